"""How many threads a process should run: the cores it may use, by whatever rule they are rationed."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """The least of: cores this process may be scheduled on, its cgroups' CPU quota, and OMP_NUM_THREADS, if set.

    A container that was given two CPUs of sixty-four by quota still sees sixty-four cores: threads beyond the quota
    would be stopped in the middle of a step, and the others would wait for them. root: where /proc and /sys are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.strip().isdigit() and int(wanted) > 0:
        cores = min(cores, int(wanted))
    return max(1, math.floor(min(cores, cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs that the process's cgroups (v1 or v2) grant, the tightest of them; infinity without a limit."""
    quotas = [math.inf]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            mounts = root / "sys/fs/cgroup"
            if controllers == "":
                quotas += [_v2(folder) for folder in _up(mounts, path)]
            elif "cpu" in controllers.split(","):
                quotas += [_v1(folder) for folder in _up(mounts / controllers, path)]
                quotas += [_v1(folder) for folder in _up(mounts / "cpu", path)]
    return min(quotas)


def _up(mount: Path, path: str) -> list[Path]:
    """The cgroup's folder and those above it. In a container its own is the mount itself, whatever `path` says."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts) + 1)]


def _v2(folder: Path) -> float:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    return math.inf


def _v1(folder: Path) -> float:
    with suppress(OSError, ValueError):
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        return quota / period if quota > 0 else math.inf
    return math.inf
