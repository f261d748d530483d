"""What the benchmarks share: the bandwidth that each is held against, and the line that says what ran where.

`make bench` (pytest bench/ --benchmark-only) takes some seven minutes; `--every-shape` times the large models' shapes
at every batch size too. Nothing here asserts a time. Each result stands alone: its extra_info has bytes, GB/s, the
machine's bandwidth read just before and just after, and the share of it.
"""

from __future__ import annotations

import pytest
import torch

from d3rt import bench
from d3rt.backends import make_backend


def pytest_addoption(parser):
    parser.addoption("--every-shape", action="store_true", help="time every model shape at every batch size")


def pytest_report_header():
    machine = bench.machine()
    backend = make_backend("cpu").describe()
    return (
        f"timing on {machine['cpu']}, {machine['cores']} cores; d3rt {backend['runs']}, {backend['threads']} threads; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["d3rt"] = {**bench.machine(), **bench.versions(), **make_backend("cpu").describe()}


@pytest.fixture(scope="session")
def read_bandwidth():
    return bench.Bandwidth()


@pytest.fixture
def say(request):
    """A function: a line about this test that is shown at the end."""
    lines = request.config.stash.setdefault(LINES, [])
    return lambda line: lines.append(f"{request.node.name}: {line}")


@pytest.fixture
def held_against_bandwidth(benchmark, read_bandwidth, say):
    """A function: notes how many bytes one call of the benchmarked function moves (moved_bytes), and what else is said
    of it. What is known only after the test, its speed, is added then; the line is shown at the end."""
    facts = {}

    def note(moved_bytes: int, **more):
        facts.update(moved_bytes=moved_bytes, **more)

    before = read_bandwidth()
    yield note
    bandwidth = (before + read_bandwidth()) / 2
    if not facts or benchmark.disabled or benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.median / facts.pop("calls", 1)
    reached = facts["moved_bytes"] / seconds / 1e9
    benchmark.extra_info.update(
        facts,
        median_us=seconds * 1e6,
        gb_per_second=reached,
        bandwidth_gb_per_second=bandwidth,
        bandwidth_probe=bench.BANDWIDTH_PROBE,
        share_of_bandwidth=reached / bandwidth,
    )
    words = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "moved_bytes")
    say(
        f"{seconds * 1e6:.1f} us, {reached:.1f} GB/s of {bandwidth:.1f} "
        f"({reached / bandwidth:.0%}){', ' if words else ''}{words}"
    )


LINES = pytest.StashKey[list]()


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section(
            f"median time, bytes moved per second, read bandwidth ({bench.BANDWIDTH_PROBE})"
        )
        for line in lines:
            terminalreporter.write_line(line)
