"""A small generation for compute-sanitizer to watch: every op, a batch, skipped layers that are filled, drawn tokens.

D3RT_BACKEND names another backend, to try the script where there is no GPU.
"""

from __future__ import annotations

import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import d3rt


def main() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=6)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=131)).eval()
    fast = d3rt.compile(
        model,
        "schedule:sets=0-3/0-1/0-3,cycle=true",
        backend=os.environ.get("D3RT_BACKEND", "cuda"),
        dtype="float16",
        batch_size=2,
        max_seq_len=64,
    )
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    for options in (dict(do_sample=False), dict(do_sample=True, seed=1, top_p=0.9, repetition_penalty=1.1)):
        out = fast.generate(ids, max_new_tokens=8, eos_token_id=None, **options)
        print(out[:, ids.shape[1] :].tolist())


if __name__ == "__main__":
    main()
