"""What the compiler makes of every kernel, for every type and architecture: registers, spills, shared memory, the width
of the loads of each weight stream, tensor-core instructions, occupancy.

`python tests/budgets.py` writes tests/gpu/budgets.json anew (with --print it only prints what it found), and
tests/gpu/test_compile_gate.py holds the kernels against it. Needs no GPU: Triton brings ptxas, cuobjdump and nvdisasm.
Which sizes: those of Llama-3.2-1B (few key-value heads), attention also at SmolLM2-135M's and Llama-2-7B's, and
Llama-2-7B with a norm over each head; biases, windows and mixed weights once. sample and advance are as the cuda
backend records them. 1 slot on every architecture, 16 slots on sm_70, sm_80 and sm_90 (the tiles of
the others are theirs), the numbers between on sm_80.

How to read it: the loads of scales and minima of packed weights are no weight stream here; they are 1/16 to 1/4 of the
codes' bytes and come 64 or 128 bits at a time. With 16 slots a thread holds so many sums that 3 to 5 blocks fit a
multiprocessor, and 2 or fewer where it holds those of two packed matrices or of a whole head. The products of weights
are FMAs, not tensor-core instructions: see kernels/cuda/matvec.py. Attention has no tensor-core instructions below
sm_80, where Triton makes FMAs of tl.dot, nor in float32, which is not rounded.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from d3rt.kernels.cases import MODEL_SHAPES
from d3rt.kernels.packing import GROUP, TILE_ROWS, PackedMatrix
from d3rt.kernels.reference import FillLayer

BUDGETS = Path(__file__).parent / "gpu" / "budgets.json"
CACHE = Path(__file__).parents[1] / "build" / "triton"
SHAPES = {shape.name: shape for shape in MODEL_SHAPES}
LENGTH = 4096  # positions in the cache
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WIDTHS = (*FLOATS, "int8", "int4", "int4 with minima")
MATVECS = ("norm_qkv_rope", "proj_add", "norm_gate_up", "kv_fill", "norm_logits")
REPRESENTATIVES = (70, 80, 90)
SAMPLINGS = ("sample", "sample+penalty", "draw", "draw+penalty")
# With what only some models have.
SWITCHED = (
    *("norm_qkv_rope+bias", "kv_fill+bias", "kv_fill+head_norm", "proj_add+bias", "norm_gate_up+bias"),
    "attention+window",
)
MIXED = ("norm_qkv_rope+mixed", "kv_fill+mixed")  # one matrix is int8, as in some GGUF files
STREAM = "# the weight stream"  # marks the loads of weights and cache in the kernels

# Per multiprocessor: bytes of shared memory, warps, blocks (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"). Registers are 65536 everywhere, given out to a warp in lots of 256.
RESIDENT = {
    70: (98304, 64, 32),
    75: (65536, 32, 16),
    80: (167936, 64, 32),
    86: (102400, 48, 16),
    89: (102400, 48, 24),
    90: (233472, 64, 32),
}


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    op: str  # as in plans.py, and what more it has, as "norm_qkv_rope+bias"; "draw" is `sample` with a random number
    width: str  # of the weights, or of the cache
    model: str
    batch: int
    arch: int

    def __str__(self) -> str:
        return f"{self.op} {self.width} {self.model} B{self.batch} sm_{self.arch}"


@dataclass(frozen=True)
class Measured:
    registers: int
    stack: int  # bytes a thread: spills
    shared: int  # bytes a block
    stream_bits: tuple[int, ...]  # widths of the loads of weights or cache, each once
    tensor_core: int  # HMMA instructions
    blocks: int  # resident on a multiprocessor
    occupancy: float  # their share of the warps that it can hold


def jobs() -> Iterator[Job]:
    from d3rt.kernels.cuda.tiles import ARCHS

    model = "Llama-3.2-1B"
    for arch in ARCHS:
        for width in WIDTHS:
            yield from (Job(op, width, model, 1, arch) for op in (*MATVECS, "embed"))
        for width in FLOATS:
            yield Job("attention", width, model, 1, arch)
            yield Job("keep_hidden", width, model, 1, arch)
        yield from (Job(op, "float32", model, 1, arch) for op in (*SAMPLINGS, "advance"))
    for arch in REPRESENTATIVES:
        for width in ("float16", "int8", "int4 with minima"):
            yield from (Job(op, width, model, 16, arch) for op in MATVECS)
        yield from (Job("attention", "float16", other, 1, arch) for other in ("SmolLM2-135M", "Llama-2-7B"))
        for batch in (1, 16):
            yield Job("norm_qkv_rope", "float16", "Llama-2-7B", batch, arch)
            for width in ("float16", "int4 with minima"):
                yield Job("norm_qkv_rope+head_norm", width, "Llama-2-7B", batch, arch)
        yield from (Job(op, "float16", model, 1, arch) for op in SWITCHED)
        yield from (Job(op, "int4 with minima", model, 1, arch) for op in MIXED)
        yield Job("advance", "float32", model, 16, arch)
    for batch in (2, 4, 8):
        for width in ("float16", "int4 with minima"):
            yield from (Job(op, width, model, batch, 80) for op in MATVECS)


def launches(job: Job) -> list:
    """The job's launches, on tensors without memory."""
    from d3rt.backends.cuda_record import Recorder
    from d3rt.backends.cuda_slots import EOS_PLACES, Kind, SlotBuffers
    from d3rt.kernels.cuda import plans

    m, batch, arch = SHAPES[job.model], job.batch, job.arch

    def tensor(*sizes: int, dtype=torch.float32):
        return torch.empty(*sizes, dtype=dtype, device="meta")

    def weight(rows: int, inputs: int):
        return matrix(job.width, rows, inputs)

    def cache_lines():
        kept = FLOATS.get(job.width, torch.float16)
        return tensor(batch, m.G, LENGTH, m.d, dtype=kept)

    def ints(*sizes: int):
        return tensor(*sizes, dtype=torch.int32)

    op, *switches = job.op.split("+")

    def optional(switch: str, *sizes: int):
        return tensor(*sizes) if switch in switches else None

    def bias(rows: int):
        return optional("bias", rows)

    x, norm = tensor(batch, m.D), tensor(m.D)
    rope = (tensor(LENGTH, m.d // 2), tensor(LENGTH, m.d // 2), ints(batch))
    heads, rows, gain = tensor(batch, m.H, m.d), m.G * m.d, optional("head_norm", m.d)
    wk, wv = weight(rows, m.D), matrix("int8" if "mixed" in switches else job.width, rows, m.D)
    if op == "embed":
        return plans.embed(arch, x, ints(batch), weight(m.V, m.D))
    if op == "norm_qkv_rope":
        w = (weight(m.H * m.d, m.D), wk, wv, bias(m.H * m.d), bias(rows), bias(rows))
        return plans.norm_qkv_rope(
            arch, heads, cache_lines(), cache_lines(), x, norm, *w, gain, gain, *rope, 1e-5
        )
    if op == "attention":
        window = LENGTH // 2 if "window" in switches else 0
        return plans.attention(
            arch, heads, heads, cache_lines(), cache_lines(), ints(batch), m.d**-0.5, window
        )
    if op == "proj_add":
        return plans.proj_add(arch, x, tensor(batch, m.F), weight(m.D, m.F), bias(m.D))
    if op == "norm_gate_up":
        w = (weight(m.F, m.D), weight(m.F, m.D), bias(m.F), bias(m.F))
        return plans.norm_gate_up(arch, tensor(batch, m.F), x, norm, *w, 1e-5)
    if op == "kv_fill":
        layer = FillLayer(cache_lines(), cache_lines(), norm, wk, wv, bias(rows), bias(rows), gain)
        return plans.kv_fill(arch, [layer] * 4, x, *rope, 1e-5)
    if op == "keep_hidden":
        return plans.keep_hidden(arch, tensor(batch, LENGTH, m.D, dtype=FLOATS[job.width]), x, ints(batch))
    if op == "norm_logits":
        return plans.norm_logits(arch, tensor(batch, m.V), x, norm, weight(m.V, m.D), 1e-5)
    if op in ("sample", "draw", "advance"):
        kind = Kind(op == "draw", "penalty" in switches, EOS_PLACES)
        ops, slots = Recorder(arch, x.device, lambda tensor: True), SlotBuffers(batch, m.V, x.device)
        slots.provide(kind)
        slots.record(ops, kind, ints(batch), ints(batch), tensor(batch, m.V))
        sample, advance = ops.recorded.launches
        return [advance if op == "advance" else sample]
    raise ValueError(f"no such job: {job}")


def matrix(width: str, rows: int, inputs: int, device: str = "meta") -> torch.Tensor | PackedMatrix:
    """A matrix of anything: without memory, or on another device in memory that nobody has touched."""
    if width in FLOATS:
        return torch.empty(rows, inputs, dtype=FLOATS[width], device=device)
    format, tiles, groups = width[:4], -(-rows // TILE_ROWS), inputs // GROUP
    words, kind = (8, torch.int8) if format == "int8" else (4, torch.uint8)

    def of_groups():
        return torch.empty(tiles, groups, TILE_ROWS, dtype=torch.float16, device=device)

    data = torch.empty(tiles, groups, words, TILE_ROWS, 4, dtype=kind, device=device)
    return PackedMatrix(format, rows, inputs, data, of_groups(), of_groups() if "minima" in width else None)


def resident_blocks(arch: int, registers: int, shared: int, warps: int) -> int:
    """Blocks of a kernel that a multiprocessor holds at a time."""
    memory, most_warps, most_blocks = RESIDENT[arch]
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // 4 // of_warp * 4 // warps  # its four parts have a quarter of the registers each
    taken = shared + (1024 if arch >= 80 else 0)  # the system's own
    return min(most_blocks, most_warps // warps, by_registers, memory // taken if taken else most_blocks)


@cache
def stream_lines() -> frozenset[tuple[str, int]]:
    """(file, line) of every marked load in the kernels."""
    from d3rt.kernels.cuda import plans

    return frozenset(
        (path.name, number)
        for path in Path(plans.__file__).parent.glob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if STREAM in line
    )


def stream_bits(ptx: str) -> tuple[int, ...]:
    """The widths in bits of all loads from global memory that come from a marked line, each once."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) ".*?([^/"]+)"', ptx, re.M))
    widths, marked = set(), False
    for line in ptx.splitlines():
        if at := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            marked = (files[at[1]], int(at[2])) in stream_lines()
        elif marked and (load := re.search(r"ld\.global(?:[.:\w]+?)??(?:\.v(\d))?\.b(\d+) ", line)):
            widths.add(int(load[1] or 1) * int(load[2]))
        elif marked and (copy := re.search(r"cp\.async\.\w+\.shared\.global .*?, 0x(\w+)", line)):
            widths.add(8 * int(copy[1], 16))
    return tuple(sorted(widths))


def tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def measure(job: Job) -> Measured:
    (launch,) = launches(job)
    return inspected(launch, job.arch)


def inspected(launch, arch: int) -> Measured:
    """Compiles it and looks at the result."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    from d3rt.kernels.cuda.compiled import compile

    made = compile(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        # nvdisasm knows sm_75 and later; before, Triton has no tensor-core products.
        code = tool("nvdisasm", "-c", file.name) if launch.op == "attention" and arch >= 75 else ""
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    registers, stack = int(found["REG"]), int(found["STACK"])
    blocks = resident_blocks(arch, registers, made.shared, made.warps)
    return Measured(
        registers=registers,
        stack=stack,
        shared=made.shared,
        stream_bits=stream_bits(made.ptx),
        tensor_core=len(re.findall(r"\bHMMA\.", code)),
        blocks=blocks,
        occupancy=round(blocks * made.warps / RESIDENT[arch][1], 3),
    )


def measure_all() -> dict[str, Measured]:
    """Every job, in a process for each processor: a spawned one, so that what was imported here stays out of it."""
    every = sorted(jobs(), key=lambda job: -job.batch)  # the long ones first
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return dict(sorted(zip(map(str, every), pool.map(measure, every), strict=True)))


def main() -> None:
    import triton

    lines = [f"  {json.dumps(name)}: {json.dumps(asdict(made))}" for name, made in measure_all().items()]
    head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n'
    text = head + ",\n".join(lines) + "\n }\n}\n"
    if sys.argv[1:] == ["--print"]:
        print(text)
    else:
        BUDGETS.write_text(text, encoding="utf-8")
        print(f"{len(lines)} kernels: {BUDGETS}")


if __name__ == "__main__":
    main()
