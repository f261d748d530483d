"""Every op on the shapes of real models (TIMED_CASES of d3rt.kernels.cases), as a decode step meets it: cold.

A step reads each weight once, so an op timed over and over on one small matrix would be timed from the cache. Here a
tape holds as many copies of the op, each on its own buffers, as exceed the caches; the time is the tape's over the
copies. By default every op runs on SmolLM2-135M's shape at every batch size and on the larger models' at batch 1.
"""

from __future__ import annotations

import math

from torch import Tensor

from d3rt.backends import make_backend
from d3rt.kernels import cases

COLD_BYTES = 192 * 2**20  # moved by one replay: several times a last-level cache
MAX_COPIES = 256  # small ops, whose recording would take longer than the timing
MAX_HELD_BYTES = 2**30  # ops that touch little of what they hold: embed, kv_fill
ROUNDS, WARMUP_ROUNDS = 15, 3


def copied(value):
    """A deep copy of an argument's tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [type(layer)(*(copied(part) for part in layer)) for layer in value]
    return value


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--every-shape")
    smallest = cases.MODEL_SHAPES[0].name
    chosen = [
        case
        for of_op in cases.TIMED_CASES.values()
        for case in of_op
        if every or case.B == 1 or case.name.startswith(smallest)
    ]
    metafunc.parametrize("case", chosen, ids=str)


def test_op(benchmark, held_against_bandwidth, case: cases.Case):
    benchmark.group = case.op
    first = cases.make(case)
    held = sum(tensor.nbytes for _, tensor in cases.tensors(first))
    moved = cases.bytes_moved(case)
    copies = max(1, min(MAX_COPIES, math.ceil(COLD_BYTES / moved), MAX_HELD_BYTES // held))
    sets = [first, *({name: copied(value) for name, value in first.items()} for _ in range(copies - 1))]
    backend = make_backend("cpu")
    for arguments in sets:
        backend.own([tensor for _, tensor in cases.tensors(arguments)])

    def all_copies(ops):
        for arguments in sets:
            cases.call(ops, case, arguments)

    program = backend.record(all_copies)
    benchmark.pedantic(program.replay, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    held_against_bandwidth(moved, calls=copies)
    benchmark.extra_info.update(
        op=case.op, shape=case.name, dtype=str(case.dtype), batch=case.B, copies=copies
    )
