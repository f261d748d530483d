"""d3rt bench: who runs beside whom, and that the tables say what was measured."""

import json
import sys
import types

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

import d3rt
from d3rt.bench import comparison, llama_cpp, parts, pictures, tables
from d3rt.bench.comparison import Settings, measure
from d3rt.cli import app

POLICY = "d3:alpha=0.9,start=0.4"


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    monkeypatch.setattr(comparison, "STEP_SECONDS", 0.001)


@pytest.fixture(scope="module")
def model():
    return tiny_models.fresh("llama", vocab_size=256, hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def found(model):
    said = []
    settings = Settings(
        weights=("float32", "int8"),
        policies=(POLICY, "static:layers=0-2+5"),
        prompt=8,
        new=12,
        rounds=2,
        threads=1,
        progress=said.append,
    )
    return measure(settings, model) | {"said": said}


def test_everyone_runs_in_every_round_in_turn(found):
    order = [text.partition(": ")[2] for text in found["said"] if ": " in text]
    once = order[: len(order) // 3]
    assert order == once * 3, "a round that does not count, then two"
    policies = ("full", POLICY, "static:layers=0-2+5")
    assert once[:4] == ["bandwidth", *(f"d3rt float32 {policy}" for policy in policies)]
    names = [run["name"] for run in found["runs"]]
    assert names == [name for name in once if not name.startswith(("step", "part", "bandwidth"))]
    assert [(run["engine"], run["weights"]) for run in found["runs"] if run["policy"] is None] == [
        ("transformers", "float32"),
        ("transformers", "bfloat16"),
    ], "Hugging Face in the same dtype; beside packed weights in bfloat16"
    assert all(len(run["decode"]["values"]) == len(run["prefill"]["values"]) == 2 for run in found["runs"])


def test_expected_speed_ups_are_ratios_of_bytes(found, model):
    for weights in ("float32", "int8"):
        runtime = d3rt.compile(model, weights=weights, policy=POLICY, max_seq_len=20, threads=1)
        ids = torch.zeros(1, 8, dtype=torch.int64)
        size = {}
        for policy in ("full", POLICY):
            runtime.policy = d3rt.parse(policy)
            runtime.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=None, pad_token_id=0
            )
            stats = runtime.last_run
            size[policy] = (sum(stats.weight_bytes[1:]) + sum(stats.kv_bytes[1:])) / 11
        run = {
            run["policy"]: run
            for run in found["runs"]
            if run["engine"] == "d3rt" and run["weights"] == weights
        }
        assert run[POLICY]["bytes_per_token"] == pytest.approx(size[POLICY])
        assert run[POLICY]["expected_speedup"] == pytest.approx(size["full"] / size[POLICY])
        assert run["full"]["expected_speedup"] is None and run["full"]["mean_depth"] == 6
        assert run["static:layers=0-2+5"]["mean_depth"] < 5
        values = zip(run[POLICY]["decode"]["values"], run["full"]["decode"]["values"], strict=True)
        assert run[POLICY]["measured_speedup"]["values"] == [a / b for a, b in values]


def test_a_step_is_timed_at_some_depths_that_the_policies_run(found):
    depths = [step["depth"] for step in found["depths"] if step["weights"] == "int8"]
    assert depths[0] == 6 and depths == sorted(depths, reverse=True) and 2 <= len(depths) <= 5
    of = {step["depth"]: step for step in found["depths"] if step["weights"] == "float32"}
    assert of[3]["bytes"] < of[6]["bytes"]
    reached = of[6]["bytes"] / of[6]["milliseconds"]["values"][0] / 1e6
    assert of[6]["bandwidth_share"]["values"][0] == pytest.approx(reached / found["bandwidth"]["values"][0])


def test_a_step_is_taken_apart_into_all_of_its_ops(found, model):
    of = {(part["depth"], part["op"]) for part in found["parts"]}
    ops = ("embed", "norm_qkv_rope", "attention", "proj_add", "norm_gate_up", "norm_logits")
    assert of == {(depth, op) for depth in (6, 3) for op in ops}
    runtime = d3rt.compile(model, threads=1)
    plan = runtime.policy.schedule(6, 2).plans()[1]
    assert parts.op_kinds(runtime, plan) == dict(zip(ops, (1, 6, 6, 12, 6, 1), strict=True))
    x = runtime.engine.for_rows(1).buffers.x
    parts.part_replay(runtime, plan, "embed")()
    embedded = x.clone()
    assert torch.equal(embedded[0], model.get_input_embeddings().weight[0].detach()), "token 0"
    parts.part_replay(runtime, plan, "norm_logits")()
    assert torch.equal(x, embedded), "nothing else of the step ran"
    assert "| all, each kind alone |" in tables.markdown(found)


def test_the_tables_show_the_figures(found):
    text = tables.markdown(found)
    first = next(run for run in found["runs"] if run["policy"] == POLICY)
    assert f"| d3rt | float32 | {POLICY} | {first['decode']['median']:.1f} (" in text
    assert f"{first['expected_speedup']:.2f}x" in text
    assert "x (" in text and " bfloat16 | " in text, "whose dtype the ratio is to, where it is another"
    assert "2 interleaved rounds" in text and "llama.cpp is not installed" in text
    assert json.loads(json.dumps({k: v for k, v in found.items() if k != "said"}))["kind"] == "d3rt bench"


def test_the_figures_are_drawn(found, tmp_path):
    assert pictures.draw(found, tmp_path / "x.png").stat().st_size > 10_000


class FakeLlamaCpp(types.ModuleType):
    """What of llama-cpp-python a run calls; the token it chooses is the last one and one more."""

    __version__ = "0.0"
    llama_token = __import__("ctypes").c_int32

    def __init__(self):
        super().__init__("llama_cpp")
        self.decoded, self.cleared, self.quantised = [], 0, []
        options = lambda: types.SimpleNamespace()  # noqa: E731
        self.llama_model_default_params = self.llama_context_default_params = options
        self.llama_model_quantize_default_params = options
        self.llama_log_callback = lambda function: function
        self.llama_log_set = lambda *given: None
        self.llama_model_load_from_file = lambda path, options: path
        self.llama_init_from_model = lambda model, options: options
        self.llama_get_memory = lambda context: context
        self.llama_batch_get_one = lambda held, count: list(held)[:count]

    def llama_model_quantize(self, source, target, options):
        self.quantised.append(options.ftype)
        open(target, "wb").write(open(source, "rb").read())
        return 0

    def llama_memory_clear(self, memory, data):
        self.cleared += 1

    def llama_decode(self, context, tokens):
        self.decoded.append(tokens)
        return 0

    def llama_get_logits_ith(self, context, at):
        logits = (__import__("ctypes").c_float * 256)()
        logits[(self.decoded[-1][-1] + 1) % 256] = 1
        return __import__("ctypes").cast(logits, __import__("ctypes").POINTER(__import__("ctypes").c_float))


def test_llama_cpp_joins_where_it_is_installed(model, monkeypatch):
    fake = FakeLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "BATCH", 5)
    settings = Settings(weights=("int4",), policies=(), prompt=8, new=4, rounds=1, threads=1)
    found = measure(settings, model)
    assert [run["name"] for run in found["runs"]] == [
        "d3rt int4 full",
        "transformers bfloat16",
        "llama.cpp Q4_0",
    ]
    assert fake.quantised == [llama_cpp.GGUF_TYPES["Q4_0"]] and fake.cleared == 2
    run = fake.decoded[: len(fake.decoded) // 2]
    assert [len(each) for each in run] == [5, 3, 1, 1, 1], "the prompt in batches, then a token a step"
    assert [each[0] for each in run[2:]] == [(run[1][-1] + 1 + at) % 256 for at in range(3)]
    assert found["notes"] == []


def test_what_llama_cpp_cannot_read_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    qwen = tiny_models.fresh("qwen2", vocab_size=256)
    found = measure(Settings(weights=("float32",), policies=(), prompt=4, new=3, rounds=1, threads=1), qwen)
    assert found["notes"] == [
        "llama.cpp F32 is left out: a GGUF file is made of Llama models here, and this is 'qwen2'."
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "int3"], "weights='int3': choose one of float32"),
        (["--policy", "d4"], "policy 'd4'"),
        (["--new", "1"], "--new 1: at least 2."),
        (["--rounds", "0"], "--rounds 0: at least 1."),
        (["--prompt", "8000", "--new", "4000"], "the model has positions for 8192 tokens"),
        (["--json", "/proc/none/x.json"], "/proc/none"),
    ],
)
@pytest.mark.demo_model
def test_what_is_wrong_is_refused_before_anything_is_timed(arguments, words):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2 and words in done.output, done.output


@pytest.mark.demo_model
def test_the_command_writes_json_picture_and_markdown(tmp_path, monkeypatch):
    figures, picture = tmp_path / "a" / "b.json", tmp_path / "b.svg"
    arguments = ["bench", "--quick", "--rounds", "1", "--new", "6", "--weights", "int8", "--markdown"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(figures), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    kept = json.loads(figures.read_text())
    assert kept["settings"]["model"].startswith("SmolLM2") and kept["settings"]["weights"] == ["int8"]
    assert "| d3rt | int8 | full |" in done.output and "| transformers | bfloat16 | - |" in done.output
    assert picture.read_text().lstrip().startswith("<?xml")
