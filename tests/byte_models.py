"""A tiny model that reads text: random weights, a token for each byte. Its fixtures are for a folder's conftest.py."""

from __future__ import annotations

import pytest
import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import d3rt


def byte_tokenizer(letters: int = 256) -> PreTrainedTokenizerFast:
    """The first `letters` of the 256 bytes are its tokens; there is no other."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:letters]
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model():
    return tiny_models.fresh("llama", vocab_size=256, max_position_embeddings=4096, eos_token_id=None)


@pytest.fixture
def fast(model, tokenizer):
    return d3rt.compile(model, threads=1, batch_size=4, tokenizer=tokenizer)
