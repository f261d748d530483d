"""What generate, stream and compile refuse: each names the culprit, the rule and the way out, before any work."""

import re

import pytest
import torch
from api_models import batch, compiled, ids, shared_model
from transformers import GenerationConfig

import d3rt
from d3rt import (
    BackendUnavailableError,
    D3rtError,
    PolicyError,
    UnsupportedModelError,
    UnsupportedOptionError,
)


@pytest.fixture(scope="module")
def fast():
    """A runtime that has generated once, so that there is something to disturb."""
    runtime = compiled()
    runtime.generate(ids(), max_new_tokens=3)
    return runtime


def refusal(fast, error, *args, call=None, **kwargs):
    """The message of that error, after checking that the call touched neither cache nor last_run."""
    before = fast.last_run, fast.engine.cache.filled.clone(), fast.engine.cache.k.clone(), fast.programs()
    with pytest.raises(error) as caught:
        (call or fast.generate)(*args, **kwargs)
    assert fast.last_run is before[0]
    assert torch.equal(fast.engine.cache.filled, before[1])
    # bit for bit: memory that nobody has written yet may hold NaN
    assert torch.equal(fast.engine.cache.k.view(torch.int32), before[2].view(torch.int32))
    assert fast.programs() == before[3]
    assert type(caught.value) is error
    return str(caught.value)


# --- not supported


UNSUPPORTED = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "constraints": [object()],
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "token_healing": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "assistant_model": object(),
    "assistant_tokenizer": object(),
    "custom_generate": "some/where",
    "inputs_embeds": torch.zeros(1, 3, 64),
    "past_key_values": object(),
    "position_ids": torch.zeros(1, 3),
    "cache_position": torch.zeros(3),
    "negative_prompt_ids": torch.zeros(1, 3),
    "negative_prompt_attention_mask": torch.zeros(1, 3),
    "synced_gpus": True,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_option_is_refused_by_name(fast, name):
    message = refusal(fast, UnsupportedOptionError, ids(), **{name: UNSUPPORTED[name]})
    assert message.startswith(name) and "is not supported" in message
    assert "model.generate" in message or "pass input_ids" in message


def test_an_unsupported_option_is_refused_by_stream_too(fast):
    message = refusal(fast, UnsupportedOptionError, [5, 6], call=fast.stream, num_beams=3)
    assert message.startswith("num_beams=3")


def test_an_unsupported_option_is_refused_wherever_it_is_said(fast):
    config = GenerationConfig(num_beams=4)
    assert refusal(fast, UnsupportedOptionError, ids(), config).startswith("num_beams=4")
    model = fast.generation_config
    model.num_beams = 5
    try:
        assert refusal(fast, UnsupportedOptionError, ids()).startswith("num_beams=5")
        fast.generate(ids(), num_beams=1, max_new_tokens=3)
    finally:
        model.num_beams = None


def test_none_is_no_option(fast):
    fast.generate(ids(), max_new_tokens=2, **dict.fromkeys(UNSUPPORTED))


def test_an_unknown_entry_of_a_generation_config_is_refused_by_name(fast):
    message = refusal(fast, UnsupportedOptionError, ids(), GenerationConfig(tempeature=0.5))
    assert "tempeature" in message


@pytest.mark.parametrize("name", ["temprature", "max_tokens", "labels", "token_type_ids", "depth"])
def test_an_unknown_keyword_is_a_type_error_with_its_name(fast, name):
    assert repr(name) in refusal(fast, TypeError, ids(), **{name: 1})
    assert repr(name) in refusal(fast, TypeError, [5, 6], call=fast.stream, **{name: 1})


def test_an_unknown_keyword_is_a_type_error_even_as_none(fast):
    assert "'temprature'" in refusal(fast, TypeError, ids(), temprature=None)


def test_the_errors_are_builtin_kinds_too():
    assert issubclass(UnsupportedOptionError, (D3rtError, ValueError))
    assert issubclass(PolicyError, (D3rtError, ValueError))
    assert issubclass(BackendUnavailableError, (D3rtError, RuntimeError))


# --- bad values


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0: it must be a whole number of at least 1"),
        (dict(max_new_tokens=-3), "max_new_tokens=-3"),
        (dict(max_new_tokens=2.5), "max_new_tokens=2.5"),
        (dict(max_new_tokens=True), "max_new_tokens=True"),
        (dict(max_new_tokens="9"), "max_new_tokens='9'"),
        (dict(max_length="9"), "max_length='9'"),
        (dict(max_length=5), "max_length=5 leaves no room after a prompt of 12 tokens; raise it"),
        (dict(max_new_tokens=600), "600 new ones exceed max_seq_len=512; lower max_new_tokens, or compile"),
        (
            dict(do_sample=True, temperature=0.0),
            "temperature=0.0: it must be above 0 (or set do_sample=False)",
        ),
        (dict(do_sample=True, temperature=-1.0), "temperature=-1.0"),
        (dict(do_sample=True, temperature=float("nan")), "temperature=nan"),
        (dict(do_sample=True, temperature="hot"), "temperature='hot'"),
        (dict(do_sample=True, top_k=-1), "top_k=-1: it must be a whole number of at least 0"),
        (dict(do_sample=True, top_k=2.5), "top_k=2.5"),
        (dict(do_sample=True, top_p=1.5), "top_p=1.5: it must be in 0..1"),
        (dict(do_sample=True, top_p=-0.1), "top_p=-0.1"),
        (dict(do_sample=True, min_p=2), "min_p=2: it must be in 0..1"),
        (dict(repetition_penalty=0), "repetition_penalty=0: it must be above 0"),
        (dict(repetition_penalty=-1.5), "repetition_penalty=-1.5"),
        (dict(repetition_penalty="x"), "repetition_penalty='x'"),
        (
            dict(num_return_sequences=2),
            "num_return_sequences=2: greedy decoding gives one sequence; set do_sample",
        ),
        (dict(num_return_sequences=-1), "num_return_sequences=-1"),
        (
            dict(num_return_sequences=5, do_sample=True),
            "a batch of 5 rows: this runtime was compiled for 4; compile(",
        ),
        (dict(eos_token_id=512), "eos_token_id=512: the model's vocabulary has 512 tokens"),
        (dict(eos_token_id=[2, 999]), "eos_token_id=999"),
        (dict(eos_token_id="end"), "eos_token_id='end': it must be a token id, or a list of them"),
        (dict(eos_token_id=[2, 3.5]), "eos_token_id=[2, 3.5]"),
        (dict(pad_token_id="pad"), "pad_token_id='pad': it must be a token id"),
        (
            dict(stop_strings="."),
            "stop_strings needs the tokenizer: generate(..., stop_strings=..., tokenizer=",
        ),
        (dict(max_time="soon"), "max_time='soon': it must be a number of seconds"),
        (dict(max_time=-1), "max_time=-1"),
        (dict(do_sample=True, seed=-1), "seed=-1: it must be a whole number in 0..2**64 - 1"),
        (dict(do_sample=True, seed=2**64), f"seed={2**64}"),
        (dict(do_sample=True, seed=1.5), "seed=1.5"),
        (dict(seed="x"), "seed='x'"),
        (dict(do_sample=True, seed=1, generator=torch.Generator()), "seed and generator were both given"),
        (dict(inputs=ids(), input_ids=ids()), "both `inputs` and `input_ids`: pass the prompt once"),
    ],
    ids=str,
)
def test_a_bad_value_is_a_value_error_that_says_the_rule(fast, options, says):
    call = options if "inputs" in options else dict(input_ids=ids(), **options)
    assert says in refusal(fast, ValueError, **call)


@pytest.mark.parametrize("pad", [-1, 512])
def test_a_pad_token_that_a_batch_could_not_embed_is_refused(fast, pad):
    message = refusal(fast, ValueError, **batch(), pad_token_id=pad)
    assert f"pad_token_id={pad}" in message and "0..511" in message and "eos_token_id" in message


def test_a_generator_or_generation_config_of_another_type_is_a_type_error(fast):
    assert "torch.Generator" in refusal(fast, TypeError, ids(), do_sample=True, generator=5)
    assert "GenerationConfig" in refusal(fast, TypeError, ids(), {"max_new_tokens": 3})


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (torch.tensor([1, 2, 3]), "of shape (3,): it must be integer token ids [batch, length]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "of shape (1, 2, 3)"),
        (torch.tensor([[1.0, 2.0]]), "torch.float32"),
        (torch.tensor([[True, False]]), "torch.bool"),
        (
            torch.zeros(1, 0, dtype=torch.int64),
            "has shape (1, 0): it must hold at least one token in each row",
        ),
        (torch.zeros(0, 3, dtype=torch.int64), "has shape (0, 3)"),
        (torch.tensor([[5, 512]]), "holds 512: token ids must be in 0..511"),
        (torch.tensor([[-1, 5]]), "holds -1"),
        (torch.full((1, 512), 5), "exceed max_seq_len=512"),
        (torch.full((5, 3), 5), "a batch of 5 rows"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{tuple(value.shape)} {value.dtype}",
)
def test_a_bad_prompt_is_a_value_error_that_says_the_rule(fast, prompt, says):
    assert says in refusal(fast, ValueError, prompt)


def test_right_padding_is_refused(fast):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    message = refusal(fast, ValueError, torch.full((2, 3), 5), attention_mask=mask)
    assert (
        "attention_mask of row 1 has padding after a token" in message and "padding_side = 'left'" in message
    )


def test_a_mask_with_a_hole_or_of_padding_only_is_refused(fast):
    hole = torch.tensor([[1, 0, 1]])
    assert "row 0 has padding after" in refusal(fast, ValueError, torch.full((1, 3), 5), attention_mask=hole)
    empty = torch.tensor([[1, 1], [0, 0]])
    assert "row 1 is all padding" in refusal(fast, ValueError, torch.full((2, 2), 5), attention_mask=empty)


def test_a_mask_of_another_shape_is_refused(fast):
    message = refusal(fast, ValueError, ids(), attention_mask=torch.ones(1, 3))
    assert "(1, 3)" in message and "(1, 12)" in message and "the same" in message


def test_no_prompt_and_no_bos_is_refused(fast):
    bos, fast.generation_config.bos_token_id = fast.generation_config.bos_token_id, None
    try:
        assert "no bos_token_id" in refusal(fast, ValueError)
    finally:
        fast.generation_config.bos_token_id = bos


def test_stream_refuses_bad_values_when_it_is_called_not_when_it_is_read(fast):
    call = fast.stream
    assert "max_new_tokens=0" in refusal(fast, ValueError, [5], call=call, max_new_tokens=0)
    assert "one prompt, not 2" in refusal(fast, ValueError, torch.full((2, 3), 5), call=call)
    sequences = dict(do_sample=True, num_return_sequences=2)
    assert "one prompt, not 2" in refusal(fast, ValueError, [5], call=call, **sequences)
    assert "no tokenizer" in refusal(fast, ValueError, "Once", call=call)
    assert "no tokenizer" in refusal(fast, ValueError, [{"role": "user", "content": "x"}], call=call)
    assert "streamer" in refusal(fast, UnsupportedOptionError, [5], call=call, streamer=object())


def test_warmup_refuses_more_rows_than_there_are(fast):
    assert "rows=5: it must be in 1..4" in refusal(fast, ValueError, call=fast.warmup, rows=5)


# --- compile


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(backend="cuda"), BackendUnavailableError, "backend 'cuda'.*cpu, reference"),
        (dict(backend="tpu"), BackendUnavailableError, "backend 'tpu': unknown; choose one of auto, cpu"),
        (dict(backend=None), BackendUnavailableError, "backend None"),
        (dict(dtype="float64"), UnsupportedOptionError, "dtype='float64': choose one of float32"),
        (dict(dtype=torch.int8), UnsupportedOptionError, "dtype=torch.int8: choose one of float32"),
        (dict(dtype="int8"), UnsupportedOptionError, "dtype='int8': choose one of float32.*weights='int8'"),
        (dict(dtype="small"), UnsupportedOptionError, "dtype='small'"),
        (dict(dtype=5), UnsupportedOptionError, "dtype=5"),
        (dict(weights="int3"), UnsupportedOptionError, "weights='int3': choose one of .*int8, int4"),
        (dict(lm_head="q6"), UnsupportedOptionError, "lm_head='q6'"),
        (
            dict(kv_cache_dtype="int4"),
            UnsupportedOptionError,
            "kv_cache_dtype='int4': choose one of float32.*fp16, int8\\.$",
        ),
        (dict(batch_size=0), ValueError, "batch_size=0: it must be a whole number of at least 1"),
        (dict(batch_size=17), ValueError, "batch_size=17: at most 16 rows decode together; split the batch"),
        (dict(batch_size=True), ValueError, "batch_size=True"),
        (dict(batch_size=2.0), ValueError, "batch_size=2.0"),
        (dict(threads=0), ValueError, "threads=0"),
        (dict(threads=-1), ValueError, "threads=-1"),
        (dict(threads="2"), ValueError, "threads='2'"),
        (dict(max_seq_len=0), ValueError, "max_seq_len=0"),
        (
            dict(max_seq_len=513),
            ValueError,
            "max_seq_len=513: the model has positions for 512 tokens at most",
        ),
        (dict(kv_fill="lazy"), UnsupportedOptionError, "kv_fill='lazy': choose one of auto, eager"),
        (dict(policy="fastest"), PolicyError, "fastest"),
        (dict(policy="d3:alpha=x"), PolicyError, "alpha"),
        (dict(policy="static:layers=0-9"), PolicyError, "9"),
        (dict(policy=0.5), TypeError, "policy=0.5: it must be a d3rt.Policy or its text"),
        (dict(policy=d3rt.D3), TypeError, "it must be a d3rt.Policy or its text"),
    ],
    ids=str,
)
def test_compile_refuses_a_bad_option_and_names_it(options, error, says):
    with pytest.raises(error) as caught:
        d3rt.compile(shared_model(), **options)
    assert type(caught.value) is error
    assert re.search(says, str(caught.value)), str(caught.value)


def test_compile_refuses_a_module_that_is_no_causal_lm():
    with pytest.raises(UnsupportedModelError, match="model_type None is not supported; supported are llama"):
        d3rt.compile(torch.nn.Linear(2, 2))


def test_compile_refuses_what_is_neither_a_model_nor_a_path():
    with pytest.raises(TypeError):
        d3rt.compile(5)
