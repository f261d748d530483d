"""torch's side of the stream that everything goes to: who waits for whom, and what torch is asked for when it captures.
torch.cuda is played by objects that keep to its documented rules; their signatures are the installed torch's."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import pytest
import torch

from d3rt.backends.cuda_device import TorchStream

graph_signature = inspect.signature(torch.cuda.graph.__init__)


class Stream:
    def __init__(self, name, waits):
        self.name, self._waits, self.cuda_stream = name, waits, 99

    def wait_stream(self, other):
        self._waits.append((self.name, other.name))


class Graph:
    """torch.cuda.CUDAGraph: its exec is there once it is instantiated, which with keep_graph is up to the caller."""

    assert callable(torch.cuda.CUDAGraph.instantiate) and callable(torch.cuda.CUDAGraph.raw_cuda_graph_exec)

    def __init__(self, keep_graph=False):
        self.kept, self.captured, self.instantiated = keep_graph, False, False

    def instantiate(self):
        assert self.captured and self.kept
        self.instantiated = True

    def raw_cuda_graph_exec(self):
        assert self.instantiated
        return 1234


class Torch:
    """torch.cuda's streams. current: the one that torch launches on; waits: (who, for whom), in order."""

    def __init__(self, monkeypatch):
        self.waits, self.captures = [], []
        self.current = Stream("the caller's", self.waits)
        for name in ("Stream", "stream", "current_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    def Stream(self, device):  # noqa: N802
        return Stream("ours", self.waits)

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, *arguments, **named):
        given = graph_signature.bind(None, *arguments, **named).arguments
        self.captures.append((given["stream"].name, given["capture_error_mode"]))
        with self.stream(given["stream"]):
            yield
        given["cuda_graph"].captured = True


@pytest.fixture
def cuda(monkeypatch):
    return Torch(monkeypatch)


def test_each_stream_waits_for_the_other_where_they_change_over(cuda):
    place = TorchStream(0)
    assert place.handle == 99 and place.device == torch.device("cuda", 0)
    with place.scope():
        assert cuda.current.name == "ours"
        assert cuda.waits == [("ours", "the caller's")]
    assert cuda.waits == [("ours", "the caller's"), ("the caller's", "ours")]
    assert cuda.current.name == "the caller's"


def test_a_capture_is_of_our_stream_and_gives_a_graph_that_can_be_launched(cuda):
    ran = []
    graph, executable = TorchStream(0).capture(lambda: ran.append(cuda.current.name))
    assert ran == ["ours"] and executable == 1234
    assert isinstance(graph, Graph), "whoever has the exec keeps what owns it"
    # Work of other threads, as a user's own, must not make a capture fail.
    assert cuda.captures == [("ours", "thread_local")]
