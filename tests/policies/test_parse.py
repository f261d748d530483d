"""The command line form of a policy: what it reads, that str() reads back, and what its errors say."""

import pytest

from d3rt.errors import PolicyError
from d3rt.policies import CALM, D3, FullDepth, LayerSchedule, SkipDecode, StaticLayers, UnifiedSkip, parse

TEXTS = [
    (FullDepth(), "full"),
    (CALM(0.9), "calm:threshold=0.9"),
    (
        CALM(1.5, "softmax", min_exit=4, exit_interval=2, decay=4, horizon=200),
        "calm:threshold=1.5,measure=softmax,min_exit=4,exit_interval=2,decay=4,horizon=200",
    ),
    (D3(0.999, 0.5), "d3:alpha=0.999,start=0.5"),
    (D3(1, 0), "d3:alpha=1,start=0"),
    (D3(0.9, 1 / 3, tail=0), "d3:alpha=0.9,start=0.3333333333333333,tail=0"),
    (D3(1e-9, 0.5, variant="slide", head=2), "d3:alpha=1e-09,start=0.5,variant=slide,head=2"),
    (SkipDecode(22, 11, 200), "skipdecode:max=22,min=11,length=200"),
    (SkipDecode(22, 11, 200, warmup=3), "skipdecode:max=22,min=11,length=200,warmup=3"),
    (UnifiedSkip(2), "unified:ratio=2"),
    (UnifiedSkip(1.5, variant="released"), "unified:ratio=1.5,variant=released"),
    (StaticLayers((*range(16), 29, 30, 31), prompt="skipped"), "static:layers=0-15+29-31,prompt=skipped"),
    (StaticLayers(attention=(), mlp=(0, 1, 5)), "static:attention=none,mlp=0-1+5"),
    (LayerSchedule([(0, 1, 2), (0, 2)], cycle=True), "schedule:sets=0-2/0+2,cycle=true"),
]


@pytest.mark.parametrize("policy, text", TEXTS, ids=[text for _, text in TEXTS])
def test_str_writes_the_form_that_parse_reads(policy, text):
    assert str(policy) == text
    assert parse(text) == policy


@pytest.mark.parametrize("policy", [policy for policy, _ in TEXTS], ids=[text for _, text in TEXTS])
def test_repr_is_the_constructor(policy):
    assert eval(repr(policy)) == policy


@pytest.mark.parametrize(
    "text, policy",
    [
        (" d3: alpha = .999 , start = .5 ", D3(0.999, 0.5)),
        ("d3:start=0.5,alpha=0.999,tail=1", D3(0.999, 0.5)),
        ("skipdecode:max_layers=22,min_layers=11,length=200", SkipDecode(22, 11, 200)),
        ("d3.paper:task=bbh,num_layers=40", D3.paper("bbh", 40)),
        ("static.without:dropped=1+3,num_layers=5", StaticLayers((0, 2, 4))),
        ("static.every_other:p=0.5,num_layers=4,prompt=skipped", StaticLayers((0, 2), prompt="skipped")),
        ("static.shortgpt:model=llama-2-7b", StaticLayers.shortgpt("llama-2-7b")),
        ("full:", FullDepth()),
    ],
)
def test_other_ways_to_write_a_policy(text, policy):
    assert parse(text) == policy


def test_the_models_size_need_not_be_written_where_it_is_known():
    assert parse("d3.paper:task=bbh", num_layers=40) == D3.paper("bbh", 40)
    assert parse("static.every_other:p=0.5", num_layers=4) == StaticLayers((0, 2))


def test_a_policy_is_checked_against_the_model_where_its_size_is_known():
    assert parse("static:layers=0+9") == StaticLayers((0, 9))
    with pytest.raises(PolicyError, match="on 8 layers: there is no layer 9"):
        parse("static:layers=0+9", num_layers=8)


def test_a_path_that_ends_in_json_reads_a_policy_file(tmp_path):
    D3(0.99, 0.5).save(tmp_path / "policy.json")
    assert parse(str(tmp_path / "policy.json")) == D3(0.99, 0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "d4:alpha=1",
            "unknown policy 'd4'; there are: calm, d3, full, schedule, skipdecode, static, unified.*json",
        ),
        ("", "unknown policy ''"),
        (
            "d3:alfa=0.9",
            "'d3:alfa=0.9' has no field 'alfa'; its fields are: alpha, start, tail, variant, head",
        ),
        ("skipdecode:most=3", "no field 'most'; its fields are: max, min, length, warmup"),
        ("full:alpha=1", "has no field 'alpha'; it has no fields"),
        ("d3:alpha=high,start=0.5", "alpha='high' is not a number"),
        ("d3:alpha=0.9,start=0.5,tail=1.5", "tail='1.5' is not an integer"),
        ("schedule:sets=0-2/x", "sets: layer ranges 'x': 'x' is no index and no range"),
        ("schedule:sets=0,cycle=yes", "cycle='yes' is not true or false"),
        ("static:layers=3-1", "the range '3-1' runs backwards; write 1-3"),
        ("static:layers=1,3", r"'3' is not field=value \(layer ranges are joined by '\+'\)"),
        ("d3:0.9", "'0.9' is not field=value"),
        ("d3:alpha=0.9", "policy 'd3' lacks start; it must have alpha and start"),
        ("d3:alpha=0.9,alpha=0.8,start=0.5", "alpha is given twice"),
        ("skipdecode:max=9,max_layers=9", "max_layers is given twice"),
        ("d3:alpha=1.2,start=0.5", r"D3\(alpha=1.2\).*\(0, 1\]"),
        ("d3.thesis:task=bbh", "'d3' has no maker 'thesis'; there are: d3.paper"),
        ("full.paper", "'full' has no maker 'paper'; there are: none"),
        ("d3.paper:task=bbh", "lacks num_layers; add num_layers=..., or pass num_layers"),
        ("d3.paper:num_layers=32", "lacks task; add task=..."),
        ("d3.paper:task=mmlu,num_layers=32", "'mmlu'"),
        ("missing/policy.json", "policy file 'missing/policy.json' cannot be read"),
        (None, "policy None: parse reads text"),
    ],
)
def test_an_error_says_what_is_wrong_and_what_there_is(text, message):
    with pytest.raises(PolicyError, match=message):
        parse(text)


def test_a_form_made_for_another_model_is_refused():
    with pytest.raises(PolicyError, match="is for num_layers=40, but the model has 32"):
        parse("d3.paper:task=bbh,num_layers=40", num_layers=32)
