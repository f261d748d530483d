"""Random conversations against the oracle: turns, forks, rewinds, files, changes of policy and of batch, interruptions,
in any order and on several sessions at once. K,V that nobody has written is NaN."""

import random

import oracle
import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt.session import Session

NAME, LAYERS, LONGEST = "llama-mha", 4, 60
POLICIES = [
    d3rt.FullDepth(),
    d3rt.D3(alpha=0.8, start=0.25),
    d3rt.D3(alpha=0.7, start=0.5, tail=0),
    d3rt.SkipDecode(max_layers=3, min_layers=2, length=5),
    d3rt.UnifiedSkip(2),
    d3rt.StaticLayers(layers=(0, 3)),
    d3rt.StaticLayers(layers=(0, 2), prompt="skipped"),
    d3rt.StaticLayers(attention=(0, 3), mlp=(0, 1, 2, 3)),
    d3rt.LayerSchedule(sets=((0, 1, 2, 3), (0, 3), (0, 1, 3), (2,)), cycle=True),
    *(schedules.random_sets(seed, LAYERS, 8) for seed in range(3)),
]


class Stop(Exception):
    pass


class Pair:
    """A session, and the oracle's account of the same conversation."""

    def __init__(self, session: Session, model, kv_fill: str):
        self.session, self.kv_fill = session, kv_fill
        self.truth = oracle.Conversation.new(model, exact=kv_fill in ("auto", "recompute"))
        self.before: list[list[int]] = []  # all tokens before each turn

    def fork(self) -> "Pair":
        copy = object.__new__(Pair)
        copy.session, copy.truth = self.session.fork(), self.truth.fork()
        copy.kv_fill, copy.before = self.kv_fill, list(self.before)
        return copy

    def plans(self, steps: int):
        return self.session.policy.schedule(LAYERS, steps).plans(self.kv_fill)


class Fuzz:
    def __init__(self, seed: int, backend: str):
        self.draw = random.Random(seed)
        self.kv_fill = self.draw.choice(("eager", "deferred", "recompute", "auto"))
        self.model = tiny_models.make(NAME)
        self.fast = tiny_models.runtime(NAME, backend=backend, kv_fill=self.kv_fill, threads=2)
        self.fast.engine.cache.k.fill_(torch.nan), self.fast.engine.cache.v.fill_(torch.nan)
        self.pairs = [self.new()]
        self.steps = 0

    def new(self) -> Pair:
        return Pair(self.fast.session(self.draw.choice(POLICIES)), self.model, self.kv_fill)

    def tokens(self, most: int) -> list[int]:
        # Few different ones, so that conversations agree by chance.
        return [self.draw.randint(3, 6) for _ in range(self.draw.randint(1, most))]

    def act(self, folder) -> None:
        pair = self.draw.choice(self.pairs)
        actions = [self.send] * 6 + [
            self.fork,
            self.rewind,
            self.cut,
            self.policy,
            self.batch,
            self.interrupt,
        ]
        actions += [self.whole, self.close, self.file]
        action = self.draw.choice(actions)
        action(pair, folder) if action == self.file else action(pair)
        assert pair.session.ids == pair.truth.ids

    def send(self, pair: Pair) -> None:
        new, count = self.tokens(4), self.draw.randint(1, 6)
        if len(pair.session.ids) + 10 > LONGEST:
            return self.rewind(pair)
        reply = pair.session.send(new, max_new_tokens=count, eos_token_id=None)
        self.expect(pair, [*pair.truth.ids, *new], count, list(reply.tokens))

    def whole(self, pair: Pair) -> None:
        other = self.draw.choice(self.pairs)
        ids = [*other.session.ids[: self.draw.randint(0, 30)], *self.tokens(3)]
        reply = pair.session.send(ids, whole=True, max_new_tokens=3, eos_token_id=None)
        self.expect(pair, ids, 3, list(reply.tokens))

    def expect(
        self, pair: Pair, ids: list[int], count: int, got: list[int], planned: int | None = None
    ) -> None:
        plans = pair.plans(planned or count)[:count]
        pair.before.append(pair.truth.ids)
        assert got == pair.truth.send(ids, plans).tokens
        self.steps += count

    def fork(self, pair: Pair) -> None:
        if len(self.pairs) < 5:
            self.pairs.append(pair.fork())
        else:
            self.pairs[self.pairs.index(pair)] = self.new()

    def rewind(self, pair: Pair) -> None:
        turns = self.draw.randint(0, pair.session.turns)
        pair.session.rewind(turns)
        for _ in range(turns):
            pair.truth.ids = pair.before.pop()
        self.forget(pair)

    def cut(self, pair: Pair) -> None:
        length = self.draw.randint(0, len(pair.session.ids))
        pair.session.rewind(tokens=length)
        pair.truth.ids = pair.truth.ids[:length]
        pair.before = pair.before[: pair.session.turns]
        self.forget(pair)

    def forget(self, pair: Pair) -> None:
        """What is cached of tokens that are not said any more."""
        cached = [token for token, _ in pair.truth.how]
        while cached != pair.truth.ids[: len(cached)]:
            cached.pop()
        pair.truth.keep(len(cached))

    def policy(self, pair: Pair) -> None:
        pair.session.policy = self.draw.choice(POLICIES)

    def batch(self, pair: Pair) -> None:
        inputs = tiny_models.left_padded([self.tokens(6) for _ in range(self.draw.randint(1, 4))])
        out = self.fast.generate(**inputs, max_new_tokens=4, eos_token_id=None)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 4

    def interrupt(self, pair: Pair) -> None:
        """A turn that raises at some step; the oracle has read what was read of it."""
        at = self.draw.randint(0, 3)
        left = iter(range(at + 1))

        def process(ids, scores):
            if next(left) == at:
                raise Stop
            return scores

        ids = [*pair.truth.ids, *self.tokens(3)]
        with pytest.raises(Stop):
            pair.session.send(
                ids[len(pair.truth.ids) :], max_new_tokens=5, eos_token_id=None, logits_processor=[process]
            )
        pair.truth.keep(pair.truth.start(ids, pair.plans(5)))

    def close(self, pair: Pair) -> None:
        """A stream that is closed early is a turn that ended there; its plans were those of the whole."""
        ids, taken = [*pair.truth.ids, *self.tokens(3)], self.draw.randint(1, 4)
        if len(ids) + 10 > LONGEST:
            return self.rewind(pair)
        pieces = pair.session.stream(ids[len(pair.truth.ids) :], max_new_tokens=5, eos_token_id=None)
        got = [next(pieces) for _ in range(taken)]
        pieces.close()
        self.expect(pair, ids, taken, got, planned=5)

    def file(self, pair: Pair, folder) -> None:
        if isinstance(pair.session.policy, schedules.AnySets):
            return  # it has no name to be saved by
        pair.session = self.fast.load_session(pair.session.save(folder / "talk"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("seed", range(8))
def test_a_random_conversation_is_the_oracles(seed, backend, tmp_path):
    fuzz = Fuzz(seed, backend)
    for _ in range(120):
        fuzz.act(tmp_path)
    assert fuzz.steps > 100
