"""Each policy equals the oracle: token for token in float32, and in the logits of every step in both dtypes."""

import oracle
import pytest
import schedules
import stories260k
import tiny_models
import torch

import d3rt

BACKENDS = ("reference", "cpu")
STEPS = 20
PROMPTS = tiny_models.ragged((7, 1, 12))


def check_against_oracle(name, policy, backend, dtype=torch.float32, kv_fill="auto"):
    """Runs policy on PROMPTS as one ragged batch; asserts tokens (float32) and logits of each row and step."""
    fast = tiny_models.runtime(name, policy, backend=backend, dtype=dtype, kv_fill=kv_fill)
    inputs = tiny_models.left_padded(PROMPTS)
    plans = schedules.plans_of(fast, STEPS)
    runs = [schedules.truth(name, dtype, plans, tuple(prompt)) for prompt in PROMPTS]
    tokens = [same.tokens for same, _ in runs]
    options = dict(max_new_tokens=STEPS, eos_token_id=None)
    if dtype == torch.float32:
        # The loop in C++, which keeps no logits; the one below is driven from Python.
        assert schedules.new_tokens(fast.generate(**inputs, **options), inputs) == tokens
    out = fast.generate(
        **inputs,
        **options,
        # In bfloat16 a near tie may fall either way, so every run is fed the oracle's tokens.
        logits_processor=[schedules.Forced(inputs["input_ids"].shape[1], tokens)],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(out.logits) == STEPS
    logits = torch.stack(out.logits, dim=1)  # [B, steps, V]
    same = torch.stack([same.logits for same, _ in runs])
    exact = torch.stack([exact.logits for _, exact in runs])
    assert oracle.excess(logits, same, exact, dtype) <= 1
    if dtype == torch.float32:
        assert logits.argmax(-1).tolist() == tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_each_policy_equals_the_oracle(policy, dtype, backend):
    check_against_oracle("llama", policy, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_each_policy_equals_the_oracle_when_all_skipped_layers_are_filled(policy, backend):
    check_against_oracle("llama", policy, backend, kv_fill="eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_a_nested_policy_equals_the_oracle_on_every_family(name, dtype):
    check_against_oracle(name, d3rt.D3(alpha=0.9, start=0.3), "cpu", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_random_sublayers_with_fills_equal_the_oracle_on_every_family(name, backend):
    layers = tiny_models.make(name).config.num_hidden_layers
    seed = 100 + tiny_models.NAMES.index(name)
    check_against_oracle(name, schedules.random_sets(seed, layers, STEPS), backend)


@pytest.mark.parametrize("seed", range(8))
def test_random_sublayers_with_fills_equal_the_oracle(seed):
    check_against_oracle("llama", schedules.random_sets(200 + seed, 6, STEPS), "cpu")


def test_any_change_of_layers_between_two_steps_equals_the_oracle():
    sets = [(0, 1, 2, 3), (0, 3), (1, 2, 3), (2,), (0, 2), (3,)]
    pairs = [layers for a in sets for b in sets for layers in (a, b)]
    policy = d3rt.LayerSchedule(sets=(sets[0], *pairs))
    name, prompt, steps = "llama-biases", tiny_models.prompt(6), 1 + len(pairs)
    fast = tiny_models.runtime(name, policy)
    expected = oracle.generate(tiny_models.make(name), prompt, schedules.plans_of(fast, steps))
    out = fast.generate(torch.tensor([prompt]), max_new_tokens=steps, eos_token_id=None)
    assert out[0, len(prompt) :].tolist() == expected.tokens


STORY_POLICIES = {
    "full": d3rt.FullDepth(),
    "d3": d3rt.D3(alpha=0.997, start=0.4),
    "d3-tail-0": d3rt.D3(alpha=0.99, start=0.6, tail=0),
    "d3-slide": d3rt.D3(alpha=0.998, start=0.4, variant="slide"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", STORY_POLICIES.values(), ids=STORY_POLICIES.keys())
def test_stories260k_equals_the_oracle_over_300_tokens(policy, backend):
    model = stories260k.load()
    fast = d3rt.compile(model, policy, backend=backend, threads=1)
    expected = oracle.generate(model, [stories260k.BOS], schedules.plans_of(fast, 300))
    out = fast.generate(torch.tensor([[stories260k.BOS]]), max_new_tokens=300, eos_token_id=None)
    assert out[0, 1:].tolist() == expected.tokens
    if policy != d3rt.FullDepth():
        assert fast.last_run.mean_depth < 4.7
