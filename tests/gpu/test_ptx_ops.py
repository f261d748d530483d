"""The PTX that Triton emits for every kernel, run by tests/ptx against kernels/reference.py: values, bounds, alignment,
barriers, races, unset values. In every order of blocks the bits must be the same.

What Triton's interpreter proves of the algorithm (tests/kernels/test_triton_ops.py) this proves of the compiled code.
"""

import random
import subprocess
import sys

import native_ops
import packed_cases
import ptx_jobs
import pytest
import token_ops
import torch

from d3rt.kernels import cases
from d3rt.sampling import SamplingParams

pytest.importorskip("triton", reason="triton is not installed")
from ptx.device import Device, Emitted  # noqa: E402
from triton_bounds import allowed, widened  # noqa: E402

JOBS = ptx_jobs.jobs()
each_arch = pytest.mark.parametrize("arch", ptx_jobs.ARCHS)


@pytest.fixture(scope="module", autouse=True)
def compiling_ahead():
    process = subprocess.Popen([sys.executable, ptx_jobs.__file__], stderr=subprocess.DEVNULL)
    yield
    process.kill()
    process.wait()


def run(job, device: Device) -> dict:
    arguments = job.arguments()
    cases.call(Emitted(device), job.case, arguments)
    assert not device.counters.any(), "counters must be 0 for the next launch"
    return arguments


def assert_right(job, arguments: dict) -> None:
    if job.width in ptx_jobs.FLOATS:
        native_ops.assert_close(
            job.case, cases.outputs(job.case, arguments), allowed=allowed(job.case, job.arch)
        )
        return
    plain = widened(job.arguments())
    right = native_ops.exact_of(job.case, plain)
    bounds = native_ops.bounds_of(job.case, plain, right)
    native_ops.assert_close(job.case, packed_cases.outputs(job.case, arguments), right, bounds)


def same_bits(some: dict, others: dict) -> bool:
    pairs = zip(
        packed_cases.parts(list(some.values())), packed_cases.parts(list(others.values())), strict=True
    )
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs if a.is_contiguous())


def orders(blocks: int) -> dict:
    """Ways to run them: one after another, and all at once with their atomics in another order."""
    shuffled = random.Random(blocks).sample(range(blocks), blocks)
    return {
        "first to last": [[block] for block in range(blocks)],
        "last to first": [[block] for block in reversed(range(blocks))],
        "random": [[block] for block in shuffled],
        "interleaved": [shuffled],
        "in threes": [shuffled[i : i + 3] for i in range(0, blocks, 3)],
    }


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_does_what_the_reference_says(job):
    device = Device(job.arch)
    arguments = run(job, device)
    assert_right(job, arguments)
    if any(machine.disagreements for machine in device.machines):
        assert_right(job, run(job, Device(job.arch, ordered=False, last_wins=False)))


def is_split(job) -> bool:
    if job.case.op == "attention":
        return job.case.name in ("gqa3", "gqa16", "head_dim128", "window_over_chunks")
    return "long" in job.case.name


@pytest.mark.parametrize("job", [job for job in JOBS if is_split(job)], ids=str)
def test_gives_the_same_bits_in_every_order_of_blocks(job):
    device = Device(job.arch, ordered=False)
    right = run(job, device)
    (machine,) = device.machines
    assert machine.executed["atom.global.gpu.acq_rel.add.u32"], "the case is too short for a split"
    for name, waves in orders(machine.blocks).items():
        assert same_bits(right, run(job, Device(job.arch, ordered=False, waves=lambda _, w=waves: w))), name


# -- the token ---------------------------------------------------------------------------------------------------------


@each_arch
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=5),
        SamplingParams(do_sample=True, temperature=1.5, top_p=0.5, repetition_penalty=0.9, seed=2**63 + 9),
    ],
    ids=["greedy", "top_k_top_p_min_p", "top_p"],
)
@pytest.mark.parametrize("vocab", [40, 5000])
def test_sample_is_the_references(arch, params, vocab):
    from d3rt.kernels.cuda import plans

    logits = 3 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1, ::3], logits[2, 7] = -torch.inf, torch.nan
    seen = [{1, 5, 39}, {2}, set()]
    mask = torch.zeros(3, vocab, dtype=torch.int8)
    for row, tokens in enumerate(seen):
        mask[row, list(tokens)] = 1
    penalised = params.repetition_penalty != 1.0
    token = torch.full((3,), -7, dtype=torch.int32)
    settings, step = plans.sampling_settings(params), torch.tensor([11], dtype=torch.int32)
    device = Device(arch)
    Emitted(device).sample(token, logits, settings, step, mask if penalised else None, params.do_sample)
    none = [set()] * 3
    expected = [
        token_ops.chosen(logits[i], params, (seen if penalised else none)[i], 11, i) for i in range(3)
    ]
    assert token.tolist() == expected


@each_arch
def test_advance_is_the_references_and_hands_the_tokens_on(arch):
    ops = Emitted(Device(arch))
    token_ops.assert_advance_is_the_references(ops)
    token_ops.assert_advance_finishes_at_an_end_token_and_hands_the_tokens_on(ops)
