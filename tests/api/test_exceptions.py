"""What goes wrong midway is raised as it is, and leaves the runtime usable and correct."""

import pytest
import stories260k
import torch
from api_models import BACKENDS, batch, compiled, ids, shared_model

import d3rt
from d3rt.errors import NotFiniteError


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def assert_correct(fast):
    """Both paths, one row and several, give Hugging Face's tokens."""
    for call in (dict(input_ids=ids()), dict(batch()), dict(batch(), no_repeat_ngram_size=2)):
        expected = shared_model().generate(**call, max_new_tokens=10)
        assert torch.equal(fast.generate(**call, max_new_tokens=10), expected)


def raising_at(step):
    """A logits processor that fails at that step."""
    steps = []

    def processor(input_ids, scores):
        steps.append(len(steps))
        if steps[-1] == step:
            raise RuntimeError(f"processor failed at step {step}")
        return scores

    return processor


@pytest.mark.parametrize("step", [0, 3])
def test_a_logits_processor_that_raises_is_survived(backend, step):
    fast = compiled(backend)
    with pytest.raises(RuntimeError, match=f"processor failed at step {step}"):
        fast.generate(**batch(), logits_processor=[raising_at(step)], max_new_tokens=20)
    assert_correct(fast)


def test_last_run_tells_the_steps_before_the_exception(backend):
    fast = compiled(backend, policy=d3rt.D3(alpha=0.9, start=0.4))
    with pytest.raises(RuntimeError):
        fast.generate(**batch(), logits_processor=[raising_at(3)], max_new_tokens=20)
    stats = fast.last_run
    assert stats.steps == len(stats.depths) == len(stats.step_seconds) == 3 and stats.batch == 3
    assert stats.depths == fast.policy.schedule(5, 20).depths[:3]


def test_a_criterion_that_raises_is_survived(backend):
    def broken(input_ids, scores, **kwargs):
        raise KeyError("criterion failed")

    fast = compiled(backend)
    with pytest.raises(KeyError, match="criterion failed"):
        fast.generate(ids(), stopping_criteria=[broken])
    assert_correct(fast)


@pytest.fixture
def poisoned(backend):
    """A runtime whose weights hold a NaN, and the function that takes it out again."""
    model = stories260k.load()
    weight = model.model.layers[-1].mlp.down_proj.weight.data
    good = weight[3, 4].item()
    fast = compiled(backend, model=model)
    weight[3, 4] = torch.nan
    return fast, lambda: weight[3, 4].fill_(good)


@pytest.mark.parametrize(
    "options",
    [{}, dict(do_sample=True, seed=1), dict(repetition_penalty=1.3)],
    ids=["greedy", "sampling", "penalty"],
)
def test_nan_logits_raise_not_finite_error_on_the_fast_path(poisoned, options):
    fast, cure = poisoned
    with pytest.raises(NotFiniteError, match="slot 0 at step 0 hold NaN or no finite value"):
        fast.generate(ids(), **options)
    cure()
    assert_correct(fast)


@pytest.mark.parametrize("options", [{}, dict(do_sample=True, seed=1)], ids=["greedy", "sampling"])
def test_nan_logits_raise_not_finite_error_on_the_slower_path(poisoned, options):
    fast, cure = poisoned
    with pytest.raises(NotFiniteError, match="slot 0 at step 0 hold NaN or no finite value"):
        fast.generate(ids(), logits_processor=[lambda input_ids, scores: scores], **options)
    cure()
    assert_correct(fast)


def test_nan_logits_raise_not_finite_error_in_a_stream(poisoned):
    fast, cure = poisoned
    with pytest.raises(NotFiniteError):
        next(fast.stream(ids()))
    cure()
    assert_correct(fast)


def test_remove_invalid_values_takes_nan_logits_away(poisoned):
    fast, _ = poisoned
    assert fast.generate(ids(), remove_invalid_values=True, max_new_tokens=4).shape == (1, 16)


def test_logits_that_become_nan_midway_end_the_run_there(backend):
    model = stories260k.load()
    fast = compiled(backend, model=model)
    weight = model.model.layers[2].mlp.up_proj.weight.data
    good = weight[0, 0].item()

    def poison_after_two(input_ids, scores):
        weight[0, 0] = torch.nan if input_ids.shape[1] == 14 else good
        return scores

    with pytest.raises(NotFiniteError, match="at step 3"):
        fast.generate(ids(), logits_processor=[poison_after_two], max_new_tokens=9)
    assert fast.last_run.steps == 3
    weight[0, 0] = good
    assert_correct(fast)


def test_processors_that_leave_no_token_raise_not_finite_error(backend):
    fast = compiled(backend)
    nothing = [lambda input_ids, scores: torch.full_like(scores, -torch.inf)]
    for options in ({}, dict(do_sample=True, seed=1)):
        with pytest.raises(NotFiniteError, match="logits processors leave no token"):
            fast.generate(ids(), logits_processor=nothing, **options)
    assert_correct(fast)


def test_rows_that_are_finished_may_have_no_token_left(backend):
    fast = compiled(backend)

    def nothing_after_a_dot(input_ids, scores):
        ended = (input_ids[:, 14:] == 426).any(1)
        return scores.masked_fill(ended[:, None], -torch.inf)

    call = dict(batch(), eos_token_id=426, pad_token_id=9, max_new_tokens=20)
    expected = fast.generate(**call)
    assert (expected == 9).any()
    for options in ({}, dict(do_sample=True, top_k=1, seed=1)):
        assert torch.equal(fast.generate(**call, **options, logits_processor=[nothing_after_a_dot]), expected)


def test_a_generation_inside_a_callback_is_refused_and_survived(backend):
    fast = compiled(backend)

    def nested(input_ids, scores):
        fast.generate(ids())
        return scores

    with pytest.raises(d3rt.D3rtError, match="still open in this thread"):
        fast.generate(ids(), logits_processor=[nested])
    assert_correct(fast)
