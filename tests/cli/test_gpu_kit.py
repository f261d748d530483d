"""The GPU kit without a GPU: what it refuses, what it finds out about a machine, and the reports that it writes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_check
import gpu_machine
import gpu_report
import pytest
import torch

from d3rt import bench
from d3rt.backends import availability

ROOT = Path(__file__).parents[2]
MISSING = availability()["cuda"].get("unavailable")
without_gpu = pytest.mark.skipif(MISSING is None, reason="this machine has a GPU")
SMI = "550.54.15, 1410, 1593, 1410, 1593, Enabled, 400.00, 62.11, 31, Enabled\n"


def done(stdout="", stderr="", returncode=0):
    return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=returncode)


def script(name, *arguments, **environment):
    command = [sys.executable, ROOT / "bench" / name, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# -- without a GPU -----------------------------------------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize("name", ["gpu.py", "gpu_check.py"])
def test_without_a_gpu_it_says_why_in_one_line_and_ends_with_2(name):
    ended = script(name)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: backend 'cuda'")


def test_with_a_gpu_nothing_is_refused():
    gpu_machine.require_gpu(lambda: {"cuda": {"runs": "A100"}})


@without_gpu
def test_the_tests_on_a_device_are_skipped_by_name_with_the_backends_reason():
    command = [sys.executable, "-m", "pytest", "tests/device", "-q", "-k", "eos or embed-one", "-rs"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert " skipped" in ended.stdout and " passed" not in ended.stdout
    assert " ".join(MISSING.split())[:60] in " ".join(ended.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "8b"], "8b: unknown; choose of smollm2, 1b, 7b"),
        (["--rounds", "0"], "--rounds 0: it must be at least 1"),
        (["--tokens", "2"], "--tokens 2: it must be at least 3"),
    ],
)
def test_wrong_arguments_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.parse_arguments(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


# -- the machine -------------------------------------------------------------------------------------------------------


def cuda(name, memory, capability, multiprocessors):
    properties = SimpleNamespace(name=name, total_memory=memory, multi_processor_count=multiprocessors)
    return SimpleNamespace(
        get_device_properties=lambda at: properties, get_device_capability=lambda at: capability
    )


def test_a_device_is_described_with_clocks_and_versions():
    a100 = cuda("NVIDIA A100-SXM4-80GB", 79 * 2**30, (8, 0), 108)
    found = gpu_machine.find_device(a100, lambda *arguments, **options: done(SMI))
    assert (found.arch, found.multiprocessors, found.slug) == (80, 108, "nvidia-a100-sxm4-80gb")
    assert found.known.name == "a100-80"
    assert found.state["power limit, W"] == "400.00" and found.state["persistence mode"] == "Enabled"
    assert found.state["driver"] == "550.54.15" and found.state["SM clock, MHz"] == "1410"
    assert found.versions["torch"] == bench.versions()["torch"] and "triton" in found.versions


def test_a_machine_without_nvidia_smi_says_so():
    def missing(*arguments, **options):
        raise FileNotFoundError("nvidia-smi")

    assert "did not answer" in gpu_machine.smi_state(missing)["nvidia-smi"]
    broken = gpu_machine.smi_state(lambda *arguments, **options: done("", "no devices", 6))
    assert broken == {"nvidia-smi": "answered 6: no devices"}


@pytest.mark.parametrize(
    ("arch", "dtype"), [(70, "float16"), (75, "float16"), (80, "bfloat16"), (90, "bfloat16")]
)
def test_the_dtype_follows_the_device(arch, dtype):
    assert gpu_machine.sixteen_bits(arch) == dtype


def test_peers_that_are_not_there_are_named_with_the_way_to_get_them(tmp_path):
    nothing = gpu_machine.peers({}, lambda name: None, lambda name: None)
    assert nothing["HF eager"] is None
    assert "C compiler" in nothing["HF static cache, compiled"] and "pip install vllm" in nothing["vLLM"]
    assert "GPT_FAST is not set" in nothing["gpt-fast"]
    (tmp_path / "generate.py").touch()
    environment = {"GPT_FAST": str(tmp_path), "GPT_FAST_CHECKPOINT": "model.pth"}
    everything = gpu_machine.peers(environment, lambda name: object(), lambda name: "/usr/bin/cc")
    assert set(everything.values()) == {None}
    assert "no generate.py" in gpu_machine.peers(environment | {"GPT_FAST": "elsewhere"})["gpt-fast"]
    assert "CHECKPOINT" in gpu_machine.peers({"GPT_FAST": str(tmp_path)})["gpt-fast"]


def test_models_are_chosen_by_the_devices_memory():
    found = gpu_machine.fitting(32 * 2**30, {"small": 10**9, "large": 20 * 10**9})
    assert found["small"] is None and "20.0 GB do not fit 34.4 GB" in found["large"]


def test_a_window_keeps_what_d3_keeps():
    import d3rt

    for share, depth in ((1.0, 32), (0.75, 24), (0.5, 16)):
        kept = d3rt.parse(gpu.window(32, share)).schedule(32, 2).sets[1]
        assert kept.depth == depth and {0, 31} <= set(kept.layers)


def test_the_copy_bandwidth_is_what_a_copy_moves(monkeypatch):
    probe = gpu.CopyBandwidth("cpu", size=4000)
    times = iter([0.0, 2.0] * 4 + [0.0, 1.0])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(times))
    assert probe() == pytest.approx(2 * 4000 / 1e9)
    assert torch.equal(probe._to, probe._from)


# -- peers in processes of their own -----------------------------------------------------------------------------------


def settings(**more):
    return gpu.parse_arguments(["--rehearse", "--rounds", "2", "--tokens", "6"])


def test_vllms_answer_is_read_and_its_failure_named():
    asked = []

    def run(command, **options):
        asked.append(command)
        assert (Path(command[3]) / "config.json").is_file()
        return done("noise\nd3rt:[10.0, 12.5]\n")

    config = gpu.tiny_config()
    assert gpu.vllm_figures(config, "float16", settings(), run) == [10.0, 12.5]
    assert asked[0][4:] == ["32", "6", "2"]
    compile(gpu.VLLM, "vllm", "exec")
    with pytest.raises(RuntimeError, match="exit code 1: ValueError: no memory"):
        gpu.vllm_figures(
            config, "float16", settings(), lambda *a, **o: done("", "x\nValueError: no memory", 1)
        )


def test_gpt_fasts_answer_is_read():
    environment = {"GPT_FAST": "clone", "GPT_FAST_CHECKPOINT": "model.pth"}
    printed = "Average tokens/sec: 104.90\nMemory used: 13.9 GB\n"
    run = lambda command, **options: done(printed) if options["cwd"] == "clone" else done(returncode=1)  # noqa: E731
    assert gpu.gpt_fast_figures(settings(), run, environment) == [104.9]


def test_a_peer_that_fails_leaves_the_others_figures(monkeypatch):
    part = {"engines": [], "failed": {}}
    arguments = settings()
    arguments.peers = {"vLLM": None, "gpt-fast": None}

    def fails(*arguments):
        raise RuntimeError("exit code 1: out of memory")

    monkeypatch.setattr(gpu, "vllm_figures", fails)
    monkeypatch.setattr(gpu, "gpt_fast_figures", lambda arguments: [100.0, 104.0])
    gpu.add_processes(part, "7b", None, "float16", arguments)
    assert part["failed"] == {"vLLM": "exit code 1: out of memory"}
    assert part["engines"][0]["tokens_per_second"]["median"] == 102.0


# -- the check ---------------------------------------------------------------------------------------------------------

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.device.test_device_ops" name="test_a[1]" time="1.5"/>
<testcase classname="tests.device.test_device_generate" name="test_b" time="0.5">
  <properties><property name="equal tokens" value="64"/></properties></testcase>
<testcase classname="tests.device.test_device_generate" name="test_c" time="0">
  <failure message="off | by 3">..</failure></testcase>
<testcase classname="tests.device.test_device_ops" name="test_d" time="0">
  <skipped message="sm_70 has no bfloat16"/></testcase>
</testsuite></testsuites>"""


def check_report(**more):
    report = {
        "kind": "check",
        "rehearsal": False,
        "device": gpu_machine.Device("A100", 80, 2**36, 108).as_dict(),
    }
    report |= gpu_check.read_results(JUNIT) | {"sanitizer": {"memcheck": "ERROR SUMMARY: 0 errors"}} | more
    return report | {"verdict": gpu_check.verdict(report)}


def test_the_results_of_the_tests_are_read():
    report = check_report()
    assert report["tests"] == {"passed": 2, "failed": 1, "skipped": 1, "seconds": 2.0}
    assert report["failures"] == [{"test": "test_device_generate::test_c", "message": "off | by 3"}]
    assert report["notes"][0]["value"] == "64"


def test_the_verdict_is_right_only_when_something_ran_and_nothing_failed():
    assert check_report()["verdict"] == "WRONG, 1 failures"
    passed = {"passed": 9, "failed": 0, "skipped": 1, "seconds": 1.0}
    assert check_report(tests=passed)["verdict"] == "right"
    assert (
        "WRONG" in check_report(tests=passed, sanitizer={"racecheck": "FAILED with 86: hazards"})["verdict"]
    )
    assert "UNKNOWN" in check_report(tests=passed | {"passed": 0})["verdict"]


def test_the_page_of_a_check_has_verdict_failures_skips_and_how_to_send_it():
    page = gpu_report.render_check(check_report())
    assert page.startswith("# d3rt on A100: WRONG, 1 failures")
    for words in (
        "| test_device_generate::test_c | off / by 3 |",
        "sm_70 has no bfloat16",
        "equal tokens: 64",
    ):
        assert words in page
    assert "ERROR SUMMARY: 0 errors" in page and gpu_report.HOW_TO_SEND in page


def test_tests_that_never_started_are_a_failure(monkeypatch):
    report = gpu_check.run_tests([], False, lambda *arguments, **options: done(returncode=4))
    assert report["tests"]["failed"] == 1 and "before it wrote" in report["failures"][0]["message"]


def test_the_sanitizer_is_run_where_it_is_there_and_named_where_it_is_not():
    assert "not installed" in gpu_check.run_sanitizer(lambda name: None)["compute-sanitizer"]
    answers = {
        "memcheck": done("== ERROR SUMMARY: 0 errors\n"),
        "racecheck": done("== RACECHECK SUMMARY: 2 hazards\n", "", 86),
    }
    run = lambda command, **options: answers[command[2]]  # noqa: E731
    found = gpu_check.run_sanitizer(lambda name: f"/usr/bin/{name}", run)
    assert found == {
        "memcheck": "ERROR SUMMARY: 0 errors",
        "racecheck": "FAILED with 86: RACECHECK SUMMARY: 2 hazards",
    }


def test_what_the_sanitizer_watches_runs():
    import os

    ended = subprocess.run(
        [sys.executable, gpu_check.SANITIZED],
        env={**os.environ, "D3RT_BACKEND": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 2


def test_a_rehearsal_of_the_check_runs_and_says_that_it_is_one(tmp_path):
    ended = script("gpu_check.py", "--rehearse", "--out", tmp_path, "-k", "v100 or too_large", "-q")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (page,) = tmp_path.glob("check-rehearsal-*.md")
    assert "no figure below is a GPU's" in page.read_text()
    (data,) = tmp_path.glob("check-rehearsal-*.json")
    report = json.loads(data.read_text())
    assert report["verdict"] == "right" and report["tests"]["passed"] == 1 and report["tests"]["skipped"] == 1


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    ended = script("gpu.py", "--rehearse", "--tokens", 6, "--rounds", 2, "--prompt", 4, "--out", folder)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (data,) = folder.glob("bench-rehearsal-*.json")
    return json.loads(data.read_text()), data.with_suffix(".md").read_text()


def test_a_rehearsal_of_the_benchmark_measures_every_engine_and_depth(rehearsed):
    report, page = rehearsed
    (model,) = report["models"]
    assert [row["name"] for row in model["steps"]] == [*gpu.DEPTHS, gpu.POLICY]
    assert [row["layers"] for row in model["steps"]][0] == 4.0
    assert model["engines"][-1]["name"] == "HF eager" and "d3rt_is" in model["engines"][-1]
    assert all(len(row["us"]["values"]) == 2 for row in model["steps"]) and model["bandwidth"]["median"] > 0
    half = model["steps"][2]
    assert half["layers"] < 3 and 1 < half["expected"] < 2
    assert "no figure below is a GPU's" in page and "vLLM (left out of a rehearsal)" in page


def test_the_page_has_modelled_figures_beside_measured_ones(rehearsed):
    report, _ = rehearsed
    model = report["models"][0]
    for row in model["steps"]:
        row["modelled_us"] = 123.4
    page = gpu_report.render_bench(
        report | {"rehearsal": False, "models": [model | {"modelled_as": "a100-80"}]}
    )
    assert "us, modelled" in page and "123.4" in page and "modelled, not measured" in page
    assert "rehearsal on a CPU" not in page
    for row in re.findall(r"^\|.*\|$", page, flags=re.MULTILINE):
        assert row.count("|") in (4, 10), row


def test_a_model_that_does_not_fit_is_named_in_the_report(rehearsed):
    report, _ = rehearsed
    page = gpu_report.render_bench(report | {"models": [{"name": "7B", "left_out": "2 copies do not fit"}]})
    assert "## 7B\n\nLeft out: 2 copies do not fit." in page


def test_a_known_gpu_gets_modelled_figures_for_every_line():
    device = gpu_machine.Device("NVIDIA A100-SXM4-80GB", 80, 79 * 2**30, 108)
    arguments = settings()
    found = gpu.forecasts(gpu.load_config(gpu.MODELS["1b"]), device, "bfloat16", arguments)
    assert list(found) == [*gpu.DEPTHS, gpu.POLICY] and found["half"] < found["full depth"]
    unknown = gpu_machine.Device("NVIDIA L4", 89, 23 * 2**30, 58)
    assert gpu.forecasts(gpu.tiny_config(), unknown, "bfloat16", arguments) == {}


def test_the_make_targets_are_listed_with_what_they_do():
    lines = (ROOT / "Makefile").read_text().splitlines()
    for target in ("gpu-check", "gpu-bench"):
        assert any(line.startswith(f"{target}: venv ## ") for line in lines)
