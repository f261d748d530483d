"""`make gpu-check`: is d3rt right on this GPU? Runs tests/device and compute-sanitizer: a verdict, a report to send.

python bench/gpu_check.py                 # everything, some five minutes
python bench/gpu_check.py -k generate     # what follows is handed to pytest
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_machine
import gpu_report
import torch

from d3rt import bench

ROOT = Path(__file__).parents[1]
SANITIZED = Path(__file__).parent / "gpu_sanitized.py"
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 600
EXIT_FAILED = 1


def run_tests(more: list[str], rehearse: bool, run: Callable[..., Any] = subprocess.run) -> dict[str, Any]:
    """tests/device under pytest: counts, failures, what was skipped and why, and what the tests noted."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/device",
            "-m",
            "gpu",
            f"--junitxml={results}",
            *more,
        ]
        run(command, cwd=ROOT, env={**os.environ, "D3RT_REHEARSE": "1" if rehearse else "0"})
        if not results.is_file():
            return _nothing_ran("pytest ended before it wrote its results")
        return read_results(results.read_text(encoding="utf-8"))


def _nothing_ran(why: str) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 1, "skipped": 0, "seconds": 0.0}
    return {
        "tests": counts,
        "failures": [{"test": "tests/device", "message": why}],
        "skipped": [],
        "notes": [],
    }


def read_results(xml: str) -> dict[str, Any]:
    """What a JUnit file of pytest says."""
    failures, skipped, notes, passed, seconds = [], [], [], 0, 0.0
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        seconds += float(case.get("time", 0))
        broken = [child for child in case if child.tag in ("failure", "error")]
        left_out = case.find("skipped")
        if broken:
            message = broken[0].get("message") or (broken[0].text or "").strip() or broken[0].tag
            failures.append({"test": name, "message": message})
        elif left_out is not None:
            skipped.append({"test": name, "message": left_out.get("message", "")})
        else:
            passed += 1
        for noted in case.iter("property"):
            notes.append({"test": name, "name": noted.get("name"), "value": noted.get("value")})
    counts = {"passed": passed, "failed": len(failures), "skipped": len(skipped), "seconds": seconds}
    return {"tests": counts, "failures": failures, "skipped": skipped, "notes": notes}


def run_sanitizer(
    which: Callable[[str], str | None] = shutil.which, run: Callable[..., Any] = subprocess.run
) -> dict[str, str]:
    """What compute-sanitizer's tools find in one small generation; that it is not there, where it is not."""
    tool = which("compute-sanitizer")
    if tool is None:
        return {"compute-sanitizer": "not installed (it comes with the CUDA toolkit), so not run"}
    found = {}
    for check in SANITIZERS:
        command = [tool, "--tool", check, "--error-exitcode", "86", sys.executable, str(SANITIZED)]
        try:
            done = run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            found[check] = f"FAILED: did not end: {error}"[:200]
            continue
        summary = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
        words = (
            summary[-1]
            if summary
            else ((done.stderr or done.stdout).strip().splitlines() or ["no output"])[-1]
        )
        found[check] = words if done.returncode == 0 else f"FAILED with {done.returncode}: {words}"
    return found


def verdict(report: dict[str, Any]) -> str:
    """ "right": something passed, nothing failed."""
    failed = report["tests"]["failed"] + sum(
        words.startswith("FAILED") for words in report["sanitizer"].values()
    )
    if failed:
        return f"WRONG, {failed} failures"
    return "right" if report["tests"]["passed"] else "UNKNOWN, no test ran"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), help="where the report goes (default: %(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU: tries the script, not a GPU")
    arguments, more = parser.parse_known_args(words)
    if arguments.rehearse:
        versions = bench.versions(gpu_machine.PACKAGES)
        device = gpu_machine.Device("rehearsal", 80, 2**33, 1, {"nvidia-smi": "not asked"}, versions)
        sanitizer = {"compute-sanitizer": "left out of a rehearsal"}
    else:
        gpu_machine.require_gpu()
        device = gpu_machine.find_device(torch.cuda)
        sanitizer = None
    report: dict[str, Any] = {"kind": "check", "rehearsal": arguments.rehearse, "device": device.as_dict()}
    report |= run_tests(more, arguments.rehearse)
    report["sanitizer"] = run_sanitizer() if sanitizer is None else sanitizer
    report["verdict"] = verdict(report)
    name = gpu_report.file_name("check", device.slug)
    written = gpu_report.write(report, gpu_report.render_check(report), arguments.out, name)
    print(gpu_report.render_check(report))
    print(f"wrote {written[0]} and {written[1]}", file=sys.stderr)
    if report["verdict"] != "right":
        raise SystemExit(EXIT_FAILED)


if __name__ == "__main__":
    main()
