"""Choosing a token: the native sampler, its definition in kernels/reference.py, and Hugging Face's warpers agree."""

import dataclasses
import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from d3rt import _C
from d3rt.backends.reference import choose
from d3rt.errors import NotFiniteError
from d3rt.kernels import reference
from d3rt.sampling import SamplingParams

INF = float("inf")
GREEDY = SamplingParams()


def sample(logits, params=GREEDY, seen=(), step=0):
    """Native: one token for each row of logits [B, V]."""
    rows = torch.as_tensor(logits, dtype=torch.float32)
    rows = (rows if rows.dim() == 2 else rows[None]).clone()
    native = _C.SamplingParams(**dataclasses.asdict(params))
    return _C.sample(rows, native, [list(row) for row in seen], step)


def warpers(params):
    """Hugging Face's own, in the order of its `_get_logits_processor`."""
    chain = LogitsProcessorList()
    if params.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain


def warp(logits, params):
    return reference.warp(logits, params.temperature, params.top_k, params.top_p, params.min_p)


def random_params(rng, **fixed):
    values = dict(
        do_sample=True,
        temperature=rng.choice([1.0, 1.0, rng.uniform(0.2, 2.0)]),
        top_k=rng.choice([0, 0, 1, 2, rng.randint(1, 60)]),
        top_p=rng.choice([1.0, rng.uniform(0.01, 0.999), rng.choice([0.3, 0.5, 0.9, 0.95])]),
        min_p=rng.choice([0.0, 0.0, rng.uniform(0.001, 0.7)]),
        seed=rng.getrandbits(64),
    )
    return SamplingParams(**(values | fixed))


def random_logits(rng, generator):
    """Of one row: sharp or flat, sometimes with equal values, sometimes with tokens that are forbidden."""
    vocab = rng.choice([1, 2, 7, 40, 300])
    logits = rng.choice([0.3, 2.0, 8.0]) * torch.randn(vocab, generator=generator)
    if rng.random() < 0.4:
        logits = (logits * 2).round() / 2
    if rng.random() < 0.3:
        forbidden = torch.rand(vocab, generator=generator) < 0.5
        forbidden[rng.randrange(vocab)] = False
        logits = logits.masked_fill(forbidden, -INF)
    return logits


# -- greedy ------------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_equal_tokens():
    for vocab in (2, 3, 15, 16, 17, 64, 1001):
        logits = torch.zeros(vocab)
        assert sample(logits) == [0]
        logits[vocab // 2 :] = 1.0
        assert sample(logits) == [vocab // 2]


def test_greedy_passes_over_forbidden_tokens():
    assert sample([-INF, -1e30, -INF]) == [1]
    assert sample([[-INF, 0.0], [0.0, -INF]]) == [1, 0]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(do_sample=True)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("vocab", [1, 3, 16, 33])
def test_logits_without_an_answer_are_refused(params, vocab):
    for at in range(vocab):
        logits = torch.zeros(2, vocab)
        logits[1, at] = torch.nan
        with pytest.raises(NotFiniteError, match="slot 1 at step 5"):
            sample(logits, params, step=5)
        with pytest.raises(NotFiniteError):
            choose(logits[1], params, set(), 5, 1)
    nothing = torch.full((1, vocab), -INF)
    with pytest.raises(NotFiniteError):
        sample(nothing, params)
    with pytest.raises(NotFiniteError):
        choose(nothing[0], params, set(), 0, 0)


def test_a_temperature_that_makes_infinities_is_refused_by_both():
    params = SamplingParams(do_sample=True, temperature=1e-38)
    for logits in ([30.0, 20.0, 1.0], [-30.0, -20.0, -40.0]):
        with pytest.raises(NotFiniteError, match="temperature"):
            sample(logits, params)
        with pytest.raises(NotFiniteError, match="temperature"):
            choose(torch.tensor(logits), params, set(), 0, 0)


def test_greedy_is_torchs_argmax():
    generator = torch.Generator().manual_seed(0)
    for vocab in (5, 100, 4097):
        logits = torch.randn(16, vocab, generator=generator)
        assert sample(logits) == logits.argmax(-1).tolist()


# -- the random numbers ------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 by the paper: S-boxes of two multiplications, round keys bumped by Weyl constants."""
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0]
    return counter


# Random123's kat_vectors, lines "philox4x32 10".
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_the_tests_own_philox_gives_the_published_blocks(counter, key, expected):
    assert philox(counter, key) == expected


@pytest.mark.parametrize(
    "uniform", [_C.philox_uniform, reference.philox_uniform], ids=["native", "reference"]
)
def test_philox_uniform_is_the_first_two_words_of_the_block(uniform):
    assert uniform(0, 0, 0) == (0x6627E8D5E169C58D >> 11) * 2.0**-53
    rng = random.Random(0)
    corners = [(2**64 - 1, 2**32 - 1, 2**32 - 1), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [(rng.getrandbits(64), rng.getrandbits(32), rng.getrandbits(32)) for _ in range(2000)]
    for seed, step, slot in corners + drawn:
        words = philox([step, slot, 0, 0], [seed % 2**32, seed >> 32])
        assert uniform(seed, step, slot) == ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


# -- native == reference -----------------------------------------------------------------------------------------------


def test_a_seed_means_the_same_tokens_natively_and_by_the_reference():
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(3000):
        logits = random_logits(rng, generator)
        params = random_params(rng, repetition_penalty=rng.choice([1.0, 1.3, 0.8]))
        seen = {rng.randrange(len(logits)) for _ in range(rng.randint(0, 6))}
        step = rng.randint(0, 10**6)
        expected = choose(logits, params, seen, step, 0)
        assert sample(logits, params, [seen], step) == [expected], f"{params}, {len(logits)} tokens"


def test_every_slot_draws_its_own_number():
    params = SamplingParams(do_sample=True, seed=3)
    logits = torch.zeros(16, 1000)
    expected = [choose(row, params, set(), 4, slot) for slot, row in enumerate(logits)]
    assert sample(logits, params, step=4) == expected
    assert len(set(expected)) > 8


def test_what_cannot_be_sampled_is_refused():
    native = _C.SamplingParams(**dataclasses.asdict(SamplingParams(repetition_penalty=2.0)))
    with pytest.raises(ValueError, match="seen token 3 is not in 0..2"):
        _C.sample(torch.zeros(1, 3), native, [[3]], 0)
    with pytest.raises(ValueError, match="seen by slot 1"):
        _C.sample(torch.zeros(2, 3), native, [[0]], 0)
    with pytest.raises(ValueError, match=r"sample: logits is float32 \[3\]"):
        _C.sample(torch.zeros(3), native, [[0]], 0)
    with pytest.raises(ValueError, match="bfloat16"):
        _C.sample(torch.zeros(1, 3, dtype=torch.bfloat16), native, [[0]], 0)
    with pytest.raises(ValueError, match="temperature"):
        sample([0.0, 1.0], SamplingParams(do_sample=True, temperature=0.0))


# -- reference == Hugging Face -----------------------------------------------------------------------------------------


def test_warp_keeps_the_tokens_that_hugging_faces_warpers_keep():
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    for _ in range(3000):
        logits, params = random_logits(rng, generator), random_params(rng)
        expected = warpers(params)(None, logits[None].clone())[0]
        got = warp(logits, params)
        if len(logits.unique()) < len(logits):  # which of equal tokens top_p keeps, HF's sort leaves open
            got, expected = got.sort().values, expected.sort().values
        assert torch.equal(got, expected), f"{params}, {len(logits)} tokens"


def test_penalise_is_hugging_faces_repetition_penalty():
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    for _ in range(300):
        logits = random_logits(rng, generator)
        seen = [rng.randrange(len(logits)) for _ in range(rng.randint(1, 9))]
        penalty = rng.uniform(0.5, 3.0)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())[0]
        assert torch.equal(reference.penalise(logits, set(seen), penalty), expected)
    logits = torch.randn(5)
    assert torch.equal(reference.penalise(logits, set(), 2.0), logits)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("count", [4, 8, 64])
def test_of_equal_tokens_top_p_keeps_the_share_and_the_larger_ones(count, top_p):
    """The prefix reaches top_p exactly, so the cut falls between equals; HF keeps as many."""
    params = SamplingParams(do_sample=True, top_p=top_p)
    logits = torch.zeros(count)
    kept = set(range(count - int(count * top_p), count))
    assert int(warpers(params)(None, logits[None]).isfinite().sum()) == len(kept)
    assert set(warp(logits, params).isfinite().nonzero().flatten().tolist()) == kept
    drawn = {sample(logits, dataclasses.replace(params, seed=seed))[0] for seed in range(400)}
    assert drawn <= kept and len(drawn) > len(kept) // 2


@pytest.mark.parametrize("count, kept", [(10, 9), (10, 3), (14, 7), (100, 95), (7, 3)])
def test_a_prefix_that_reaches_top_p_but_for_rounding_reaches_it(count, kept):
    """9 of 10 equal tokens are a share of 0.9, whatever 0.9 and 1 - 0.9 are in binary."""
    params = SamplingParams(do_sample=True, top_p=kept / count)
    logits = torch.zeros(count)
    assert int(warp(logits, params).isfinite().sum()) == kept
    for step in range(300):
        assert sample(logits, params, step=step) == [choose(logits, params, set(), step, 0)]


# -- the distribution --------------------------------------------------------------------------------------------------

DRAWS = 20_000
# Upper 1e-4 point of chi-square by Wilson & Hilferty's cube: a wrong sampler is off by hundreds, and the seed is fixed.
Z = 3.719


def chi_square_limit(degrees):
    return degrees * (1 - 2 / (9 * degrees) + Z * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_hugging_faces_distribution(settings):
    params = SamplingParams(do_sample=True, seed=17, **settings)
    logits = torch.tensor([0.5, -0.6, 2.0, 1.2, -INF, 0.0, 1.9, -1.0, 0.9, 0.5])
    probabilities = warpers(params)(None, logits[None])[0].double().softmax(-1)
    counts = torch.zeros(len(logits), dtype=torch.float64)
    rows = logits.repeat(16, 1)
    for step in range(DRAWS // 16):  # 16 slots a step: both counters of the generator move
        counts += torch.bincount(torch.tensor(sample(rows, params, step=step)), minlength=len(logits))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    assert expected.min() > 5, "too few draws for the test to mean anything"
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    assert statistic < chi_square_limit(degrees), f"chi-square {statistic:.1f} on {degrees} degrees"
