"""What torch itself does on the GPU: the prefill, its hand-over into our cache, and the values that a generation
samples by. Run on fake tensors of device cuda, which have shapes and devices but no content: whatever would make the
host wait for the device, or depends on its content, cannot run."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from d3rt.config import DecoderConfig
from d3rt.kernels.packing import PackedMatrix
from d3rt.kv_cache import KVCache
from d3rt.models.decoder import Decoder, DecoderWeights, LayerWeights, StepBuffers
from d3rt.plan import LayerSet, Plan
from d3rt.quantize import packed_parts
from d3rt.sampling import SamplingParams

pytest.importorskip("triton", reason="triton is not installed")

CUDA = torch.device("cuda")
S, LAYERS = 64, 2
CONFIG = DecoderConfig("llama", 64, LAYERS, 4, 2, 16, 96, 128, S, 1e-5, (0, 5))
PROMPTS = (7, 1, 20)  # lengths; in chunks of 8 they are cut in three places


@pytest.fixture(scope="module", autouse=True)
def guard(tmp_path_factory):
    """A CPU build of torch refuses cuda tensors for want of this; a CUDA build has its own."""
    if torch.version.cuda is not None:
        return
    built = tmp_path_factory.mktemp("guard") / "cuda_guard.so"
    root = Path(torch.__file__).parent
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    command = [compiler, "-std=c++20", "-fPIC", "-shared", f"-I{root / 'include'}"]
    source = Path(__file__).with_name("cuda_guard.cpp")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    subprocess.run([*command, abi, str(source), f"-L{root / 'lib'}", "-lc10", "-o", str(built)], check=True)
    ctypes.CDLL(str(built))


class Copies(TorchDispatchMode):
    """Notes every copy from one kind of device to another."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            self._note(args[0].device, torch.device(kwargs["device"]))
        if func is torch.ops.aten.copy_.default:
            self._note(args[1].device, args[0].device)
        return func(*args, **kwargs)

    def _note(self, source: torch.device, target: torch.device) -> None:
        if source.type != target.type:
            self.seen.append((source.type, target.type))


@pytest.fixture
def copies():
    with FakeTensorMode(), Copies() as seen:
        yield seen.seen


def matrix(width, rows, cols):
    if isinstance(width, torch.dtype):
        return torch.empty(rows, cols, dtype=width, device=CUDA)
    parts = {
        name: torch.empty(shape, dtype=dtype, device=CUDA)
        for name, (shape, dtype) in packed_parts(width, rows, cols).items()
        if name != "minima" or width == "int4"
    }
    return PackedMatrix(width, rows, cols, **parts)


def decoder(width, arch=80, flash=None) -> Decoder:
    from d3rt.backends.cuda_prefill import CudaPrefill

    c = CONFIG
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sizes = {
        **{"wq": (q, c.hidden_size), "wk": (kv, c.hidden_size), "wv": (kv, c.hidden_size)},
        **{"wo": (c.hidden_size, q), "w_down": (c.hidden_size, c.intermediate_size)},
        **dict.fromkeys(("w_gate", "w_up"), (c.intermediate_size, c.hidden_size)),
    }
    vectors = {
        **dict.fromkeys(("attention_norm", "mlp_norm"), c.hidden_size),
        **dict.fromkeys(("q_norm", "k_norm"), c.head_dim),
        **{"bq": q, "bk": kv, "bv": kv, "bo": c.hidden_size, "b_down": c.hidden_size},
        **dict.fromkeys(("b_gate", "b_up"), c.intermediate_size),
    }
    layer = LayerWeights(
        **{name: matrix(width, *size) for name, size in sizes.items()},
        **{name: torch.empty(size, device=CUDA) for name, size in vectors.items()},
    )
    table = matrix(width, c.vocab_size, c.hidden_size)
    weights = DecoderWeights(table, (layer,) * LAYERS, torch.empty(c.hidden_size, device=CUDA), table)
    prefill = CudaPrefill(arch, flash)
    return Decoder(c, weights, prefill.linear, prefill.attend)


def buffers(dtype):
    cache = KVCache(CONFIG, len(PROMPTS), S, dtype, CUDA)
    rope = (torch.empty(S, CONFIG.head_dim // 2, device=CUDA) for _ in range(2))
    return cache, StepBuffers(CONFIG, cache, *rope, len(PROMPTS))


def prefill(model, dtype):
    cache, buf = buffers(dtype)
    prompts = [torch.zeros(length, dtype=torch.int64, device=CUDA) for length in PROMPTS]
    model.prefill(prompts, LayerSet.full(LAYERS), cache, buf, 8)
    return cache, buf


def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size):
    """What flash-attn checks of its arguments."""
    assert q.device.type == k.device.type == v.device.type == "cuda"
    assert q.dtype == k.dtype == v.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[0] == k.shape[0] and k.shape == v.shape and q.shape[2] % k.shape[2] == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert causal and window_size in ((-1, -1), (4, 0))
    return torch.empty_like(q)


WIDTHS = [torch.float32, torch.float16, torch.bfloat16, "int8", "int4"]


@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("arch", [70, 80])
def test_a_prefill_stays_on_the_device_and_never_makes_the_host_wait(copies, arch, width):
    dtype = width if isinstance(width, torch.dtype) else torch.float16
    prefill(decoder(width, arch), dtype)
    assert copies == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flash_attention_gets_what_it_takes_straight_from_the_cache(copies, dtype):
    calls = []
    model = decoder(dtype, flash=lambda *args, **named: calls.append(0) or flash_attn_func(*args, **named))
    prefill(model, dtype)
    pieces = 5  # 7 and 1 | 8 | 8 | 4
    assert len(calls) == LAYERS * pieces
    assert copies == []


def test_flash_attention_is_left_alone_with_a_float32_cache(copies):
    def never(*_, **__):
        raise AssertionError("flash-attn has no float32")

    prefill(decoder(torch.float16, flash=never), torch.float32)


def test_cache_and_buffers_are_on_the_device_and_filled_lengths_are_not(copies):
    cache, buf = prefill(decoder(torch.float16), torch.float16)
    on_host = {id(buf.filled)}
    for tensor in (cache.k, cache.v, *(each for each in buf.tensors() if id(each) not in on_host)):
        assert tensor.device.type == "cuda"
    assert cache.filled.device.type == "cpu"


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_sampling_parameters_go_to_the_device_and_nothing_comes_back(copies, penalty):
    from d3rt.backends.cuda_slots import Kind, SlotBuffers

    slots = SlotBuffers(3, 128, CUDA)
    sampling = SamplingParams(True, 0.7, 40, 0.9, 0.01, penalty, 2**64 - 1)
    kind = Kind.of(sampling, range(9))
    slots.provide(kind)
    slots.begin(kind, sampling, list(range(9)), 5, [[1, 2], [3], [4, 5, 6]])
    assert set(copies) == {("cpu", "cuda")}
    assert all(tensor.device.type == "cuda" for tensor in slots.tensors())
    assert kind.eos == 16


def test_recording_a_step_computes_nothing():
    """On meta tensors, which have no addresses to put into a table: all that a step does is in its launches."""
    from d3rt.backends.cuda_record import Recorder

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            done.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    global CUDA
    done: set[str] = set()
    device, CUDA = CUDA, torch.device("meta")
    try:
        model, (_, buf) = decoder("int4"), buffers(torch.float16)
        ops = Recorder(80, CUDA, lambda tensor: True)
        with Ops():
            model.decode_step(ops, Plan.of(LayerSet(LAYERS, 1, 3), fill=(1,)), buf)
    finally:
        CUDA = device
    assert len(ops.recorded.launches) == 1 + 5 + 1 + 2 + 1
    assert done <= {"view", "detach", "lift_fresh", "_to_copy", "alias", "reshape"}


# -- the instruments see what they are for -----------------------------------------------------------------------------


def test_what_would_make_the_host_wait_is_caught(copies):
    tensor = torch.zeros(4, device=CUDA)
    with pytest.raises(DataDependentOutputException):
        tensor[0].item()
    with pytest.raises(DynamicOutputShapeException):
        tensor.nonzero()
    with pytest.raises(DynamicOutputShapeException):
        tensor.unique()


def test_a_copy_between_devices_is_caught(copies):
    torch.zeros(4, device=CUDA).cpu()
    torch.zeros(4, device=CUDA).copy_(torch.zeros(4))
    assert copies == [("cuda", "cpu"), ("cpu", "cuda")]
