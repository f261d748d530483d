"""Threads, processes and signals: runtimes live side by side, wait for one another, and leave nothing behind."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_models
import torch
from api_models import BACKENDS, PROMPTS, batch, compiled, ids

import d3rt

TESTS = Path(__file__).resolve().parents[1]
# Enough tokens for many seconds, and a cache that is not touched until it is needed.
ENDLESS = 120_000


def endless(threads=1):
    """A runtime of a tiny random model with room for ENDLESS tokens and no end of sequence."""
    config = tiny_models.config("llama-tied")
    config.max_position_embeddings = ENDLESS
    torch.manual_seed(0)
    model = tiny_models.MODELS["llama-tied"][0][1](config).eval()
    model.generation_config.eos_token_id = None
    return d3rt.compile(model, threads=threads, max_seq_len=ENDLESS)


def start(script):
    """A Python process that runs the script after the imports it needs; this file is `t` there.

    In the tests' folder: the repository root on sys.path would hide Hugging Face's package `kernels`.
    """
    imports = "import gc, os, sys, threading, time, torch, d3rt\nsys.path.insert(0, 'api')\nimport test_threads as t\n"
    env = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", imports + textwrap.dedent(script)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=TESTS, env=env, **pipes)


# --- Python threads


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_threads_on_one_runtime_get_what_they_get_one_by_one(backend):
    fast = compiled(backend, policy=d3rt.D3(alpha=0.95, start=0.4), threads=2)
    calls = [
        dict(batch(PROMPTS[0])),
        dict(batch(PROMPTS[1], PROMPTS[2])),
        dict(batch(PROMPTS[2]), do_sample=True, seed=5),
        dict(batch(), no_repeat_ngram_size=2),
    ]
    calls = [call | dict(max_new_tokens=12, return_dict_in_generate=True) for call in calls]
    alone = [fast.generate(**call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: fast.generate(**call), calls * 5))
    for i, answer in enumerate(together):
        assert torch.equal(answer.sequences, alone[i % 4].sequences)
        assert answer.stats.prompt_tokens == alone[i % 4].stats.prompt_tokens  # its own, not another thread's


def test_several_runtimes_run_at_the_same_time():
    policies = (None, "static:layers=0-1+4", "d3:alpha=0.9,start=0.4", None)
    runtimes = [
        compiled(backend, policy=policy, threads=threads)
        for backend, policy, threads in zip(
            ("cpu", "cpu", "cpu", "reference"), policies, (1, 2, 2, 1), strict=True
        )
    ]
    alone = [fast.generate(**batch(), max_new_tokens=20) for fast in runtimes]
    assert not torch.equal(alone[0], alone[1])
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(lambda fast: fast.generate(**batch(), max_new_tokens=20), runtimes))
            for one, other in zip(alone, together, strict=True):
                assert torch.equal(one, other)


def test_two_runtimes_share_one_model_and_its_weights():
    first, second = compiled(), compiled(policy="static:layers=0-1+4")
    assert first.engine.decoder.weights.embed.data_ptr() == second.engine.decoder.weights.embed.data_ptr()
    assert not torch.equal(first.generate(ids()), second.generate(ids()))


def test_streams_of_several_threads_take_turns():
    fast = compiled()
    expected = [list(fast.stream(ids(text), max_new_tokens=10)) for text in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda text: list(fast.stream(ids(text), max_new_tokens=10)), PROMPTS * 3))
    assert answers == expected * 3


def test_other_python_threads_run_during_generate():
    fast, prompt = endless(), torch.tensor([[5, 6, 7]])
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    fast.generate(prompt, max_new_tokens=6_000)
    seconds = time.perf_counter() - begin
    done.set()
    thread.join()
    assert fast.last_run.decode_seconds > 0.2  # long enough to count
    # 1 ms of sleep allows some 900 a second. With the GIL held while C++ runs it would be 20, one for each look that
    # generate takes at signals.
    assert sum(t >= begin for t in ticks) / seconds > 100


# --- fork


FORKS = """
prompt = torch.tensor([[5, 6, 7]])

def child(what, work):
    "Prints what work() says in a forked child, or how the child ended: killed after 5 s if it hangs."
    pid = os.fork()
    if pid == 0:
        try:
            said = work()
        except d3rt.D3rtError as error:
            said = f"refused: {error}"
        print(what, said, flush=True)
        os._exit(0)
    deadline = time.monotonic() + 5
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            deadline += 5
        time.sleep(0.01)

def free():
    global fast
    del fast
    gc.collect()
    return "done"

def free_beside_a_thread():
    # it is given the stack of a thread that the parent had, and with it what the parent's handle points to
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return free()

for threads in (1, 2):
    fast = t.endless(threads)
    expected = fast.generate(prompt, max_new_tokens=5)
    child(f"generate/{threads}", lambda: fast.generate(prompt, max_new_tokens=5))
    child(f"stream/{threads}", lambda: next(fast.stream(prompt)))
    child(f"warmup/{threads}", lambda: fast.warmup(5))
    child(f"free/{threads}", free)
    child(f"free_beside_a_thread/{threads}", free_beside_a_thread)
    print(f"parent/{threads}", torch.equal(fast.generate(prompt, max_new_tokens=5), expected), flush=True)

running = threading.Thread(target=lambda: list(fast.stream(prompt, max_new_tokens=3_000)))
running.start()
while fast.engine._owner is None:  # until it holds the runtime's lock, which stays locked for ever in the child's copy
    time.sleep(0.001)
child("generate/running", lambda: fast.generate(prompt, max_new_tokens=5))
running.join()
"""


@pytest.fixture(scope="module")
def forks():
    """What each forked child of FORKS said, and its parent."""
    process = start(FORKS)
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return dict(line.split(" ", 1) for line in out.splitlines())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["generate", "stream", "warmup"])
def test_a_forked_child_gets_an_error_and_does_not_hang(forks, call, threads):
    said = forks[f"{call}/{threads}"]
    assert "refused: this runtime was made before fork()" in said and "'spawn'" in said


def test_a_child_forked_during_a_generation_gets_an_error_too(forks):
    assert "made before fork()" in forks["generate/running"]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_parent_of_a_fork_goes_on(forks, threads):
    assert forks[f"parent/{threads}"] == "True"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_may_free_the_runtime(forks, threads):
    assert forks[f"free/{threads}"] == "done"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_with_threads_of_its_own_may_free_the_runtime(forks, threads):
    assert forks.get(f"free_beside_a_thread/{threads}") == "done"


# --- what is left behind


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_runtime_is_freed_at_once(backend):
    fast = compiled(backend, threads=2)
    fast.generate(**batch(), max_new_tokens=4)
    list(fast.stream(ids(), max_new_tokens=4))
    gone, cache = weakref.ref(fast), weakref.ref(fast.engine.cache)
    gc.disable()  # by its references alone: a K,V cache may be large
    try:
        del fast
        assert gone() is None and cache() is None
    finally:
        gc.enable()


def test_a_runtime_that_was_interrupted_by_an_exception_is_freed():
    fast = compiled(threads=2)

    def broken(input_ids, scores):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fast.generate(ids(), logits_processor=[broken])
    gone = weakref.ref(fast)
    del fast
    gc.collect()  # the traceback held its frames
    assert gone() is None


def test_runtimes_leave_no_threads_behind():
    def threads():
        return len(os.listdir("/proc/self/task"))

    def once():
        fast = compiled(threads=2)
        answer = fast.generate(ids(), max_new_tokens=3)
        next(fast.stream(ids(), max_new_tokens=3))
        return answer

    expected = once()  # torch starts its own threads now
    gc.collect()
    before = threads()
    for _ in range(20):
        assert torch.equal(once(), expected)
    gc.collect()
    deadline = time.monotonic() + 5  # a joined thread leaves /proc a moment later
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before


# --- Ctrl-C


def test_ctrl_c_stops_a_generation_within_a_second_and_the_runtime_goes_on():
    script = """
    fast, prompt, COUNT = t.endless(), torch.tensor([[5, 6, 7]]), t.ENDLESS - 100
    expected = fast.generate(prompt, max_new_tokens=40)

    def stream():
        for _ in fast.stream(prompt, max_new_tokens=COUNT):
            pass

    class Nothing:
        def put(self, value): pass
        def end(self): pass

    ways = {
        "plain": lambda: fast.generate(prompt, max_new_tokens=COUNT),
        "slower path": lambda: fast.generate(prompt, max_new_tokens=COUNT, no_repeat_ngram_size=COUNT),
        "streamer": lambda: fast.generate(prompt, max_new_tokens=COUNT, streamer=Nothing()),
        "stream": stream,
    }
    for name, way in ways.items():
        print("running", name, flush=True)
        try:
            way()
            print("ended", flush=True)
        except KeyboardInterrupt:
            print("stopped", flush=True)
        steps = fast.last_run.steps
        same = torch.equal(fast.generate(prompt, max_new_tokens=40), expected)
        print(0 < steps < COUNT, same, flush=True)
    """
    process = start(script)
    try:
        for name in ("plain", "slower path", "streamer", "stream"):
            assert process.stdout.readline() == f"running {name}\n", process.communicate()[1]
            time.sleep(0.5)  # into the middle: past the prefill, far from the end
            process.send_signal(signal.SIGINT)
            begin = time.monotonic()
            assert process.stdout.readline() == "stopped\n"
            assert time.monotonic() - begin < 1.5, name
            assert process.stdout.readline() == "True True\n", name
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()
