#!/usr/bin/env bash
# Tries a wheel the way a user meets it: a clean venv, outside the repository, so that nothing from it helps.
# Versions are held to requirements.txt, since what is checked is the wheel and not the newest torch.
#   PYTHON=python3 TORCH_INDEX= tests/check_wheel.sh dist/d3rt-*.whl
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
python=$(realpath --no-symlinks "${PYTHON:-python3}")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

echo "checking $(basename "$wheel") in a clean venv"
"$python" -m venv venv
# Build tools among the pins do no harm here, a constraint only binds what gets installed.
venv/bin/pip --disable-pip-version-check install -q ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
  -c "$root/requirements.txt" "$wheel"

venv/bin/d3rt info
venv/bin/python - <<'PY'
import importlib.util
import pathlib
import sys

import torch
import transformers

import d3rt
import d3rt._C
import d3rt.kernels

for module in (d3rt, d3rt._C, d3rt.kernels):
    assert pathlib.Path(sys.prefix) in pathlib.Path(module.__file__).parents, module.__file__
assert importlib.util.find_spec("kernels") is None, "the wheel installs a top-level package `kernels`"

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, pad_token_id=0,
)
model = transformers.LlamaForCausalLM(config).eval()
prompt = torch.randint(1, 128, (1, 8))
length = dict(max_new_tokens=16, do_sample=False)
expected = model.generate(prompt, **length)
full = d3rt.compile(model, policy=d3rt.FullDepth()).generate(prompt, **length)
assert torch.equal(full, expected), (full, expected)
skipping = d3rt.compile(model, policy=d3rt.D3(alpha=0.97, start=0.5)).generate(prompt, **length)
assert skipping.shape == expected.shape
print("the wheel works: full depth equals Hugging Face token for token, and D3 generates")
PY
