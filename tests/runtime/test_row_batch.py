"""A RowBatch: every row's tokens are those of a generation of its own, whoever joins, leaves or stands beside it."""

import random
from collections import Counter

import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt.backends.reference import ReferenceProgram
from d3rt.kernels import reference

BACKENDS = ("reference", "cpu")
D3 = d3rt.D3(alpha=0.9, start=0.4)


def alone(fast, policy, prompt, **options):
    """The new tokens of a generation of its own."""
    other = tiny_models.runtime("llama", policy, backend=fast.backend.name)
    ids = torch.tensor([prompt])
    out = other.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_rows_that_come_and_go_answer_as_if_alone(policy, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend)
    batch = fast.serve_batch(3)
    batch._cache.k.fill_(torch.nan), batch._cache.v.fill_(torch.nan)
    rows = {}
    for i in range(7):
        prompt = tiny_models.prompt(2 + i * 3 % 7, i)
        rows[batch.add(prompt, max_new_tokens=3 + i * 2, eos_token_id=None)] = prompt, 3 + i * 2
        batch.step()
    done = batch.drain()
    assert set(done) == set(rows) and batch.active == batch.waiting == ()
    for row, (prompt, new) in rows.items():
        assert done[row].tokens == alone(fast, policy, prompt, max_new_tokens=new, eos_token_id=None)


@pytest.mark.parametrize("seed", range(6))
def test_any_policies_may_stand_side_by_side(seed):
    draw = random.Random(seed)
    fast = tiny_models.runtime("llama", threads=2)
    batch, rows = fast.serve_batch(5), {}
    for i in range(12):
        policy = draw.choice(list(schedules.POLICIES.values()))
        prompt, new = tiny_models.prompt(draw.randint(1, 6), i), draw.randint(1, 12)
        rows[batch.add(prompt, policy=policy, max_new_tokens=new, eos_token_id=None)] = policy, prompt, new
        for _ in range(draw.randint(0, 3)):
            batch.step()
        if draw.random() < 0.3:
            gone = draw.choice(list(rows))
            row, (policy, prompt, new) = batch.remove(gone), rows.pop(gone)
            assert (
                row.tokens
                == alone(fast, policy, prompt, max_new_tokens=new, eos_token_id=None)[: len(row.tokens)]
            )
    done = batch.drain()
    assert set(done) == set(rows)
    for row, (policy, prompt, new) in rows.items():
        assert done[row].tokens == alone(fast, policy, prompt, max_new_tokens=new, eos_token_id=None)
        plans = policy.schedule(6, new).plans()
        assert done[row].depths == [plan.layer_set.depth for plan in plans]


def test_the_order_in_which_rows_are_added_changes_no_token():
    fast = tiny_models.runtime("llama", D3)
    prompts = [tiny_models.prompt(3 + i, i) for i in range(4)]
    answers = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        batch = fast.serve_batch(4)
        numbers = {i: batch.add(prompts[i], max_new_tokens=10, eos_token_id=None) for i in order}
        done = batch.drain()
        answers.append([done[numbers[i]].tokens for i in range(4)])
    assert answers[0] == answers[1]


def test_each_layer_runs_once_for_just_the_rows_that_retain_it(monkeypatch):
    ran = Counter()

    class Spy:
        def __getattr__(self, name):
            op = getattr(reference, name)

            def call(*arguments, **named):
                ran[name, len(arguments[0])] += 1
                return op(*arguments, **named)

            return call

    monkeypatch.setattr(ReferenceProgram, "replay", lambda program: program._step(Spy()))
    policy = d3rt.D3(alpha=0.9, start=0.2)
    batch = tiny_models.runtime("llama", policy, backend="reference").serve_batch(4)
    for _ in range(4):
        batch.add(tiny_models.prompt(4), max_new_tokens=40, eos_token_id=None)
        batch.step(), batch.step()
    plans = [batch[row].plan for row in batch.active]
    assert len({plan.layer_set.depth for plan in plans}) >= 3
    ran.clear()
    batch.step()
    expected = Counter({("embed", 4): 1, ("norm_logits", 4): 1})
    for layer in range(6):
        rows = sum(layer in plan.layer_set.layers for plan in plans)
        names = ("norm_qkv_rope", "attention", "proj_add", "norm_gate_up", "proj_add")
        expected.update((name, rows) for name in names if rows)
    assert ran == expected


def test_a_row_that_has_finished_costs_nothing():
    fast = tiny_models.runtime("llama")
    batch = fast.serve_batch(3)
    short = batch.add(tiny_models.prompt(3), max_new_tokens=2, eos_token_id=None)
    batch.add(tiny_models.prompt(4), max_new_tokens=6, eos_token_id=None)
    batch.step(), batch.step()
    assert batch[short].finished and short not in batch.active
    batch.step()
    assert max(key[0] for key in batch._recorded) == 2 and list(batch._buffers) == [1, 2]


def test_new_combinations_of_known_layers_record_nothing():
    fast = tiny_models.runtime("llama", D3)
    batch = fast.serve_batch(3)
    recorded = []
    for gap in (2, 2, 3):
        for i in range(3):
            batch.add(tiny_models.prompt(4, i), max_new_tokens=20, eos_token_id=None)
            for _ in range(gap):
                batch.step()
        batch.drain()
        recorded.append((len(batch._recorded), len(batch._steps_of)))
    assert recorded[0] == recorded[1] and recorded[2][1] > recorded[1][1]
    assert recorded[2][0] <= 3 * (6 * 3 + 2)  # of each number of rows: any share of each layer, and both ends


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_draw_as_they_would_alone(backend):
    fast = tiny_models.runtime("llama", D3, backend=backend)
    batch, options = fast.serve_batch(3), {}
    for i in range(5):
        given = dict(
            max_new_tokens=8,
            eos_token_id=None,
            do_sample=True,
            seed=i,
            top_k=20,
            top_p=0.9,
            repetition_penalty=1.2,
        )
        options[batch.add(tiny_models.prompt(4, i), **given)] = given
    done = batch.drain()
    for row, given in options.items():
        assert done[row].tokens == alone(fast, D3, tiny_models.prompt(4, row), **given)


def test_rows_may_have_processors_and_criteria_of_their_own():
    fast = tiny_models.runtime("llama", D3)
    batch, prompt = fast.serve_batch(2), tiny_models.prompt(4)
    options = [
        dict(min_new_tokens=6, eos_token_id=7, max_new_tokens=9),
        dict(no_repeat_ngram_size=1, max_new_tokens=9),
    ]
    rows = [batch.add(prompt, **each) for each in options]
    done = batch.drain()
    for row, each in zip(rows, options, strict=True):
        assert done[row].tokens == alone(fast, D3, prompt, **each)


def test_an_end_of_sequence_ends_its_row_only():
    fast = tiny_models.runtime("llama", D3)
    prompt = tiny_models.prompt(5)
    eos = alone(fast, D3, prompt, max_new_tokens=6, eos_token_id=None)[3]
    batch = fast.serve_batch(2)
    ends, other = (
        batch.add(prompt, max_new_tokens=20, eos_token_id=eos),
        batch.add([9, 8], max_new_tokens=12, eos_token_id=None),
    )
    done = batch.drain()
    assert done[ends].tokens[-1] == eos and len(done[ends].tokens) <= 4 and len(done[other].tokens) == 12


def test_generations_and_sessions_in_between_disturb_no_row():
    fast = tiny_models.runtime("llama", D3)
    batch, session = fast.serve_batch(2), fast.session()
    rows = [batch.add(tiny_models.prompt(4, i), max_new_tokens=9, eos_token_id=None) for i in range(2)]
    while batch.active or batch.waiting:
        batch.step()
        session.send([5, 6], max_new_tokens=2, eos_token_id=None)
        fast.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=3, eos_token_id=None)
    for i, row in enumerate(rows):
        assert batch[row].tokens == alone(
            fast, D3, tiny_models.prompt(4, i), max_new_tokens=9, eos_token_id=None
        )


def test_rows_join_together_every_so_many_steps():
    fast = tiny_models.runtime("llama", D3)
    batch = fast.serve_batch(4, join_every=5)
    batch.add([5, 6], max_new_tokens=30, eos_token_id=None)
    batch.step(), batch.step()
    late = [batch.add([7 + i], max_new_tokens=4, eos_token_id=None) for i in range(2)]
    for _ in range(3):
        assert batch.waiting == tuple(late)
        batch.step()
    assert set(batch.step()) == {0, *late} and batch.waiting == ()


def test_a_row_whose_scores_are_broken_stops_no_other():
    fast = tiny_models.runtime("llama", D3)
    batch = fast.serve_batch(2)

    def forbid(ids, scores):
        return torch.full_like(scores, -torch.inf) if ids.shape[1] > 6 else scores

    good = batch.add(tiny_models.prompt(4), max_new_tokens=9, eos_token_id=None)
    bad = batch.add(tiny_models.prompt(4, 1), max_new_tokens=9, eos_token_id=None, logits_processor=[forbid])
    batch.step(), batch.step(), batch.step()
    for _ in range(2):
        with pytest.raises(d3rt.errors.NotFiniteError, match=f"row {bad} at its step 3.*remove the row"):
            batch.step()
    assert len(batch.remove(bad).tokens) == 3
    batch.drain()
    assert batch[good].tokens == alone(fast, D3, tiny_models.prompt(4), max_new_tokens=9, eos_token_id=None)


def test_what_does_not_fit_is_refused_before_any_work():
    fast = tiny_models.runtime("llama", D3)
    for wrong, match in (
        ({"rows": 0}, "rows=0"),
        ({"rows": 17}, "at most 16"),
        ({"join_every": 0}, "join_every=0"),
        ({"max_seq_len": 1000}, "compiled for 160"),
    ):
        with pytest.raises(ValueError, match=match):
            fast.serve_batch(**wrong)
    batch = fast.serve_batch(2, max_seq_len=20)
    for prompt, options, error, match in (
        ([tiny_models.prompt(15)], {"max_new_tokens": 6}, ValueError, "exceed max_seq_len=20"),
        ([[5], [6]], {}, ValueError, "one by one"),
        ([5], {"num_beams": 3, "max_new_tokens": 2}, d3rt.UnsupportedOptionError, "num_beams"),
        ([5], {"attention_mask": torch.ones(1, 1)}, d3rt.UnsupportedOptionError, "attention_mask"),
        ([5], {"max_new_tokens": 2, "policy": "d4"}, d3rt.PolicyError, "d4"),
        ([500], {}, ValueError, "0..130"),
    ):
        with pytest.raises(error, match=match):
            batch.add(torch.tensor(prompt), **options)
    assert batch.waiting == () and batch.step() == {}
    with pytest.raises(KeyError, match="row 3: there is none"):
        batch.remove(3)


def test_rows_wait_for_room():
    fast = tiny_models.runtime("llama")
    batch = fast.serve_batch(1)
    rows = [batch.add([5 + i], max_new_tokens=2, eos_token_id=None) for i in range(3)]
    assert batch.step().keys() == {rows[0]} and batch.waiting == tuple(rows[1:])
    batch.remove(rows[1])
    batch.step()
    assert batch.step().keys() == {rows[2]} and repr(batch) == "RowBatch(1 of 1 rows active, 0 waiting)"
