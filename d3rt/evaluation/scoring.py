"""Is an answer right? The rules of lm-evaluation-harness 0.4.12 (tasks gsm8k and bbh_fewshot), and where they are
traps.

GSM8K. `strict` is the first number after "#### "; `flexible` is the last number of the whole answer, so that one who
goes on talking after the answer is judged by what is said last. A flexible "number" is also two or more of the
characters "$0-9.,": an answer that ends in "..." has the number "...". Both are compared after commas, dollar signs and
one full stop at the end are taken away; 18.00 is not 18.

BBH. The harness compares the text as it came. Tokenizers of GPT-2's kind, which keep the space before a word, so give
" (A)" for "(A)", and every answer is wrong; one that goes on after its answer ("False\\n") is wrong too. And it stops
at the letter "Q", so that "(Q)", a right answer of reasoning_about_colored_objects, cannot be given. `exact_match` here
takes white space off both ends and stops at "Q:" instead; `harness` is what the harness would say of the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")
BBH_STOPS = ("</s>", "Q:", "\n\n")
BBH_HARNESS_STOPS = ("</s>", "Q", "\n\n")
NOTHING = "[invalid]"

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops, one stop after the other."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def strict_number(text: str) -> str:
    """The first number after "#### "."""
    found = _STRICT.search(text)
    return found[1].strip() if found else NOTHING


def flexible_number(text: str) -> str:
    """The last number."""
    found = _FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else NOTHING


def plain(answer: str) -> str:
    """An answer, or a solution that ends in one, as it is compared."""
    for pattern in _IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def score_gsm8k(text: str, solution: str) -> dict[str, float]:
    """strict and flexible, 1 or 0. solution: the data's `answer`, which ends in "#### N"."""
    gold = plain(solution)
    answers = {"strict": strict_number(text), "flexible": flexible_number(text)}
    return {name: float(plain(answer) == gold) for name, answer in answers.items()}


def score_bbh(text: str, target: str) -> dict[str, float]:
    """exact_match and harness, 1 or 0. text: the answer up to one of BBH_STOPS."""
    return {
        "exact_match": float(text.strip() == target.strip()),
        "harness": float(cut(text, BBH_HARNESS_STOPS) == target),
    }
