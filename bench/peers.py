"""d3rt beside the engines that a CPU user would pick, in one run: decode and prefill at every weight width.

    python bench/peers.py --model smollm2 --json out/bench/peers.json
    python bench/peers.py --model 1b --engines d3rt,transformers,llama.cpp --widths fp32,16bit
    python bench/peers.py --peer-python path/to/python     # the peers' packages may live in an environment of their own

Each engine loads the same weights in a process of its own and then waits. The processes are asked in turn, round after
round (A B C A B C ...), so that all of them meet the same minutes of the machine; ratios are taken within a round. The
bandwidth is read in the same rounds. Peers that are not installed are named and left out.

What each engine runs is in ENGINES, below: which of its own formats stands for a width, and what is timed. Everyone
gets the same token ids, the same number of threads, greedy choice, no end of sequence, batch 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

WIDTHS = ("fp32", "16bit", "8bit", "4bit")
MODELS = ("smollm2", "1b")
OURS, SAME_FILE = "d3rt", "d3rt gguf"
# engine -> width -> its own name for what it runs there
ENGINES = {
    OURS: {"fp32": "float32", "16bit": "bfloat16", "8bit": "int8", "4bit": "int4"},
    "transformers": {"fp32": "float32", "16bit": "bfloat16"},
    "llama.cpp": {"fp32": "F32", "16bit": "BF16", "8bit": "Q8_0", "4bit": "Q4_0"},
    "llama.cpp f16": {"16bit": "F16"},
    SAME_FILE: {
        "8bit": "Q8_0",
        "4bit": "Q4_0",
    },  # d3rt on llama.cpp's file, whose blocks it takes as they are
    "onnxruntime-genai": {"fp32": "fp32", "4bit": "int4"},
}
NEEDS = {
    OURS: "d3rt",
    "transformers": "transformers",
    "llama.cpp": "llama_cpp",
    "llama.cpp f16": "llama_cpp",
    SAME_FILE: "llama_cpp",  # which makes the file
    "onnxruntime-genai": "onnxruntime_genai",
}


# -- the weights, once on disk in every engine's format --------------------------------------------------------------


def hugging_face_folder(model: str, work: Path) -> Path:
    """The model as a float32 Hugging Face folder: SmolLM2-135M, or Llama-3.2-1B's shape with random weights."""
    folder = work / model / "hf"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import d3rt

    if model == "smollm2":
        made, tokenizer = d3rt.demo_model()
        tokenizer.save_pretrained(folder)
    else:
        torch.manual_seed(0)
        made = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=2048,
                num_hidden_layers=16,
                intermediate_size=8192,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=32000,
                max_position_embeddings=8192,
                tie_word_embeddings=True,
            )
        )
        d3rt.demo_model()[1].save_pretrained(folder)  # some engines refuse to load without one
    made.save_pretrained(folder)
    return folder


def llama_cpp_module() -> ModuleType:
    """d3rt/bench/llama_cpp.py, by its path: the peers' environment need not have d3rt."""
    path = Path(__file__).parents[1] / "d3rt" / "bench" / "llama_cpp.py"
    spec = importlib.util.spec_from_file_location("d3rt_llama_cpp", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gguf_file(hf: Path, kind: str) -> Path:
    """The same weights as a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    if (path := hf.parent / f"{kind}.gguf").is_file():
        return path
    return llama_cpp_module().gguf_file(
        AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), hf.parent, kind
    )


def onnx_folder(hf: Path, kind: str) -> Path:
    """The same weights as ONNX Runtime GenAI's own model builder makes them."""
    folder = hf.parent / f"onnx-{kind}"
    if not (folder / "genai_config.json").is_file():
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            hf,
            "-o",
            folder,
            "-p",
            kind,
        ]
        # accuracy level 4: int8 activations, its fastest on CPUs
        extra = ["--extra_options", "int4_accuracy_level=4"] if kind == "int4" else []
        subprocess.run(
            [*map(str, command), "-e", "cpu", "-c", str(hf.parent / "onnx-cache"), *extra],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return folder


# -- one engine in its process ---------------------------------------------------------------------------------------

# prompt, number of new tokens -> seconds of the prefill, seconds of the decode steps
Run = Callable[[list[int], int], tuple[float, float]]


def load_d3rt(hf: Path, kind: str, threads: int, context: int) -> tuple[Run, dict]:
    return d3rt_run(hf, kind, threads, context)


def load_same_file(hf: Path, kind: str, threads: int, context: int) -> tuple[Run, dict]:
    width = {"Q8_0": "int8", "Q4_0": "int4"}[kind]
    return d3rt_run(hf.parent / f"{kind}.gguf", width, threads, context)


def d3rt_run(path: Path, width: str, threads: int, context: int) -> tuple[Run, dict]:
    import torch

    import d3rt
    from d3rt import bench

    torch.set_num_threads(threads)
    runtime = d3rt.compile(path, weights=width, threads=threads, max_seq_len=context)
    runtime.generation_config.eos_token_id = None
    runtime.generation_config.pad_token_id = 0

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        ids = torch.tensor([prompt])
        begin = time.perf_counter()
        runtime.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        seconds = time.perf_counter() - begin
        prefill = runtime.last_run.prefill_seconds
        facts["bytes_per_token"] = bench.bytes_per_token(runtime.last_run) if new_tokens > 1 else 0
        return prefill, seconds - prefill

    facts = {"version": d3rt.__version__, "runs": runtime.backend.describe()["runs"]}
    return run, facts


def load_transformers(hf: Path, kind: str, threads: int, context: int) -> tuple[Run, dict]:
    import torch
    import transformers
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, kind)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    class Clock(BaseStreamer):
        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        ids, clock = torch.tensor([prompt]), Clock()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]

    return run, {"version": transformers.__version__, "runs": f"torch {torch.__version__}"}


def load_llama_cpp(hf: Path, kind: str, threads: int, context: int) -> tuple[Run, dict]:
    import llama_cpp

    vocab_size = json.loads((hf / "config.json").read_text())["vocab_size"]
    timed = llama_cpp_module().LlamaCppRun(gguf_file(hf, kind), vocab_size, [], 0, threads, context)
    system = llama_cpp.llama_print_system_info().decode()
    return timed.run, {"version": timed.version, "runs": system}


def load_onnx(hf: Path, kind: str, threads: int, context: int) -> tuple[Run, dict]:
    import onnxruntime_genai as og

    config = og.Config(str(onnx_folder(hf, kind)))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        params = og.GeneratorParams(model)
        length = len(prompt) + new_tokens
        params.set_search_options(min_length=length, max_length=length, do_sample=False)
        generator = og.Generator(model, params)
        begin = time.perf_counter()
        generator.append_tokens([prompt])
        generator.generate_next_token()
        prefilled = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        return prefilled - begin, time.perf_counter() - prefilled

    return run, {"version": og.__version__, "runs": "cpu"}


LOADERS = {
    OURS: load_d3rt,
    "transformers": load_transformers,
    "llama.cpp": load_llama_cpp,
    "llama.cpp f16": load_llama_cpp,
    SAME_FILE: load_same_file,
    "onnxruntime-genai": load_onnx,
}


def work(arguments: argparse.Namespace) -> None:
    """A worker: loads, then answers each line [prompt tokens, new tokens] of stdin with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    kind = ENGINES[arguments.worker][arguments.width]
    run, facts = LOADERS[arguments.worker](Path(arguments.hf), kind, arguments.threads, arguments.context)
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        prompt, new_tokens = json.loads(line)
        # any ids do: nobody's speed depends on them
        prefill, decode = run([7 * i % 30000 + 10 for i in range(prompt)], new_tokens)
        answer = {"prefill_seconds": prefill, "decode_seconds": decode} | facts
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """An engine's process, seen from outside."""

    def __init__(self, engine: str, width: str, hf: Path, arguments: argparse.Namespace):
        theirs = arguments.peer_python if engine not in (OURS, SAME_FILE) else None
        python = theirs or sys.executable
        self.engine = engine
        self._process = subprocess.Popen(
            [python, __file__, "--worker", engine, "--width", width, "--hf", str(hf)]
            + ["--threads", str(arguments.threads), "--context", str(arguments.context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if arguments.verbose else subprocess.DEVNULL,
            text=True,
            # No wait policy: OpenMP threads then spin for about a millisecond and sleep. "passive" would halve
            # llama.cpp's speed, "active" would have those of an engine that waits take a core from the one that runs.
            env={name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"},
        )
        self.facts = self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.engine} ended with {self._process.wait()}; --verbose shows why")
        return json.loads(line)

    def run(self, prompt: int, new_tokens: int) -> dict:
        print(json.dumps([prompt, new_tokens]), file=self._process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# -- the comparison --------------------------------------------------------------------------------------------------


def installed(engine: str, peer_python: str | None) -> bool:
    if engine == OURS or not peer_python:
        return importlib.util.find_spec(NEEDS[engine]) is not None
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({NEEDS[engine]!r}) is None)"
    return subprocess.run([peer_python, "-c", check]).returncode == 0


def compare(width: str, engines: list[str], hf: Path, arguments: argparse.Namespace) -> dict:
    """Every engine at one width: decode tokens/s and prefill tokens/s of every round, and the bandwidth in between."""
    from rich.console import Console

    from d3rt import bench

    console = Console(stderr=True)
    workers, results = [], {}
    for engine in engines:
        with console.status(f"{width}: loading {engine} ({ENGINES[engine][width]})"):
            try:
                workers.append(Worker(engine, width, hf, arguments))
            except RuntimeError as error:
                console.print(f"{width}: {error}")
    bandwidth = bench.Bandwidth()
    read = []
    try:
        for counted in range(-1, arguments.rounds):  # the first round warms everyone up
            for worker in list(workers):
                try:
                    with console.status(
                        f"{width}: round {counted + 1} of {arguments.rounds}, {worker.engine}"
                    ):
                        answer = worker.run(arguments.prompt, arguments.tokens)
                        prefill = worker.run(arguments.prefill, 1)
                except RuntimeError as error:  # a peer that crashes must not take the others' figures with it
                    console.print(f"{width}: {error}")
                    workers.remove(worker)
                    results.pop(worker.engine, None)
                    continue
                if counted < 0:
                    continue
                of = results.setdefault(
                    worker.engine,
                    {"format": ENGINES[worker.engine][width], "decode": [], "prefill": []} | worker.facts,
                )
                of["decode"].append((arguments.tokens - 1) / answer["decode_seconds"])
                of["prefill"].append(arguments.prefill / prefill["prefill_seconds"])
                if "bytes_per_token" in answer:
                    of["bytes_per_token"] = answer["bytes_per_token"]
            if counted >= 0:
                read.append(bandwidth())
    finally:
        for worker in workers:
            worker.end()
    return {"width": width, "bandwidth": read, "engines": results}


def lines(result: dict) -> list[str]:
    """One width's part of the table, as Markdown."""
    ours, same_file = (result["engines"].get(name) for name in (OURS, SAME_FILE))
    rows = []

    def ratio(mine: dict | None, of: dict, what: str) -> str:
        if not mine or mine is of:
            return "-"
        ratios = [a / b for a, b in zip(mine[what], of[what], strict=True)]
        return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"

    for engine, of in result["engines"].items():
        row = [result["width"], engine, of["format"]]
        for what in ("decode", "prefill"):
            row.append(f"{statistics.median(of[what]):.1f} ({min(of[what]):.0f}-{max(of[what]):.0f})")
            row.append(ratio(ours, of, what))
            row.append(ratio(same_file, of, what) if engine == "llama.cpp" else "-")
        share = "-"
        if "bytes_per_token" in of:
            reached = [speed * of["bytes_per_token"] / 1e9 for speed in of["decode"]]
            shares = [a / b for a, b in zip(reached, result["bandwidth"], strict=True)]
            share = (
                f"{statistics.median(reached):.1f} of {statistics.median(result['bandwidth']):.1f} GB/s, "
                f"{statistics.median(shares):.0%}"
            )
        rows.append(f"| {' | '.join([*row, share])} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--widths", default=",".join(WIDTHS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens before the timed decode")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of the timed decode")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the timed prefill")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-python", help="the Python that has the peers' packages (default: this one)")
    parser.add_argument("--work", type=Path, default=Path("out/peers"), help="where model files are kept")
    parser.add_argument("--json", type=Path, help="write every round's figures there")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    for hidden in ("worker", "width", "hf"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, default=1024, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    asked, widths = arguments.engines.split(","), arguments.widths.split(",")
    for given, known in ((asked, ENGINES), (widths, WIDTHS)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: unknown; choose of {', '.join(known)}")
    absent = [engine for engine in asked if not installed(engine, arguments.peer_python)]
    if absent:
        print(f"not installed, so left out: {', '.join(absent)}", file=sys.stderr)
    hf = hugging_face_folder(arguments.model, arguments.work)

    from d3rt import bench

    print(f"{arguments.model}: prompt {arguments.prompt}, {arguments.tokens} new tokens, prefill of ", end="")
    print(f"{arguments.prefill}, {arguments.threads} threads, {arguments.rounds} rounds; {bench.machine()}")
    head = [
        "width",
        "engine",
        "format",
        "decode tok/s",
        "d3rt is",
        "on its file",
        "prefill tok/s",
        "d3rt is",
        "on its file",
        "weights and K,V read",
    ]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    results = []
    for width in widths:
        engines = [engine for engine in asked if engine not in absent and width in ENGINES[engine]]
        results.append(compare(width, engines, hf, arguments))
        print("\n".join(lines(results[-1])), flush=True)
        if arguments.json:  # after every width: what has been measured is kept
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            settings = {name: str(value) for name, value in vars(arguments).items() if value is not None}
            whole = {
                "settings": settings,
                "machine": bench.machine(),
                "bandwidth_probe": bench.BANDWIDTH_PROBE,
            }
            arguments.json.write_text(json.dumps(whole | {"results": results}, indent=1))


if __name__ == "__main__":
    main()
