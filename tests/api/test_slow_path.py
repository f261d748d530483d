"""Options that only Python objects can do: each gives model.generate's greedy tokens, and so do combinations of them.

The slower path drives the same recorded steps from Python (d3rt/generation.py says what goes there).
"""

import pytest
import torch
from api_models import BACKENDS, PROMPTS, assert_same, batch, compiled, ids, shared_model, tokenizer
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from d3rt.generation import resolve

DOT, EOS = 426, 2
HAPPY = 399  # the fifth new token that greedy decoding from PROMPT gives: an EOS that comes early


@pytest.fixture(scope="module", params=BACKENDS)
def fast(request):
    return compiled(request.param)


def greedy(count=30):
    return shared_model().generate(ids(), max_new_tokens=count)[0, ids().shape[1] :].tolist()


def allowed(_row, tokens):
    """Only tokens of the same parity as the last."""
    return list(range(int(tokens[-1]) % 2, 512, 2))


OPTIONS = {
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=2),
    "bad_words_ids": dict(bad_words_ids=[[greedy()[0]], greedy()[4:6]]),
    "min_new_tokens": dict(min_new_tokens=12, eos_token_id=HAPPY),
    "min_length": dict(min_length=24, eos_token_id=HAPPY),
    "min_new_tokens over min_length": dict(min_new_tokens=7, min_length=40, eos_token_id=[HAPPY, DOT]),
    "suppress_tokens": dict(suppress_tokens=greedy()[:3]),
    "begin_suppress_tokens": dict(begin_suppress_tokens=greedy()[:1]),
    "sequence_bias": dict(sequence_bias={(greedy()[2],): -3.0, tuple(greedy()[6:8]): -8.0, (300,): 1.5}),
    "forced_eos_token_id": dict(forced_eos_token_id=EOS),
    "several forced_eos_token_id": dict(forced_eos_token_id=[EOS, DOT]),
    "forced_eos_token_id by max_length": dict(forced_eos_token_id=EOS, max_length=25, max_new_tokens=None),
    "exponential_decay_length_penalty": dict(
        exponential_decay_length_penalty=(3, 1.6), eos_token_id=DOT, pad_token_id=EOS
    ),
    "renormalize_logits": dict(renormalize_logits=True),
    "remove_invalid_values": dict(remove_invalid_values=True),
    "prefix_allowed_tokens_fn": dict(prefix_allowed_tokens_fn=allowed),
    "repetition_penalty": dict(repetition_penalty=1.6),
    "repetition_penalty below 1": dict(repetition_penalty=0.8),
    "repetition_penalty with another processor": dict(repetition_penalty=1.6, no_repeat_ngram_size=3),
    "all at once": dict(
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        sequence_bias={(300,): 1.5},
        bad_words_ids=[[greedy()[0]]],
        min_new_tokens=3,
        suppress_tokens=[331],
        renormalize_logits=True,
    ),
}
# Those that change nothing here by design; all others must show, or the comparison would prove nothing.
INVISIBLE = ("renormalize_logits", "remove_invalid_values")


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_hugging_faces_tokens(fast, name):
    call = dict(max_new_tokens=24) | OPTIONS[name]
    answer = assert_same(fast, shared_model(), ids(), **call)
    plain = fast.generate(ids(), max_new_tokens=24, eos_token_id=call.get("eos_token_id", EOS))
    assert (answer.tolist() == plain.tolist()) == (name in INVISIBLE)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_hugging_faces_tokens_for_a_ragged_batch(fast, name):
    assert_same(fast, shared_model(), **batch(), **(dict(max_new_tokens=16) | OPTIONS[name]))


def test_forced_bos_token_id_follows_a_prompt_of_one_token(fast):
    answer = assert_same(fast, shared_model(), torch.tensor([[1]]), forced_bos_token_id=300, max_new_tokens=6)
    assert answer[0, 1] == 300
    assert_same(fast, shared_model(), ids(), forced_bos_token_id=300, max_new_tokens=6)


def test_begin_suppress_tokens_comes_after_a_forced_bos(fast):
    second = shared_model().generate(torch.tensor([[1, 300]]), max_new_tokens=1)[0, -1].item()
    call = dict(forced_bos_token_id=300, begin_suppress_tokens=[second], max_new_tokens=6)
    assert_same(fast, shared_model(), torch.tensor([[1]]), **call)


def test_repetition_penalty_alone_stays_on_the_fast_path():
    runtime = compiled()
    request = resolve(runtime.config, runtime.generation_config, **batch(), repetition_penalty=1.3)
    assert not request.stepwise


@pytest.mark.parametrize(
    "name", sorted(set(OPTIONS) - {n for n in OPTIONS if n.startswith("repetition_penalty")})
)
def test_the_other_options_take_the_slower_path(name):
    runtime = compiled()
    assert resolve(runtime.config, runtime.generation_config, ids(), **OPTIONS[name]).stepwise


# --- stopping


@pytest.mark.parametrize("stop", ["happy", ["zebra", "and want"], ["e"]])
def test_stop_strings_end_the_row_where_hugging_face_does(fast, stop):
    call = dict(stop_strings=stop, tokenizer=tokenizer(), max_new_tokens=60)
    answer = assert_same(fast, shared_model(), ids(), **call)
    assert answer.shape[1] < ids().shape[1] + 60


def test_stop_strings_end_each_row_of_a_batch_by_itself(fast):
    call = dict(stop_strings=[".", "park"], tokenizer=tokenizer(), max_new_tokens=30, pad_token_id=9)
    answer = assert_same(fast, shared_model(), **batch(), **call)
    assert (answer[:, -1] == 9).any()


def test_max_time_stops_after_the_step_that_runs(fast):
    answer = fast.generate(ids(), max_time=0.0, max_new_tokens=50)
    assert answer.shape[1] == ids().shape[1] + 1
    assert torch.equal(answer, shared_model().generate(ids(), max_new_tokens=1))


def test_max_time_that_is_not_reached_changes_nothing(fast):
    assert_same(fast, shared_model(), ids(), max_time=600, max_new_tokens=10)


class EndsRow(StoppingCriteria):
    """Ends row r once it has `lengths[r]` tokens."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


def test_a_criterion_may_end_each_row_by_itself(fast):
    width = batch()["input_ids"].shape[1]
    criteria = [EndsRow([width + 3, width + 9, width + 5])]
    answer = assert_same(
        fast, shared_model(), **batch(), stopping_criteria=criteria, max_new_tokens=20, pad_token_id=9
    )
    assert (answer[:, -4:] == 9).all(1).tolist() == [True, False, True]
    assert answer.shape[1] == width + 9


def test_rows_that_only_a_criterion_ends_are_not_padded_without_an_eos_token(fast):
    width = batch()["input_ids"].shape[1]
    criteria = StoppingCriteriaList([EndsRow([width + 2, width + 8, width + 5])])
    call = dict(stopping_criteria=criteria, max_new_tokens=20, pad_token_id=9, eos_token_id=None)
    own = dict(batch())
    expected = fast.generate(**own, max_new_tokens=8, eos_token_id=None)
    model = shared_model()
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        assert torch.equal(assert_same(fast, model, **own, **call), expected)
    finally:
        model.generation_config.eos_token_id = eos


def test_a_criterion_that_answers_with_a_bool_ends_all_rows(fast):
    criteria = [lambda input_ids, scores, **kwargs: input_ids.shape[1] >= 20]
    assert (
        assert_same(fast, shared_model(), **batch(), stopping_criteria=criteria, max_new_tokens=30).shape[1]
        == 20
    )


def test_a_criterion_sees_what_hugging_faces_sees(fast):
    def spying(log):
        def criterion(input_ids, scores, **kwargs):
            log.append((input_ids.tolist(), None if scores is None else len(scores)))
            return torch.zeros(len(input_ids), dtype=torch.bool)

        return [criterion]

    for extra in ({}, dict(output_scores=True, return_dict_in_generate=True)):
        ours, theirs = [], []
        fast.generate(**batch(), stopping_criteria=spying(ours), max_new_tokens=4, **extra)
        shared_model().generate(**batch(), stopping_criteria=spying(theirs), max_new_tokens=4, **extra)
        assert ours == theirs


def test_a_criterion_of_the_caller_takes_the_place_of_the_same_one_by_option(fast):
    eos = [EosTokenCriteria(DOT)]
    answer = assert_same(fast, shared_model(), **batch(), stopping_criteria=eos, max_new_tokens=25)
    assert (answer[:, -1] == EOS).any()  # ended rows are padded
    patient = [MaxTimeCriteria(600)]
    assert_same(fast, shared_model(), ids(), stopping_criteria=patient, max_time=0.0, max_new_tokens=5)


# --- logits processors


class Shift(LogitsProcessor):
    """Makes each row prefer a token that depends on what it holds; `in_place` on the very tensor it is given."""

    def __init__(self, in_place=False):
        self.in_place = in_place

    def __call__(self, input_ids, scores):
        scores = scores if self.in_place else scores.clone()
        scores[torch.arange(len(scores)), (input_ids[:, -1] * 7 + input_ids[:, 0]) % 512] += 4
        return scores


@pytest.mark.parametrize("in_place", [False, True])
def test_a_custom_logits_processor_works(fast, in_place):
    call = dict(logits_processor=[Shift(in_place)], max_new_tokens=20)
    answer = assert_same(fast, shared_model(), **batch(), **call)
    assert not torch.equal(answer, fast.generate(**batch(), max_new_tokens=20))


def test_custom_processors_run_after_those_by_option_and_before_the_warpers(fast):
    call = dict(
        logits_processor=LogitsProcessorList([Shift()]), repetition_penalty=1.5, no_repeat_ngram_size=2
    )
    assert_same(fast, shared_model(), **batch(), **call)


def test_a_processor_of_the_caller_takes_the_place_of_the_same_one_by_option(fast):
    call = dict(max_new_tokens=40, repetition_penalty=3.0, no_repeat_ngram_size=1)
    mild = [RepetitionPenaltyLogitsProcessor(1.1), NoRepeatNGramLogitsProcessor(4)]
    assert_same(fast, shared_model(), ids(), logits_processor=mild, **call)


def test_a_plain_function_is_a_logits_processor(fast):
    call = dict(logits_processor=[lambda input_ids, scores: scores.roll(1, dims=-1)], max_new_tokens=6)
    assert_same(fast, shared_model(), ids(), **call)


def test_a_logits_processor_sees_the_padded_rows(fast):
    seen = []

    def spy(input_ids, scores):
        seen.append((input_ids.tolist(), tuple(scores.shape), scores.dtype))
        return scores

    answer = fast.generate(**batch(), logits_processor=[spy], max_new_tokens=3)
    width = answer.shape[1] - 3
    assert [row for row, _, _ in seen] == [answer[:, : width + step].tolist() for step in range(3)]
    assert {(shape, dtype) for _, shape, dtype in seen} == {((len(PROMPTS), 512), torch.float32)}


def test_empty_lists_of_processors_and_criteria_stay_on_the_fast_path(fast):
    empty = dict(logits_processor=LogitsProcessorList(), stopping_criteria=StoppingCriteriaList())
    assert_same(fast, shared_model(), ids(), **empty)
    assert not resolve(fast.config, fast.generation_config, ids(), **empty).stepwise


def test_the_slower_path_and_the_fast_one_may_alternate(fast):
    for call in ({}, dict(no_repeat_ngram_size=2), {}, dict(logits_processor=[Shift()]), {}):
        assert_same(fast, shared_model(), **batch(), max_new_tokens=8, **call)


@pytest.mark.parametrize("policy", ["static:layers=0-1+3-4", "d3:alpha=0.9,start=0.25"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_slower_path_follows_the_policy(backend, policy):
    runtime = compiled(backend, policy=policy)
    expected = runtime.generate(**batch(), max_new_tokens=20)
    depths = runtime.last_run.depths
    same = [lambda input_ids, scores: scores]
    assert torch.equal(runtime.generate(**batch(), max_new_tokens=20, logits_processor=same), expected)
    assert runtime.last_run.depths == depths and min(depths) < 5
