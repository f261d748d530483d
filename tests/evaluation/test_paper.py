"""bench/paper.py: its figures are what they say they are."""

import json

import paper
import pytest
import torch
from reexamined import averages, equal_bytes, forcing, grid, premise

import d3rt
from d3rt.policies import CALM, D3, FullDepth, StaticLayers

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def chatty(fast):
    fast.tokenizer.chat_template = TEMPLATE
    yield fast
    fast.tokenizer.chat_template = None


@pytest.fixture
def options(tmp_path, text_file, model):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"Question {at}?"}) + "\n" for at in range(12)))
    given = paper.options(
        f"premise --texts 3 --prompt 8 --new 32 --text {text_file} --prompts {prompts} --shots 0 --gsm8k-items 2 "
        f"--bbh-new 4 --out {tmp_path / 'out'}".split()
    )
    given.bbh_tasks = ("navigate",)
    given.model_object = model
    return given


def test_the_printed_averages_and_ratios_follow_from_the_formulas():
    rows = averages.measure()["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row["layers"] == pytest.approx(row["printed_layers"], abs=0.006)
        assert row["ratio"] == pytest.approx(row["printed_ratio"], abs=0.016)
    assert rows[0]["ratio_at"][5] == pytest.approx(1.24, abs=0.01), "short answers save little"
    assert all(row["clock"] > row["ratio"] + 0.04 for row in rows[3:]), "the printed times exceed the FLOPs"
    assert "13B | `d3:alpha=0.9,start=0.5,tail=0` | 20.33 | 20.34 | 1.94x | 1.94x" in averages.markdown(
        {"rows": rows}
    )


def test_the_lm_head_of_llama_2_in_layers():
    assert [round(each.head_in_layers, 2) for each in averages.MODELS] == [0.65, 0.52, 0.31]


def test_forced_tokens_give_what_the_runtime_would_choose_from(fast):
    item = forcing.Item("0", tuple(range(40, 60)), tuple(range(70, 90)))
    policy = D3(0.9, 0.4)
    other = forcing.Item("1", tuple(range(30, 42)), tuple(range(90, 97)))
    ((logs, cost),) = forcing.Teacher(fast).logs([item], policy)
    fast.policy = policy
    steps = list(fast.forced_logits([torch.tensor(item.prompt)], torch.tensor([item.tokens])))
    assert (logs - torch.cat(steps).log_softmax(-1)).abs().max() < 1e-4
    assert cost.depth == sum(policy.schedule(6, 20).depths)
    (beside, its_cost), (short, short_cost) = forcing.Teacher(fast).logs([item, other], policy)
    assert (beside - logs).abs().max() < 1e-4 and its_cost.weight_bytes == cost.weight_bytes
    assert len(short) == 7 and short_cost.depth == sum(policy.schedule(6, 7).depths)
    ((alone, _),) = forcing.Teacher(fast).logs([other], policy)
    assert (short - alone).abs().max() < 1e-4


def test_a_prompt_is_read_once_however_many_policies_go_on_from_it(fast, monkeypatch):
    read = []
    prefill = fast.engine.prefill
    monkeypatch.setattr(
        fast.engine, "prefill", lambda prompts, *rest: (read.append(rest[-1]), prefill(prompts, *rest))
    )
    item = forcing.Item("0", tuple(range(40, 60)), (1, 2, 3))
    arms = {"full": FullDepth(), "some": D3(0.9, 0.4), "few": StaticLayers((0, 1, 5))}
    results = {arm: result for arm, _, result in forcing.Teacher(fast).compare([item], arms, arms)}
    assert [starts[0] for starts in read] == [0, 19, 19, 19]
    assert max(map(abs, results["full"]["kl"])) < 1e-6 and results["full"]["agree"] == [1, 1, 1]
    assert results["few"]["kl"][0] < 1e-6 < results["few"]["kl"][1], "the first token comes from the prompt"


def test_greedy_stops_where_the_answer_does(fast):
    teacher = forcing.Teacher(fast)
    tokens, text = teacher.greedy(range(40, 50), 12)
    assert len(tokens) == 12 and text == fast.tokenizer.decode(tokens)
    stop = text[2:4]
    cut_tokens, cut_text = teacher.greedy(range(40, 50), 12, [stop])
    assert cut_text == text.partition(stop)[0] and tokens[: len(cut_tokens)] == cut_tokens
    assert len(cut_tokens) < 12


def test_the_premise_is_held_against_skips_that_begin_late(chatty, options, monkeypatch):
    monkeypatch.setattr(premise, "SKIPPED", (1, 2))
    found = premise.measure(chatty, options)
    for task in ("text", "own"):
        arms = found["tasks"][task]["arms"]
        late = [each["mean"] for each in arms["2 late"]["kl"]]
        always = [each["mean"] for each in arms["2"]["kl"]]
        assert max(map(abs, late[:4])) < 1e-6 and min(late[4:]) > 1e-6, (
            "begun at step 16 of 32: in bin 4 of 8"
        )
        assert min(always) > 1e-6
        assert arms["2"]["trend"]["items"] == 3
    assert premise.constant(6, 2).layer_set(1, 6).depth == 4
    assert premise.constant(6, 2, 16).layer_set(15, 6).depth == 6
    assert "| KL, without 2 layers |" in premise.markdown(found)
    assert premise.draw(found, options.out / "x.png").stat().st_size > 5000


def test_every_policy_comes_to_the_same_mean_depth(chatty, options, monkeypatch):
    monkeypatch.setattr(equal_bytes, "TARGETS", (2 / 3,))
    monkeypatch.setattr(equal_bytes, "STARTS", (0.3, 0.5))
    monkeypatch.setattr(equal_bytes, "TUNING", 2)
    found = equal_bytes.measure(chatty, options)
    figures = found["tasks"]["own"]
    layer, head = chatty.engine.decoder.weights.layers[0], chatty.engine.decoder.weights.lm_head
    layer_bytes = layer.attention_bytes + layer.mlp_bytes
    assert set(found["policies"]) == {
        "full",
        *(f"0.666667: D3, start {start}" for start in (0.3, 0.5)),
        *(
            f"0.666667: {name}"
            for name in (
                *("SkipDecode", "Unified Layer Skipping", "one window in the middle", "ShortGPT", "greedy"),
                *("LayerDrop, every other", "CALM, state"),
            )
        ),
    }
    for arm, figure in figures.items():
        if arm == "full":
            assert figure["bytes"] == 1 and abs(figure["kl"]["mean"]) < 1e-6
        elif "CALM" not in arm:
            wanted = (4 * layer_bytes + head.numel() * 4) / (6 * layer_bytes + head.numel() * 4)
            assert figure["bytes"] == pytest.approx(wanted, rel=0.02), arm
            assert figure["kl"]["mean"] > 0 and 0 <= figure["agree"]["mean"] <= 1
    assert isinstance(d3rt.parse(found["policies"]["0.666667: CALM, state"]), CALM)
    text = equal_bytes.markdown(found)
    assert text.count("| D3, start 0.5 |") == 1 and "| 1.000 |" in text, "D3 .5 against itself"
    assert equal_bytes.draw(found, options.out / "x.png").stat().st_size > 5000


def test_a_bisection_finds_the_argument():
    assert equal_bytes.bisect(lambda x: x * x, 0, 2, 2) == pytest.approx(2**0.5)
    assert equal_bytes.depth_of(equal_bytes.d3(0.5, 25, 30, 128), 30, 128) == pytest.approx(25, abs=0.05)


def test_the_grid_goes_on_where_it_was_stopped(chatty, options, monkeypatch):
    monkeypatch.setattr(grid, "STARTS", (0.2, 0.5))
    monkeypatch.setattr(grid, "ALPHAS", (0.9, 0.999))
    found = grid.measure(chatty, options)
    assert {task: of["full"]["items"] for task, of in found["tasks"].items()} == {
        **{"gsm8k": 2, "gsm8k gold": 2, "bbh": 1, "bbh gold": 1, "text": 3}
    }
    assert (
        found["tasks"]["gsm8k"]["0.9/0.5"]["mean_depth"] < found["tasks"]["gsm8k"]["0.999/0.5"]["mean_depth"]
    )
    assert found["tasks"]["bbh"]["0.9/0.2"]["right"]["p"] <= 1
    lines = (options.out / "grid.jsonl").read_text().splitlines()
    (options.out / "grid.jsonl").write_text("\n".join(lines[:-7]) + "\n")
    forced = []
    logs = forcing.Teacher.logs
    monkeypatch.setattr(forcing.Teacher, "logs", lambda *given: (forced.append(given[2]), logs(*given))[1])
    assert grid.measure(chatty, options) == found
    lost = [D3(0.9, 0.5), D3(0.999, 0.2), D3(0.999, 0.5)]  # of the last three texts, which run side by side
    assert forced == [FullDepth(), *lost]
    assert "BBH, exact match" in grid.markdown(found)
    assert grid.draw(found, options.out / "x.png").stat().st_size > 5000


def test_bad_sizes_are_refused(capsys):
    with pytest.raises(SystemExit):
        paper.options(["grid", "--new", "2"])
    assert "at least 16 tokens" in capsys.readouterr().err


def test_the_averages_need_no_model(tmp_path, capsys):
    paper.main(["averages", "--out", str(tmp_path)])
    assert "| gsm8k, 70B |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "averages.json").read_text())["rows"]) == 6
