"""The GPU that a report is about: what it is, how it is clocked, what it can do, which peers are there.

Everything that asks the machine takes what it asks as an argument, so that it is tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from d3rt import bench
from d3rt.backends import availability
from d3rt.gpus import Gpu, closest

EXIT_REFUSED = 2
PACKAGES = ("d3rt", "torch", "transformers", "triton", "vllm", "flash-attn")
# nvidia-smi's names, and ours
SMI_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "SM clock, MHz",
    "clocks.mem": "memory clock, MHz",
    "clocks.max.sm": "highest SM clock, MHz",
    "clocks.max.mem": "highest memory clock, MHz",
    "persistence_mode": "persistence mode",
    "power.limit": "power limit, W",
    "power.draw": "power, W",
    "temperature.gpu": "temperature, C",
    "ecc.mode.current": "ECC",
}


def refuse(message: str) -> NoReturn:
    """One line on stderr and exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(EXIT_REFUSED)


def require_gpu(report: Callable[[], Mapping[str, Mapping[str, str]]] = availability) -> None:
    """Refuses, with the backend's own reason, where there is no GPU to run on."""
    if reason := report()["cuda"].get("unavailable"):
        refuse(reason)


@dataclass(frozen=True)
class Device:
    """One GPU. memory: bytes; state: what nvidia-smi says; versions: of the packages."""

    name: str
    arch: int  # 80 for sm_80
    memory: int
    multiprocessors: int
    state: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def known(self) -> Gpu | None:
        """Its entry in d3rt.gpus, for modelled figures; None where there is none."""
        return closest(self.name, self.memory, self.arch)

    @property
    def slug(self) -> str:
        """For file names."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_device(cuda: Any, run: Callable[..., Any] = subprocess.run) -> Device:
    """The current device; cuda: torch.cuda, or what stands in for it."""
    properties = cuda.get_device_properties(0)
    major, minor = cuda.get_device_capability(0)
    return Device(
        name=properties.name,
        arch=10 * major + minor,
        memory=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        state=smi_state(run),
        versions=bench.versions(PACKAGES) | {"CUDA of torch": _cuda_of_torch()},
    )


def _cuda_of_torch() -> str:
    import torch

    return str(torch.version.cuda or "none")


def smi_state(run: Callable[..., Any] = subprocess.run) -> dict[str, str]:
    """Clocks, power and driver as nvidia-smi has them now; {"nvidia-smi": why} without it."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": f"did not answer: {error}"}
    values = (
        [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
        if done.stdout.strip()
        else []
    )
    if done.returncode != 0 or len(values) != len(SMI_FIELDS):
        return {"nvidia-smi": f"answered {done.returncode}: {(done.stderr or done.stdout).strip()[:200]}"}
    return dict(zip(SMI_FIELDS.values(), values, strict=True))


def sixteen_bits(arch: int) -> str:
    """The 16 bit type that the device is timed in: bfloat16 where it has it, float16 before sm_80 (V100, T4)."""
    return "bfloat16" if arch >= 80 else "float16"


def peers(
    environment: Mapping[str, str] = os.environ,
    find_spec: Callable[[str], Any] = importlib.util.find_spec,
    which: Callable[[str], str | None] = shutil.which,
) -> dict[str, str | None]:
    """Every engine that the benchmark knows: None where it is there, else what is missing. torch.compile needs a C
    compiler."""
    folder = environment.get("GPT_FAST", "")
    missing: dict[str, str | None] = {
        "HF eager": None,
        "HF static cache, compiled": None,
        "vLLM": None,
        "gpt-fast": None,
    }
    if not (which("cc") or which("gcc") or environment.get("CC")):
        missing["HF static cache, compiled"] = "no C compiler, which torch.compile needs: apt install gcc"
    if find_spec("vllm") is None:
        missing["vLLM"] = "not installed: pip install vllm"
    if not folder:
        missing["gpt-fast"] = "GPT_FAST is not set: the folder of a clone of pytorch-labs/gpt-fast"
    elif not (Path(folder) / "generate.py").is_file():
        missing["gpt-fast"] = f"GPT_FAST={folder}: no generate.py in it"
    elif not environment.get("GPT_FAST_CHECKPOINT"):
        missing["gpt-fast"] = (
            "GPT_FAST_CHECKPOINT is not set: the model.pth that its scripts made of Llama-2-7B"
        )
    return missing


# Copies of the weights that are on the device at a time: d3rt's, transformers' own, and room for caches and graphs.
COPIES, ROOM = 2, 2 * 2**30


def fitting(memory: int, weight_bytes: Mapping[str, int]) -> dict[str, str | None]:
    """Each model: None where it fits the device, else why not."""
    return {
        name: None
        if COPIES * size + ROOM <= memory
        else f"{COPIES} copies of {size / 1e9:.1f} GB do not fit {memory / 1e9:.1f} GB"
        for name, size in weight_bytes.items()
    }
