"""Every instruction set that this build and processor have gives the model's tokens. Each runs in a process of its
own, because D3RT_CPU_ISA is what a user would set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

from d3rt import _C

TESTS = Path(__file__).parent.parent

# Full depth against Hugging Face, and a policy with holes and fills against the oracle, in a ragged batch and alone.
SCRIPT = """
import oracle, schedules, tiny_models, torch
from d3rt import _C
torch.set_num_threads(1)
print(_C.selected_isa())
for name in ("llama-biases", "llama-head-dim", "mistral-window", "qwen3"):
    model, prompts = tiny_models.make(name), tiny_models.ragged((7, 1, 12))
    inputs = tiny_models.left_padded(prompts)
    options = dict(max_new_tokens=16, eos_token_id=None)
    expected = model.generate(**inputs, do_sample=False, **options)
    assert torch.equal(tiny_models.runtime(name, threads=2).generate(**inputs, **options), expected), name
    fast = tiny_models.runtime(name, schedules.random_sets(3, 4, 16))
    plans = schedules.plans_of(fast, 16)
    expected = [oracle.generate(model, prompt, plans).tokens for prompt in prompts]
    assert schedules.new_tokens(fast.generate(**inputs, **options), inputs) == expected, name
    solo = [fast.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    assert solo == expected, name
dtype = torch.bfloat16
fast = tiny_models.runtime("llama-biases", schedules.random_sets(3, 4, 16), dtype=dtype)
plans = schedules.plans_of(fast, 16)
runs = [schedules.truth("llama-biases", dtype, plans, tuple(prompt)) for prompt in prompts]
forced = schedules.Forced(12, [same.tokens for same, _ in runs])
options |= dict(logits_processor=[forced], output_logits=True, return_dict_in_generate=True)
out = fast.generate(**inputs, **options)
same, exact = (torch.stack([run[i].logits for run in runs]) for i in (0, 1))
assert oracle.excess(torch.stack(out.logits, dim=1), same, exact, dtype) <= 1
"""


@pytest.mark.parametrize("isa", _C.available_isas())
def test_an_instruction_set_gives_the_models_tokens(isa):
    environment = os.environ | {"D3RT_CPU_ISA": isa, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_an_instruction_set_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("D3RT_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"ISA 'mmx' \(D3RT_CPU_ISA\) cannot run here; .* have: scalar"):
        tiny_models.runtime("llama").generate(torch.tensor([[5]]), max_new_tokens=2)
