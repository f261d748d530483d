"""d3rt._C.cuda as Python sees it, over a libcuda without a device (tests/fake_cuda), with the kernels that Triton
really compiles. tests/csrc/test_cuda_*.cpp have the same from the inside, under the sanitizers, with more of the loop.

Device addresses are host addresses here, so that tensors in host memory do."""

import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from fake_libcuda import FakeCuda, Ran, build

from d3rt.errors import BackendUnavailableError, CudaError, D3rtError, HoleError, NotFiniteError

pytest.importorskip("triton", reason="triton is not installed")

from d3rt import _C  # noqa: E402
from d3rt.kernels.cuda import compiled, plans, tokens  # noqa: E402
from d3rt.kernels.cuda.launch import Launch  # noqa: E402

LONG = 60.0  # seconds; a test that waits this long has hung
AHEAD = 4
LAYERS = 2
EOS = 7
HIDDEN = 2  # parameters that Triton adds to every kernel


@pytest.fixture
def fake():
    """As new; afterwards everything must be gone, and nothing done against the driver's rules."""
    fake = FakeCuda()
    yield fake
    fake.run_by(None)
    gc.collect()
    assert fake.errors == []
    assert fake.faults() == ""
    assert fake.live() == fake.live("context")  # pytest still holds what its fixture gave


@pytest.fixture
def context(fake):
    return _C.cuda.Context(_C.cuda.Driver(fake.path), 0)


def load(context, launch: Launch):
    made = compiled.compile(launch, context.arch)
    return _C.cuda.Kernel(context, made.cubin, made.name, made.shared, 32 * made.warps), made


def record(context, tape, launch: Launch):
    """Adds a launch that needs no working memory."""
    kernel, _ = load(context, launch)
    tape.add(launch.op, kernel, launch.grid, [tensor.data_ptr() for tensor in launch.arguments.values()])


class Model:
    """A loop whose tokens count up. The kernels are the real ones; Python does what `advance` does, and `embed` only
    leaves a trace."""

    def __init__(self, fake, context, batch=1, eos=(), ahead=AHEAD):
        self.fake, self.batch, self.ends = fake, batch, list(eos)
        ints = {"dtype": torch.int32}
        self.token, self.pos, self.next_token = (torch.zeros(batch, **ints) for _ in range(3))
        self.finished = torch.zeros(batch, dtype=torch.bool)
        self.step, self.ring = torch.zeros(1, **ints), torch.zeros(ahead + 1, batch, **ints)
        self.eos = torch.tensor(self.ends, **ints) if self.ends else None
        self.x, self.table = torch.zeros(batch, 32), torch.zeros(64, 32)
        self.host_pos, self.host_filled = torch.zeros(batch, **ints), torch.ones(LAYERS, batch, **ints)
        self.chosen, self.ran = {}, []
        stream = 0
        choosing, deep = _C.cuda.Tape(context), _C.cuda.Tape(context)
        record(context, deep, plans.embed(context.arch, self.x, self.token, self.table)[0])
        advance = plans.advance(
            context.arch,
            *(self.token, self.pos, self.next_token, self.finished),
            **{"eos": self.eos, "pad": 0, "step": self.step, "ring": self.ring},
        )
        for tape in (choosing, deep):
            record(context, tape, advance[0])
        self.steps = [_C.cuda.Step.graph(tape, stream) for tape in (choosing, deep)]
        self.dispatcher = _C.cuda.Dispatcher(
            context=context,
            stream=stream,
            pos=self.host_pos,
            filled=self.host_filled,
            ring=self.ring.data_ptr(),
            ring_rows=len(self.ring),
            batch=batch,
            ahead=ahead,
        )
        self.first = self.dispatcher.add(self.steps[0], [], [])
        self.deep = self.dispatcher.add(self.steps[1], [0, 1], [])
        fake.run_by(self.run)

    def prefill(self):
        """Everything as it was after a prompt of one token."""
        for tensor in (self.token, self.pos, self.finished, self.step, self.host_pos):
            tensor.zero_()
        self.host_filled.fill_(1)

    def run(self, ran: Ran):
        self.ran.append(ran)
        if ran.kernel != "advance":
            return
        step = int(self.step)
        for slot in range(self.batch):
            done = bool(self.finished[slot])
            chosen = 0 if done else self.chosen.get((step, slot), int(self.token[slot]) + 1)
            self.pos[slot] += 0 if done else 1
            self.token[slot] = max(chosen, 0)
            self.ring[step % len(self.ring), slot] = chosen
            if self.ends:
                self.finished[slot] = done or chosen < 0 or chosen in self.ends
        self.step += 1

    def start(self, steps):
        self.dispatcher.start(first=self.first, programs=[self.deep] * steps, eos_tokens=self.ends)

    def tokens(self):
        return self.dispatcher.read(0, 0)[0]


def test_the_extension_links_to_no_cuda():
    listed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True).stdout
    assert "libc.so" in listed
    assert "cuda" not in listed


def test_without_a_driver_the_backend_is_unavailable():
    with pytest.raises(
        BackendUnavailableError,
        match=r"^backend 'cuda': no CUDA driver: /nowhere/libcuda.so.1: .*available here: cpu",
    ):
        _C.cuda.Driver("/nowhere/libcuda.so.1")


@pytest.mark.parametrize(
    "setting, why",
    [
        ({"FAKECUDA_VERSION": "11020"}, "version 11.2, and d3rt needs 11.4 or later"),
        ({"FAKECUDA_DEVICES": "0"}, "no CUDA device found"),
        ({"FAKECUDA_HIDE": "cuGraphLaunch"}, "has no cuGraphLaunch"),
        ({"FAKECUDA_FAIL": "cuInit:1:999"}, "CUDA_ERROR_UNKNOWN"),
    ],
)
def test_a_driver_that_will_not_do_says_why(setting, why):
    code = "from d3rt import _C\ntry: _C.cuda.Driver()\nexcept Exception as e: print(type(e).__name__, e)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **setting, "D3RT_LIBCUDA": str(build())},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.startswith("BackendUnavailableError backend 'cuda': "), ran.stderr
    assert why in ran.stdout


def test_a_context_tells_what_the_device_is(fake):
    fake.set(arch=90, memory=1 << 20)
    context = _C.cuda.Context(_C.cuda.Driver(fake.path), 0)
    assert (context.name, context.arch, context.multiprocessors) == ("Fake GPU", 90, 108)
    assert context.memory() == (1 << 20, 1 << 20)


def test_a_context_is_released_with_its_last_user(fake):
    before = fake.live("context")
    context = _C.cuda.Context(_C.cuda.Driver(fake.path), 0)
    tape = _C.cuda.Tape(context)
    del context
    assert fake.live("context") == before + 1
    del tape
    assert fake.live("context") == before


@pytest.mark.parametrize("arch", [70, 80, 90])
def test_parameters_are_the_pointers_of_the_launch_and_tritons_hidden_ones(fake, arch):
    fake.set(arch=arch)
    context = _C.cuda.Context(_C.cuda.Driver(fake.path), 0)
    x, token, table = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int32), torch.zeros(64, 64)
    for launch in (plans.embed(arch, x, token, table)[0], plans.proj_add(arch, x, x, table, None)[0]):
        kernel, made = load(context, launch)
        assert kernel.parameters == [(8 * i, 8) for i in range(len(made.parameters) + HIDDEN)]


def test_a_launch_arrives_as_the_plan_has_it(fake, context):
    x, a, w = torch.zeros(2, 64), torch.zeros(2, 64), torch.zeros(64, 64)
    launch = plans.proj_add(context.arch, x, a, w, None)[0]
    kernel, made = load(context, launch)
    ran = []
    fake.run_by(ran.append)
    tape = _C.cuda.Tape(context)
    tape.add("proj_add", kernel, launch.grid, [t.data_ptr() for t in launch.arguments.values()])
    tape.launch(0)
    assert ran == []  # nothing runs before somebody waits
    _C.cuda.synchronize(context, 0)
    pointers = (*(t.data_ptr() for t in launch.arguments.values()), *(0,) * HIDDEN)
    assert ran == [Ran(made.name, made.cubin, launch.grid, 32 * made.warps, made.shared, pointers)]
    assert tape.ops == ["proj_add"] and len(tape) == 1


def test_a_block_that_the_kernel_was_not_compiled_for_is_refused(fake, context):
    x, token, table = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int32), torch.zeros(64, 64)
    made = compiled.compile(plans.embed(context.arch, x, token, table)[0], context.arch)
    with pytest.raises(
        ValueError, match=r"kernel 'embed': a block of 64 threads, but it was compiled for 128"
    ):
        _C.cuda.Kernel(context, made.cubin, made.name, made.shared, 64)
    with pytest.raises(ValueError, match=r"no section .nv.info.other"):
        _C.cuda.Kernel(context, made.cubin, "other", made.shared, 128)
    with pytest.raises(ValueError, match="it ends after 100 bytes"):
        _C.cuda.Kernel(context, made.cubin[:100], made.name, made.shared, 128)


def test_a_missing_pointer_is_refused(fake, context):
    x, token, table = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int32), torch.zeros(64, 64)
    launch = plans.embed(context.arch, x, token, table)[0]
    kernel, _ = load(context, launch)
    pointers = [tensor.data_ptr() for tensor in launch.arguments.values()]
    with pytest.raises(ValueError, match="has 5 parameters, of which up to 2 are hidden; given are 2"):
        _C.cuda.Tape(context).add("embed", kernel, launch.grid, pointers[:-1])


def test_a_graph_of_real_kernels_is_a_chain_in_the_tapes_order(fake, context):
    model = Model(fake, context)
    nodes = fake.log("cuGraphAddKernelNode")
    assert [line.split(" ")[1] for line in nodes] == ["advance", "embed", "advance"]
    assert [line.rpartition("after=")[2] for line in nodes] == ["", "", "0"]
    step = model.steps[1]
    assert (step.mode, step.nodes, step.ops) == ("graph", 2, ["embed", "advance"])
    assert step.bytes > 0


@pytest.mark.parametrize("eager", [False, True])
def test_a_generation_runs_with_kernels_in_python_while_the_caller_waits(fake, context, eager):
    fake.set_eager(eager)
    model = Model(fake, context, batch=2)
    model.start(20)
    assert model.dispatcher.wait(LONG)
    assert model.tokens() == [i // 2 + 1 for i in range(42)]
    assert [ran.kernel for ran in model.ran] == ["advance"] + ["embed", "advance"] * 20
    assert model.host_pos.tolist() == [21, 21] == model.pos.tolist()
    assert model.host_filled.tolist() == [[21, 21]] * LAYERS
    assert len(model.dispatcher.step_seconds) == 21
    assert model.dispatcher.batch == 2


def test_eos_comes_late_and_the_steps_ahead_change_nothing(fake, context):
    model = Model(fake, context, eos=[EOS])
    model.start(100)
    assert model.dispatcher.wait(LONG)
    assert model.tokens() == list(range(1, EOS + 1))
    assert int(model.step) == EOS + AHEAD - 1  # what was enqueued by then
    assert model.host_pos.tolist() == [EOS] == model.pos.tolist()


def test_tokens_are_read_as_they_come_from_another_thread(fake, context):
    model = Model(fake, context)
    seen = []

    def read():
        ended = False
        while not ended:
            new, ended = model.dispatcher.read(len(seen), LONG)
            seen.extend(new)

    model.start(200)
    reader = threading.Thread(target=read)
    reader.start()
    reader.join(LONG)
    assert seen == list(range(1, 202))


def test_cancel_stops_and_the_loop_works_again(fake, context):
    fake.set_logging(False)
    model = Model(fake, context)
    model.start(1_000_000)
    model.dispatcher.read(10, LONG)
    model.dispatcher.cancel()
    assert model.dispatcher.wait(0)
    made = model.tokens()
    assert made == list(range(1, len(made) + 1))
    assert model.host_pos.tolist() == [len(made)]
    model.prefill()
    model.start(1)
    assert model.dispatcher.wait(LONG)
    assert model.tokens() == [1, 2]


def test_a_loop_that_is_dropped_in_a_generation_ends_it(fake, context):
    """Its thread needs the GIL for the kernels, and whoever drops the loop holds it."""
    fake.set_logging(False)
    model = Model(fake, context)
    model.start(1_000_000)
    model.dispatcher.read(3, LONG)
    start = time.monotonic()
    del model.dispatcher
    assert time.monotonic() - start < LONG


def test_a_driven_step_has_run_when_the_call_returns(fake, context):
    model = Model(fake, context)
    model.dispatcher.begin()
    model.dispatcher.commit([False])
    model.dispatcher.step(model.deep)
    assert [ran.kernel for ran in model.ran] == ["embed", "advance"]
    assert model.host_filled.tolist() == [[2]] * LAYERS
    model.dispatcher.commit([False])
    assert model.host_pos.tolist() == [2]


def test_a_driver_error_is_a_cuda_error_that_says_which(fake, context):
    model = Model(fake, context)
    fake.fail("cuGraphLaunch:3:2")
    model.start(10)
    with pytest.raises(
        CudaError, match=r"^cuGraphLaunch: CUDA_ERROR_OUT_OF_MEMORY \(2\), while launching a graph of 2"
    ):
        model.dispatcher.wait(LONG)
    assert issubclass(CudaError, D3rtError) and issubclass(CudaError, RuntimeError)
    assert model.tokens() == [1, 2]
    model.prefill()
    model.start(1)
    assert model.dispatcher.wait(LONG)
    assert model.tokens() == [1, 2]


def test_a_broken_context_says_so(fake, context):
    fake.fail("cuStreamSynchronize:1:700")
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        _C.cuda.synchronize(context, 0)
    with pytest.raises(CudaError, match="the CUDA context is broken until this process ends"):
        context.memory()


@pytest.mark.parametrize("code, why", [(tokens.NOT_FINITE, "NaN"), (tokens.NO_DISTRIBUTION, "temperature")])
def test_an_error_of_sample_is_raised_as_on_the_cpu(fake, context, code, why):
    model = Model(fake, context, batch=2)
    model.chosen[3, 1] = code
    model.start(10)
    with pytest.raises(NotFiniteError, match=f"slot 1 at step 3 .*{why}"):
        model.dispatcher.wait(LONG)
    assert model.tokens() == [1, 1, 2, 2, 3, 3]


def test_a_hole_is_refused_before_it_is_read(fake, context):
    model = Model(fake, context)
    model.host_filled[1] = 0
    model.start(3)
    with pytest.raises(HoleError, match="layer 1 of slot 0"):
        model.dispatcher.wait(LONG)
    assert [ran.kernel for ran in model.ran] == ["advance"]


def test_tensors_that_do_not_fit_are_refused(fake, context):
    pos, filled = torch.zeros(2, dtype=torch.int32), torch.zeros(LAYERS, 2, dtype=torch.int32)
    ring = torch.zeros(5, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"dispatcher: pos is int32 \[2\], but must be int32 \[3\]"):
        _C.cuda.Dispatcher(context, 0, pos, filled, ring.data_ptr(), 5, 3, 4)
    with pytest.raises(ValueError, match="a ring of 4 lines for 4 steps ahead"):
        _C.cuda.Dispatcher(context, 0, pos, filled, ring.data_ptr(), 4, 2, 4)
