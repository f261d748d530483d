"""Which kernels are run as PTX, on which cases: every op, on the architectures that stand for the others.

`python tests/ptx_jobs.py` compiles them all, the last first, so that a test run that begins with the first has
only half of them left to compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import packed_cases
import torch
from ptx.device import compiled

from d3rt.kernels import cases
from d3rt.kernels.cases import Case

ARCHS = (70, 80, 90)
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Of cases.TEST_CASES: odd sizes, gaps, biases, head norms, GQA, windows, splits ("long_rows", attention's), some slots.
SHAPES = {
    "embed": "odd gapped",
    "norm_qkv_rope": "head_dim6 gqa3 head_dim64 head_dim128 gapped long_rows",
    "attention": "first_position chunk_over gqa3 gqa16 head_dim128 head_dim512 window_in_chunk window_over_chunks",
    "proj_add": "odd triple gapped long_rows many_rows",
    "norm_gate_up": "odd block_over tile_and_rest long_rows",
    "kv_fill": "three_layers head_dim6 head_dim80 head_dim128",
    "keep_hidden": "odd full_batch",
    "norm_logits": "odd triple gapped",
}
# On sm_80 all of these; elsewhere fewer, but of attention, which goes another way on sm_70.
FEWER = {
    "embed": "gapped",
    "norm_qkv_rope": "head_dim64 long_rows",
    "attention": "gqa3 head_dim128 window_over_chunks",
    "proj_add": "odd long_rows",
    "norm_gate_up": "odd",
    "kv_fill": "three_layers",
    "keep_hidden": "odd",
    "norm_logits": "odd",
}
SIXTEEN_SLOTS = {"norm_qkv_rope": "gqa16", "attention": "head_dim6", "proj_add": "full_batch"}
# Long rows, so that columns are split over programs.
LONG_PACKED = [
    Case("proj_add", "packed_long", torch.float32, D=20, K=4096),
    Case("norm_gate_up", "packed_long", torch.float32, D=3072, F=20),
]


# Here LLVM packs a register that nobody writes into a pair of which one half is used.
UNDEFINED = Case(
    *("norm_qkv_rope", "packed_head_dim96", torch.float32),
    **dict(B=5, D=192, H=3, G=1, d=96, S=7, pos=(6, 4, 3, 1, 0), head_norm=True),
)


@dataclass(frozen=True)
class Job:
    """width: of the weights, and of the cache where it is a float type. slack: elements between tensors; 8 leave them
    aligned for the widest loads, 5 do not."""

    case: Case
    width: str
    arch: int
    slack: int = 8

    def __str__(self) -> str:
        case = str(self.case) if self.width in FLOATS else f"{self.case}-{self.width.replace(' ', '_')}"
        return f"{case}-{'' if self.slack == 8 else 'unaligned-'}sm_{self.arch}"

    def arguments(self) -> dict:
        if self.width in FLOATS:
            return cases.make(self.case, slack=self.slack)
        return packed_cases.packed_arguments(self.case, self.width)


def _of(shapes: dict[str, str], width: str, arch: int, **more) -> Iterator[Job]:
    for op, names in shapes.items():
        for name in names.split():
            case = next(case for case in cases.TEST_CASES[op] if case.name == name)
            yield Job(replace(case, dtype=FLOATS[width]), width, arch, **more)


def jobs() -> list[Job]:
    found = []
    for arch in ARCHS:
        shapes = SHAPES if arch == 80 else FEWER | {"attention": SHAPES["attention"]}
        found += _of(shapes, "float16", arch)
        for case in [*packed_cases.CASES, *LONG_PACKED]:
            widths = packed_cases.WIDTHS if arch == 80 else ("int8", "int4 with minima")
            found += [
                Job(case, width, arch)
                for width in widths
                if case.B < 16 and (arch == 80 or "long" in case.name or case.B == 1)
            ]
    found += _of(FEWER, "bfloat16", 80)
    found += _of({op: FEWER[op] for op in ("norm_qkv_rope", "attention", "proj_add")}, "bfloat16", 90)
    found += _of(FEWER, "float32", 80)
    found += _of(FEWER, "float16", 80, slack=5)
    found.append(Job(UNDEFINED, "int4 with minima", 70))
    return [*found, *_of(SIXTEEN_SLOTS, "float16", 80)]


def launches(job: Job) -> list:
    from d3rt.kernels.cuda import plans

    return getattr(plans, job.case.op)(job.arch, **job.arguments())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in reversed(jobs()):
        for launch in launches(job):
            compiled(launch, job.arch)
