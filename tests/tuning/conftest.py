"""The tiny model of tune's tests."""

from byte_models import fast, model, tokenizer

__all__ = ["fast", "model", "tokenizer"]
