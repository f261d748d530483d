"""fast.save(folder) and d3rt.load(folder): the same runtime again, bit for bit; and no folder that is half of one."""

import json
import os
import shutil
from dataclasses import dataclass

import pytest
import tiny_models
import torch
from api_models import compiled, ids, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import d3rt
from d3rt import storage
from d3rt.backends import make_backend
from d3rt.errors import (
    ModelNotFoundError,
    PolicyError,
    SaveError,
    UnsupportedModelError,
    UnsupportedOptionError,
)
from d3rt.kernels.packing import GROUP, pack_codes
from d3rt.models.source import SharedModule
from d3rt.policies import base
from d3rt.quantize import Widths
from d3rt.runtime import Runtime

WIDTHS = ("fp32", "bf16", "fp16", "int8", "int4")


def packable(name="llama", **options):
    """A runtime of that tiny model in sizes that can be packed."""
    model = tiny_models.fresh(name, **tiny_models.PACKABLE)
    return d3rt.compile(model, **({"threads": 1, "batch_size": 2} | options))


def assert_same(one, other):
    """Tokens and every logit of a ragged batch, and what the runtimes say of themselves."""
    inputs = tiny_models.left_padded(tiny_models.ragged((5, 9)))
    call = dict(max_new_tokens=10, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    ours, theirs = (fast.generate(**inputs, **call) for fast in (one, other))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert repr(one) == repr(other)


def stored(folder):
    """Names of the tensors in a folder."""
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


# -- the same again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WIDTHS)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_what_is_loaded_generates_what_was_saved(tmp_path, name, weights):
    fast = packable(name, weights=weights)
    assert fast.save(tmp_path / "saved") == tmp_path / "saved"
    assert_same(d3rt.load(tmp_path / "saved", threads=1), fast)


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_the_reference_backend_loads_what_it_saved(tmp_path, weights):
    fast = packable(weights=weights, backend="reference")
    fast.save(tmp_path / "saved")
    assert_same(d3rt.load(tmp_path / "saved", backend="reference"), fast)


def test_columns_that_cannot_be_packed_are_saved_as_they_are(tmp_path):
    fast = tiny_models.runtime("llama-head-dim", batch_size=2)
    fast.save(tmp_path / "saved")
    assert_same(d3rt.load(tmp_path / "saved", threads=1), fast)


def test_each_part_keeps_a_width_of_its_own(tmp_path):
    fast = packable(weights="int4", lm_head="bf16", kv_cache_dtype="fp16")
    fast.save(tmp_path / "saved")
    again = d3rt.load(tmp_path / "saved", threads=1)
    assert "int4 (lm_head bfloat16, K,V float16)" in repr(again)
    assert_same(again, fast)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_an_int8_cache_is_saved_as_such_and_can_be_asked_for_later(tmp_path, weights):
    fast = packable(weights=weights, kv_cache_dtype="int8")
    fast.save(tmp_path / "saved")
    again = d3rt.load(tmp_path / "saved", threads=1)
    assert again.engine.cache.k.dtype == torch.int8
    assert_same(again, fast)
    packable(weights=weights).save(tmp_path / "wide")
    assert_same(d3rt.load(tmp_path / "wide", threads=1, kv_cache_dtype="int8"), fast)


class Symmetric(SharedModule):
    """Every matrix as int4 without minima, which only files have (Q4_0)."""

    def take(self, name, width):
        weight = super().take(name, width)
        if width != "int4":
            return weight
        groups = weight.view(len(weight), -1, GROUP)
        scales = groups.abs().amax(-1) / 7
        codes = (groups / scales[..., None]).round() + 8
        return pack_codes("int4", codes.flatten(1), scales)


@pytest.mark.parametrize("kind", [Symmetric, SharedModule])
def test_minima_of_packed_blocks_are_kept_where_there_are_any(tmp_path, kind):
    source = kind(tiny_models.fresh("llama", **tiny_models.PACKABLE))
    widths = Widths.parse(None, "int4", None, None)
    fast = Runtime(source, None, make_backend("cpu", 1), widths, None, 2, "auto", None)
    fast.save(tmp_path / "saved")
    again = d3rt.load(tmp_path / "saved", threads=1)
    assert (again.engine.decoder.weights.layers[0].wq.minima is None) is (kind is Symmetric)
    assert_same(again, fast)


@pytest.mark.demo_model
def test_the_embedded_models_own_blocks_are_kept(tmp_path, demo):
    inputs = demo[1]("The capital of France is", return_tensors="pt")
    fast = d3rt.compile(None, weights="int4")
    fast.save(tmp_path / "saved")
    again = d3rt.load(tmp_path / "saved")
    said = fast.generate(**inputs, max_new_tokens=12)
    assert torch.equal(again.generate(**inputs, max_new_tokens=12), said)
    assert "".join(again.stream("The capital of France is", max_new_tokens=12)) == demo[1].decode(
        said[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )


# -- tied heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize(("name", "tied"), [("llama-tied", True), ("llama", False)])
def test_a_tied_head_is_stored_once_and_shared_again(tmp_path, name, tied, weights):
    packable(name, weights=weights).save(tmp_path / "saved")
    assert any(name.startswith("lm_head") for name in stored(tmp_path / "saved")) is not tied
    again = d3rt.load(tmp_path / "saved", threads=1).engine.decoder.weights
    assert (again.lm_head is again.embed) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_decide_what_is_tied_not_the_config(tmp_path, tied):
    model = tiny_models.fresh("llama", tie_word_embeddings=not tied)
    embed = model.model.embed_tokens.weight
    model.lm_head.weight = embed if tied else torch.nn.Parameter(embed.detach().flip(0))
    fast = d3rt.compile(model, threads=1, batch_size=2)
    fast.save(tmp_path / "saved")
    again = d3rt.load(tmp_path / "saved", threads=1)
    assert (again.engine.decoder.weights.lm_head is again.engine.decoder.weights.embed) is tied
    assert_same(again, fast)
    assert model.config.tie_word_embeddings is not tied, "the model's own config is left alone"


def test_weights_that_lie_in_one_block_of_memory_are_saved(tmp_path):
    model = tiny_models.fresh("llama")
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach())
    attention = model.model.layers[0].self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    fused = torch.cat([part.weight.detach() for part in parts])
    for part, rows in zip(parts, fused.split([len(part.weight) for part in parts]), strict=True):
        part.weight = torch.nn.Parameter(rows)
    fast = d3rt.compile(model, threads=1, batch_size=2)
    assert_same(d3rt.load(fast.save(tmp_path / "saved"), threads=1), fast)


# -- options ------------------------------------------------------------------------------------------------------

POLICIES = (
    d3rt.FullDepth(),
    d3rt.D3(alpha=0.9, start=0.4),
    d3rt.SkipDecode(max_layers=5, min_layers=3, length=20),
    d3rt.UnifiedSkip(ratio=1.5),
    d3rt.StaticLayers(layers=(0, 2, 5)),
    d3rt.LayerSchedule(((0, 1, 2, 3), (0, 1)), cycle=True),
)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_options_that_are_not_given_are_the_saved_ones(tmp_path, policy):
    fast = packable(policy=policy, kv_fill="eager", max_seq_len=77, weights="int8", kv_cache_dtype="fp32")
    fast.save(tmp_path / "saved")
    again = d3rt.load(tmp_path / "saved", threads=1)
    assert (again.policy, again.kv_fill, again.max_seq_len, again.batch_size) == (policy, "eager", 77, 2)
    assert_same(again, fast)


def test_options_that_are_given_win(tmp_path):
    packable(policy=d3rt.D3(alpha=0.9, start=0.4), max_seq_len=77, weights="int8").save(tmp_path / "saved")
    given = dict(policy="static:layers=0-2", max_seq_len=50, batch_size=3, kv_fill="eager", threads=2)
    again = d3rt.load(
        tmp_path / "saved", backend="reference", tokenizer=tokenizer(), kv_cache_dtype="fp16", **given
    )
    assert again.policy == d3rt.StaticLayers(layers=(0, 1, 2))
    assert (again.max_seq_len, again.batch_size, again.kv_fill) == (50, 3, "eager")
    assert again.backend.name == "reference" and again.tokenizer is tokenizer()
    assert again.engine.cache.k.dtype == torch.float16


def test_another_policy_is_what_compile_would_make_with_it(tmp_path):
    packable(weights="int8").save(tmp_path / "saved")
    policy = d3rt.D3(alpha=0.9, start=0.4)
    assert_same(
        d3rt.load(tmp_path / "saved", policy=policy, threads=1), packable(weights="int8", policy=policy)
    )


def test_tokenizer_and_generation_config_come_along(tmp_path):
    fast = compiled(tokenizer=tokenizer(), batch_size=1)
    fast.generation_config.do_sample, before = False, fast.generation_config.do_sample
    fast.generation_config.temperature = 0.25  # in vain when greedy, which save_pretrained would refuse
    fast.generation_config.max_new_tokens = 7
    try:
        fast.save(tmp_path / "saved")
        again = d3rt.load(tmp_path / "saved", threads=1)
        assert again.generation_config.to_dict() == fast.generation_config.to_dict()
        assert torch.equal(again.generate(ids()), fast.generate(ids()))
        assert "".join(again.stream("Once upon a time")) == "".join(fast.stream("Once upon a time"))
    finally:
        fast.generation_config.do_sample = before
        fast.generation_config.temperature = fast.generation_config.max_new_tokens = None


def test_without_a_tokenizer_there_is_none(tmp_path):
    packable().save(tmp_path / "saved")
    assert d3rt.load(tmp_path / "saved").tokenizer is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(weights="int8"), TypeError),
        (dict(polcy="full"), TypeError),
        (dict(policy=3), TypeError),
        (dict(policy="d3:alpha=7"), PolicyError),
        (dict(policy="static:layers=0-99"), PolicyError),
        (dict(kv_fill="never"), UnsupportedOptionError),
        (dict(kv_cache_dtype="int4"), UnsupportedOptionError),
        (dict(batch_size=0), ValueError),
        (dict(batch_size=17), ValueError),
        (dict(threads=True), ValueError),
        (dict(max_seq_len=161), ValueError),
        (dict(backend="tpu"), d3rt.D3rtError),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused_before_anything_is_read(saved, no_reading, options, error):
    with pytest.raises(error):
        d3rt.load(saved, **options)


def test_a_policy_that_is_not_known_here_names_the_way_out(tmp_path):
    @dataclass(frozen=True)
    class Own(d3rt.Policy):
        name = "own-for-this-test"

        def layer_set(self, step, num_layers):
            return d3rt.LayerSet.full(num_layers)

    packable(policy=Own()).save(tmp_path / "saved")
    del base._registry["own-for-this-test"]  # as in a process that does not import it
    with pytest.raises(PolicyError, match="own-for-this-test.*Import the module.*policy="):
        d3rt.load(tmp_path / "saved")
    assert d3rt.load(tmp_path / "saved", policy="full").policy == d3rt.FullDepth()


# -- memory -------------------------------------------------------------------------------------------------------


def test_what_is_loaded_owns_its_weights_and_outlives_the_folder(tmp_path):
    fast = packable(weights="int8")
    again = d3rt.load(fast.save(tmp_path / "saved"), threads=1)
    shutil.rmtree(tmp_path / "saved")
    assert_same(again, fast)
    assert again.memory().shared_weights == 0 and again.memory().weights == fast.memory().weights


# -- files and folders --------------------------------------------------------------------------------------------


def test_large_weights_are_split_into_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_BYTES", 60_000)
    fast = packable()
    fast.save(tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(stored(tmp_path / "saved"))
    assert_same(d3rt.load(tmp_path / "saved", threads=1), fast)
    (tmp_path / "saved" / files[1]).unlink()
    with pytest.raises(ModelNotFoundError, match=f"lacks '{files[1]}'"):
        d3rt.load(tmp_path / "saved")


def test_an_earlier_save_is_replaced_even_by_what_was_loaded_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_BYTES", 60_000)
    packable(weights="fp32").save(tmp_path / "saved")
    fast = packable(weights="int8", tokenizer=tokenizer())
    fast.save(tmp_path / "saved")
    again = d3rt.load(tmp_path / "saved", threads=1)
    again.save(tmp_path / "saved")
    assert_same(d3rt.load(tmp_path / "saved", threads=1), fast)
    assert os.listdir(tmp_path) == ["saved"]


def test_folders_on_the_way_are_made_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    fast = packable()
    for folder in (tmp_path / "a" / "b", tmp_path / "new" / "deep" / "saved"):
        assert_same(d3rt.load(fast.save(str(folder)), threads=1), fast)


@pytest.mark.parametrize("with_a_save", [False, True])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, with_a_save):
    fast = packable()
    folder = tmp_path / "saved"
    if with_a_save:
        fast.save(folder)
    else:
        folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    before = sorted(os.listdir(folder))
    with pytest.raises(SaveError, match=r"saved'\): the folder holds 'thesis.txt'.*choose a folder"):
        fast.save(folder)
    assert sorted(os.listdir(folder)) == before and os.listdir(tmp_path) == ["saved"]


def test_a_file_is_not_overwritten(tmp_path):
    (tmp_path / "saved").write_text("years of work")
    with pytest.raises(SaveError, match="it is a file"):
        packable().save(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "years of work"


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("where", ["weights", "tokenizer", "settings", "disk", "rename"])
def test_what_is_interrupted_leaves_the_folder_as_it_was(tmp_path, monkeypatch, where, earlier):
    fast = packable(tokenizer=tokenizer())
    old = packable("llama-tied", weights="int8")
    if earlier:
        old.save(tmp_path / "saved")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    def half_a_file(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    rename = os.rename

    def rename_but_not_into_place(source, target):
        if str(source).endswith(".tmp") and fast_is_there(source):
            raise KeyboardInterrupt
        rename(source, target)

    def fast_is_there(folder):
        return json.loads((folder / "d3rt.json").read_text())["weights"] == "float32"

    if where == "tokenizer":
        monkeypatch.setattr(type(tokenizer()), "save_pretrained", interrupt)
    else:
        target, name, instead = {
            "weights": (storage, "save_file", half_a_file),
            "settings": (storage.json, "dumps", interrupt),
            "disk": (storage, "_sync", interrupt),
            "rename": (os, "rename", rename_but_not_into_place),
        }[where]
        monkeypatch.setattr(target, name, instead)
    with pytest.raises(KeyboardInterrupt):
        fast.save(tmp_path / "saved")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["saved"] if earlier else [])
    if earlier:
        assert_same(d3rt.load(tmp_path / "saved", threads=1), old)


# -- what cannot be loaded ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    return packable(weights="int8").save(tmp_path / "saved")


@pytest.fixture
def no_reading(monkeypatch):
    """Fails when a tensor is read."""

    def take(self, name, width):
        pytest.fail(f"{name} was read")

    monkeypatch.setattr(storage.SavedSource, "take", take)


def settings(folder, **changes):
    """Changes d3rt.json; None removes an entry."""
    path = folder / "d3rt.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def tensors(folder, change):
    """Changes model.safetensors."""
    path = folder / "model.safetensors"
    kept = load_file(path)
    change(kept)
    save_file(kept, path)


def cut(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WQ = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "later version": (
        lambda f: settings(f, version=2),
        UnsupportedModelError,
        "version 2.*up to 1.*later d3rt",
    ),
    "no version": (
        lambda f: settings(f, version=None),
        UnsupportedModelError,
        "not what Runtime.save writes",
    ),
    "no json": (lambda f: (f / "d3rt.json").write_text("{"), UnsupportedModelError, "not what Runtime.save"),
    "a list": (lambda f: (f / "d3rt.json").write_text("[]"), UnsupportedModelError, "not what Runtime.save"),
    "width": (lambda f: settings(f, weights="int3"), UnsupportedModelError, "damaged: weights='int3'"),
    "no width": (lambda f: settings(f, lm_head=None), UnsupportedModelError, "damaged: lm_head=None"),
    "cache": (lambda f: settings(f, kv_cache="int4"), UnsupportedModelError, "damaged: kv_cache='int4'"),
    "files": (lambda f: settings(f, files="model"), UnsupportedModelError, "damaged: files='model'"),
    "length": (lambda f: settings(f, max_seq_len="9"), UnsupportedModelError, "damaged: max_seq_len='9'"),
    "rows": (lambda f: settings(f, batch_size=99), ValueError, "batch_size=99"),
    "kv_fill": (lambda f: settings(f, kv_fill="x"), UnsupportedOptionError, "kv_fill='x'"),
    "policy": (lambda f: settings(f, policy={"name": "?"}), PolicyError, "d3rt.json.*policy"),
    "another width": (
        lambda f: settings(f, weights="int4"),
        UnsupportedModelError,
        r"data' is \[.*\], not \[",
    ),
    "gone": (lambda f: (f / "model.safetensors").unlink(), ModelNotFoundError, "lacks 'model.safetensors'"),
    "no config": (lambda f: (f / "config.json").unlink(), ModelNotFoundError, "lacks 'config.json'"),
    "cut config": (lambda f: cut(f, "config.json"), UnsupportedModelError, "configs cannot be read"),
    "cut weights": (lambda f: cut(f, "model.safetensors"), UnsupportedModelError, "safetensors' is damaged"),
    "foreign weights": (
        lambda f: (f / "model.safetensors").write_text("hello"),
        UnsupportedModelError,
        "safetensors' is damaged",
    ),
    "a tensor less": (
        lambda f: tensors(f, lambda t: t.pop(f"{WQ}.scales")),
        UnsupportedModelError,
        f"'{WQ}.scales' is missing",
    ),
    "a tensor more": (
        lambda f: tensors(f, lambda t: t.update(stray=torch.zeros(2))),
        UnsupportedModelError,
        "'stray' is not part of the model",
    ),
    "a shape": (
        lambda f: tensors(f, lambda t: t.update({f"{WQ}.scales": t[f"{WQ}.scales"][1:].clone()})),
        UnsupportedModelError,
        rf"'{WQ}.scales' is \[3, 3, 16\], not \[4, 3, 16\]",
    ),
    "a dtype": (
        lambda f: tensors(f, lambda t: t.update({f"{WQ}.scales": t[f"{WQ}.scales"].bfloat16()})),
        UnsupportedModelError,
        f"'{WQ}.scales' is torch.bfloat16, not torch.float16",
    ),
    "a dtype of no weight": (
        lambda f: tensors(f, lambda t: t.update({f"{WQ}.scales": t[f"{WQ}.scales"].double()})),
        UnsupportedModelError,
        f"'{WQ}.scales' is ",
    ),
    "layers": (lambda f: config(f, num_hidden_layers=7), UnsupportedModelError, "layers.6.*is missing"),
    "family": (lambda f: config(f, model_type="gpt2"), UnsupportedModelError, "gpt2"),
    "no family": (lambda f: config(f, model_type="?"), UnsupportedModelError, "configs cannot be read"),
    "activation": (lambda f: config(f, hidden_act="relu"), UnsupportedModelError, "hidden_act='relu'"),
    "type": (
        lambda f: config(f, hidden_size="wide"),
        UnsupportedModelError,
        "configs cannot be read.*hidden_size",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_before_anything_is_read(saved, no_reading, what):
    damage, error, message = DAMAGE[what]
    damage(saved)
    with pytest.raises(error, match=f"(?s){message}"):
        d3rt.load(saved)


def test_every_error_of_a_folder_is_a_d3rt_error(saved, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(d3rt.D3rtError):
            d3rt.load(folder)


def test_a_folder_that_is_not_there_or_not_saved_names_the_way_out(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere': no such folder"):
        d3rt.load(tmp_path / "nowhere")
    tiny_models.make("llama").save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelNotFoundError, match=r"theirs' has no d3rt.json.*d3rt.compile\(folder\)"):
        d3rt.load(tmp_path / "theirs")


@pytest.mark.parametrize("read", [d3rt.compile, d3rt.load_model])
def test_compile_and_load_model_send_to_load(saved, read):
    with pytest.raises(UnsupportedModelError, match=r"written by Runtime.save: d3rt.load\('.*saved'\)"):
        read(saved)
