"""Under FullDepth, d3rt gives Hugging Face's greedy tokens, one by one, in float32."""

import pytest
import stories260k
import tiny_models
import torch

import d3rt

BACKENDS = ("reference", "cpu")
RAGGED = (9, 1, 17, 4)


def ask(model, inputs, **options):
    """Hugging Face's own greedy answer."""
    return model.generate(**inputs, do_sample=False, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_one_prompt_gives_hugging_faces_tokens(name, backend):
    inputs = tiny_models.left_padded([tiny_models.prompt(11)])
    expected = ask(tiny_models.make(name), inputs, max_new_tokens=40, eos_token_id=None)
    fast = tiny_models.runtime(name, backend=backend)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=40, eos_token_id=None), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_a_left_padded_ragged_batch_gives_hugging_faces_tokens(name, backend):
    inputs = tiny_models.left_padded(tiny_models.ragged(RAGGED))
    expected = ask(tiny_models.make(name), inputs, max_new_tokens=24, eos_token_id=None)
    fast = tiny_models.runtime(name, backend=backend)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=24, eos_token_id=None), expected)


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "qwen3-window"])
def test_a_window_changes_what_the_windowed_models_say(name):
    inputs = tiny_models.left_padded([tiny_models.prompt(11)])
    wide = tiny_models.fresh(name)
    wide.config.sliding_window = wide.config.max_position_embeddings
    answers = [
        ask(model, inputs, max_new_tokens=24, eos_token_id=None) for model in (wide, tiny_models.make(name))
    ]
    assert not torch.equal(*answers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_stop_at_their_own_eos_as_in_hugging_face(backend):
    model, inputs = tiny_models.make("llama"), tiny_models.left_padded(tiny_models.ragged(RAGGED))
    free = ask(model, inputs, max_new_tokens=20, eos_token_id=None)[:, inputs["input_ids"].shape[1] :]
    # Tokens that rows 0 and 2 say midway, so that they end early and at different steps, and others go on.
    eos = [int(free[0, 5]), int(free[2, 11])]
    expected = ask(model, inputs, max_new_tokens=20, eos_token_id=eos)
    new = expected[:, inputs["input_ids"].shape[1] :]
    assert (new == tiny_models.PAD).any(), "no row ended early: choose another seed"
    fast = tiny_models.runtime("llama", backend=backend)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=20, eos_token_id=eos), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_ends_when_its_last_row_does(backend):
    model, inputs = tiny_models.make("llama"), tiny_models.left_padded([tiny_models.prompt(9)])
    free = ask(model, inputs, max_new_tokens=20, eos_token_id=None)
    eos = int(free[0, 9 + 6])
    expected = ask(model, inputs, max_new_tokens=20, eos_token_id=eos)
    assert expected.shape[1] < 9 + 20
    fast = tiny_models.runtime("llama", backend=backend)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=20, eos_token_id=eos), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_models_own_eos_is_the_default(backend):
    model = tiny_models.fresh("llama")
    inputs = tiny_models.left_padded([tiny_models.prompt(9)])
    model.generation_config.eos_token_id = int(ask(model, inputs, max_new_tokens=8, eos_token_id=None)[0, -1])
    expected = ask(model, inputs, max_new_tokens=30)
    assert expected.shape[1] < 9 + 30
    fast = d3rt.compile(model, backend=backend, threads=1)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=30), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stories260k_tells_hugging_faces_story(backend, threads):
    model, inputs = stories260k.load(), tiny_models.left_padded([[stories260k.BOS]])
    expected = ask(model, inputs, max_new_tokens=256)
    fast = d3rt.compile(model, backend=backend, threads=threads)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=256), expected)


# -- the embedded SmolLM2-135M ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast_demo(demo):
    return d3rt.compile(demo[0], max_seq_len=256, batch_size=4)


PROMPT_NAMES = (
    *("text-short", "text-story", "text-science", "text-news", "text-poem", "text-one-word", "text-list"),
    *("numbers-sum", "numbers-series", "numbers-pi", "numbers-table", "code-python", "code-c", "code-json"),
    *("chat-question", "chat-instruction", "french", "german", "japanese", "greek-and-emoji"),
)


def test_every_prompt_of_the_file_is_tried(demo_prompts):
    assert tuple(demo_prompts) == PROMPT_NAMES


@pytest.mark.demo_model
@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPT_NAMES)
def test_smollm2_gives_hugging_faces_tokens(name, fast_demo, demo, demo_prompts, demo_reference):
    inputs = demo[1](demo_prompts[name], return_tensors="pt")
    expected = demo_reference[name]
    out = fast_demo.generate(**inputs, max_new_tokens=len(expected), eos_token_id=None)
    assert out[0, inputs.input_ids.shape[1] :].tolist() == expected


@pytest.mark.demo_model
@pytest.mark.slow
def test_smollm2_gives_hugging_faces_tokens_in_a_ragged_batch(fast_demo, demo, demo_prompts, demo_reference):
    names = ("text-one-word", "numbers-table", "chat-question", "japanese")
    inputs = demo[1]([demo_prompts[name] for name in names], return_tensors="pt", padding=True)
    expected = [demo_reference[name] for name in names]
    out = fast_demo.generate(**inputs, max_new_tokens=len(expected[0]), eos_token_id=None)
    assert out[:, inputs.input_ids.shape[1] :].tolist() == expected


@pytest.mark.demo_model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat-question", "numbers-sum"])
def test_smollm2_gives_hugging_faces_tokens_on_the_reference_backend(
    name, demo, demo_prompts, demo_reference
):
    fast = d3rt.compile(demo[0], backend="reference", max_seq_len=256)
    inputs = demo[1](demo_prompts[name], return_tensors="pt")
    out = fast.generate(**inputs, max_new_tokens=24, eos_token_id=None)
    assert out[0, inputs.input_ids.shape[1] :].tolist() == demo_reference[name][:24]


@pytest.mark.demo_model
@pytest.mark.slow
def test_smollm2_stops_at_eos_where_hugging_face_does(fast_demo, demo, demo_prompts):
    names = ("chat-instruction", "text-short", "code-python")
    inputs = demo[1]([demo_prompts[name] for name in names], return_tensors="pt", padding=True)
    expected = demo[0].generate(**inputs, max_new_tokens=48, do_sample=False)
    new = expected[:, inputs.input_ids.shape[1] :]
    assert (new == demo[0].generation_config.eos_token_id).any(), "no row said EOS: choose other prompts"
    assert torch.equal(fast_demo.generate(**inputs, max_new_tokens=48), expected)
