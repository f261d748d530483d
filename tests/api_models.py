"""What the API tests run on: the story model with a tokenizer of its own, and comparison with model.generate.

The trained story model rather than random ones: its argmaxes have margins, so that greedy tokens can be compared with
Hugging Face's exactly, and its text can be stopped at a word.
"""

from __future__ import annotations

from functools import lru_cache

import stories260k
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import d3rt

BACKENDS = ("cpu", "reference")
PROMPT = "Once upon a time there was a cat."
# Of different lengths, so that a batch of them is ragged.
PROMPTS = ("Once upon a time", "The dog was very sad because it", "Lily and Tom went to the park. They")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '. ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Lily said' }}{% endif %}"
)


@lru_cache(maxsize=1)
def shared_model() -> LlamaForCausalLM:
    """The story model; one object for all tests, so not to be changed."""
    return stories260k.load()


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the story model's vocabulary: same pieces, other merges; padding is left and is EOS."""
    pieces = [piece.decode() for piece in stories260k.vocabulary()]
    # Scores fall with the id, as the checkpoint's do; any would do that make long pieces win.
    unigram = models.Unigram([(p, -1 - i / 100) for i, p in enumerate(pieces)], unk_id=0, byte_fallback=True)
    backend = Tokenizer(unigram)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    bos, eos = pieces[stories260k.BOS], pieces[stories260k.EOS]
    special = dict(bos_token=bos, eos_token=eos, pad_token=eos, padding_side="left")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.chat_template = CHAT_TEMPLATE
    return made


def compiled(backend: str = "cpu", model: LlamaForCausalLM | None = None, **kwargs) -> d3rt.Runtime:
    """A runtime of four rows. One thread, unless a test says more: a core that others keep busy costs the pool far
    more time than a model this small can win by it."""
    return d3rt.compile(
        model or shared_model(), backend=backend, **({"batch_size": 4, "threads": 1} | kwargs)
    )


def ids(text: str = PROMPT) -> torch.Tensor:
    """int64 [1, T]"""
    return tokenizer()(text, return_tensors="pt").input_ids


def batch(*texts: str) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of the texts, padded on the left, as `generate` takes them."""
    return dict(tokenizer()(list(texts or PROMPTS), padding=True, return_tensors="pt"))


def assert_same(fast: d3rt.Runtime, model: LlamaForCausalLM, *args, **kwargs) -> torch.Tensor:
    """Asserts that both answer this call alike, token for token; returns the answer."""
    expected = model.generate(*args, **kwargs)
    got = fast.generate(*args, **kwargs)
    assert got.dtype == expected.dtype
    assert got.tolist() == expected.tolist()
    return got
