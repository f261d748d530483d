"""What a recording holds: the launches of a step, what they write, and the memory and kernels that they share."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from d3rt.errors import ForeignBufferError
from d3rt.kernels import cases, reference
from d3rt.kernels.reference import FillLayer
from d3rt.sampling import SamplingParams

pytest.importorskip("triton", reason="triton is not installed")

from d3rt.backends import cuda_record  # noqa: E402
from d3rt.backends.cuda_record import Kernels, Recorded, Recorder, Working, progress  # noqa: E402
from d3rt.backends.cuda_slots import Kind, SlotBuffers  # noqa: E402
from d3rt.kernels.cuda.launch import COUNTERS, PARTIALS  # noqa: E402

CPU = torch.device("cpu")
B, D, S = 2, 64, 32


def recorder():
    return Recorder(80, CPU, lambda tensor: True)


def proj_add(ops, rows=D, inputs=D):
    x, a, w = torch.zeros(B, rows), torch.zeros(B, inputs), torch.zeros(rows, inputs)
    ops.proj_add(x, a, w, None)
    return x


def fill_layer(norm=None):
    cache = [torch.zeros(B, 2, S, 16) for _ in range(2)]
    w = [torch.zeros(32, D) for _ in range(2)]
    return FillLayer(*cache, torch.ones(D) if norm is None else norm, *w, None, None, None)


def kv_fill(ops, layers):
    rope = torch.zeros(S, 8), torch.zeros(S, 8)
    ops.kv_fill(layers, torch.zeros(B, D), *rope, torch.zeros(B, dtype=torch.int32), 1e-5)


def test_memory_that_is_not_the_runtimes_own_is_refused_by_name():
    stranger = torch.zeros(B, D)
    ops = Recorder(80, CPU, lambda tensor: tensor is not stranger)
    with pytest.raises(ForeignBufferError, match="proj_add: a is not the runtime's own"):
        ops.proj_add(torch.zeros(B, D), stranger, torch.zeros(D, D), None)


def test_memory_behind_a_table_of_addresses_is_held_to_that_too():
    stranger = torch.ones(D)
    ops = Recorder(80, CPU, lambda tensor: tensor is not stranger)
    with pytest.raises(ForeignBufferError, match=r"kv_fill: layers\[1\].norm"):
        kv_fill(ops, [fill_layer(), fill_layer(stranger)])


def test_a_table_of_addresses_is_on_the_device_and_what_it_leads_to_is_kept():
    ops, layers = recorder(), [fill_layer(), fill_layer()]
    kv_fill(ops, layers)
    (launch,), (behind,) = ops.recorded.launches, ops.recorded.behind
    assert launch.uploads == () and launch.arguments["table"].device == CPU
    kept = {tensor.data_ptr() for tensor in behind}
    assert {layer.wk.data_ptr() for layer in layers} <= kept
    assert {cache.data_ptr() for cache in ops.recorded.caches} == {
        cache.data_ptr() for layer in layers for cache in (layer.k_cache, layer.v_cache)
    }


def test_arguments_may_be_named():
    ops, x = recorder(), torch.zeros(B, D)
    ops.proj_add(x=x, a=torch.zeros(B, D), w=torch.zeros(D, D), bias=None)
    assert ops.recorded.written == {"x": x}


def test_two_recordings_in_a_row_are_one():
    first, second = recorder(), recorder()
    x = proj_add(first)
    kv_fill(second, [fill_layer()])
    both = first.recorded + second.recorded
    assert [launch.op for launch in both.launches] == ["proj_add", "kv_fill"]
    assert both.written == {"x": x} and len(both.caches) == 2 and len(both.behind) == 2


def held(recorded: Recorded) -> set[int]:
    """Addresses of what a self-check compares and puts back."""
    return {tensor.data_ptr() for tensor in (*recorded.written.values(), *recorded.caches)}


def changes(run, tensors) -> set[int]:
    """Addresses of those tensors that run() changes."""
    before = [tensor.clone() for tensor in tensors]
    run()
    pairs = zip(tensors, before, strict=True)
    return {
        at.data_ptr() for at, was in pairs if not torch.equal(at.view(torch.uint8), was.view(torch.uint8))
    }


@pytest.mark.parametrize("op", cases.OPS)
def test_all_that_an_op_writes_is_held_by_the_recording(op):
    case = next(case for case in cases.TEST_CASES[op] if case.B > 1 and not case.row_gap)
    arguments, ops = cases.make(case), recorder()
    cases.call(ops, case, arguments)
    written = changes(
        lambda: cases.call(reference, case, arguments), [at for _, at in cases.tensors(arguments)]
    )
    assert held(ops.recorded) == written and written


def test_all_that_the_end_of_a_step_writes_is_held_by_the_recording():
    from ptx.device import Device, Emitted

    kind, sampling = Kind(False, True, 8), SamplingParams(repetition_penalty=1.5)
    slots, logits = SlotBuffers(B, 40, CPU), torch.randn(B, 40)
    token, pos = (torch.full((B,), -5, dtype=torch.int32) for _ in range(2))
    slots.provide(kind)
    slots.begin(kind, sampling, [int(logits[0].argmax())], 0, [[], []])
    slots.ring.fill_(-1)
    slots.next_token.fill_(-1)
    ops = recorder()
    slots.record(ops, kind, token, pos, logits)
    run = lambda: slots.record(Emitted(Device(80)), kind, token, pos, logits)  # noqa: E731
    assert held(ops.recorded) == changes(run, [token, pos, logits, *slots.tensors()])


def test_working_memory_that_was_handed_out_keeps_its_address_and_more_is_new():
    def wants(partials, counters):
        return Recorded([SimpleNamespace(partials=partials, counters=counters)])

    working = Working(CPU)
    working.reserve(wants(100, 3))
    first = working.tensors()
    working.reserve(wants(50, 2))
    assert working.tensors()[PARTIALS] is first[PARTIALS] and len(first[PARTIALS]) == 100
    working.reserve(wants(200, 3))
    second = working.tensors()
    assert len(second[PARTIALS]) == 200 and second[COUNTERS] is first[COUNTERS]
    assert second[PARTIALS].data_ptr() != first[PARTIALS].data_ptr()
    assert working.nbytes == 4 * (200 + 3) and not second[COUNTERS].any()


def test_a_kernel_is_compiled_and_loaded_once_for_each_distinct_use(monkeypatch):
    compiled = []
    monkeypatch.setattr(cuda_record, "compile", lambda launch, arch: compiled.append(launch.op) or object())
    kernels, ops = Kernels(80, lambda made: made), recorder()
    proj_add(ops)
    proj_add(ops)
    proj_add(ops, inputs=2 * D)
    loaded = kernels.load(ops.recorded.launches)
    assert loaded[0] is loaded[1] is not loaded[2]
    assert kernels.load(ops.recorded.launches) == loaded and len(compiled) == 2
    unaligned = torch.zeros(B * D + 1)[1:].view(B, D)
    ops.proj_add(torch.zeros(B, D), unaligned, torch.zeros(D, D), None)
    assert kernels.load(ops.recorded.launches)[-1] not in loaded, "its loads may not be as wide"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only_and_goes_at_last(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress() as show:
        show("compiling kernel 1 of 2")
        show("short")
    written = capsys.readouterr().err
    if terminal:
        assert "d3rt: compiling kernel 1 of 2" in written and written.endswith("\r")
        assert written.rsplit("\r", 2)[1].strip() == ""
    else:
        assert written == ""
