"""`make gpu-bench`: d3rt on a GPU, by depth and beside Hugging Face, in one report to send.

    python bench/gpu.py                                       # all that fits, some 15 minutes
    python bench/gpu.py --models smollm2 --rounds 3           # a minute or two
    GPT_FAST=clone GPT_FAST_CHECKPOINT=.../model.pth python bench/gpu.py   # and gpt-fast, for Llama-2-7B

What is compared runs interleaved (bench.interleave), the bandwidth of the device is read in the same rounds, and what
the roofline model says stands beside it. vLLM and gpt-fast take the device for themselves, so each runs in a process of
its own after the rounds. d3rt is used through its public API: compile, generate, last_run, programs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_machine
import gpu_report
import torch
from torch import nn

import d3rt
from d3rt import bench, planning
from d3rt.models.loading import load_config
from d3rt.nodes import Outline
from d3rt.plan import Plan, format_ranges
from d3rt.quantize import Widths

# name on the command line -> hub id; smollm2 is the embedded model, the others are random weights of that shape
MODELS = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M",
    "1b": "meta-llama/Llama-3.2-1B",
    "7b": "meta-llama/Llama-2-7b-hf",
}
DEPTHS = {"full depth": 1.0, "three quarters": 0.75, "half": 0.5}
POLICY = "d3:alpha=0.998,start=0.5"
COPY_BYTES = 2**30  # many times any cache
PEER_SECONDS = 600


class CopyBandwidth:
    """Copies a large buffer within the device. A call returns GB/s, read and written, the best of five copies."""

    probe = "torch copy of 1 GiB within the device, read and written"

    def __init__(self, device: str, size: int = COPY_BYTES):
        self._from = torch.ones(size // 4, device=device)
        self._to = torch.empty_like(self._from)
        self._wait = torch.cuda.synchronize if device != "cpu" else lambda: None

    def __call__(self) -> float:
        seconds = []
        for _ in range(5):
            self._wait()
            begin = time.perf_counter()
            self._to.copy_(self._from)
            self._wait()
            seconds.append(time.perf_counter() - begin)
        return 2 * self._from.nbytes / min(seconds) / 1e9


def window(layers: int, share: float) -> str:
    """The bottom half and the top of a model, as D3(start=0.5) leaves them: a policy's text."""
    depth = max(2, round(share * layers))
    below = (depth + 1) // 2
    kept = [*range(below), *range(layers - (depth - below), layers)]
    return f"static:layers={format_ranges(kept, '+')}" if depth < layers else "full"


def make_model(name: str, dtype: str, config: Any = None) -> nn.Module:
    """On the CPU, in the dtype: the embedded SmolLM2, or random weights of the shape (no download)."""
    if name == "smollm2" and config is None:
        return d3rt.demo_model(dtype)[0]
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config or load_config(MODELS[name]), dtype=getattr(torch, dtype))
    made.generation_config.eos_token_id = None
    return made.eval()


def measure(
    name: str,
    model: nn.Module,
    device: gpu_machine.Device,
    where: tuple[str, str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One model's part of the report. where: d3rt's backend, and torch's device for Hugging Face and the bandwidth."""
    backend, torch_device = where
    dtype = str(model.dtype).removeprefix("torch.")
    layers, length = model.config.num_hidden_layers, arguments.prompt + arguments.tokens
    ids = torch.randint(3, 250, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    policies = {name: window(layers, share) for name, share in DEPTHS.items()} | {POLICY: POLICY}
    fast = d3rt.compile(model, backend=backend, dtype=dtype, max_seq_len=length)
    ours = {
        what: bench.D3rtRun(model, fast, ids, arguments.tokens, d3rt.parse(policy, num_layers=layers))
        for what, policy in policies.items()
    }
    probe = CopyBandwidth(torch_device, arguments.copy_bytes)
    theirs = copy.deepcopy(model).to(torch_device)
    runs: dict[str, Callable[[], float]] = dict(ours)
    runs["HF eager"] = bench.HuggingFaceRun(theirs, ids.to(torch_device), arguments.tokens)
    failed: dict[str, str] = {}
    if arguments.peers["HF static cache, compiled"] is None:
        static = bench.HuggingFaceRun(
            theirs, ids.to(torch_device), arguments.tokens, cache_implementation="static"
        )
        try:
            static()  # compiles, which no round should wait for
            runs["HF static cache, compiled"] = static
        except Exception as error:  # whatever torch.compile says: the others go on
            failed["HF static cache, compiled"] = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
    found = bench.interleave({**runs, "bandwidth": probe}, arguments.rounds, arguments.seconds, say(name))
    bandwidth, full = found["bandwidth"], found["full depth"]
    steps, forecast = [], forecasts(model.config, device, dtype, arguments)
    times = {
        what: bench.Spread(tuple(1e6 * median_step(one) for one in run.runs[1:]))
        for what, run in ours.items()
    }
    moved = {what: bench.bytes_per_token(run.runs[-1]) for what, run in ours.items()}
    for what, run in ours.items():
        reached = moved[what] / times[what].median / 1e3
        plans = set(run_plans(run, layers, arguments.tokens))
        programs = [program for program in fast.programs() if program.plan in plans]
        steps.append(
            {
                "name": what,
                "layers": run.runs[-1].mean_depth,
                "us": times[what].as_dict(),
                "modelled_us": forecast.get(what),
                "gb_per_second": reached,
                "share_of_bandwidth": reached / bandwidth.median,
                "over_full": times["full depth"].over(times[what]).as_dict(),
                "expected": moved["full depth"] / moved[what],
                "modes": sorted({getattr(program, "mode", "tape") for program in programs}),
                "graphs": len(programs),
                "graph_bytes": sum(getattr(program, "device_bytes", 0) for program in programs),
            }
        )
    engines = [
        {"name": f"d3rt, {what}" if what in ours else what, "tokens_per_second": found[what].as_dict()}
        | ({} if what in ours else {"d3rt_is": full.over(found[what]).as_dict()})
        for what in runs
    ]
    return {
        "name": MODELS.get(name, name),
        "widths": dtype,
        "bandwidth": bandwidth.as_dict(),
        "engines": engines,
        "failed": failed,
        "steps": steps,
        "tokens_equal_hf": ours["full depth"].tokens == runs["HF eager"].tokens,
        "modelled_as": device.known.name if device.known else None,
        "memory": str(fast.memory()),
    }


def release(torch_device: str) -> None:
    """Gives the device's memory back, for whoever comes next: torch keeps what was freed."""
    gc.collect()
    if torch_device != "cpu":
        torch.cuda.empty_cache()


def run_plans(run: bench.D3rtRun, layers: int, tokens: int) -> tuple[Plan, ...]:
    """The plans of the decode steps of a run."""
    return run.policy.schedule(layers, tokens).plans()[1:]


def median_step(stats: Any) -> float:
    """Seconds of the middle decode step; step 0 is sampling only."""
    steps = sorted(stats.step_seconds[1:])
    return steps[len(steps) // 2]


def forecasts(
    config: Any, device: gpu_machine.Device, dtype: str, arguments: argparse.Namespace
) -> dict[str, float]:
    """Modelled microseconds of a step, for each of DEPTHS and POLICY; nothing for a GPU that is not in the table."""
    if device.known is None:
        return {}
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    found = {}
    policies = {name: window(config.num_hidden_layers, share) for name, share in DEPTHS.items()} | {
        POLICY: POLICY
    }
    for what, policy in policies.items():
        forecast = planning.forecast(config, device.known, policy, short, arguments.prompt, arguments.tokens)
        found[what] = 1e6 * forecast.lines[-1].step_seconds
    return found


def say(model: str) -> Callable[[str], None]:
    return lambda name: print(f"{model}: {name}", file=sys.stderr, flush=True)


# -- peers that take the whole device ---------------------------------------------------------------------------------

VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, prompt, tokens, rounds = sys.argv[1], *map(int, sys.argv[2:5])
options = dict(skip_tokenizer_init=True, gpu_memory_utilization=0.8, load_format="dummy")
llm = LLM(folder, max_model_len=prompt + tokens, **options)
def seconds(count):
    wanted = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    llm.generate([{"prompt_token_ids": [7 * i % 200 + 3 for i in range(prompt)]}], wanted, use_tqdm=False)
    return time.perf_counter() - begin
seconds(tokens)
print("d3rt:" + json.dumps([(tokens - 1) / (seconds(tokens) - seconds(1)) for _ in range(rounds)]))
"""


def vllm_figures(config: Any, dtype: str, arguments: argparse.Namespace, run=subprocess.run) -> list[float]:
    """vLLM's decode tokens/s, each the time of a whole answer less that of one token; random weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(config)
        config.dtype, config.architectures = getattr(torch, dtype), ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        sizes = map(str, (arguments.prompt, arguments.tokens, arguments.rounds))
        done = run(
            [sys.executable, "-c", VLLM, folder, *sizes], capture_output=True, text=True, timeout=PEER_SECONDS
        )
    return json.loads(_answer(done, r"^d3rt:(.*)$"))


def gpt_fast_figures(
    arguments: argparse.Namespace, run=subprocess.run, environment=os.environ
) -> list[float]:
    """gpt-fast's own figure: its generate.py --compile, on the checkpoint that GPT_FAST_CHECKPOINT names."""
    command = [
        sys.executable,
        "generate.py",
        "--compile",
        "--checkpoint_path",
        environment["GPT_FAST_CHECKPOINT"],
    ]
    command += ["--max_new_tokens", str(arguments.tokens), "--num_samples", str(arguments.rounds)]
    done = run(command, cwd=environment["GPT_FAST"], capture_output=True, text=True, timeout=PEER_SECONDS)
    return [float(_answer(done, r"Average tokens/sec: ([\d.]+)"))]


def _answer(done: Any, pattern: str) -> str:
    found = re.search(pattern, done.stdout, flags=re.MULTILINE)
    if done.returncode != 0 or found is None:
        tail = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"exit code {done.returncode}: {tail[:200]}")
    return found[1]


def add_processes(
    part: dict[str, Any], name: str, config: Any, dtype: str, arguments: argparse.Namespace
) -> None:
    """vLLM's and gpt-fast's figures into a model's part of the report; what fails is named there."""
    tries: dict[str, Callable[[], list[float]]] = {"vLLM": lambda: vllm_figures(config, dtype, arguments)}
    if name == "7b":
        tries["gpt-fast"] = lambda: gpt_fast_figures(arguments)
    for engine, figures in tries.items():
        if arguments.peers[engine] is not None:
            continue
        say(name)(engine)
        try:
            speeds = bench.Spread(tuple(figures()))
        except (RuntimeError, ValueError, OSError, subprocess.TimeoutExpired) as error:
            part["failed"][engine] = str(error)
        else:
            label = f"{engine} (own process, not interleaved)"
            part["engines"].append({"name": label, "tokens_per_second": speeds.as_dict()})


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each run")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, at most")
    parser.add_argument(
        "--seconds", type=float, default=180, help="no further round of a model starts after that time"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), help="where the report goes (default: %(default)s)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with a tiny model: tries the script"
    )
    arguments = parser.parse_args(words)
    arguments.models = arguments.models.split(",")
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; choose of {', '.join(MODELS)}")
    for name, least in (("prompt", 1), ("tokens", 3), ("rounds", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} {getattr(arguments, name)}: it must be at least {least}")
    arguments.copy_bytes = 2**20 if arguments.rehearse else COPY_BYTES
    return arguments


def tiny_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4),
        **dict(vocab_size=256, max_position_embeddings=512, tie_word_embeddings=True),
    )


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    if arguments.rehearse:
        versions = bench.versions(gpu_machine.PACKAGES)
        device = gpu_machine.Device("rehearsal", 80, 2**33, 1, {"nvidia-smi": "not asked"}, versions)
        arguments.models, where = ["smollm2"], ("cpu", "cpu")
        arguments.peers = dict.fromkeys(gpu_machine.peers(), "left out of a rehearsal") | {"HF eager": None}
    else:
        gpu_machine.require_gpu()
        device, where = gpu_machine.find_device(torch.cuda), ("cuda", "cuda")
        arguments.peers = gpu_machine.peers()
    dtype = gpu_machine.sixteen_bits(device.arch)
    configs = {
        name: tiny_config() if arguments.rehearse else load_config(MODELS[name]) for name in arguments.models
    }
    widths = Widths.parse(None, dtype, None, None)
    fits = gpu_machine.fitting(
        device.memory, {name: Outline(config, widths).weight_bytes for name, config in configs.items()}
    )
    settings = {name: getattr(arguments, name) for name in ("prompt", "tokens", "rounds", "seconds")}
    report: dict[str, Any] = {
        "kind": "bench",
        "rehearsal": arguments.rehearse,
        "device": device.as_dict(),
        "settings": settings | {"bandwidth_probe": CopyBandwidth.probe, "policy": POLICY},
        "peers": arguments.peers,
        "models": [],
    }
    name_of_file = gpu_report.file_name("bench", device.slug)
    for name, config in configs.items():
        if fits[name]:
            report["models"].append({"name": MODELS[name], "left_out": fits[name]})
            continue
        model = make_model(name, dtype, config if arguments.rehearse else None)
        part = measure(name, model, device, where, arguments)
        del model
        release(where[1])
        add_processes(part, name, config, dtype, arguments)
        report["models"].append(part)
        # after every model: what has been measured is kept
        gpu_report.write(report, gpu_report.render_bench(report), arguments.out, name_of_file)
    if not any("engines" in part for part in report["models"]):
        gpu_machine.refuse(f"no model fits {device.name}: {report['models']}")
    if not arguments.rehearse:
        report["device"]["state after"] = gpu_machine.smi_state()
    written = gpu_report.write(report, gpu_report.render_bench(report), arguments.out, name_of_file)
    print(gpu_report.render_bench(report))
    print(f"wrote {written[0]} and {written[1]}", file=sys.stderr)


if __name__ == "__main__":
    main()
