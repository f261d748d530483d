"""A decode step by depth on a GPU, with pytest-benchmark: whole generations of a random model, their median step noted.

The report for others is bench/gpu.py's; this is for working on the kernels, one depth at a time. Skipped by name where
there is no GPU; D3RT_REHEARSE=1 runs it on the cpu backend.
"""

from __future__ import annotations

import os
from functools import lru_cache

import gpu
import gpu_machine
import pytest
import torch

import d3rt
from d3rt import bench
from d3rt.backends import availability
from d3rt.models.loading import load_config

REHEARSAL = os.environ.get("D3RT_REHEARSE") == "1"
UNAVAILABLE = None if REHEARSAL else availability()["cuda"].get("unavailable")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))]
TOKENS = 8 if REHEARSAL else 64


@lru_cache(maxsize=1)
def compiled(name: str, width: str):
    if REHEARSAL:
        dtype, config = "bfloat16", gpu.tiny_config()
    else:
        device = gpu_machine.find_device(torch.cuda)
        dtype, config = gpu_machine.sixteen_bits(device.arch), load_config(gpu.MODELS[name])
    model = gpu.make_model(name, dtype, config)
    weights = dtype if width == "16 bits" else width
    fast = d3rt.compile(
        *(model, None, "cpu" if REHEARSAL else "cuda"), weights=weights, kv_cache_dtype=dtype, max_seq_len=256
    )
    return model, fast


@pytest.mark.parametrize("depth", gpu.DEPTHS)
@pytest.mark.parametrize("width", ["16 bits", "int8", "int4"])
@pytest.mark.parametrize("name", ["1b"])
def test_decode_step(benchmark, say, name, width, depth):
    benchmark.group = f"{name}, {width}"
    model, fast = compiled(name, width)
    layers = fast.config.num_hidden_layers
    policy = d3rt.parse(gpu.window(layers, gpu.DEPTHS[depth]), num_layers=layers)
    run = bench.D3rtRun(model, fast, torch.full((1, 32), 5), TOKENS, policy)
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    seconds = gpu.median_step(run.runs[-1])
    reached = bench.bytes_per_token(run.runs[-1]) / seconds / 1e9
    benchmark.extra_info.update(step_us=1e6 * seconds, gb_per_second=reached, layers=run.runs[-1].mean_depth)
    say(f"{1e6 * seconds:.1f} us a step, {reached:.1f} GB/s")
