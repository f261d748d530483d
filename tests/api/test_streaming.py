"""Streaming: Hugging Face's streamers in generate, and stream(), which hands the text out piece by piece."""

import threading
import time

import pytest
import tiny_models
import torch
from api_models import BACKENDS, PROMPT, batch, compiled, ids, shared_model, tokenizer
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import d3rt

# Far more than the C++ loop can run between two looks of the consumer.
LONG = 4000


@pytest.fixture(scope="module", params=BACKENDS)
def fast(request):
    return compiled(request.param, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def endless():
    """A runtime with room for LONG tokens, and no end of sequence."""
    config = tiny_models.config("llama-tied")
    config.max_position_embeddings = LONG + 100
    torch.manual_seed(0)
    model = tiny_models.MODELS["llama-tied"][0][1](config).eval()
    model.generation_config.eos_token_id = None
    return d3rt.compile(model, threads=1)


class Recorder(BaseStreamer):
    """Writes down everything it is given."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append((value.tolist(), tuple(value.shape), value.dtype, value.device.type))

    def end(self):
        self.calls.append("end")


def recorded(generate, **kwargs):
    streamer = Recorder()
    generate(streamer=streamer, **kwargs)
    return streamer.calls


def text_of(fast, **kwargs):
    """What generate's new tokens say, EOS left out."""
    tokens = fast.generate(ids(), **kwargs)[0, ids().shape[1] :]
    return tokenizer().decode([t for t in tokens.tolist() if t != 2])


# --- generate(streamer=...)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(eos_token_id=426, pad_token_id=9),
        dict(no_repeat_ngram_size=2),
        dict(stop_strings=["happy", "park"], tokenizer=tokenizer()),
    ],
    ids=["plain", "rows end apart", "slower path", "stop strings"],
)
def test_a_streamer_sees_prompt_tokens_and_end_as_hugging_faces_does(fast, options):
    call = dict(batch(), max_new_tokens=12, **options)
    calls = recorded(fast.generate, **call)
    assert calls == recorded(shared_model().generate, **call)
    assert len(calls) > 3


def test_a_streamer_does_not_change_the_answer(fast):
    plain = fast.generate(**batch(), max_new_tokens=12)
    assert torch.equal(fast.generate(**batch(), max_new_tokens=12, streamer=Recorder()), plain)


def test_text_streamer_prints_what_it_prints_for_hugging_face(fast, capsys):
    printed = []
    for generate in (fast.generate, shared_model().generate):
        generate(ids(), streamer=TextStreamer(tokenizer(), skip_prompt=True), max_new_tokens=40)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "very happy" in printed[0]


def test_text_iterator_streamer_works_from_another_thread(fast):
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
    call = dict(inputs=ids(), streamer=streamer, max_new_tokens=30)
    thread = threading.Thread(target=fast.generate, kwargs=call)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text_of(fast, max_new_tokens=30)
    assert len(pieces) > 5


def test_text_streamer_refuses_a_batch_and_the_runtime_stays_usable(fast):
    with pytest.raises(ValueError, match="batch size 1"):
        fast.generate(**batch(), streamer=TextStreamer(tokenizer()))
    assert torch.equal(fast.generate(ids()), shared_model().generate(ids()))


def test_a_streamer_that_raises_stops_the_work(endless):
    class Broken(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.calls) == 4:
                raise RuntimeError("the reader went away")

    prompt = torch.tensor([[5, 6, 7]])
    with pytest.raises(RuntimeError, match="went away"):
        endless.generate(prompt, streamer=Broken(), max_new_tokens=LONG)
    assert 3 <= endless.last_run.steps < LONG
    assert endless.generate(prompt, max_new_tokens=5).shape == (1, 8)


def test_tokens_arrive_while_the_generation_runs(endless):
    times = []

    class Watch(Recorder):
        def put(self, value):
            times.append(time.perf_counter())

    endless.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=LONG, streamer=Watch())
    assert len(times) == LONG + 1
    # Held back until the end, the first would come about when the last does.
    assert times[1] - times[0] < (times[-1] - times[0]) / 2


# --- stream(...)


def test_stream_yields_the_text_that_generate_gives(fast):
    pieces = list(fast.stream(PROMPT, max_new_tokens=40))
    assert "".join(pieces) == text_of(fast, max_new_tokens=40)
    assert len(pieces) > 5 and all(isinstance(piece, str) and piece for piece in pieces)


def test_stream_leaves_the_eos_token_out(fast):
    text = "".join(fast.stream(PROMPT, max_new_tokens=40, eos_token_id=[426, 2]))
    assert text == text_of(fast, max_new_tokens=40, eos_token_id=[426, 2]).removesuffix(".")
    assert fast.last_run.steps < 40


@pytest.mark.parametrize(
    "form", [lambda row: row, lambda row: torch.tensor(row), lambda row: torch.tensor([row])]
)
def test_stream_takes_token_ids_in_any_form(fast, form):
    assert "".join(fast.stream(form(ids()[0].tolist()), max_new_tokens=20)) == text_of(
        fast, max_new_tokens=20
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_stream_yields_token_ids_without_a_tokenizer(backend):
    fast = compiled(backend)
    tokens = list(fast.stream(ids(), max_new_tokens=20))
    assert tokens == fast.generate(ids(), max_new_tokens=20)[0, ids().shape[1] :].tolist()
    assert {type(token) for token in tokens} == {int}


def test_stream_without_a_tokenizer_yields_the_eos_token_too():
    fast = compiled()
    assert list(fast.stream(ids(), max_new_tokens=40, eos_token_id=426))[-1] == 426


def test_stream_takes_chat_messages(fast):
    messages = [{"role": "user", "content": "Tell me a story"}, {"role": "Tom", "content": "No"}]
    prompt = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("Lily said")
    expected = "".join(fast.stream(prompt, max_new_tokens=25))
    assert "".join(fast.stream(messages, max_new_tokens=25)) == expected


def test_stream_takes_generates_options(fast):
    for options in (dict(do_sample=True, seed=4), dict(no_repeat_ngram_size=2), dict(repetition_penalty=1.5)):
        assert "".join(fast.stream(PROMPT, max_new_tokens=15, **options)) == text_of(
            fast, max_new_tokens=15, **options
        )


def test_stream_stops_at_stop_strings(fast):
    text = "".join(fast.stream(PROMPT, stop_strings=["happy"], tokenizer=tokenizer(), max_new_tokens=40))
    assert text.endswith("happy")


def test_nothing_runs_before_the_first_piece_is_asked_for(fast):
    fast.generate(ids(), max_new_tokens=2)
    before = fast.last_run
    fast.stream(PROMPT)
    assert fast.last_run is before
    fast.generate(ids(), max_new_tokens=2)  # and the runtime is not taken


@pytest.mark.parametrize("options", [{}, dict(no_repeat_ngram_size=40)], ids=["fast path", "slower path"])
def test_closing_a_stream_stops_the_work(endless, options):
    stream = endless.stream([5, 6, 7], max_new_tokens=LONG, **options)
    taken = [next(stream) for _ in range(3)]
    stream.close()
    assert 3 <= endless.last_run.steps < LONG
    assert endless.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, **options)[0, 3:].tolist() == taken


def test_a_stream_that_is_dropped_stops_the_work(endless):
    for _ in endless.stream([5, 6, 7], max_new_tokens=LONG):
        break
    assert endless.last_run.steps < LONG
    assert endless.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape == (1, 5)


def test_a_closed_stream_leaves_the_runtime_correct(fast):
    stream = fast.stream(PROMPT, max_new_tokens=200)
    next(stream)
    stream.close()
    assert torch.equal(
        fast.generate(ids(), max_new_tokens=30), shared_model().generate(ids(), max_new_tokens=30)
    )


@pytest.mark.parametrize("again", ["generate", "stream", "warmup"])
def test_an_open_stream_of_this_thread_forbids_another_generation(fast, again):
    stream = fast.stream(PROMPT, max_new_tokens=30)
    first = next(stream)
    with pytest.raises(d3rt.D3rtError, match="still open"):
        {
            "generate": lambda: fast.generate(ids()),
            "stream": lambda: next(fast.stream(PROMPT)),
            "warmup": lambda: fast.warmup(),
        }[again]()
    assert first + "".join(stream) == text_of(fast, max_new_tokens=30)  # the open one goes on


def test_another_thread_waits_for_the_stream_to_end(fast):
    answers = []
    stream = fast.stream(PROMPT, max_new_tokens=10)
    text = next(stream)
    thread = threading.Thread(target=lambda: answers.append(fast.generate(ids(), max_new_tokens=5)))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and not answers
    text += "".join(stream)
    thread.join(60)
    assert torch.equal(answers[0], shared_model().generate(ids(), max_new_tokens=5))
    assert text == text_of(fast, max_new_tokens=10)
