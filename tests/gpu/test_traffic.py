"""What each launch of a decode step moves between the chip and its memory: hardly more than its weights, activations,
and K,V once. Counted over the whole grid of the PTX that is really emitted; the table is tests/traffic_table.py."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import traffic_table

from d3rt.kernels import cases
from d3rt.kernels.cases import Case

pytest.importorskip("triton", reason="triton is not installed")
from ptx.device import Device, Emitted  # noqa: E402
from ptx.memory import Memory  # noqa: E402
from ptx.traffic import KEPT, SECTOR, Traffic, mark  # noqa: E402

from d3rt.kernels.cuda import tiles  # noqa: E402

MOST = 1.05


@pytest.fixture(scope="module")
def compiling_ahead():
    process = subprocess.Popen(
        [sys.executable, traffic_table.__file__, "--compile"], stderr=subprocess.DEVNULL
    )
    yield
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("model, width, arch", traffic_table.WHAT)
def test_every_launch_moves_at_most_a_twentieth_more_than_it_must(compiling_ahead, model, width, arch):
    rows = list(traffic_table.measure(traffic_table.SHAPES[model], width, arch))
    assert [row.op for row in rows] == list(traffic_table.OPS)
    for row in rows:
        assert row.missed == 0, f"{row}: something that the op needs was never touched"
        assert 1 <= row.ratio <= MOST, row


CONTEXTS = (512, 1024, 2048, 4096)


@pytest.mark.slow
@pytest.mark.parametrize("model, arch", traffic_table.ATTENTION)
def test_attention_does_so_however_few_positions_there_are(compiling_ahead, model, arch):
    """Two splits are the fewest there are sums of; one leaves none."""
    shape = traffic_table.SHAPES[model]
    fewest = tiles.fewest_positions(shape.H // shape.G, shape.d, 2)
    for context in (1, 2 * fewest - 1, 2 * fewest, *CONTEXTS):
        row = traffic_table.measure_attention(shape, arch, context)
        assert row.missed == 0, f"{context} positions: {row}"
        assert 1 <= row.ratio <= MOST, f"{context} positions: {row}"


def machine_of(case: Case, waves=lambda blocks: None):
    """The machine that ran the case's launch, counting."""
    device = Device(80, ordered=False, streams=traffic_table.is_stream, waves=waves)
    cases.call(Emitted(device), case, cases.make(case))
    (machine,) = device.machines
    return machine


@pytest.mark.parametrize(
    "case",
    [
        Case("proj_add", "small", torch.float16, D=96, K=2048),
        Case("norm_logits", "small", torch.float16, D=320, V=700),
    ],
    ids=str,
)
def test_the_count_does_not_depend_on_how_many_blocks_run_at_a_time(case):
    whole = machine_of(case).traffic.bytes
    assert whole == machine_of(case, lambda blocks: [[block] for block in range(blocks)]).traffic.bytes
    fives = lambda blocks: [range(i, min(i + 5, blocks)) for i in range(0, blocks, 5)]  # noqa: E731
    assert whole == machine_of(case, fives).traffic.bytes


def test_what_all_blocks_read_is_counted_once_and_so_is_each_sector_of_the_matrix():
    machine = machine_of(Case("norm_logits", "unsplit", torch.float16, D=192, V=192))
    assert machine.blocks == 3, "64 rows each, and each reads all inputs and their norms"
    everything = mark(machine.memory, machine.memory.tensors.values())
    assert machine.traffic.bytes == SECTOR * int(everything.sum())


def asked(*accesses: tuple[int, int]) -> int:
    """Sectors of a matrix of 64 sectors that count, when (block, first sector) are asked for in turn: 32 threads of the
    block, 16 bytes each."""
    matrix = torch.zeros(64 * SECTOR + 32, dtype=torch.uint8)
    matrix = matrix[-matrix.data_ptr() % SECTOR :][: 64 * SECTOR]
    memory = Memory({"w": matrix})
    traffic = Traffic(memory, [matrix])
    for block, first in accesses:
        traffic.count(memory.numbers(matrix)[0][0] + first * SECTOR + 16 * np.arange(32), np.full(32, block))
    return traffic.asked


def test_a_sector_counts_again_for_another_block_and_when_it_has_left_the_cache():
    assert asked((0, 0)) == 16
    assert asked((0, 0), (0, 16)) == 32
    assert asked((0, 0), (0, 0)) == 16, "a load of each half"
    assert asked((0, 0), (1, 0)) == 32
    others = [(0, 16)] * KEPT
    assert asked((0, 0), *others, (0, 0)) == 48
