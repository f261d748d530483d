"""The native decode loop as Python sees it: tokens, ends, holes, errors, threads; and that it does what the reference
backend's loop does. tests/csrc/test_dispatcher.cpp has the same loop from the inside, under the sanitizers."""

import gc
import threading
import time

import pytest
import torch

from d3rt.backends import make_backend
from d3rt.errors import D3rtError, ForeignBufferError, HoleError, NotFiniteError
from d3rt.sampling import SamplingParams

V = 10
LAYERS = 2
MANY = 1_000_000  # slow steps: longer than any test waits
LONG = 60.0  # seconds; a test that waits this long has hung
SECONDS_PER_STEP_AT_MOST = 1.0


class Counting:
    """A model that counts: its table is one-hot and its head shifted by one, so t is followed by t + 1, and 9 by 0.

    With `random` it is a model that says anything instead: random table and head.
    """

    def __init__(self, last=(0,), length=None, backend="cpu", threads=1, random=False):
        batch = len(last)
        self.backend = make_backend(backend, threads)
        self.token = torch.zeros(batch, dtype=torch.int32)
        self.pos = torch.zeros(batch, dtype=torch.int32)
        self.filled = torch.zeros(LAYERS, batch, dtype=torch.int32)
        self.logits, self.x = torch.zeros(batch, V), torch.zeros(batch, V)
        self.table, self.norm = torch.eye(V), torch.ones(V)
        self.head = torch.eye(V).roll(1, dims=0)
        if random:
            generator = torch.Generator().manual_seed(5)
            self.table, self.head = torch.randn(2, V, V, generator=generator)
        self.broken = torch.full((V, V), torch.nan)
        self.backend.own([value for value in vars(self).values() if isinstance(value, torch.Tensor)])
        self.loop = self.backend.loop(self.token, self.pos, self.logits, self.filled)
        self.count = self.add(self.head)
        self.prefill(last, length)

    def add(self, head, reads=(0, 1), fills=(), times=1):
        """A program whose attention would read the layers `reads`; it does its work `times` over."""

        def step(ops):
            for _ in range(times):
                ops.embed(x=self.x, token=self.token, table=self.table)
                ops.norm_logits(logits=self.logits, x=self.x, norm=self.norm, w=head, eps=1e-5)

        return self.loop.add(self.backend.record(step), list(reads), list(fills))

    def prefill(self, last, length=None):
        """Leaves everything as after a prompt of `length` tokens that ends in `last`."""
        length = torch.tensor(length or [1] * len(last), dtype=torch.int32)
        self.logits.copy_(self.head[:, list(last)].T)
        self.pos.copy_(length - 1)
        self.filled.copy_(length.expand(LAYERS, -1))

    def start(self, programs, eos=(), pad=0, seen=(), **sampling):
        programs = [self.count] * programs if isinstance(programs, int) else programs
        self.loop.start(
            programs=programs,
            eos_tokens=list(eos),
            pad_token=pad,
            sampling=SamplingParams(**sampling),
            seen=seen,
        )

    def start_for_long(self):
        """A generation that does not end by itself while the test looks: some ten seconds, undisturbed."""
        self.start([self.add(self.head, times=100)] * MANY)

    def run(self, *args, **kwargs):
        """The tokens of a whole generation, one list a step."""
        self.start(*args, **kwargs)
        assert self.loop.wait(LONG)
        return self.all()

    def all(self):
        tokens, _ = self.loop.read(0, 0.0)
        return [tokens[i : i + len(self.token)] for i in range(0, len(tokens), len(self.token))]


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.param


# -- both loops --------------------------------------------------------------------------------------------------------


def test_counts(backend):
    model = Counting([4], [7], backend)
    assert model.run(3) == [[5], [6], [7], [8]]
    assert model.pos.tolist() == [10] and model.filled.tolist() == [[10]] * LAYERS
    assert len(model.loop.step_seconds) == 4
    assert all(0 < seconds < SECONDS_PER_STEP_AT_MOST for seconds in model.loop.step_seconds)


def test_finished_slots_emit_pad_and_stand_still(backend):
    model = Counting([4, 0], [3, 8], backend)
    assert model.run(50, eos=[7, 6], pad=9) == [[5, 1], [6, 2], [9, 3], [9, 4], [9, 5], [9, 6]]
    assert model.pos.tolist() == [4, 13]
    assert model.filled.tolist() == [[4, 13]] * LAYERS


def test_a_skipped_position_is_a_hole_when_it_is_read(backend):
    model = Counting([0], [3], backend)
    skipping = model.add(model.head, reads=[0])
    model.start([skipping, skipping, model.count])
    with pytest.raises(HoleError, match="layer 1 of slot 0 has K,V for 3 positions, but this step reads 5"):
        model.loop.wait(LONG)
    assert model.filled.tolist() == [[5], [3]]


def test_a_filled_position_is_no_hole(backend):
    model = Counting([0], [3], backend)
    filling = model.add(model.head, reads=[0], fills=[1])
    assert model.run([filling, filling, model.count]) == [[1], [2], [3], [4]]


def test_broken_logits_end_the_generation_and_the_next_one_works(backend):
    model = Counting([0], backend=backend)
    broken = model.add(model.broken)
    model.start([model.count, broken, model.count])
    with pytest.raises(NotFiniteError, match="slot 0 at step 2"):
        model.loop.wait(LONG)
    model.prefill([6])
    assert model.run(2) == [[7], [8], [9]]


def test_stepping_does_what_a_whole_run_does(backend):
    whole, stepped = Counting([4, 0], [3, 8], backend), Counting([4, 0], [3, 8], backend)
    expected = whole.run(9, eos=[6], pad=9)
    finished = torch.zeros(2, dtype=torch.bool)
    tokens = []
    stepped.loop.begin()
    while not finished.all():
        if tokens:
            stepped.loop.step(stepped.count)
        chosen = torch.where(finished, 9, stepped.logits.argmax(-1))
        finished |= chosen == 6
        stepped.loop.commit(chosen.tolist(), finished.tolist())
        tokens.append(chosen.tolist())
    assert tokens == expected
    assert torch.equal(stepped.pos, whole.pos) and torch.equal(stepped.filled, whole.filled)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"repetition_penalty": 1.4},
        {"do_sample": True, "seed": 9},
        {"do_sample": True, "seed": 2**63 + 1, "temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
        {"do_sample": True, "seed": 1, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_the_native_loop_gives_the_reference_loops_tokens(sampling):
    seen = [[1, 2], [3, 3, 4], []] if "repetition_penalty" in sampling else []
    runs = []
    for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 3)):
        model = Counting([1, 4, 7], [5, 2, 9], backend, threads, random=True)
        tokens = model.run(60, eos=[0] if sampling.get("do_sample") else [], pad=3, seen=seen, **sampling)
        runs.append((tokens, model.pos.tolist(), model.filled.tolist()))
    assert runs[0] == runs[1] == runs[2]
    assert len({tuple(step) for step in runs[0][0]}) > 2, "the model must say more than one thing"


# -- native: threads and time ------------------------------------------------------------------------------------------


def test_wait_and_read_give_up_in_time_and_let_python_run():
    model = Counting()
    model.start_for_long()
    begin = time.perf_counter()
    assert model.loop.wait(0.05) is False
    assert time.perf_counter() - begin < 5
    tokens, ended = model.loop.read(0, LONG)
    assert tokens[:3] == [1, 2, 3] and not ended
    assert model.loop.read(MANY, 0.01) == ([], False)
    model.loop.cancel()
    assert model.loop.wait(0.0) is True
    count = len(model.all())
    assert model.loop.read(count, 0.0) == ([], True)


def test_waiting_may_be_without_end():
    model = Counting()
    model.start(2000)
    assert model.loop.wait(float("inf")) is True
    assert model.loop.wait(-1.0) is True
    assert model.loop.read(2001, 1e300) == ([], True)


def test_cancel_stops_and_keeps_the_tokens():
    model = Counting(threads=2)
    model.start_for_long()
    model.loop.read(20, LONG)
    model.loop.cancel()
    tokens = model.all()
    assert 20 < len(tokens) < MANY
    assert all(token == [(step + 1) % V] for step, token in enumerate(tokens))
    assert model.pos.item() == len(tokens)
    model.loop.cancel()
    model.prefill([6])
    assert model.run(1) == [[7], [8]]


def test_while_it_runs_nothing_else_may_start():
    model = Counting()
    model.start_for_long()
    for name, call in {
        "start": lambda: model.start(1),
        "begin": lambda: model.loop.begin(),
        "step": lambda: model.loop.step(model.count),
        "commit": lambda: model.loop.commit([1], [False]),
        "add a program": lambda: model.add(model.head),
    }.items():
        with pytest.raises(D3rtError, match=f"cannot {name} while a generation runs"):
            call()
    model.loop.cancel()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_last_reference_may_go_while_it_runs(threads):
    for _ in range(3):
        model = Counting(threads=threads)
        model.start_for_long()
        model.loop.read(5, LONG)
        del model
        gc.collect()


def test_the_buffers_live_as_long_as_the_loop():
    model = Counting([0, 3])
    loop = model.loop
    model.start(3000)
    del model
    gc.collect()
    noise = [torch.full((V, V), torch.nan) for _ in range(100)]  # would take freed memory
    assert loop.wait(LONG)
    tokens, _ = loop.read(0, 0.0)
    assert tokens == [(first + step + 1) % V for step in range(3001) for first in (0, 3)]
    del noise


def in_threads(*bodies):
    """Runs each in a thread of its own, and raises what one of them raised."""
    errors = []

    def guarded(body):
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive(), "hangs"
    for error in errors:
        raise error


def test_several_readers_see_every_token_in_order():
    model = Counting([0, 3])

    def reader(pause):
        def body():
            step, ended = 0, False
            while not ended:
                tokens, ended = model.loop.read(step, LONG)
                assert ended == (not tokens)
                for at in range(0, len(tokens), 2):
                    assert tokens[at : at + 2] == [(step + 1) % V, (step + 4) % V]
                    step += 1
                time.sleep(pause)
            assert step == 3001

        return body

    model.start(3000)
    in_threads(reader(0), reader(0.001), reader(0.01))


@pytest.mark.parametrize("threads", [1, 2])
def test_two_loops_run_in_two_threads_at_once(threads):
    def body(first):
        model = Counting([first], threads=threads)

        def run():
            for _ in range(10):
                model.prefill([first])
                assert model.run(200) == [[(first + step + 1) % V] for step in range(201)]

        return run

    in_threads(body(0), body(5))


def test_a_reader_is_woken_by_the_error():
    model = Counting()
    broken = model.add(model.broken)
    steps = [model.count] * 100 + [broken]
    model.start(steps)
    step = 0
    with pytest.raises(NotFiniteError, match="at step 101"):
        while True:
            tokens, ended = model.loop.read(step, LONG)
            assert tokens and not ended
            step += len(tokens)
    assert step == 101


# -- native: refusals --------------------------------------------------------------------------------------------------


def test_buffers_outside_the_arena_are_refused():
    model = Counting()
    with pytest.raises(ForeignBufferError, match="must be registered"):
        model.backend.loop(model.token, model.pos, model.logits.clone(), model.filled)


def test_buffers_that_do_not_fit_each_other_are_refused():
    model = Counting([0, 1])
    other = torch.zeros(3, dtype=torch.int32)
    model.backend.own([other])
    with pytest.raises(ValueError, match=r"dispatcher: pos is int32 \[3\], but must be int32 \[2\]"):
        model.backend.loop(model.token, other, model.logits, model.filled)
    with pytest.raises(ValueError, match="dispatcher: logits"):
        model.backend.loop(model.token, model.pos, model.filled, model.filled)


def test_what_does_not_exist_is_refused():
    model = Counting([0, 1])
    with pytest.raises(ValueError, match="no program 5; there are 1"):
        model.start([5])
    with pytest.raises(ValueError, match="no program -1"):
        model.loop.step(-1)
    with pytest.raises(ValueError, match="layer 2 is not in 0..1"):
        model.add(model.head, reads=[2])
    with pytest.raises(ValueError, match="each of the 2 slots"):
        model.loop.commit([1], [False])
    with pytest.raises(ValueError, match="each of the 2 slots"):
        model.start(1, repetition_penalty=2.0, seen=[[1]])
    assert model.run(1) == [[1, 2], [2, 3]]


@pytest.mark.parametrize("pad", [V, -1])
def test_a_pad_token_outside_the_vocabulary_surfaces_when_it_is_embedded(pad):
    model = Counting([4, 0])
    model.start(9, eos=[5], pad=pad)
    with pytest.raises(ValueError, match=rf"embed: token\[0\] is {pad}, but must be in 0..9"):
        model.loop.wait(LONG)
