"""How many threads are taken by default."""

import math
import os

import pytest

from d3rt.backends.cores import cpu_quota, usable_cores

AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that writes files below a root of our own, which it returns."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def write(files: dict[str, str]):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_without_a_limit_every_core_is_taken(system):
    root = system({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert cpu_quota(root) == math.inf
    assert usable_cores(root) == AFFINITY


def test_a_quota_of_one_and_a_half_cpus_takes_one(system):
    root = system({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"})
    assert cpu_quota(root) == 1.5
    assert usable_cores(root) == 1


def test_less_than_one_cpu_still_takes_one(system):
    root = system({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"})
    assert usable_cores(root) == 1


def test_the_tightest_cgroup_on_the_way_up_counts(system):
    root = system(
        {
            "proc/self/cgroup": "0::/kubepods/pod/box\n",
            "sys/fs/cgroup/kubepods/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/kubepods/pod/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/kubepods/pod/box/cpu.max": "max 100000\n",
        }
    )
    assert cpu_quota(root) == 3


def test_a_quota_of_the_first_cgroups_counts(system):
    root = system(
        {
            "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
        }
    )
    assert cpu_quota(root) == 2


def test_no_cgroups_at_all_is_no_limit(system):
    assert cpu_quota(system({})) == math.inf


def test_a_damaged_file_is_no_limit(system):
    root = system({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense"})
    assert cpu_quota(root) == math.inf


@pytest.mark.parametrize(
    ("wanted", "cores"), [("1", 1), ("1,2", 1), ("999", AFFINITY), ("", AFFINITY), ("x", AFFINITY)]
)
def test_omp_num_threads_is_respected(system, monkeypatch, wanted, cores):
    root = system({})
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert usable_cores(root) == cores
