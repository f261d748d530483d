"""return_dict_in_generate, output_scores and output_logits: Hugging Face's output, and `stats` besides."""

import pytest
import stories260k
import torch
import transformers
from api_models import BACKENDS, assert_same, batch, compiled, ids, shared_model
from packaging import version
from transformers.generation.utils import GenerateDecoderOnlyOutput

import d3rt


@pytest.fixture(scope="module", params=BACKENDS)
def fast(request):
    return compiled(request.param)


def both(fast, **kwargs):
    call = dict(batch(), max_new_tokens=8, return_dict_in_generate=True, **kwargs)
    return fast.generate(**call), shared_model().generate(**call)


def assert_close(ours, theirs):
    assert len(ours) == len(theirs) == 8
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
        # float32 sums in another order; logits are of the size of 10
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_a_tensor_is_returned_unless_a_dict_is_asked_for(fast):
    assert type(fast.generate(ids())) is torch.Tensor
    assert type(fast.generate(ids(), output_scores=True)) is torch.Tensor


def test_the_dict_is_hugging_faces_own_kind_and_holds_the_sequences(fast):
    ours, theirs = both(fast)
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours["sequences"], ours[0])


def test_what_is_not_asked_for_is_none(fast):
    ours, _ = both(fast)
    assert (ours.scores, ours.logits, ours.attentions, ours.hidden_states) == (None,) * 4
    assert ours.past_key_values is None  # the K,V cache stays the runtime's
    assert set(ours) == {"sequences", "stats"}


def test_the_stats_are_those_of_this_run(fast):
    ours, _ = both(fast)
    assert ours.stats is fast.last_run
    assert ours.stats.steps == 8 and ours.stats.batch == 3


def test_scores_are_hugging_faces(fast):
    ours, theirs = both(fast, output_scores=True)
    assert ours.logits is None
    assert_close(ours.scores, theirs.scores)


def test_logits_are_hugging_faces(fast):
    ours, theirs = both(fast, output_logits=True)
    assert ours.scores is None
    assert_close(ours.logits, theirs.logits)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="transformers below 5.23 counts left padding among the tokens that repetition_penalty has seen",
)
def test_scores_are_processed_and_logits_are_not(fast):
    call = dict(output_scores=True, output_logits=True, repetition_penalty=1.4, suppress_tokens=[5, 6])
    ours, theirs = both(fast, **call)
    assert_close(ours.scores, theirs.scores)
    assert_close(ours.logits, theirs.logits)
    assert ours.scores[0][0, 5] == -torch.inf and ours.logits[0][0, 5] > -torch.inf


def test_the_scores_of_a_sampling_run_are_warped_as_hugging_faces_are(fast):
    call = dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, output_scores=True)
    ours, theirs = (
        fast.generate(ids(), **call, max_new_tokens=1, return_dict_in_generate=True, seed=1),
        shared_model().generate(ids(), **call, max_new_tokens=1, return_dict_in_generate=True),
    )
    torch.testing.assert_close(ours.scores[0], theirs.scores[0], rtol=1e-4, atol=1e-3)


def test_asking_for_scores_does_not_change_the_tokens(fast):
    ours, _ = both(fast, output_scores=True, output_logits=True)
    assert torch.equal(ours.sequences, fast.generate(**batch(), max_new_tokens=8))


def test_transition_scores_can_be_computed_from_the_dict(fast):
    ours, theirs = both(fast, output_scores=True)
    compute = shared_model().compute_transition_scores
    torch.testing.assert_close(
        compute(ours.sequences, ours.scores, normalize_logits=True),
        compute(theirs.sequences, theirs.scores, normalize_logits=True),
        rtol=1e-4,
        atol=1e-3,
    )


def test_rows_that_end_early_leave_as_many_scores_as_hugging_faces(fast):
    call = dict(
        batch(), max_new_tokens=30, eos_token_id=426, return_dict_in_generate=True, output_scores=True
    )
    ours, theirs = fast.generate(**call), shared_model().generate(**call)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores) == ours.sequences.shape[1] - call["input_ids"].shape[1]


def test_the_generation_config_may_ask_for_the_dict():
    model = stories260k.load()
    model.generation_config.return_dict_in_generate = True
    fast = d3rt.compile(model)
    assert isinstance(fast.generate(ids(), max_new_tokens=3), d3rt.GenerateOutput)
    assert_same(fast, model, ids(), max_new_tokens=3, return_dict_in_generate=False)
