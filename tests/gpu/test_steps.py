"""A recorded step is checked against its launches one by one before it is used, and replaced by a slower one where it
differs or the driver refuses it. The driver's side is played by Python functions here."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from d3rt.errors import CudaError

pytest.importorskip("triton", reason="triton is not installed")

from d3rt.backends.cuda_record import Recorded  # noqa: E402
from d3rt.backends.cuda_steps import State, StepBuilder, difference  # noqa: E402


class Fake:
    """A step that adds 1 to x and writes 7 to the K,V line at pos; each mode can be made to fail or to do otherwise."""

    def __init__(self):
        self.x, self.pos = torch.zeros(2, 3), torch.tensor([1, 4], dtype=torch.int32)
        self.cache = torch.zeros(2, 1, 6, 2)
        self.recorded = Recorded([SimpleNamespace(op="it")], {"x": self.x}, [self.cache], [[]])
        self.wrong: dict[str, BaseException | float] = {}  # by mode: raised when made, or added to x besides
        self.launched: list[str] = []

    def run(self, mode):
        self.launched.append(mode)
        self.x += 1 + (self.wrong.get(mode) if isinstance(self.wrong.get(mode), float) else 0)
        self.cache[torch.arange(2), :, self.pos.long()] = 7

    def step(self, mode):
        if isinstance(self.wrong.get(mode), BaseException):
            raise self.wrong[mode]
        return SimpleNamespace(mode=mode, launch=lambda stream: self.run(mode))

    def build(self):
        def eager(launch, behind):
            if "triton" in self.wrong:
                raise self.wrong["triton"]
            self.run("triton")

        def captured(context, executable, ops):
            assert (context, executable, ops) == ("context", 99, ["it"])
            return self.step("captured")

        def synchronize(context, stream):
            if "device" in self.wrong:
                raise self.wrong["device"]

        native = SimpleNamespace(
            Step=SimpleNamespace(
                graph=lambda tape, stream: self.step("graph"),
                captured=captured,
                eager=lambda tape: self.step("eager"),
            ),
            synchronize=synchronize,
        )

        def capture(run):
            self.launched.append("capture")
            run()
            # A capture runs nothing; here it did, so take it back.
            self.x -= 1
            return "torch's graph", 99

        place = SimpleNamespace(handle=5, scope=nullcontext, capture=capture)
        tape = SimpleNamespace(ops=["it"])
        builder = StepBuilder(
            native, "context", place, lambda recorded: (tape, "what it needs"), lambda: eager
        )
        return builder.build(self.recorded, self.pos, "the step")


def test_a_graph_that_does_as_its_launches_do_is_used_and_the_state_is_as_before():
    fake = Fake()
    built = fake.build()
    assert fake.launched == ["triton", "graph"]
    assert built.step.mode == "graph" and "what it needs" in built.keeps
    assert fake.x.count_nonzero() == 0 and fake.cache.count_nonzero() == 0


def test_a_graph_that_differs_gives_way_to_torchs_capture():
    fake = Fake()
    fake.wrong = {"graph": 1e-7}
    with pytest.warns(RuntimeWarning, match="as a graph, 6 of 6 values of x differ.*torch captures"):
        built = fake.build()
    assert built.step.mode == "captured" and "torch's graph" in built.keeps
    assert fake.x.count_nonzero() == 0


def test_launches_one_by_one_come_last_and_each_step_down_is_said():
    fake = Fake()
    fake.wrong = {"graph": CudaError("out of memory"), "captured": 1.0}
    with pytest.warns(RuntimeWarning) as said:
        built = fake.build()
    assert built.step.mode == "eager"
    words = [str(warning.message) for warning in said]
    assert len(words) == 2
    assert "CudaError: out of memory" in words[0] and "captures, 6 of 6 values of x" in words[1]


def test_a_step_that_works_in_no_way_is_an_error_with_all_reasons():
    fake = Fake()
    fake.wrong = {"graph": 1.0, "captured": CudaError("no"), "eager": 2.0}
    with pytest.warns(RuntimeWarning), pytest.raises(CudaError, match="as a graph.*no.*one by one.*'cpu'"):
        fake.build()
    assert fake.x.count_nonzero() == 0


def test_without_tritons_launcher_graphs_are_used_and_it_is_said_that_nothing_was_checked():
    fake = Fake()
    fake.wrong = {"triton": OSError("no C compiler"), "graph": 1.0}
    with pytest.warns(RuntimeWarning, match="not checked.*no C compiler"):
        assert fake.build().step.mode == "graph"


def test_a_device_that_fails_at_the_kernels_themselves_is_an_error_and_not_taken_for_a_missing_launcher(
    recwarn,
):
    fake = Fake()
    eager, built = fake.run, fake.build
    fake.run = lambda mode: fake.wrong.update(device=CudaError("ILLEGAL_ADDRESS")) or eager(mode)
    with pytest.raises(CudaError, match="the step, launched one by one: ILLEGAL_ADDRESS"):
        built()
    assert fake.launched == ["triton"] and not recwarn.list


def test_a_device_that_is_broken_by_a_graph_is_an_error_with_that_reason(monkeypatch):
    def restore(state):
        if "graph" in fake.launched:
            raise RuntimeError("the device is gone")

    fake = Fake()
    fake.wrong = {"graph": 1.0}
    monkeypatch.setattr(State, "restore", restore)
    with pytest.raises(CudaError, match="the step, as a graph, .*then the device failed: the device is gone"):
        fake.build()


@pytest.mark.parametrize(
    ("a", "b"),
    [(0.0, -0.0), (1.0, 1.0 + 2**-23), (float("nan"), 1.0)],
)
def test_one_bit_is_a_difference(a, b):
    assert "1 of 1 values of x" in difference({"x": torch.tensor([a])}, {"x": torch.tensor([b])})


def test_the_same_nan_is_none():
    nan = torch.tensor([float("nan"), 1.0], dtype=torch.float16)
    assert difference({"x": nan}, {"x": nan.clone()}) is None


def test_a_state_holds_the_line_of_each_slots_own_position():
    fake = Fake()
    state = State(fake.recorded, fake.pos)
    fake.run("")
    fake.cache[0, 0, 0] = 3  # not a line of this step
    line = state.now()["K,V line of cache 0"]
    assert line.shape == (2, 1, 2) and bool((line == 7).all())
    state.restore()
    assert fake.cache.count_nonzero() == 2 and bool((fake.cache[0, 0, 0] == 3).all())
