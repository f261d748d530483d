"""Detokenizer: the text of tokens as they come, each piece as soon as it is certain.

A token's text depends on the tokens before it (a leading blank, half of a UTF-8 character), but only on the last few:
so a window of tokens is decoded twice, with and without the new one, and the difference is the piece. The cost of a
token does not grow with the text, and text without blanks is not held back, unlike transformers' TextStreamer.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

# A character takes four bytes at most, so four tokens; one that is still broken after more will stay so.
MAX_PENDING = 8
BROKEN = "\ufffd"


class Detokenizer:
    """`put` every token, then `end`; the pieces joined are the decoded text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._told: list[int] = []  # the tokens of the piece told last: context for what follows
        self._pending: list[int] = []

    def put(self, token: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._pending.append(token)
        return self._piece(final=len(self._pending) > MAX_PENDING)

    def end(self) -> str:
        """What was held back."""
        return self._piece(final=True) if self._pending else ""

    def _piece(self, final: bool) -> str:
        before, now = self._decode(self._told), self._decode(self._told + self._pending)
        if now.endswith(BROKEN) and not final:
            return ""
        self._told, self._pending = self._pending, []
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
