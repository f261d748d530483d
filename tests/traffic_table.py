"""How many bytes each launch of a decode step moves between the chip and its memory, against the fewest possible.

The whole grid of each launch runs in tests/ptx, on weights that hold anything, at the shapes of published models, one
sequence, every position of a cache of 4096 in use. `moved` is what tests/ptx/traffic.py counts: matrices and K,V as
often as they are asked for, everything else once. `least` is the sectors of what must be read or written: weights,
activations, K,V once each. They differ by what a kernel leaves for itself, the sums of splits, and by what it reads
twice.

`python tests/traffic_table.py` prints the table; with --short the one of README.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import step_launches
import torch
from ptx.device import Device, compiled
from ptx.traffic import SECTOR, mark
from torch import Tensor

from d3rt.kernels.cases import MODEL_SHAPES, ModelShape
from d3rt.plan import LayerSet, Plan

LENGTH = 4096
FILLED = 2
# Every op, kv_fill of two layers at once.
PLAN = Plan.of(LayerSet.of([FILLED], FILLED + 2), fill=range(FILLED), keep=[FILLED + 1])
WAVE = 4096  # threads at a time: what keeps numpy's temporaries in the processor's caches
SHAPES = {shape.name: shape for shape in MODEL_SHAPES}
WIDTHS = ("float16", "int8", "int4 with minima")
WHAT = [
    *((model, width, 80) for model in SHAPES for width in WIDTHS),
    *(("Llama-3.2-1B", "float16", arch) for arch in (70, 90)),
]
ATTENTION = [(model, arch) for model in SHAPES for arch in (70, 80, 90)]
OPS = (
    *("embed", "kv_fill", "norm_qkv_rope", "attention", "proj_add", "norm_gate_up", "proj_add"),
    *("keep_hidden", "norm_logits", "sample", "advance"),
)


@dataclass(frozen=True)
class Row:
    op: str
    splits: int
    least: int  # bytes
    moved: int
    missed: int  # bytes of what must be read or written and was not

    @property
    def ratio(self) -> float:
        return self.moved / self.least


def is_stream(name: str) -> bool:
    """Of the tensors of norm_qkv_rope, attention, proj_add, norm_gate_up, kv_fill and norm_logits, by name."""
    part = name.rpartition("].")[2]
    return part.startswith("w") or part in ("k_cache", "v_cache")


def needed(launch, reachable: dict[str, Tensor], last: int = LENGTH - 1) -> Iterator[Tensor]:
    """The parts of a launch's tensors that its op has to read or write, for one sequence at position `last`."""
    named = {name: at for name, at in launch.arguments.items() if isinstance(at, Tensor)}
    if launch.uploads:  # the layers of kv_fill, its first argument
        named |= {name: tensor for name, tensor in reachable.items() if name.startswith("[0]")}
    for name, tensor in named.items():
        part = name.rpartition(".")[2]
        if part in ("k_cache", "v_cache"):
            yield tensor[:, :, : last + 1] if launch.op == "attention" else tensor[:, :, last]
        elif part == "hidden":
            yield tensor[:, last]
        elif part in ("cos", "sin"):
            yield tensor[last]
        elif name in launch.uploads:
            yield from (tensor[row, column] for row, column in tensor.nonzero().tolist())
        elif launch.op == "embed" and name in ("table", "scales", "minima"):
            # Of token 0; packed, it is row 0 of a tile of 16.
            packed = launch.constants["FORMAT"] != "plain"
            yield tensor[0].select(-1 - (name == "table"), 0) if packed else tensor[0]
        elif launch.op == "advance" and name == "ring":
            yield tensor[0]
        elif launch.op == "sample" and name in ("settings", "step"):
            continue  # for draws and penalties; this one is greedy
        else:
            yield tensor


def measure(shape: ModelShape, width: str, arch: int) -> Iterator[Row]:
    """Every launch of the step, in order."""
    step = step_launches.collect(arch, shape, PLAN, width, LENGTH, device="cpu")
    for launch, reachable in zip(step.launches, step.reachable, strict=True):
        yield _count(launch, reachable, arch)


def attention(shape: ModelShape, arch: int, device: str = "cpu"):
    """The launch of attention over a float16 cache of LENGTH, its position to be set."""
    from d3rt.kernels.cuda import plans

    heads, cache = (1, shape.H, shape.d), (1, shape.G, LENGTH, shape.d)
    out, q = (torch.zeros(heads, device=device) for _ in range(2))
    k_cache, v_cache = (torch.zeros(cache, dtype=torch.float16, device=device) for _ in range(2))
    pos = torch.zeros(1, dtype=torch.int32, device=device)
    (launch,) = plans.attention(arch, out, q, k_cache, v_cache, pos, shape.d**-0.5, 0)
    return launch


def measure_attention(shape: ModelShape, arch: int, context: int) -> Row:
    """Attention to the first `context` positions of the cache."""
    launch = attention(shape, arch)
    launch.arguments["pos"].fill_(context - 1)
    return _count(launch, dict(launch.arguments), arch, context - 1)


def _count(launch, reachable: dict[str, Tensor], arch: int, last: int = LENGTH - 1) -> Row:
    wave = max(1, WAVE // (32 * launch.warps))
    device = Device(
        arch,
        ordered=False,
        streams=is_stream,
        waves=lambda blocks: [range(i, min(i + wave, blocks)) for i in range(0, blocks, wave)],
    )
    machine = device.launch(launch, reachable)
    must = mark(machine.memory, needed(launch, reachable, last))
    missed = SECTOR * int((must & ~machine.traffic.touched).sum())
    splits = launch.constants.get("SPLIT", 1)
    return Row(launch.op, splits, SECTOR * int(must.sum()), machine.traffic.bytes, missed)


def compile_ahead() -> None:
    """All kernels of the table into Triton's cache, the last first, beside a process that begins with the first."""
    for model, arch in ATTENTION:
        compiled(attention(SHAPES[model], arch, "meta"), arch)
    for model, width, arch in reversed(WHAT):
        for launch in step_launches.collect(arch, SHAPES[model], PLAN, width, LENGTH).launches:
            compiled(launch, arch)


def print_all() -> None:
    print("| model | weights | arch | op | splits | least | moved | moved / least |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for model, width, arch in WHAT:
        for row in measure(SHAPES[model], width, arch):
            figures = f"{row.splits} | {row.least} | {row.moved} | {row.ratio:.4f}"
            print(f"| {model} | {width} | sm_{arch} | {row.op} | {figures} |", flush=True)


def print_short() -> None:
    print("| moved / least, weights in float16, int8, int4 |", " | ".join(SHAPES), "|")
    print("| --- |", " | ".join("---" for _ in SHAPES), "|")
    rows = {(m, w): list(measure(SHAPES[m], w, 80)) for m in SHAPES for w in WIDTHS}
    for i, op in enumerate(OPS):
        cells = [", ".join(f"{rows[model, width][i].ratio:.3f}" for width in WIDTHS) for model in SHAPES]
        print(f"| {op} |", " | ".join(cells), "|")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"": print_all, "--short": print_short, "--compile": compile_ahead}["".join(sys.argv[1:])]()
