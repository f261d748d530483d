"""What the cuda backend says when it cannot be had, or cannot run what is asked of it: before any work, with the reason
and the way out. The driver and torch.cuda are small fakes."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import d3rt.backends
from d3rt.backends import cuda_device, make_backend
from d3rt.backends.base import Needs
from d3rt.backends.cuda_device import Found, find, torch_runs_on
from d3rt.errors import BackendUnavailableError, CudaError, UnsupportedModelError, UnsupportedOptionError

GIB = 2**30
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


class Torch:
    """As much of torch.cuda as `find` asks."""

    def __init__(self, arch=80, name="NVIDIA A100", built_for=CUDA_13, available=True):
        self.is_available = lambda: available
        self.current_device = lambda: 1
        self.get_device_name = lambda ordinal: name
        self.get_device_capability = lambda ordinal: divmod(arch, 10)
        self.get_arch_list = lambda: built_for


def retained(driver, ordinal):
    return SimpleNamespace(ordinal=ordinal)


def found(cuda=None, toolkit="13.0", devices=2, version=13000, has_triton=True, context=retained) -> Found:
    return find(
        cuda or Torch(),
        toolkit,
        lambda: SimpleNamespace(version=version, devices=lambda: devices),
        context,
        lambda: has_triton,
    )


def test_the_gpu_that_torch_uses_is_found():
    gpu = found()
    assert (gpu.ordinal, gpu.context.ordinal, gpu.kernel_arch) == (1, 1, 80)


V100 = dict(arch=70, name="Tesla V100")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(devices=0), "no CUDA device found; available here: cpu, reference"),
        (dict(toolkit=None), "built without CUDA: pip install torch.*whl/cu126 for a V100"),
        (
            dict(cuda=Torch(available=False), version=12040),
            "needs a driver for CUDA 13.0, and this one is for 12.4: update",
        ),
        (
            dict(cuda=Torch(**V100)),
            r"no code for Tesla V100 \(sm_70\), only for sm_75, .*--index-url https://download.pytorch.org/whl/cu126",
        ),
        (
            dict(cuda=Torch(arch=60, name="P100", built_for=CUDA_12)),
            "P100 is sm_60, and there are kernels for sm_70",
        ),
        (dict(cuda=Torch(arch=100, name="B200")), "B200 is sm_100, and there are kernels for .*sm_90"),
        # a Tegra chip, which runs no machine code of other chips of its generation
        (dict(cuda=Torch(arch=87, name="Orin")), "Orin is sm_87, and there are kernels for .*sm_86, .* only"),
        (dict(has_triton=False), "Triton.*is not installed: pip install 'triton"),
    ],
)
def test_what_is_missing_is_named_with_the_way_out(given, words):
    with pytest.raises(BackendUnavailableError, match=f"backend 'cuda': .*{words}"):
        found(**given)


def test_a_device_that_the_driver_does_not_hand_out_is_unavailable():
    def busy(driver, ordinal):
        raise CudaError("cuDevicePrimaryCtxRetain: CUDA_ERROR_DEVICE_UNAVAILABLE (46)")

    with pytest.raises(BackendUnavailableError, match="NVIDIA A100 cannot be used: .*UNAVAILABLE"):
        found(context=busy)


def test_a_device_on_which_torch_cannot_start_cuda_is_unavailable():
    def broken():
        raise RuntimeError("CUDA unknown error - this may be due to\n an incorrectly set up environment")

    cuda = Torch()
    cuda.current_device = broken
    with pytest.raises(
        BackendUnavailableError, match="cannot start CUDA: .*due to an incorrectly.*cpu, reference"
    ):
        found(cuda)


def test_a_v100_is_taken_with_a_torch_that_has_code_for_it():
    assert found(Torch(**V100, built_for=CUDA_12), toolkit="12.6").kernel_arch == 70


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90])
def test_kernels_are_compiled_for_the_very_architecture(arch):
    assert found(Torch(arch)).kernel_arch == arch


@pytest.mark.parametrize(
    ("arch", "built_for", "runs"),
    [
        (86, ["sm_80"], True),  # machine code runs on later chips of its generation
        (80, ["sm_86"], False),
        (90, ["sm_80"], False),
        (90, ["sm_80", "compute_80"], True),  # the driver compiles PTX
        (90, ["sm_90a"], True),
        (70, ["compute_75"], False),
    ],
)
def test_torch_runs_where_it_has_machine_code_of_the_generation_or_older_ptx(arch, built_for, runs):
    assert torch_runs_on(arch, built_for) is runs


def test_no_driver_is_said_by_name(monkeypatch):
    monkeypatch.setenv("D3RT_LIBCUDA", "/nowhere/libcuda.so.1")
    with pytest.raises(BackendUnavailableError, match="backend 'cuda': .*driver.*/nowhere/.*cpu, reference"):
        make_backend("cuda")


def test_auto_takes_the_cpu_where_there_is_no_gpu_and_logs_why(monkeypatch, caplog):
    monkeypatch.setattr(cuda_device, "find", lambda: found(devices=0))
    with caplog.at_level(logging.INFO, logger="d3rt"):
        assert make_backend("auto", 1).name == "cpu"
    assert "no CUDA device found" in caplog.text


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    gpu = SimpleNamespace(name="cuda")
    monkeypatch.setitem(d3rt.backends._MAKERS, "cuda", lambda threads: gpu)
    assert make_backend("auto") is gpu


# -- what a backend that is there cannot run ---------------------------------------------------------------------------


def backend(arch=80, free=8 * GIB):
    from d3rt.backends.cuda import CudaBackend

    context = SimpleNamespace(name="A GPU", arch=arch, memory=lambda: (free, 80 * GIB))
    place = SimpleNamespace(
        device=torch.device("cpu"), handle=0, scope=nullcontext, reusable_bytes=lambda: GIB // 2
    )
    return CudaBackend(Found(context, 0, arch), place)


def needs(weight="float16", cache=torch.float16, weights=GIB, kv_cache=GIB):
    dtype = getattr(torch, weight, weight)
    return Needs(frozenset([weight if weight in ("int8", "int4") else dtype]), cache, weights, kv_cache, 1, 1)


@pytest.mark.parametrize("weight", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("arch", [70, 75, 80, 90])
def test_every_other_width_is_taken_on_every_architecture(arch, weight):
    backend(arch).admit(needs(weight))


def test_bfloat16_is_refused_on_a_v100_and_float16_is_the_way_out():
    with pytest.raises(UnsupportedOptionError, match="dtype='bfloat16': A GPU .*sm_70.*pass dtype='float16'"):
        backend(70).admit(needs("bfloat16"))
    with pytest.raises(UnsupportedOptionError, match="pass kv_cache_dtype='float16'"):
        backend(70).admit(needs("int8", torch.bfloat16))
    backend(75).admit(needs("bfloat16", torch.bfloat16))


def test_an_int8_cache_is_refused_by_name():
    with pytest.raises(UnsupportedOptionError, match="kv_cache_dtype='int8'.*float16 or bfloat16"):
        backend().admit(needs(cache=torch.int8))


@pytest.mark.parametrize("arch", [70, 80])
def test_heads_that_are_too_wide_are_refused_by_name(arch):
    with pytest.raises(
        UnsupportedModelError, match="backend 'cuda': head_dim 640: .*512 values at most; use backend='cpu'"
    ):
        backend(arch).admit(replace(needs(), head_dim=640))
    backend(arch).admit(replace(needs(), head_dim=512))


def test_heads_that_shared_memory_has_no_room_for_are_refused_by_name():
    shared_by_many = replace(needs(), head_dim=512, group=64)
    with pytest.raises(
        UnsupportedModelError,
        match="head_dim 512 with 64 query heads.*takes 133120 bytes.* sm_86 has 101376; .*'float32'",
    ):
        backend(86).admit(shared_by_many)
    backend(80).admit(shared_by_many)
    backend(86).admit(replace(shared_by_many, cache_dtype=torch.float32))


def test_too_little_memory_is_told_part_by_part():
    with pytest.raises(BackendUnavailableError) as refusal:
        backend().admit(needs(weights=7 * GIB, kv_cache=2 * GIB))
    told = str(refusal.value)
    # 8 GiB free and half a GiB that torch holds unused
    for words in ("A GPU has 9.13 GB free", "takes 9.93 GB", "weights 7.52", "K,V cache 2.15", "graphs 0.27"):
        assert words in told
    assert "max_seq_len" in told


def test_the_matrix_that_a_prefill_unpacks_is_counted():
    widest = replace(needs("int4", weights=7 * GIB), unpacked=GIB // 2)
    with pytest.raises(BackendUnavailableError, match="prefill 1.07"):
        backend().admit(widest)
    backend().admit(replace(widest, unpacked=GIB // 32))


def test_what_torch_holds_without_using_it_counts_as_free():
    backend(free=2 * GIB).admit(needs())  # 2 GiB and what is set aside for graphs, but for torch's half
