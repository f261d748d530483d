"""The compile gate: every kernel, for every type and architecture, is compiled here, without a GPU, and must be no
worse than tests/gpu/budgets.json says. `python tests/budgets.py` writes that file; read the difference before you
commit it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import budgets
import pytest

pytest.importorskip("triton", reason="triton is not installed")
import triton  # noqa: E402

JOBS = [str(job) for job in budgets.jobs()]
BUDGET = json.loads(budgets.BUDGETS.read_text(encoding="utf-8"))
STREAMS = ("norm_qkv_rope", "proj_add", "norm_gate_up", "kv_fill", "norm_logits", "attention")
each_kernel = pytest.mark.parametrize("job", JOBS)


@pytest.fixture(scope="module")
def measured():
    """Every kernel compiled: minutes on two processors, seconds once build/triton has them."""
    made = subprocess.run([sys.executable, budgets.__file__, "--print"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return {name: SimpleNamespace(**values) for name, values in json.loads(made.stdout)["kernels"].items()}


def test_the_budget_lists_exactly_the_kernels_that_there_are():
    assert sorted(BUDGET["kernels"]) == sorted(JOBS)
    assert len(set(JOBS)) == len(JOBS)


@each_kernel
def test_no_register_is_spilled(measured, job):
    assert measured[job].stack == 0


@each_kernel
def test_weights_and_cache_are_read_128_bits_at_a_time(measured, job):
    if job.split()[0].partition("+")[0] in STREAMS:
        assert measured[job].stream_bits == [128]


@each_kernel
def test_shared_memory_fits_a_block(measured, job):
    from d3rt.kernels.cuda.tiles import SHARED_LIMIT

    assert measured[job].shared <= SHARED_LIMIT[int(job.rpartition("sm_")[2])]
    assert measured[job].blocks >= 1


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("attention")])
def test_attention_runs_on_tensor_cores_where_triton_has_them(measured, job):
    """Elsewhere Triton makes FMAs of tl.dot, so the kernel has a way of its own; and float32 is not rounded."""
    has_them = int(job.rpartition("sm_")[2]) >= 80 and "float32" not in job
    assert bool(measured[job].tensor_core) == has_them


@each_kernel
def test_is_no_worse_than_its_budget(measured, job):
    if triton.__version__ != BUDGET["triton"]:
        pytest.skip(f"the budget is for triton {BUDGET['triton']}; this is {triton.__version__}")
    got, budget = measured[job], BUDGET["kernels"][job]
    assert got.registers <= budget["registers"]
    assert got.shared <= budget["shared"]
    assert got.tensor_core >= budget["tensor_core"]
    assert got.blocks >= budget["blocks"] and got.occupancy >= budget["occupancy"]


def test_resident_blocks_are_those_of_nvidias_occupancy_calculator():
    """Worked out by hand from the tables of the programming guide: registers, shared memory, warps, blocks."""
    assert budgets.resident_blocks(80, registers=32, shared=0, warps=4) == 16  # 64 warps
    assert budgets.resident_blocks(80, registers=128, shared=0, warps=4) == 4  # 65536 / (128 * 32) = 16 warps
    assert budgets.resident_blocks(80, registers=255, shared=0, warps=4) == 2
    assert budgets.resident_blocks(80, registers=32, shared=71680, warps=4) == 2  # 164 KiB / (70 + 1) KiB
    assert budgets.resident_blocks(75, registers=32, shared=0, warps=1) == 16  # blocks
    assert budgets.resident_blocks(70, registers=32, shared=49152, warps=4) == 2  # 96 KiB
    assert budgets.resident_blocks(86, registers=40, shared=0, warps=4) == 12  # 48 warps


def test_the_marked_loads_are_found_and_their_width_is_read_off():
    assert {name for name, _ in budgets.stream_lines()} == {"matvec.py", "attention.py"}
    (line,) = (number for name, number in sorted(budgets.stream_lines())[:1])
    ptx = f"""
        .file	1 "/somewhere/attention.py"
        .loc	1 {line} 20
        @%p1 ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_first.v2.b32 {{ %r1, %r2 }}, [ %rd1 + 0 ];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        .loc	1 {line + 100} 20
        ld.global.b32 {{ %r1 }}, [ %rd1 + 0 ];
    """
    assert budgets.stream_bits(ptx) == (64, 128)
