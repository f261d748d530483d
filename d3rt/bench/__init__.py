"""Measuring: what the demo, the command line and bench/ share, so that every number is taken the same way.

On a shared machine, speeds drift by a quarter from one minute to the next. So what is compared runs interleaved
(A B C A B C ...), a comparison is the median of the ratios within each round, the spread is told with it, and the
memory bandwidth that a speed is held against is read in the same rounds. What is compared is up to the callers.
"""

from d3rt.bench.bandwidth import BANDWIDTH_PROBE, BANDWIDTH_PROBE_BYTES, Bandwidth
from d3rt.bench.machine import cpu_name, machine, versions
from d3rt.bench.runs import D3rtRun, HuggingFaceRun, TokenClock, bytes_per_token, without_eos
from d3rt.bench.spread import MIN_ROUNDS, Spread, interleave
from d3rt.bench.steps import step_bytes, step_replay, teacher_forced

__all__ = [
    "BANDWIDTH_PROBE",
    "BANDWIDTH_PROBE_BYTES",
    "Bandwidth",
    "D3rtRun",
    "HuggingFaceRun",
    "MIN_ROUNDS",
    "Spread",
    "TokenClock",
    "bytes_per_token",
    "cpu_name",
    "interleave",
    "machine",
    "step_bytes",
    "step_replay",
    "teacher_forced",
    "versions",
    "without_eos",
]
