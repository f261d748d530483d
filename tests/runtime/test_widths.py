"""Weight widths end to end: what compile(weights=..., lm_head=..., kv_cache_dtype=...) makes, and that the cpu backend
generates with packed weights what the reference does."""

import pytest
import stories260k
import tiny_models
import torch

import d3rt
from d3rt.kernels.packing import PackedMatrix
from d3rt.models.loading import open_model


@pytest.fixture(scope="module")
def model():
    config = tiny_models.fresh("llama").config
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 64, 96, 4
    config.num_key_value_heads, config.head_dim = 2, 16
    torch.manual_seed(3)
    made = type(tiny_models.fresh("llama"))(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 1.0)
    return made


PROMPT = torch.tensor([[5, 9, 77, 3, 20]])


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    "policy", [None, d3rt.LayerSchedule(((0, 1), (0,)), cycle=True)], ids=["full", "alternating"]
)
def test_packed_weights_generate_what_the_reference_generates(model, weights, policy):
    options = dict(policy=policy, weights=weights, kv_cache_dtype="fp32")
    call = dict(max_new_tokens=24, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    native = d3rt.compile(model, backend="cpu", **options).generate(PROMPT, **call)
    plain = d3rt.compile(model, backend="reference", **options).generate(PROMPT, **call)
    # An activation on the edge of two codes may fall either way, 1/127 of its group's largest; that may decide between
    # two tokens that stand as close, and from there on the texts differ.
    assert torch.equal(native.sequences[:, :12], plain.sequences[:, :12])
    for a, b, ours, theirs in zip(native.logits, plain.logits, *new_tokens(native, plain), strict=True):
        # One code of one activation moved by one, anywhere, moves a logit by 0.05 in the median and 0.21 at most
        # (60 random ones at each width and policy).
        allowed = 0.25 * b.std()
        assert (a - b).abs().max() <= allowed
        if ours != theirs:
            best = b[0].topk(2).values
            assert best[0] - best[1] <= 2 * allowed
            break


def new_tokens(*outputs):
    return [output.sequences[0, PROMPT.shape[1] :].tolist() for output in outputs]


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.35), ("int4", 0.30)])
def test_fewer_bytes_are_read(model, weights, share):
    full = d3rt.compile(model).generate(PROMPT, max_new_tokens=3, return_dict_in_generate=True).stats
    less = (
        d3rt.compile(model, weights=weights)
        .generate(PROMPT, max_new_tokens=3, return_dict_in_generate=True)
        .stats
    )
    assert less.full_weight_bytes < share * full.full_weight_bytes


def test_each_part_has_a_width_of_its_own(model):
    fast = d3rt.compile(model, weights="int4", lm_head="bf16", kv_cache_dtype="fp16")
    weights = fast.engine.decoder.weights
    assert weights.layers[0].wq.format == "int4" and weights.lm_head.dtype == torch.bfloat16
    assert fast.engine.cache.k.dtype == torch.float16
    assert "int4 (lm_head bfloat16, K,V float16)" in repr(fast)


def test_four_bits_keep_the_head_at_eight_and_the_cache_at_sixteen(model):
    fast = d3rt.compile(model, weights="int4")
    assert (
        fast.engine.decoder.weights.lm_head.format == "int8" and fast.engine.cache.k.dtype == torch.bfloat16
    )


def test_the_cache_alone_may_be_int8(model):
    fast = d3rt.compile(model, kv_cache_dtype="int8")
    assert fast.engine.decoder.weights.layers[0].wq.dtype == torch.float32
    assert fast.engine.cache.k.dtype == fast.dtype == torch.int8 and fast.engine.cache.k.shape[-1] == 16 + 4
    assert "float32 (lm_head float32, K,V int8)" in repr(fast)


def test_float16_is_shared_with_the_model_and_close_to_it(model):
    import copy

    half = copy.deepcopy(model).half()
    fast = d3rt.compile(half)
    assert (
        fast.engine.decoder.weights.layers[0].wq.data_ptr()
        == half.model.layers[0].self_attn.q_proj.weight.data_ptr()
    )
    call = dict(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    wide = d3rt.compile(model).generate(PROMPT, **call).logits[0]
    # float16 keeps 11 bits; through a few layers some units of 2^-11 of the logits' size add up.
    assert (fast.generate(PROMPT, **call).logits[0] - wide).abs().max() <= 2**-5 * wide.abs().max()


def test_wrong_widths_are_named_with_the_choices(model):
    with pytest.raises(d3rt.UnsupportedOptionError, match="weights='int3': choose one of float32.*int4"):
        d3rt.compile(model, weights="int3")
    with pytest.raises(d3rt.UnsupportedOptionError, match="dtype='int8'.*weights='int8'"):
        d3rt.compile(model, dtype="int8")
    with pytest.raises(
        d3rt.UnsupportedOptionError, match="kv_cache_dtype='int4': choose one of float32.*int8"
    ):
        d3rt.compile(model, kv_cache_dtype="int4")


def test_columns_that_do_not_divide_are_refused_with_the_matrix_name():
    with pytest.raises(d3rt.UnsupportedModelError, match="down_proj.*172 columns.*multiple of 32.*bf16"):
        d3rt.compile(stories260k.load(torch.float32), weights="int8")


@pytest.mark.demo_model
def test_gguf_blocks_are_taken_as_they_are(demo):
    model = demo[0]
    source, _ = open_model(None, None)
    seen = set()
    for name, dense in model.state_dict().items():
        for width in ("int8", "int4"):
            taken = source.take(name, width) if name != "lm_head.weight" else None  # tied
            if isinstance(taken, PackedMatrix):
                assert taken.format == width and torch.equal(taken.dequantize(), dense), name
                seen.add(width)
    assert seen == {"int8", "int4"}


@pytest.mark.demo_model
def test_the_embedded_model_speaks_at_every_width(demo):
    model, tokenizer = demo
    ids = tokenizer("The capital of France is", return_tensors="pt")
    from_file = d3rt.compile(None, weights="int4")
    for fast in (d3rt.compile(model, weights="fp16"), d3rt.compile(model, weights="int8"), from_file):
        assert "Paris" in tokenizer.decode(fast.generate(**ids, max_new_tokens=8)[0]), repr(fast)
    assert from_file.engine.decoder.weights.layers[0].wq.minima is not None, "the file's Q4_1 blocks"
    again = d3rt.compile(model, weights="int4").engine.decoder.weights.layers[0].wq
    assert torch.equal(again.dequantize(), from_file.engine.decoder.weights.layers[0].wq.dequantize())
    assert isinstance(from_file.engine.decoder.weights.lm_head, PackedMatrix), "the file's Q8_0 blocks"
