"""do_sample draws by seed: the same everywhere for the same seed, and Hugging Face's distribution.

The number drawn for a token depends on seed, step and slot alone, and row r of a batch is slot r: that is why a prompt
draws the same tokens wherever it stands in row r, and other tokens in another row. What is drawn is tested against the
distribution in the tests of the kernels; here is that the API hands everything through.
"""

import pytest
import stories260k
import torch
from api_models import BACKENDS, PROMPTS, batch, compiled, ids, shared_model

SAMPLE = dict(do_sample=True, max_new_tokens=24)


@pytest.fixture(scope="module", params=BACKENDS)
def fast(request):
    return compiled(request.param)


@pytest.fixture(scope="module")
def cpu():
    return compiled("cpu")


@pytest.fixture(scope="module")
def reference():
    return compiled("reference")


def draws(fast, **kwargs):
    return fast.generate(ids(), **SAMPLE | kwargs).tolist()


def test_the_same_seed_draws_the_same_tokens(fast):
    assert draws(fast, seed=7) == draws(fast, seed=7)


def test_other_seeds_draw_other_tokens(fast):
    assert len({str(draws(fast, seed=seed)) for seed in range(6)}) > 3


@pytest.mark.parametrize("seed", [0, 2**32, 2**62 + 1, 2**64 - 1])
def test_all_backends_draw_the_same_tokens(cpu, reference, seed):
    assert draws(cpu, seed=seed) == draws(reference, seed=seed)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.6),
        dict(top_k=5),
        dict(top_k=0, temperature=1.5),
        dict(top_p=0.7),
        dict(min_p=0.1),
        dict(temperature=1.3, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_the_slower_path_draws_the_same_tokens(fast, options):
    call = dict(batch(), **SAMPLE, **options, seed=11)
    expected = fast.generate(**call)
    same = [lambda input_ids, scores: scores]
    assert torch.equal(fast.generate(**call, logits_processor=same), expected)


def test_processors_and_sampling_combine_alike_on_all_backends(cpu, reference):
    call = dict(batch(), **SAMPLE, temperature=1.2, no_repeat_ngram_size=2, repetition_penalty=1.1, seed=5)
    answer = cpu.generate(**call)
    assert torch.equal(answer, reference.generate(**call))
    plain = call | dict(no_repeat_ngram_size=0)
    assert not torch.equal(answer, cpu.generate(**plain))


@pytest.mark.parametrize(
    "warper", [dict(typical_p=0.5), dict(epsilon_cutoff=0.02), dict(eta_cutoff=0.02), dict(top_h=0.4)]
)
def test_rarer_warpers_cut_what_hugging_faces_cut(fast, warper):
    call = dict(do_sample=True, **warper, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    ours, theirs = fast.generate(ids(), **call, seed=1), shared_model().generate(ids(), **call)
    torch.testing.assert_close(ours.scores[0], theirs.scores[0], rtol=1e-4, atol=1e-3)
    assert int(ours.scores[0].isinf().sum()) > 400


def test_torch_manual_seed_decides_where_no_seed_is_given(fast):
    def seeded():
        torch.manual_seed(5)
        return draws(fast)

    assert seeded() == seeded()


def test_each_call_draws_anew_from_torchs_generator(fast):
    torch.manual_seed(5)
    assert len({str(draws(fast)) for _ in range(5)}) > 2


def test_a_generator_decides_and_leaves_torchs_own_alone(fast):
    before = torch.get_rng_state()
    first = draws(fast, generator=torch.Generator().manual_seed(3))
    assert draws(fast, generator=torch.Generator().manual_seed(3)) == first
    generator = torch.Generator().manual_seed(4)
    assert draws(fast, generator=generator) != draws(fast, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_decoding_and_a_given_seed_leave_torchs_generator_alone(fast):
    before = torch.get_rng_state()
    fast.generate(ids(), max_new_tokens=3)
    draws(fast, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_row_r_of_a_batch_draws_with_slot_r(fast):
    together = fast.generate(**batch(*[PROMPTS[0]] * 3), **SAMPLE, seed=9)
    assert together[0].tolist() == fast.generate(**batch(PROMPTS[0]), **SAMPLE, seed=9)[0].tolist()
    assert len({str(row.tolist()) for row in together}) == 3


def test_a_row_draws_the_same_whatever_the_other_rows_hold(fast):
    call = SAMPLE | dict(seed=9, eos_token_id=None)
    one = fast.generate(**batch(PROMPTS[0], PROMPTS[1]), **call)[1, -24:]
    other = fast.generate(**batch(PROMPTS[2], PROMPTS[1], PROMPTS[0]), **call)[1, -24:]
    assert one.tolist() == other.tolist()


def test_num_return_sequences_draws_each_copy_by_itself(fast):
    answer = fast.generate(ids(), **SAMPLE, num_return_sequences=4, seed=2)
    assert answer.shape[0] == 4 and len({str(row.tolist()) for row in answer}) == 4
    assert answer[0].tolist() == draws(fast, seed=2)[0][: answer.shape[1]]


@pytest.mark.parametrize(
    "options", [dict(top_k=1), dict(temperature=1e-4), dict(top_p=1e-6), dict(top_p=0.0), dict(min_p=1.0)]
)
def test_sampling_that_leaves_one_token_is_greedy(fast, options):
    greedy = fast.generate(ids(), max_new_tokens=24)
    assert draws(fast, **options, seed=1) == greedy.tolist()


def test_the_default_top_k_of_50_holds(fast):
    call = dict(SAMPLE, max_new_tokens=1, temperature=50.0, return_dict_in_generate=True, output_scores=True)
    assert int((fast.generate(ids(), **call, seed=1).scores[0] > -torch.inf).sum()) == 50


def test_the_tokens_drawn_first_have_hugging_faces_probabilities():
    fast, model = compiled("cpu", batch_size=16), shared_model()
    prompt = ids("Lily likes to play with her")
    call = dict(do_sample=True, max_new_tokens=1, temperature=1.5, top_k=8)
    counts = torch.zeros(stories260k.load().config.vocab_size)
    for seed in range(150):
        drawn = fast.generate(prompt, **call, num_return_sequences=16, seed=seed)[:, -1]
        counts += torch.bincount(drawn, minlength=len(counts))
    theirs = model.generate(prompt, **call, return_dict_in_generate=True, output_scores=True)
    expected = theirs.scores[0][0].softmax(-1) * counts.sum()
    kept = expected > 0
    assert int(kept.sum()) == 8 and counts[~kept].sum() == 0
    chi_squared = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_squared < 24.3  # 7 degrees of freedom: p = 0.001, and the seeds are fixed
