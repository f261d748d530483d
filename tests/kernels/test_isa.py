"""Which kernels run: the environment variable, what a processor lacks, and NEON under emulation."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from d3rt import _C

CHECK_NEON = Path(__file__).parents[1] / "csrc" / "check_neon.sh"


def python(code, **environment):
    """Runs code in a new interpreter, away from the repository root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_isas_of_this_processor_are_named_slowest_first():
    isas = _C.available_isas()
    assert isas[0] == "scalar"
    expected = {
        "x86_64": {"scalar", "avx2", "avx512", "avx512_bf16"},
        "aarch64": {"scalar", "neon", "neon_dotprod"},
    }
    assert set(isas) <= expected.get(platform.machine(), {"scalar"})
    if platform.machine() == "x86_64":
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
        assert ("avx2" in isas) == {"avx2", "fma"}.issubset(flags)
        avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
        assert ("avx512" in isas) == avx512.issubset(flags)
        assert ("avx512_bf16" in isas) == (avx512 | {"avx512_bf16"}).issubset(flags)


@pytest.mark.parametrize("isa", _C.available_isas())
def test_the_environment_variable_chooses(isa):
    ran = python("from d3rt import _C; print(_C.selected_isa())", D3RT_CPU_ISA=isa)
    assert ran.stdout.strip() == isa, ran.stderr


@pytest.mark.parametrize("isa", ["nonsense", "AVX2", "neon" if platform.machine() == "x86_64" else "avx2"])
def test_an_isa_that_cannot_run_is_refused_with_those_that_can(isa):
    code = "from d3rt import _C; _C.Tape(_C.ThreadPool(1), _C.Arena())"
    ran = python(code, D3RT_CPU_ISA=isa)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: ISA '{isa}'") and last.endswith(", ".join(_C.available_isas())), last
    with pytest.raises(ValueError, match=f"ISA '{isa}'"):
        _C.Tape(_C.ThreadPool(1), _C.Arena(), isa=isa)


def test_threads_that_the_system_does_not_give_are_an_error_not_an_abort():
    code = """
import resource
from d3rt import _C
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)  # room for a dozen stacks
try:
    _C.ThreadPool(500)
except Exception as error:
    print(type(error).__name__, error)
print(_C.ThreadPool(2).size)
"""
    ran = python(code)
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, ran.stderr
    assert lines[0].startswith("D3rtError threads=500: the system gives this process no more than")
    assert lines[1] == "2"


def test_a_forked_child_that_uses_the_pool_is_told_so_and_ends():
    code = """
import os, time
import torch
from d3rt import _C
x = torch.ones(1, 1)
arena, pool = _C.Arena(), _C.ThreadPool(2)
arena.add(x)
tape = _C.Tape(pool, arena)
tape.proj_add(x=x, a=x, w=x, bias=None)
tape.replay()
time.sleep(0.05)  # the worker parks
if os.fork() == 0:
    try:
        tape.replay()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    del tape, pool  # must not wait for a worker that only the parent has
    os._exit(0)
_, status = os.wait()
tape.replay()
print(status, x.item())
"""
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("D3rtError") and "fork()" in lines[0]
    assert lines[1] == "0 6.0"  # 1 + 1 * 1, then 2 + 2 * 2; the child added nothing


@pytest.mark.slow
def test_the_neon_kernels_pass_the_cpp_tests_under_qemu():
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64-static") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"missing {', '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user-static)")
    ran = subprocess.run([CHECK_NEON], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    assert "ISAs: scalar neon neon_dotprod\n" in ran.stdout
