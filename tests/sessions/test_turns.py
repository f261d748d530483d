"""A session's turns are what the oracle makes of them: exact where kv_fill is "recompute", and from the K,V that is
there where it is "eager" or "deferred"."""

import oracle
import pytest
import schedules
import tiny_models
import torch

import d3rt

BACKENDS = ("reference", "cpu")
FILLS = ("auto", "eager", "deferred", "recompute")
TURNS, NEW = 3, 9


def talk(session, turns=TURNS, new=NEW, lengths=(6, 3, 4), **options):
    """Several turns of random tokens; the tokens of each answer."""
    return [
        list(
            session.send(
                tiny_models.prompt(length, seed), max_new_tokens=new, eos_token_id=None, **options
            ).tokens
        )
        for seed, length in enumerate(lengths[:turns])
    ]


def answer(fast, ids, new=NEW):
    """The new tokens of a plain `generate` that reads all of ids."""
    ids = torch.tensor([ids])
    out = fast.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, eos_token_id=None, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


def expected(name, policy, kv_fill, turns=TURNS, new=NEW, lengths=(6, 3, 4), dtype=torch.float32):
    """The oracle's answers to the same turns."""
    model = tiny_models.make(name, dtype)
    plans = policy.schedule(model.config.num_hidden_layers, new).plans(kv_fill)
    conversation = oracle.Conversation.new(model, exact=kv_fill in ("auto", "recompute"))
    return [
        conversation.send([*conversation.ids, *tiny_models.prompt(length, seed)], plans).tokens
        for seed, length in enumerate(lengths[:turns])
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_fill", FILLS)
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_every_turn_is_the_oracles(policy, kv_fill, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend, kv_fill=kv_fill)
    fast.engine.cache.k.fill_(torch.nan), fast.engine.cache.v.fill_(torch.nan)
    assert talk(fast.session()) == expected("llama", policy, kv_fill)


@pytest.mark.parametrize("kv_fill", ["deferred", "recompute"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_family(name, kv_fill):
    policy = schedules.random_sets(3, tiny_models.make(name).config.num_hidden_layers, NEW)
    fast = tiny_models.runtime(name, policy, kv_fill=kv_fill)
    assert talk(fast.session()) == expected(name, policy, kv_fill)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_recompute_answers_as_a_runtime_does_that_reads_the_whole_conversation(policy, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend, kv_fill="recompute")
    other = tiny_models.runtime("llama", policy, backend=backend)
    session = fast.session()
    for seed in range(TURNS):
        reply = session.send(tiny_models.prompt(4, seed), max_new_tokens=NEW, eos_token_id=None)
        assert list(reply.tokens) == answer(other, session.ids[:-NEW])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", [None, "int8"])
def test_deferred_makes_the_kv_that_eager_makes_within_the_dtype(dtype, cache):
    policy, kept = d3rt.D3(alpha=0.9, start=0.34), {}
    for kv_fill in ("eager", "deferred"):
        fast = tiny_models.runtime("llama", policy, dtype=dtype, kv_fill=kv_fill, kv_cache_dtype=cache)
        session = fast.session()
        inputs = tiny_models.prompt(6)
        forced = tiny_models.prompt(NEW, 7)
        session.send(
            inputs, max_new_tokens=NEW, eos_token_id=None, logits_processor=[schedules.Forced(6, [forced])]
        )
        session.send(
            [5], max_new_tokens=1, eos_token_id=None, logits_processor=[schedules.Forced(7 + NEW, [[3]])]
        )
        kept[kv_fill] = [
            d3rt.kernels.kv_line.read(each[:, 0, :, : 6 + NEW - 1]).double()
            for each in (fast.engine.cache.k, fast.engine.cache.v)
        ]
    narrow = torch.bfloat16 if cache == "int8" else dtype  # of the hidden state that was kept
    # Roundings: of sums in another order, and of the state.
    steps = {torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}[dtype]
    for eager, deferred in zip(*kept.values(), strict=True):
        size = eager.abs().amax(-1, keepdim=True)
        allowed = steps * torch.finfo(narrow).eps * size + (size / 127 if cache == "int8" else 0)
        assert ((eager - deferred).abs() <= allowed).all()
        assert not torch.equal(eager, deferred)  # so it was kept, and filled later


@pytest.mark.parametrize("kv_fill", ["eager", "deferred"])
def test_what_was_filled_is_not_read_again(kv_fill):
    fast = tiny_models.runtime("llama", d3rt.D3(alpha=0.9, start=0.4), kv_fill=kv_fill)
    session = fast.session()
    session.send(tiny_models.prompt(6), max_new_tokens=NEW, eos_token_id=None)
    reply = session.send(tiny_models.prompt(3), max_new_tokens=NEW, eos_token_id=None)
    assert (reply.reused, reply.recomputed, reply.read) == (6 + NEW - 1, 0, 4)
    assert reply.filled == (NEW - 1 if kv_fill == "deferred" else 0)


def test_recompute_says_how_much():
    fast = tiny_models.runtime("llama", d3rt.D3(alpha=0.9, start=0.4))
    session = fast.session()
    session.send(tiny_models.prompt(6), max_new_tokens=NEW, eos_token_id=None)
    reply = session.send(tiny_models.prompt(3), max_new_tokens=NEW, eos_token_id=None)
    assert (reply.reused, reply.filled, reply.recomputed, reply.read) == (6, 0, NEW - 1, 4)


@pytest.mark.parametrize("kv_fill", FILLS)
def test_nothing_is_repaired_at_full_depth(kv_fill):
    fast = tiny_models.runtime("llama", kv_fill=kv_fill)
    session = fast.session()
    session.send(tiny_models.prompt(6), max_new_tokens=NEW, eos_token_id=None)
    reply = session.send(tiny_models.prompt(3), max_new_tokens=NEW, eos_token_id=None)
    assert (reply.reused, reply.filled, reply.recomputed) == (6 + NEW - 1, 0, 0)


@pytest.mark.parametrize("kv_fill", FILLS)
def test_a_static_set_that_reads_the_prompt_too_has_nothing_to_repair(kv_fill):
    policy = d3rt.StaticLayers(layers=(0, 2, 5), prompt="skipped")
    session = tiny_models.runtime("llama", policy, kv_fill=kv_fill).session()
    session.send(tiny_models.prompt(6), max_new_tokens=NEW, eos_token_id=None)
    reply = session.send(tiny_models.prompt(3), max_new_tokens=NEW, eos_token_id=None)
    assert (reply.reused, reply.filled, reply.recomputed) == (6 + NEW - 1, 0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_and_another_session_in_between_change_nothing(backend):
    policy = d3rt.D3(alpha=0.9, start=0.4)
    alone = talk(tiny_models.runtime("llama", policy, backend=backend, kv_fill="deferred").session())
    fast = tiny_models.runtime("llama", policy, backend=backend, kv_fill="deferred")
    session, other, answers = fast.session(), fast.session(), []
    for seed, length in enumerate((6, 3, 4)):
        answers += [
            list(session.send(tiny_models.prompt(length, seed), max_new_tokens=NEW, eos_token_id=None).tokens)
        ]
        other.send(tiny_models.prompt(5, 50 + seed), max_new_tokens=4)
        assert session.nbytes > 0
        fast.generate(**tiny_models.left_padded(tiny_models.ragged((7, 2, 9))), max_new_tokens=5)
    assert answers == alone


@pytest.mark.parametrize("kv_fill", FILLS)
def test_the_policy_may_change_from_turn_to_turn(kv_fill):
    model = tiny_models.make("llama")
    fast = tiny_models.runtime("llama", kv_fill=kv_fill)
    session = fast.session("static:layers=0+2+5,prompt=skipped")
    conversation = oracle.Conversation.new(model, exact=kv_fill in ("auto", "recompute"))
    for seed, policy in enumerate(
        [
            d3rt.StaticLayers(layers=(0, 2, 5), prompt="skipped"),
            d3rt.FullDepth(),
            d3rt.D3(alpha=0.9, start=0.4),
            d3rt.UnifiedSkip(2),
            d3rt.StaticLayers(layers=(0, 2, 5), prompt="skipped"),
        ]
    ):
        session.policy = policy
        new = tiny_models.prompt(3, seed)
        reply = session.send(new, max_new_tokens=NEW, eos_token_id=None)
        plans = policy.schedule(6, NEW).plans(kv_fill)
        assert list(reply.tokens) == conversation.send([*conversation.ids, *new], plans).tokens


def test_steps_begin_anew_with_each_turn_or_go_on():
    policy = d3rt.D3(alpha=0.9, start=0.4, tail=0)
    for restart, depths in ((True, [6, 5, 4, 4]), (False, [6, 3, 3, 2])):
        session = tiny_models.runtime("llama", policy).session(restart_steps=restart)
        session.send(tiny_models.prompt(3), max_new_tokens=4, eos_token_id=None)
        reply = session.send(tiny_models.prompt(3), max_new_tokens=4, eos_token_id=None)
        assert list(reply.stats.depths) == depths


def test_only_what_differs_is_read():
    session = tiny_models.runtime("llama").session()
    ids = tiny_models.prompt(20)
    session.send(ids, max_new_tokens=4, eos_token_id=None)
    changed = [*ids[:12], *tiny_models.prompt(5, 9)]
    reply = session.send(changed, whole=True, max_new_tokens=NEW, eos_token_id=None)
    assert (reply.reused, reply.read) == (12, 5)
    assert list(reply.tokens) == answer(tiny_models.runtime("llama"), changed)
    assert session.ids == [*changed, *reply.tokens]


def test_the_same_conversation_again_reads_its_last_token_only():
    session = tiny_models.runtime("llama").session()
    first = session.send(tiny_models.prompt(20), max_new_tokens=NEW, eos_token_id=None)
    again = session.send(tiny_models.prompt(20), whole=True, max_new_tokens=NEW, eos_token_id=None)
    assert (again.reused, again.read) == (19, 1) and again.tokens == first.tokens


def test_an_answer_that_ran_out_of_tokens_can_be_gone_on_with():
    session = tiny_models.runtime("llama").session()
    session.send(tiny_models.prompt(5), max_new_tokens=4, eos_token_id=None)
    session.send([], max_new_tokens=5, eos_token_id=None)
    whole = answer(tiny_models.runtime("llama"), tiny_models.prompt(5), 9)
    assert session.ids == [*tiny_models.prompt(5), *whole]


def test_an_end_of_sequence_ends_the_turn_and_stays_in_the_conversation():
    fast = tiny_models.runtime("llama")
    ids = tiny_models.prompt(5)
    eos = answer(fast, ids, 4)[-2]
    session = fast.session()
    reply = session.send(ids, max_new_tokens=50, eos_token_id=eos)
    assert reply.tokens[-1] == eos and eos not in reply.tokens[:-1] and session.ids[-1] == eos
    reply = session.send([4, 7], max_new_tokens=NEW, eos_token_id=None)
    assert list(reply.tokens) == answer(fast, session.ids[:-NEW])


def test_a_turn_can_be_drawn_and_depends_on_its_seed_alone():
    fast = tiny_models.runtime("llama", d3rt.D3(alpha=0.9, start=0.4))
    drawn = [talk(fast.session(), do_sample=True, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_processors_see_the_whole_conversation():
    seen = []

    def look(ids, scores):
        seen.append(ids[0].tolist())
        return scores

    session = tiny_models.runtime("llama", d3rt.D3(alpha=0.9, start=0.4)).session()
    talk(session, turns=1)
    talk(session, turns=1, logits_processor=[look])
    assert seen[-1] == session.ids[:-1] and len(seen) == NEW


@pytest.mark.parametrize("kv_fill", FILLS)
def test_streaming_gives_the_same(kv_fill):
    fast = tiny_models.runtime("llama", d3rt.D3(alpha=0.9, start=0.4), kv_fill=kv_fill)
    sent, streamed = fast.session(), fast.session()
    answers = talk(sent)
    for seed, length in enumerate((6, 3, 4)):
        pieces = streamed.stream(tiny_models.prompt(length, seed), max_new_tokens=NEW, eos_token_id=None)
        assert list(pieces) == answers[seed]
    assert streamed.ids == sent.ids and streamed.last_reply.tokens == sent.last_reply.tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("measure, threshold", [("state", 0.6), ("softmax", 0.2)])
def test_steps_that_ended_early_are_read_again_where_that_is_asked_for(measure, threshold, backend):
    policy = d3rt.CALM(threshold, measure, min_exit=1)
    fast = tiny_models.runtime("llama", policy, backend=backend)
    exact, filled = fast.session(), fast.session(kv_fill="eager")
    first = [
        each.send(tiny_models.prompt(6), max_new_tokens=NEW, eos_token_id=None) for each in (exact, filled)
    ]
    assert first[0].tokens == first[1].tokens and first[0].stats.mean_depth < 6
    new = tiny_models.prompt(3, 1)
    replies = [each.send(new, max_new_tokens=NEW, eos_token_id=None) for each in (exact, filled)]
    shallow = next(step for step, depth in enumerate(first[0].stats.depths) if depth < 6)
    assert replies[0].reused == 6 + shallow - 1 and replies[1].reused == 6 + NEW - 1
    assert list(replies[0].tokens) == answer(fast, exact.ids[:-NEW])
    whole = fast.session(d3rt.CALM(1.5, measure, min_exit=1))
    whole.send(tiny_models.prompt(6), max_new_tokens=NEW, eos_token_id=None)
    assert whole.send(new, max_new_tokens=NEW, eos_token_id=None).reused == 6 + NEW - 1


def test_thresholds_go_on_where_steps_do():
    policy = d3rt.CALM(0.9, min_exit=2, decay=4, horizon=20)
    whole, rest = policy.schedule(6, 9), policy.schedule(6, 4, first=5)
    assert rest.thresholds[1:] == whole.thresholds[6:]


def test_early_exit_cannot_be_deferred_and_has_no_place_among_rows_of_their_own_depth():
    fast = tiny_models.runtime("llama")
    with pytest.raises(d3rt.PolicyError, match="kv_fill='deferred'.*fills what it left out at once"):
        fast.session(d3rt.CALM(0.5), kv_fill="deferred").send([5, 6], max_new_tokens=3)
    with pytest.raises(d3rt.UnsupportedOptionError, match="must be known before a step"):
        fast.serve_batch().add([5, 6], policy=d3rt.CALM(0.5), max_new_tokens=3)
