"""What `d3rt bench` measures: policies and weight widths beside Hugging Face and llama.cpp, in interleaved rounds."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from d3rt.bench import llama_cpp
from d3rt.bench.bandwidth import BANDWIDTH_PROBE, Bandwidth
from d3rt.bench.machine import machine, versions
from d3rt.bench.parts import op_kinds, part_replay
from d3rt.bench.runs import D3rtRun, HuggingFaceRun, bytes_per_token
from d3rt.bench.spread import Spread, interleave
from d3rt.bench.steps import step_bytes, step_replay
from d3rt.compiling import compile
from d3rt.models.loading import DEMO_MODEL_NAME, load_model
from d3rt.plan import LayerSet, Plan
from d3rt.policies import EarlyExit, FullDepth, Policy, parse
from d3rt.quantize import parse_width
from d3rt.runtime import Runtime

FULL = "full"
FLOATS = ("float32", "bfloat16", "float16")
DEPTHS = 5  # depths of which the step is timed, at most
STEP_SECONDS = 0.15  # of replays of one step in one round
BANDWIDTH, STEP, PART = "bandwidth", "step", "part"


@dataclass(frozen=True)
class Settings:
    """What `d3rt bench` was asked for."""

    model: str | None = None
    weights: tuple[str, ...] = ("bfloat16",)
    policies: tuple[str, ...] = ("d3:alpha=0.998,start=0.5",)  # beside full depth, which always runs
    prompt: int = 128  # tokens
    new: int = 128
    rounds: int = 5
    backend: str = "auto"
    threads: int | None = None
    progress: Callable[[str], None] = field(default=lambda text: None, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("new", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}.")
        if not self.weights:
            raise ValueError("no --weights: give at least one width, such as bfloat16.")
        widths = (parse_width("weights", width) for width in self.weights)
        object.__setattr__(self, "weights", tuple(str(each).removeprefix("torch.") for each in widths))
        for policy in self.policies:
            parse(policy)


@dataclass
class Arm:
    """One line of the table: an engine at one width, with a policy if it is d3rt."""

    name: str
    engine: str
    weights: str
    policy: str | None
    run: Any  # D3rtRun, HuggingFaceRun or LlamaCppRun
    runtime: Runtime | None = None


def measure(
    settings: Settings, model: nn.Module | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Every figure, as JSON knows it: settings, bandwidth, runs, depths, notes. Greedy, one sequence, no end of
    sequence; every engine gets the same token ids and the same number of threads.

    model: in the place of the one that the settings name."""
    if model is None:
        settings.progress("loading the model")
        model, tokenizer = load_model(settings.model)
    length = settings.prompt + settings.new
    if length > model.config.max_position_embeddings:
        raise ValueError(
            f"--prompt {settings.prompt} and --new {settings.new}: the model has positions for "
            f"{model.config.max_position_embeddings} tokens."
        )
    layers = model.config.num_hidden_layers
    policies = {FULL: FullDepth()} | {
        str(policy): policy for policy in (parse(text, num_layers=layers) for text in settings.policies)
    }
    ids = torch.randint(
        0, model.config.vocab_size, (1, settings.prompt), generator=torch.Generator().manual_seed(0)
    )
    notes: list[str] = []
    kept = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        with tempfile.TemporaryDirectory(prefix="d3rt-bench-") as folder:
            arms = _arms(settings, model, policies, ids, length, Path(folder), notes)
            return _timed(settings, arms, layers, notes)
    finally:
        torch.set_num_threads(kept)


def _arms(
    settings: Settings,
    model: nn.Module,
    policies: Mapping[str, Policy],
    ids: Tensor,
    length: int,
    folder: Path,
    notes: list[str],
) -> list[Arm]:
    arms: list[Arm] = []
    for width in settings.weights:
        settings.progress(f"compiling {width}")
        runtime = compile(
            model, backend=settings.backend, weights=width, max_seq_len=length, threads=settings.threads
        )
        arms += [
            Arm(
                f"d3rt {width} {name}",
                "d3rt",
                width,
                name,
                D3rtRun(model, runtime, ids, settings.new, policy),
                runtime,
            )
            for name, policy in policies.items()
        ]
    device, threads = arms[0].runtime.backend.device, arms[0].runtime.backend.threads
    for dtype in dict.fromkeys(width if width in FLOATS else "bfloat16" for width in settings.weights):
        settings.progress(f"Hugging Face in {dtype}")
        same = next(model.parameters())
        if str(same.dtype) == f"torch.{dtype}" and same.device == device:
            theirs = model
        else:
            theirs = type(model)(model.config).to(device, getattr(torch, dtype)).eval()
            theirs.load_state_dict(model.state_dict())
            theirs.generation_config = model.generation_config
        run = HuggingFaceRun(theirs, ids.to(device), settings.new)
        arms.append(Arm(f"transformers {dtype}", "transformers", dtype, None, run))
    if device.type != "cpu":
        notes.append("llama.cpp, the bandwidth and steps by depth are not measured on a GPU: make gpu-bench.")
    elif not llama_cpp.installed():
        notes.append("llama.cpp is not installed (pip install llama-cpp-python), so it is not in the table.")
    else:
        for width in settings.weights:
            kind = llama_cpp.FORMATS[width]
            settings.progress(f"llama.cpp {kind}")
            try:
                path = llama_cpp.gguf_file(model, folder, kind)
                run = llama_cpp.LlamaCppRun(
                    path, model.config.vocab_size, ids[0].tolist(), settings.new, threads, length
                )
            except (ValueError, ImportError) as error:
                notes.append(f"llama.cpp {kind} is left out: {error}.")
                continue
            arms.append(Arm(f"llama.cpp {kind}", "llama.cpp", width, None, run))
    return arms


def _timed(settings: Settings, arms: list[Arm], layers: int, notes: list[str]) -> dict[str, Any]:
    first = arms[0].runtime
    on_cpu = first.backend.device.type == "cpu"
    measures: dict[str, Callable[[], float]] = {}
    steps: dict[str, tuple[str, LayerSet, int]] = {}
    sets: list[LayerSet] = []
    at = settings.prompt + settings.new // 2  # where single steps stand
    if on_cpu:
        measures[BANDWIDTH] = Bandwidth()
    for arm in arms:
        measures[arm.name] = arm.run
    if on_cpu:
        for runtime in {id(arm.runtime): arm.runtime for arm in arms if arm.runtime}.values():
            width = next(arm.weights for arm in arms if arm.runtime is runtime)
            found_sets = _depths(arms, runtime, layers, settings.new)
            sets = sets or found_sets
            for layer_set in found_sets:
                name = f"{STEP} {width} {layer_set.depth}"
                steps[name] = (width, layer_set, step_bytes(runtime, Plan.of(layer_set), at))
                measures[name] = _replays(
                    runtime, at, lambda r=runtime, s=layer_set: step_replay(r, Plan.of(s), at)
                )
    parts: dict[str, tuple[str, LayerSet, str]] = {}
    if on_cpu:
        for layer_set in {id(each): each for each in (sets[0], sets[-1])}.values():
            for kind in op_kinds(first, Plan.of(layer_set)):
                name = f"{PART} {layer_set.depth} {kind}"
                parts[name] = (arms[0].weights, layer_set, kind)
                measures[name] = _replays(
                    first, at, lambda s=layer_set, k=kind: part_replay(first, Plan.of(s), k)
                )
    rounds = 0

    def progress(name: str) -> None:
        nonlocal rounds
        number, rounds = rounds // len(measures), rounds + 1
        settings.progress(f"{f'round {number} of {settings.rounds}' if number else 'warming up'}: {name}")

    found = interleave(measures, settings.rounds, progress=progress)
    bandwidth = found.get(BANDWIDTH)
    speeds = {arm.name: found[arm.name] for arm in arms}
    prefill = {
        arm.name: Spread(tuple(settings.prompt / each for each in arm.run.prefill_seconds[1:]))
        for arm in arms
    }
    about = first.backend.describe()
    return {
        "kind": "d3rt bench",
        "settings": {
            "model": settings.model or DEMO_MODEL_NAME,
            "num_layers": layers,
            "weights": list(settings.weights),
            "prompt_tokens": settings.prompt,
            "new_tokens": settings.new,
            "rounds": settings.rounds,
            "threads": first.backend.threads,
            "backend": first.backend.name,
            "runs": about["runs"],
            "machine": machine(),
            "versions": versions(("d3rt", "torch", "transformers", "llama_cpp_python")),
            "bandwidth_probe": BANDWIDTH_PROBE if on_cpu else None,
        },
        "bandwidth": bandwidth.as_dict() if bandwidth else None,
        "runs": [_row(arm, arms, speeds, prefill[arm.name], bandwidth) for arm in arms],
        "depths": [
            _step(width, layer_set, size, found[name], bandwidth)
            for name, (width, layer_set, size) in steps.items()
        ],
        "parts": [
            {"weights": width, "depth": of.depth, "op": kind, "milliseconds": found[name].as_dict()}
            for name, (width, of, kind) in parts.items()
        ],
        "process_peak_bytes": _peak(),
        "notes": notes,
    }


def _depths(arms: list[Arm], runtime: Runtime, layers: int, new: int) -> list[LayerSet]:
    """Of the layer sets that the policies run, full depth and some others, the deepest first."""
    found = {LayerSet.full(layers)}
    for arm in arms:
        if arm.runtime is runtime and not isinstance(arm.run.policy, EarlyExit):
            found |= {plan.layer_set for plan in arm.run.policy.schedule(layers, new).plans()}
    by_depth = {each.depth: each for each in sorted(found, key=str)}
    depths = sorted(by_depth, reverse=True)
    last = len(depths) - 1
    chosen = {round(at * last / (DEPTHS - 1)) for at in range(DEPTHS)} if last else {0}
    return [by_depth[depths[at]] for at in sorted(chosen)]


def _replays(
    runtime: Runtime, position: int, record: Callable[[], Callable[[], None]]
) -> Callable[[], float]:
    """Milliseconds of one replay of what is recorded at the first call, on average over STEP_SECONDS of them."""
    replay: list[Callable[[], None]] = []

    def run() -> float:
        if not replay:
            replay.append(record())
        runtime.engine.for_rows(1).buffers.pos.fill_(position)
        count, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < STEP_SECONDS or count < 3:
            replay[0]()
            count += 1
        return spent / count * 1e3

    return run


def _row(
    arm: Arm, arms: list[Arm], speeds: Mapping[str, Spread], prefill: Spread, bandwidth: Spread | None
) -> dict[str, Any]:
    speed = speeds[arm.name]
    row: dict[str, Any] = {
        **{"name": arm.name, "engine": arm.engine, "weights": arm.weights, "policy": arm.policy},
        **{"decode": speed.as_dict(), "prefill": prefill.as_dict()},
        **dict.fromkeys(("mean_depth", "bytes_per_token", "bandwidth_share", "expected_speedup")),
        **dict.fromkeys(("measured_speedup", "over_transformers", "transformers", "peak_bytes")),
    }
    if arm.engine == "transformers":
        return row
    theirs = next(
        (each for each in arms if each.engine == "transformers" and each.weights == arm.weights), None
    ) or next(each for each in arms if each.engine == "transformers")
    row["over_transformers"] = speed.over(speeds[theirs.name]).as_dict()
    row["transformers"] = theirs.weights
    if arm.engine != "d3rt":
        return row
    stats = arm.run.runs[-1]
    size = bytes_per_token(stats)
    full = next(each for each in arms if each.runtime is arm.runtime and each.policy == FULL)
    row |= {"mean_depth": stats.mean_depth, "bytes_per_token": size}
    row["peak_bytes"] = arm.runtime.memory().peak
    if bandwidth:
        reached = Spread(tuple(each * size / 1e9 for each in speed.values))
        row["bandwidth_share"] = reached.over(bandwidth).as_dict()
    if arm is not full:
        row["expected_speedup"] = bytes_per_token(full.run.runs[-1]) / size
        row["measured_speedup"] = speed.over(speeds[full.name]).as_dict()
    return row


def _step(
    width: str, layer_set: LayerSet, size: int, milliseconds: Spread, bandwidth: Spread
) -> dict[str, Any]:
    reached = Spread(tuple(size / each / 1e6 for each in milliseconds.values))
    return {
        **{"weights": width, "depth": layer_set.depth, "layers": str(layer_set), "bytes": size},
        "milliseconds": milliseconds.as_dict(),
        "bandwidth_share": reached.over(bandwidth).as_dict(),
    }


def _peak() -> int:
    """The most memory that this process has held, everyone's weights included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
