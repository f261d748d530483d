"""Policies as JSON and as files: round trips, what is written, and what the errors say."""

import json

import pytest

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet
from d3rt.policies import (
    CALM,
    D3,
    FullDepth,
    LayerSchedule,
    Policy,
    SkipDecode,
    StaticLayers,
    UnifiedSkip,
    known_policies,
)

POLICIES = [
    FullDepth(),
    CALM(0.9),
    CALM(0.1 + 0.2, "softmax", min_exit=4, exit_interval=3, decay=4, horizon=200),
    D3(0.9999, 0.8, tail=0),
    D3(0.1 + 0.2, 1 / 3, variant="slide", head=2),
    SkipDecode(22, 11, 200, warmup=2),
    UnifiedSkip(1.5, variant="balanced"),
    StaticLayers(layers=(0, 1, 7), prompt="skipped"),
    StaticLayers(attention=(), mlp=(0, 3)),
    LayerSchedule([(0, 1, 2), (0,)], cycle=True),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_survives_dict_json_and_file(policy, tmp_path):
    assert Policy.from_dict(policy.to_dict()) == policy
    assert Policy.from_json(policy.to_json()) == policy
    policy.save(tmp_path / "policy.json")
    loaded = Policy.load(tmp_path / "policy.json")
    assert (type(loaded), loaded, hash(loaded)) == (type(policy), policy, hash(policy))


def test_every_policy_is_among_those_that_round_trip():
    ours = {name for name, kind in known_policies().items() if kind.__module__.startswith("d3rt.")}
    assert {policy.name for policy in POLICIES} == ours


def test_the_file_names_the_policy_and_every_field():
    assert json.loads(D3(0.999, 0.5).to_json()) == {
        "name": "d3",
        "alpha": 0.999,
        "start": 0.5,
        "tail": 1,
        "variant": "window",
        "head": 1,
    }


def test_left_out_fields_take_their_defaults():
    assert Policy.from_dict({"name": "d3", "alpha": 0.9, "start": 0.5}) == D3(0.9, 0.5)


def test_a_class_reads_only_its_own_kind():
    assert D3.from_json(D3(0.9, 0.5).to_json()) == D3(0.9, 0.5)
    with pytest.raises(PolicyError, match="this is a FullDepth"):
        D3.from_json(FullDepth().to_json())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "d4"}, "unknown policy 'd4'; there are: calm, d3, full"),
        ({"name": ["d3"]}, "unknown policy"),
        ({"alpha": 0.9}, "a policy is an object with a name"),
        ([1, 2], "a policy is an object with a name"),
        (
            {"name": "d3", "alpha": 0.9, "start": 0.5, "beta": 1},
            "'d3' has no field 'beta'; its fields are: alpha,",
        ),
        ({"name": "d3", "alpha": 0.9}, "'d3' lacks start"),
        ({"name": "d3", "alpha": "0.9", "start": 0.5}, r"D3\(alpha='0.9'\)"),
        ({"name": "d3", "alpha": 0.9, "start": 0.5, "variant": []}, r"D3\(variant=\[\]\)"),
    ],
)
def test_an_object_that_is_no_policy_is_refused(values, message):
    with pytest.raises(PolicyError, match=message):
        Policy.from_dict(values)


def test_text_that_is_not_json_is_refused():
    with pytest.raises(PolicyError, match="not JSON: .*line 1"):
        Policy.from_json("d3:alpha=1")


@pytest.mark.parametrize("content", [b"{", b'{"name": "d4"}', b"\xff\xfe"])
def test_an_error_in_a_file_names_the_file(content, tmp_path):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(PolicyError, match="broken.json"):
        Policy.load(tmp_path / "broken.json")


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    FullDepth().save(tmp_path / "policy.json")
    D3(0.9, 0.5).save(str(tmp_path / "policy.json"))
    assert Policy.load(tmp_path / "policy.json") == D3(0.9, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    FullDepth().save(tmp_path / "policy.json")

    def no_space(*arguments, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space"):
        D3(0.9, 0.5).save(tmp_path / "policy.json")
    monkeypatch.undo()
    assert Policy.load(tmp_path / "policy.json") == FullDepth()
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(PolicyError, match="'d3' of .*Impostor is taken by D3"):

        class Impostor(Policy):
            name = "d3"

            def layer_set(self, step, num_layers):
                return LayerSet.full(num_layers)


def test_a_policy_without_a_name_cannot_be_written():
    class Nameless(Policy):
        def layer_set(self, step, num_layers):
            return LayerSet.full(num_layers)

    with pytest.raises(PolicyError, match="Nameless has no name"):
        Nameless().to_json()
