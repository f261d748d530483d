"""last_run and stats say what happened: depths, layers, bytes read and times, against hand computation."""

import pytest
import stories260k
import tiny_models
import torch
from api_models import BACKENDS, batch, compiled, ids, shared_model

import d3rt

# The story model, by its own config: D, F, heads times head length, the same for keys and values, vocabulary.
WIDTH, INNER, QUERY, KEY, VOCAB, LAYERS = 64, 172, 64, 32, 512, 5


def weight_bytes(kept, size=4, filled=0):
    """Of a step that runs `kept` layers and fills K,V of `filled` others; matrices of `size` bytes a value, norms of
    four."""
    head = VOCAB * WIDTH * size + WIDTH * 4
    kv = 2 * KEY * WIDTH * size + WIDTH * 4
    layer = kv + 2 * QUERY * WIDTH * size + 3 * INNER * WIDTH * size + WIDTH * 4
    return head + kept * layer + filled * kv


def kv_bytes(kept, positions, size=4):
    return kept * 2 * KEY * size * positions


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def run(fast, **kwargs):
    fast.generate(**(dict(input_ids=ids(), max_new_tokens=6, eos_token_id=None) | kwargs))
    return fast.last_run


def test_full_depth_runs_every_layer_at_every_step(backend):
    stats = run(compiled(backend))
    assert stats.num_layers == LAYERS and stats.batch == 1 and stats.prompt_tokens == (12,)
    assert stats.steps == 6
    assert stats.depths == (5.0,) * 6 and stats.layers == ("0-4",) * 6
    assert stats.layers_skipped == 0 and stats.byte_share == 1.0 and stats.mean_depth == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_bytes_are_those_of_the_parameters(backend, dtype):
    stats = run(compiled(backend, dtype=dtype))
    size = dtype.itemsize
    assert stats.weight_bytes == (weight_bytes(0, size), *(weight_bytes(5, size),) * 5)
    assert stats.full_weight_bytes == weight_bytes(5, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_those_of_the_positions_read(backend, dtype):
    stats = run(compiled(backend, dtype=dtype))
    # step i reads the prompt, the tokens before it, and its own
    assert stats.kv_bytes == (0, *(kv_bytes(5, 12 + step, dtype.itemsize) for step in range(1, 6)))


def test_kv_bytes_of_a_ragged_batch_add_up(backend):
    stats = run(compiled(backend), **batch())
    lengths = batch()["attention_mask"].sum(1).tolist()
    assert stats.prompt_tokens == tuple(lengths)
    expected = [sum(kv_bytes(5, length + step) for length in lengths) for step in range(1, 6)]
    assert stats.kv_bytes == (0, *expected)
    assert stats.weight_bytes[1:] == (weight_bytes(5),) * 5  # read once for all rows


def test_a_sliding_window_bounds_the_kv_bytes():
    fast = d3rt.compile(tiny_models.make("mistral-window"), threads=1)  # window 6, 2 heads of 10
    fast.generate(torch.tensor([tiny_models.prompt(4)]), max_new_tokens=6, eos_token_id=None)
    line = 4 * 2 * 2 * 10 * 4  # layers, K and V, heads, values, bytes
    assert fast.last_run.kv_bytes == (0, *(line * positions for positions in (5, 6, 6, 6, 6)))


def test_skipped_layers_show_in_depths_layers_and_bytes(backend):
    stats = run(compiled(backend, policy="static:layers=0-1+4"))
    assert stats.depths[1:] == (3.0,) * 5 and stats.layers[1:] == ("0-1,4",) * 5
    assert stats.layers_skipped == sum(5 - depth for depth in stats.depths)
    assert stats.weight_bytes[1:] == (weight_bytes(3),) * 5
    assert stats.kv_bytes[1:] == tuple(kv_bytes(3, 12 + step) for step in range(1, 6))
    assert stats.byte_share == pytest.approx(weight_bytes(3) / weight_bytes(5))


def test_a_decaying_policy_shows_step_by_step(backend):
    policy = d3rt.D3(alpha=0.9, start=0.4)
    stats = run(compiled(backend, policy=policy), max_new_tokens=15)
    schedule = policy.schedule(LAYERS, 15)
    assert stats.depths == tuple(plan.layer_set.depth for plan in schedule.plans("auto"))
    assert stats.depths[0] == 5 > stats.depths[-1]
    assert stats.mean_depth == pytest.approx(sum(stats.depths) / 15)
    assert 0 < stats.byte_share < 1
    text = [str(plan.layer_set) for plan in schedule.plans("auto")]
    assert stats.layers == tuple(text)


def test_filled_layers_count_their_key_and_value_weights(backend):
    stats = run(compiled(backend, policy="static:layers=0-1+4", kv_fill="eager"))
    assert stats.weight_bytes[1:] == (weight_bytes(3, filled=2),) * 5
    assert stats.depths[1:] == (3.0,) * 5


def test_times_are_taken(backend):
    stats = run(compiled(backend), max_new_tokens=10)
    assert stats.prefill_seconds > 0
    assert len(stats.step_seconds) == 10 and all(seconds > 0 for seconds in stats.step_seconds)
    assert stats.decode_seconds == pytest.approx(sum(stats.step_seconds))
    assert stats.tokens_per_second == pytest.approx(9 / sum(stats.step_seconds[1:]))


def test_the_slower_path_takes_the_same_notes(backend):
    fast = compiled(backend)
    plain = run(fast)
    slow = run(fast, logits_processor=[lambda input_ids, scores: scores])
    for name in (
        "depths",
        "layers",
        "weight_bytes",
        "kv_bytes",
        "prompt_tokens",
        "full_weight_bytes",
        "batch",
    ):
        assert getattr(slow, name) == getattr(plain, name)
    assert len(slow.step_seconds) == 6 and all(seconds > 0 for seconds in slow.step_seconds)


def test_one_token_needs_no_decode_step(backend):
    stats = run(compiled(backend), max_new_tokens=1)
    assert stats.steps == 1 and stats.weight_bytes == (weight_bytes(0),) and stats.kv_bytes == (0,)
    assert stats.byte_share == 1.0 and stats.tokens_per_second == 0.0


def test_an_early_end_leaves_only_the_steps_that_ran(backend):
    fast = compiled(backend, policy=d3rt.D3(alpha=0.9, start=0.4))
    end = fast.generate(ids(), max_new_tokens=50, eos_token_id=None)[0, 30].item()
    answer = fast.generate(ids(), max_new_tokens=50, eos_token_id=end)
    assert fast.last_run.steps == answer.shape[1] - 12 < 20


def test_stats_print_in_one_line(backend):
    text = str(run(compiled(backend, policy="static:layers=0-1+4")))
    assert "6 tokens" in text and "of 5" in text and "prefill" in text and "tokens/s" in text
    assert "\n" not in text


def test_there_is_no_last_run_before_the_first():
    assert compiled().last_run is None


def test_each_run_has_notes_of_its_own(backend):
    fast = compiled(backend)
    first = run(fast, max_new_tokens=3)
    second = run(fast, max_new_tokens=4)
    assert (first.steps, second.steps) == (3, 4)


def test_programs_count_their_replays(backend):
    fast = compiled(backend, policy="static:layers=0-1+4")
    run(fast)
    run(fast)
    (program,) = fast.programs()
    assert program.rows == 1 and program.replays == 10 and program.depth == 3
    assert program.weight_bytes == weight_bytes(3)


def test_a_stream_that_is_closed_notes_the_steps_that_ran():
    fast = compiled("reference")  # it runs a step when a token is asked for, so that the count is exact
    stream = fast.stream(ids(), max_new_tokens=50)
    for _ in range(4):
        next(stream)
    stream.close()
    assert fast.last_run.steps == 4 == len(fast.last_run.depths) == len(fast.last_run.step_seconds)


def test_the_model_is_what_the_hand_computation_says():
    config = stories260k.load().config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (WIDTH, INNER, LAYERS)
    assert config.num_key_value_heads * config.head_dim == KEY and config.vocab_size == VOCAB
    parameters = sum(p.numel() for p in shared_model().parameters())
    assert weight_bytes(5) == 4 * parameters  # tied: the head is the embedding, and everything is read once
