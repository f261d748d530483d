"""What the PTX interpreter is worth: kernels that are broken on purpose must be refused. Each barrier is left out in
turn; and what orders asynchronous copies and blocks, what masks and what bounds is taken away."""

import re

import native_ops
import packed_cases
import ptx_jobs
import pytest
import torch

from d3rt.kernels import cases
from d3rt.kernels.cases import Case

pytest.importorskip("triton", reason="triton is not installed")
from ptx.device import Device, Emitted, compiled  # noqa: E402
from ptx.errors import OutOfBounds, PtxError, Race  # noqa: E402
from triton_bounds import allowed  # noqa: E402

JOBS = {str(job): job for job in ptx_jobs.jobs()}
ATTENTION = [f"attention-gqa3-float16-B3-sm_{arch}" for arch in ptx_jobs.ARCHS]
# The first barrier of the pipeline that fetches K,V ahead. What comes before it and what comes between it and the next
# one are copies to places of their own, so it orders nothing.
NEEDLESS = {**dict.fromkeys(ATTENTION[1:], [0])}
WITH_BARRIERS = [
    *ATTENTION,
    *(f"norm_qkv_rope-long_rows-float16-B1-sm_{arch}" for arch in ptx_jobs.ARCHS),
    "norm_qkv_rope-head_dim64-float16-B2-sm_80",
    *(f"proj_add-long_rows-float16-B1-sm_{arch}" for arch in ptx_jobs.ARCHS),
    "proj_add-packed_long-float32-B1-int8-sm_80",
    "norm_gate_up-long_rows-float16-B1-sm_80",
    "norm_gate_up-packed_long-float32-B1-int4_with_minima-sm_90",
    "kv_fill-three_layers-float16-B2-sm_80",
    "norm_logits-triple-float16-B3-sm_80",
]


def without(pattern: str, which: int):
    """What comments out the which-th line of PTX that matches."""

    def mutate(ptx: str) -> str:
        at = [match.start() for match in re.finditer(rf"^\s*{pattern}", ptx, re.M)][which]
        return f"{ptx[:at]}\n//{ptx[at:].lstrip()}"

    return mutate


def sub(pattern: str, new: str):
    """What replaces all that matches."""

    def mutate(ptx: str) -> str:
        mutated, times = re.subn(pattern, new, ptx)
        assert times
        return mutated

    return mutate


def caught(job, mutate) -> PtxError | None:
    """What the interpreter says of the kernel with this mutation. None: nothing, and then its values must be right."""
    arguments = job.arguments()
    try:
        cases.call(Emitted(Device(job.arch, mutate=mutate)), job.case, arguments)
    except PtxError as error:
        return error
    if job.width in ptx_jobs.FLOATS:
        native_ops.assert_close(
            job.case, cases.outputs(job.case, arguments), allowed=allowed(job.case, job.arch)
        )
    return None


@pytest.mark.parametrize("name", WITH_BARRIERS)
def test_every_barrier_that_is_left_out_is_missed(name):
    job = JOBS[name]
    (launch,) = ptx_jobs.launches(job)
    barriers = len(re.findall(r"^\s*bar\.sync", compiled(launch, job.arch).ptx, re.M))
    assert barriers > 3
    unnoticed = [i for i in range(barriers) if caught(job, without(r"bar\.sync", i)) is None]
    assert unnoticed == NEEDLESS.get(name, [])


def test_every_barrier_of_a_draw_that_is_left_out_is_missed():
    def draw(mutate):
        logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(0))
        seen, step = torch.zeros(1, 700, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
        token = torch.zeros(1, dtype=torch.int32)
        settings = torch.tensor([7, 20, 2**62, 0, 0x3F800000, 0x3F800000], dtype=torch.int64)
        Emitted(Device(80, mutate=mutate)).sample(token, logits, settings, step, seen, True)

    ptx = []
    draw(lambda text: ptx.append(text) or text)
    barriers = len(re.findall(r"^\s*bar\.sync", ptx[0], re.M))
    assert barriers > 30
    for i in range(barriers):
        with pytest.raises(Race):
            draw(without(r"bar\.sync", i))


@pytest.mark.parametrize("name", ATTENTION[1:])
def test_a_copy_that_is_not_waited_for_is_refused(name):
    job = JOBS[name]
    for which in range(2):
        assert isinstance(caught(job, without(r"cp\.async\.wait_group", which)), Race)
    assert isinstance(caught(job, sub(r"(cp\.async\.wait_group\s+)2", r"\g<1>3")), Race)


@pytest.mark.parametrize("semantics", ["relaxed", "acquire", "release"])
@pytest.mark.parametrize("name", [ATTENTION[0], "proj_add-long_rows-float16-B1-sm_90"])
def test_arrival_must_release_what_was_written_and_acquire_what_others_wrote(name, semantics):
    mutate = sub(r"atom\.global\.gpu\.acq_rel", f"atom.global.gpu.{semantics}")
    assert isinstance(caught(JOBS[name], mutate), Race)


@pytest.mark.parametrize("arch", ptx_jobs.ARCHS)
@pytest.mark.parametrize("limit", [20, 70], ids=["rows", "columns"])
def test_a_mask_that_ends_one_too_late_is_out_of_bounds(arch, limit):
    case = Case("proj_add", "mask", torch.float32, D=20, K=70)
    mutate = sub(rf"(setp\.lt\.\w+\s+%p\d+, %rd?\d+, ){limit};", rf"\g<1>{limit + 1};")
    with pytest.raises(OutOfBounds):
        cases.call(Emitted(Device(arch, mutate=mutate)), case, cases.make(case, slack=8))


def test_a_position_past_the_cache_is_out_of_bounds():
    case = Case("norm_qkv_rope", "position", torch.float16, D=64, H=2, G=1, d=16, S=8, pos=(7,))
    arguments = cases.make(case, slack=8)
    arguments["pos"].fill_(8)
    with pytest.raises(OutOfBounds, match="cos|sin|k_cache|v_cache"):
        cases.call(Emitted(Device(80)), case, arguments)


def test_a_packed_matrix_with_a_row_block_too_few_is_out_of_bounds():
    case = packed_cases.CASES[3]
    arguments = packed_cases.packed_arguments(case, "int8")
    whole = arguments["w"]
    object.__setattr__(whole, "data", whole.data[:-1])
    with pytest.raises(OutOfBounds, match="w"):
        cases.call(Emitted(Device(80)), case, arguments)
