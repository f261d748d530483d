"""Forks, rewinds, files, messages, what is refused, and what is left when a turn does not end."""

import json
import threading

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import d3rt

NEW = 8
POLICY = d3rt.D3(alpha=0.9, start=0.4)
FILLS = ("eager", "deferred", "recompute")
each_fill = pytest.mark.parametrize("kv_fill", FILLS)


def runtime(kv_fill="recompute", **options):
    return tiny_models.runtime("llama", POLICY, kv_fill=kv_fill, **options)


def say(session, seed, length=4, **options):
    options = {"max_new_tokens": NEW, "eos_token_id": None} | options
    return list(session.send(tiny_models.prompt(length, seed), **options).tokens)


def state(session):
    return session.ids, session.messages, session.turns, session._steps


# -- forks and rewinds ---------------------------------------------------------------------------------------------


@each_fill
def test_a_fork_goes_its_own_way(kv_fill):
    fast = runtime(kv_fill)
    session, straight = fast.session(), fast.session()
    say(session, 0)
    fork = session.fork()
    assert state(fork) == state(session)
    first, other = say(session, 1), say(fork, 2)
    then = [say(session, 3), say(fork, 3)]
    say(straight, 0)
    assert (first, then[0]) == (say(straight, 1), say(straight, 3))
    again = fast.session()
    say(again, 0)
    assert (other, then[1]) == (say(again, 2), say(again, 3))


@each_fill
def test_forks_share_their_kv_until_one_goes_on(kv_fill):
    session = runtime(kv_fill).session()
    say(session, 0)
    forks = [session.fork() for _ in range(3)]
    assert len({each._away.k.data_ptr() for each in (session, *forks)}) == 1
    kept = session._away.k.clone()
    say(forks[0], 1)
    assert torch.equal(session._away.k, kept) and session.nbytes == forks[1].nbytes > 0


@each_fill
def test_a_turn_that_is_taken_back_was_never_said(kv_fill):
    fast = runtime(kv_fill)
    session, straight = fast.session(), fast.session()
    say(session, 0), say(straight, 0)
    before = state(session)
    say(session, 1), say(session, 2)
    session.rewind(2)
    assert state(session) == before and session.cached_tokens <= len(session.ids)
    assert [say(session, 3), say(session, 4)] == [say(straight, 3), say(straight, 4)]


@each_fill
def test_rewinding_to_a_token_takes_back_the_turns_that_go_further(kv_fill):
    fast = runtime(kv_fill)
    session = fast.session()
    say(session, 0), say(session, 1)
    first_turn = 4 + NEW
    session.rewind(tokens=first_turn + 2)
    assert session.turns == 1 and len(session.ids) == first_turn + 2
    session.rewind(tokens=3)
    assert session.turns == 0 and session.ids == tiny_models.prompt(4, 0)[:3]
    reply = session.send(tiny_models.prompt(4, 0)[3:], max_new_tokens=NEW, eos_token_id=None)
    other = fast.session()
    assert list(reply.tokens) == say(other, 0)
    session.rewind(tokens=0)
    assert session.ids == [] and say(session, 0) == list(reply.tokens)


def test_a_rewind_of_more_than_there_is_is_refused():
    session = runtime().session()
    say(session, 0)
    for wrong in ({"turns": 2}, {"turns": -1}, {"tokens": 13}, {"tokens": -1}, {"turns": 1, "tokens": 1}):
        with pytest.raises(ValueError, match="rewind"):
            session.rewind(**wrong)
    assert session.turns == 1


# -- files ---------------------------------------------------------------------------------------------------------


@each_fill
@pytest.mark.parametrize("cache", [None, "int8"])
def test_a_saved_conversation_goes_on_as_it_would_have(tmp_path, kv_fill, cache):
    fast = runtime(kv_fill, kv_cache_dtype=cache)
    session = fast.session(restart_steps=False)
    say(session, 0), say(session, 1)
    path = session.save(tmp_path / "talk.safetensors")
    other = runtime(kv_fill, kv_cache_dtype=cache)
    loaded = other.load_session(path)
    assert state(loaded) == state(session) and repr(loaded) == repr(session)
    assert say(loaded, 2) == say(session, 2)
    loaded.rewind(3)
    assert loaded.ids == []


def test_an_empty_conversation_can_be_saved(tmp_path):
    fast = runtime()
    loaded = fast.load_session(fast.session().save(tmp_path / "empty"))
    assert loaded.ids == [] and say(loaded, 0) == say(fast.session(), 0)


def test_a_file_of_another_model_or_none_is_refused(tmp_path):
    session = runtime().session()
    say(session, 0)
    path = session.save(tmp_path / "talk")
    for other in (
        tiny_models.runtime("llama-tied"),
        tiny_models.runtime("llama", dtype=torch.bfloat16),
        runtime(kv_cache_dtype="int8"),
    ):
        with pytest.raises(d3rt.UnsupportedModelError, match="another model made it"):
            other.load_session(path)
    with pytest.raises(d3rt.UnsupportedModelError, match="exceed max_seq_len=10"):
        runtime(max_seq_len=10).load_session(path)
    with pytest.raises(d3rt.ModelNotFoundError, match="no such file"):
        runtime().load_session(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(d3rt.UnsupportedModelError, match="cannot be read"):
        runtime().load_session(tmp_path / "text")


@pytest.mark.parametrize("what", ["k", "filled", "plans", "cached", "version", "policy", "no k"])
def test_a_damaged_file_is_refused(tmp_path, what):
    fast = runtime()
    session = fast.session()
    say(session, 0)
    path = session.save(tmp_path / "talk")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["d3rt.session"])
    tensors = load_file(path)
    if what == "k":
        tensors["k"] = tensors["k"][:, :, :3].contiguous()
    elif what == "no k":
        tensors = {}
    elif what == "filled":
        tensors["filled"] += 1000
    elif what == "plans":
        values["plan_of"][0] = 99
    elif what == "cached":
        values["cached"] = values["cached"][:-1]
    elif what == "version":
        values["version"] = 2
    else:
        values["policy"] = {"name": "nobody"}
    save_file(tensors, path, {"d3rt.session": json.dumps(values)})
    with pytest.raises(d3rt.UnsupportedModelError, match="session"):
        fast.load_session(path)


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    session = runtime().session()
    say(session, 0)
    path = session.save(tmp_path / "talk")
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("d3rt.session.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        session.save(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["talk"]


# -- what is refused, before any work ---------------------------------------------------------------------------------


def test_a_conversation_that_would_not_fit_is_refused_before_any_work():
    fast = runtime(max_seq_len=30)
    session = fast.session()
    say(session, 0)
    before, last = state(session), fast.last_run
    with pytest.raises(ValueError, match="20 prompt tokens and 11 new ones exceed max_seq_len=30"):
        session.send(tiny_models.prompt(8), max_new_tokens=11)
    assert state(session) == before and fast.last_run is last and session.cached_tokens == 4 + NEW - 1
    assert len(say(session, 1)) == NEW


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"attention_mask": torch.ones(1, 4)}, d3rt.UnsupportedOptionError, "attention_mask.*one row"),
        ({"num_return_sequences": 2, "do_sample": True}, d3rt.UnsupportedOptionError, "num_return_sequences"),
        ({"max_new_token": 3}, TypeError, "max_new_token"),
        ({"num_beams": 4}, d3rt.UnsupportedOptionError, "num_beams"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, match):
    session = runtime().session()
    with pytest.raises(error, match=match):
        session.send([5, 6, 7], **options)
    with pytest.raises(error, match=match):
        session.stream([5, 6, 7], **options)
    assert state(session) == ([], None, 0, 0)


def test_bad_prompts_are_refused():
    session = runtime().session()
    for prompt, match in (([], "at least one token"), ([131], "0..130"), ("hello", "no tokenizer")):
        with pytest.raises(ValueError, match=match):
            session.send(prompt)
    with pytest.raises(ValueError, match="chat template"):
        session.send([{"role": "user", "content": "hello"}])


def test_unknown_policies_and_fills_are_refused():
    fast = runtime()
    with pytest.raises(d3rt.UnsupportedOptionError, match="kv_fill='never'"):
        fast.session(kv_fill="never")
    with pytest.raises(d3rt.PolicyError):
        fast.session(policy="d4")
    with pytest.raises(TypeError, match="policy=3"):
        fast.session(policy=3)
    session = fast.session()
    with pytest.raises(d3rt.PolicyError):
        session.policy = d3rt.StaticLayers(layers=(0, 6))
    assert session.policy == POLICY


# -- turns that do not end -----------------------------------------------------------------------------------------


class Stops(Exception):
    pass


def failing(at, error=Stops):
    """A logits processor that raises at its step `at`."""
    steps = iter(range(1000))

    def process(ids, scores):
        if next(steps) == at:
            raise error
        return scores

    return process


@each_fill
@pytest.mark.parametrize("error", [Stops, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_turn_that_raises_leaves_the_conversation_as_it_was(kv_fill, at, error):
    fast = runtime(kv_fill)
    session, straight = fast.session(), fast.session()
    say(session, 0), say(straight, 0)
    before = state(session)
    with pytest.raises(error):
        say(session, 1, logits_processor=[failing(at, error)])
    assert state(session) == before
    assert say(session, 2) == say(straight, 2)


@each_fill
def test_a_turn_whose_prefill_raises_leaves_the_conversation_as_it_was(kv_fill, monkeypatch):
    fast = runtime(kv_fill)
    session, straight = fast.session(), fast.session()
    say(session, 0), say(straight, 0)
    before, chunk = state(session), fast.engine.prefiller._run_slots
    with monkeypatch.context() as patch:

        def half(prompts, pieces, *more):
            chunk(prompts, pieces, *more)
            raise Stops

        patch.setattr(fast.engine.prefiller, "_run_slots", half)
        with pytest.raises(Stops):
            say(session, 1)
    assert state(session) == before
    assert say(session, 2) == say(straight, 2)


@each_fill
def test_a_fill_that_raises_leaves_the_conversation_as_it_was(kv_fill, monkeypatch):
    fast = runtime(kv_fill)
    session, straight = fast.session(), fast.session()
    say(session, 0), say(straight, 0)
    before = state(session)
    with monkeypatch.context() as patch:
        fill, calls = fast.engine.decoder.fill, []

        def second(*given):
            calls.append(given)
            if len(calls) == 2:
                raise Stops
            fill(*given)

        patch.setattr(fast.engine.decoder, "fill", second)
        if kv_fill == "deferred":
            with pytest.raises(Stops):
                say(session, 1)
    assert state(session) == before
    assert say(session, 2) == say(straight, 2)


@each_fill
@pytest.mark.parametrize("taken", [1, 4, NEW - 1])
def test_a_stream_that_is_closed_keeps_what_it_has_handed_out(kv_fill, taken):
    fast = runtime(kv_fill)
    session, straight = fast.session(), fast.session()
    pieces = session.stream(tiny_models.prompt(4, 0), max_new_tokens=NEW, eos_token_id=None)
    got = [next(pieces) for _ in range(taken)]
    pieces.close()
    assert session.ids == [*tiny_models.prompt(4, 0), *got] and session.turns == 1
    assert say(straight, 0, max_new_tokens=taken) == got
    assert say(session, 1) == say(straight, 1)


def test_a_stream_that_was_never_begun_is_no_turn():
    session = runtime().session()
    session.stream(tiny_models.prompt(4), max_new_tokens=NEW).close()
    assert state(session) == ([], None, 0, 0)


def test_an_open_stream_lets_no_other_turn_in():
    fast = runtime()
    session, other = fast.session(), fast.session()
    pieces = session.stream(tiny_models.prompt(4), max_new_tokens=NEW, eos_token_id=None)
    next(pieces)
    with pytest.raises(d3rt.D3rtError, match="still open in this thread"):
        say(other, 0)
    with pytest.raises(d3rt.D3rtError, match="still open in this thread"):
        session.fork()
    assert len(list(pieces)) == NEW - 1


def test_threads_take_turns():
    fast = runtime("deferred")
    alone = []
    for first in range(3):
        session = fast.session()
        alone.append([say(session, first), say(session, 9), say(session, first + 3)])
    got = [None] * 3

    def talk(first):
        session = fast.session()
        got[first] = [say(session, first), say(session, 9), say(session, first + 3)]

    threads = [threading.Thread(target=talk, args=(first,)) for first in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert got == alone


def test_a_session_that_is_gone_is_not_put_away():
    fast = runtime()
    session = fast.session()
    say(session, 0)
    del session
    assert fast.engine.tenant() is None
    assert len(fast.generate(torch.tensor([[5, 6]]), max_new_tokens=3, eos_token_id=None)[0]) == 5


# -- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.demo_model
def test_messages_are_rendered_by_the_template_and_only_what_is_new_is_read():
    fast = d3rt.compile(None, POLICY.__class__(alpha=0.99, start=0.5), max_seq_len=512, kv_fill="deferred")
    session = fast.session()
    first = session.send("Name three rivers.", max_new_tokens=12)
    assert [each["role"] for each in session.messages] == ["user", "assistant"]
    assert session.messages[1]["content"] == first.text == str(first)
    cached = session.cached_tokens
    second = session.send([{"role": "user", "content": "And a lake?"}], max_new_tokens=8)
    # The template ends an answer with its own token, which the first answer did not reach.
    assert second.reused >= cached - 1 and second.recomputed == 0 and second.filled > 0
    rendered = fast.tokenizer.apply_chat_template(
        session.messages[:-1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert session.ids == [*rendered, *second.tokens]
    session.rewind()
    assert session.messages[-1]["content"] == first.text
    pieces = "".join(session.stream("And a lake?", max_new_tokens=8))
    assert pieces.strip() == session.last_reply.text.strip() == second.text.strip()
    with pytest.raises(ValueError, match="of messages, and so must be"):
        session.send([1, 2, 3])


@pytest.mark.demo_model
def test_exact_turns_of_a_real_conversation_equal_a_fresh_read():
    fast = d3rt.compile(None, "d3:alpha=0.99,start=0.5", max_seq_len=512)
    session = fast.session()
    for text in ("What is the capital of France?", "And of Italy?", "Which is larger?"):
        reply = session.send(text, max_new_tokens=16)
        ids = torch.tensor([session.ids[: -len(reply.tokens)]])
        fresh = fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)
        assert fresh[0, ids.shape[1] :].tolist() == list(reply.tokens)
