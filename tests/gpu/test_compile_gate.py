"""The compile gate: every kernel, for every type and architecture, is compiled here, without a GPU, and must be no
worse than tests/gpu/budgets.json says. `python tests/budgets.py` writes that file; read the difference before you
commit it."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import budgets
import pytest
import tiny_models
import torch

import d3rt
from d3rt.models.decoder import StepBuffers
from d3rt.plan import LayerSet, Plan

pytest.importorskip("triton", reason="triton is not installed")
import triton  # noqa: E402

JOBS = [str(job) for job in budgets.jobs()]
BUDGET = json.loads(budgets.BUDGETS.read_text(encoding="utf-8"))
OPS = (*budgets.MATVECS, "embed", "attention", "keep_hidden", "sample", "advance")
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


@pytest.mark.parametrize("head_dim", [80, 256, 512])
@pytest.mark.parametrize("arch", [80, 86])  # sm_89 and sm_90 have their tiles
def test_attention_takes_the_shared_memory_that_its_tile_was_chosen_by(arch, head_dim):
    from d3rt.kernels.cuda import plans, tiles

    def tensor(*sizes, dtype=torch.float32):
        return torch.empty(*sizes, dtype=dtype, device="meta")

    cache = tensor(1, 2, budgets.LENGTH, head_dim, dtype=torch.float16)
    q, pos = tensor(1, 6, head_dim), tensor(1, dtype=torch.int32)
    made = budgets.inspected(plans.attention(arch, q, q, cache, cache, pos, 1.0, 0)[0], arch)
    tile, _ = tiles.attention_tile(arch, 3, head_dim, True)
    taken = tiles.attention_shared_bytes(tile, 16, tiles.power_of_2(head_dim))
    assert made.shared <= taken <= tiles.SHARED_LIMIT[arch]
    assert made.stack == 0


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


# -- whether these are the kernels that a generation launches ----------------------------------------------------------


def kinds(launch) -> frozenset:
    """What a kernel is made of, but for sizes: of each parameter its type, whether it is there, which way it sends the
    kernel. How often it is split is a size too."""
    given = {
        name: value
        for name, value in (launch.signature() | launch.constants).items()
        if name not in ("partials", "counters")
    }
    given |= {name: given[name] > 0 for name in ("WINDOW",) if name in given}
    return frozenset(
        (launch.kernel.__name__, name, str(value))
        for name, value in given.items()
        if not isinstance(value, int | float) or isinstance(value, bool)
    )


def recorded(model: str, width: str) -> list:
    """The launches of recorded steps of a tiny model, one that fills and keeps, and all ways to end it, on an A100."""
    from d3rt.backends.cuda_record import Recorder
    from d3rt.backends.cuda_slots import EOS_PLACES, Kind, SlotBuffers

    cpu = torch.device("cpu")
    dtype = budgets.FLOATS.get(width, torch.float16)
    weights = {} if width in budgets.FLOATS else {"weights": width}
    hf_model = tiny_models.fresh(model, dtype, **({} if width in budgets.FLOATS else tiny_models.PACKABLE))
    runtime = d3rt.compile(hf_model, backend="reference", batch_size=2, **weights)
    decoder, cache, rope = runtime.engine.decoder, runtime.engine.cache, runtime.engine.rope
    layers = decoder.config.num_hidden_layers
    buffers, slots = StepBuffers(decoder.config, cache, *rope, 2), SlotBuffers(2, tiny_models.VOCAB_SIZE, cpu)
    ops = Recorder(80, cpu, lambda tensor: True)
    buffers.keep(1)
    plan = Plan.of(LayerSet.of(range(1, layers - 1), layers), fill=[0], keep=[layers - 1])
    decoder.decode_step(ops, plan, buffers)
    for draw, penalty in itertools.product([False, True], repeat=2):
        kind = Kind(draw, penalty, EOS_PLACES)
        slots.provide(kind)
        slots.record(ops, kind, buffers.token, buffers.pos, buffers.logits)
    return ops.recorded.launches


@pytest.fixture(scope="module")
def gated():
    """kinds of each kernel of the gate on an A100."""
    return [kinds(*budgets.launches(job)) for job in budgets.jobs() if job.arch == 80]


@pytest.mark.parametrize("width", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("model", ["llama-biases", "mistral-window", "qwen2", "qwen3"])
def test_the_gate_has_every_kind_of_kernel_that_a_step_launches(gated, model, width):
    """Of sample and advance each combination, of the others each kind of each parameter."""
    together = frozenset().union(*gated)
    launches = recorded(model, width)
    assert {launch.op for launch in launches} == set(OPS)
    for launch in launches:
        assert kinds(launch) <= together, launch.op
        if launch.op in ("sample", "advance"):
            assert kinds(launch) in gated, launch.op


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
