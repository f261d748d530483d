"""The tasks: what is run for each item, and what is kept of it. What follows from it over all items is report.py's.

    gsm8k, bbh    an answer is generated and scored                               an item is a question
    ppl           NLL of the next tokens of a text, and of the model's own full-depth continuation      a passage
    agreement     along the full-depth continuation: is the choice the same, KL(full depth || arm)      a passage

In ppl and agreement the given tokens are forced through the steps that the policy records, so that position i runs at
the depth that token i has when it is generated. What is forced in `own` and in agreement is the model's own full-depth
text, up to end-of-sequence: the tokens that a policy meets in use, unlike an author's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from d3rt.evaluation import data
from d3rt.evaluation.data import Question
from d3rt.evaluation.scoring import BBH_STOPS, GSM8K_STOPS, score_bbh, score_gsm8k
from d3rt.evaluation.settings import Settings
from d3rt.evaluation.until import Cost, answer, prompt_ids
from d3rt.policies import FullDepth, Policy
from d3rt.runtime import Runtime

FULL = "full"
ROWS = 4  # passages that are read side by side
Result = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """What is done in one go. run() yields (item, arm, result) for every key."""

    keys: tuple[tuple[str, str], ...]  # item, arm
    run: Callable[[], Iterator[tuple[str, str, Result]]]


@dataclass(frozen=True)
class Task:
    """A task on its items: `about` is what of its settings and items decides the results."""

    name: str
    about: Mapping[str, Any]
    units: list[Unit]


def make_task(name: str, runtime: Runtime, arms: Mapping[str, Policy], settings: Settings) -> Task:
    """The task of that name for these arms."""
    return {"gsm8k": _gsm8k, "bbh": _bbh, "ppl": _ppl, "agreement": _agreement}[name](runtime, arms, settings)


# ---- answers ----


def _gsm8k(runtime: Runtime, arms: Mapping[str, Policy], settings: Settings) -> Task:
    questions = data.gsm8k(settings.gsm8k, settings.shots, settings.limit)
    return _answers("gsm8k", questions, GSM8K_STOPS, score_gsm8k, runtime, arms, settings)


def _bbh(runtime: Runtime, arms: Mapping[str, Policy], settings: Settings) -> Task:
    questions = data.bbh(settings.bbh, settings.bbh_limit, settings.bbh_tasks)
    return _answers("bbh", questions, BBH_STOPS, score_bbh, runtime, arms, settings)


def _answers(
    name: str,
    questions: Sequence[Question],
    stops: Sequence[str],
    score: Callable[[str, str], dict[str, float]],
    runtime: Runtime,
    arms: Mapping[str, Policy],
    settings: Settings,
) -> Task:
    def run(question: Question, arm: str) -> Iterator[tuple[str, str, Result]]:
        runtime.policy = arms[arm]
        ids, cut = prompt_ids(runtime, question.prompt, settings.max_new_tokens)
        given = answer(runtime, ids, stops, settings.max_new_tokens)
        result = {
            "scores": score(given.text, question.target),
            "text": given.text,
            "target": question.target,
            "group": question.group,
            "prompt_tokens": ids.shape[1],
            "prompt_cut": cut,
            "cost": asdict(given.cost),
        }
        yield question.item, arm, result

    # arm after arm for one question: what a shared machine does meanwhile meets all of them
    units = [
        Unit(((question.item, arm),), lambda question=question, arm=arm: run(question, arm))
        for question in questions
        for arm in arms
    ]
    about = {"questions": [asdict(each) for each in questions], "max_new_tokens": settings.max_new_tokens}
    return Task(name, about, units)


# ---- forced tokens ----


def _ppl(runtime: Runtime, arms: Mapping[str, Policy], settings: Settings) -> Task:
    passages = _passages(runtime, settings)
    split = settings.prompt_tokens

    def run_text(group: Sequence[int], arm: str) -> Iterator[tuple[str, str, Result]]:
        runtime.policy = arms[arm]
        rows = torch.stack([passages[at] for at in group])
        yield from _named("text", group, arm, losses(runtime, list(rows[:, :split]), rows[:, split:]))

    def run_own(group: Sequence[int]) -> Iterator[tuple[str, str, Result]]:
        heads = [passages[at][:split] for at in group]
        tokens, lengths, _ = continued(runtime, heads, settings.continued_tokens, logits=False)
        for arm, policy in arms.items():
            runtime.policy = policy
            yield from _named("own", group, arm, losses(runtime, heads, tokens, lengths))

    units = []
    for group in _groups(len(passages), runtime):
        units += [
            Unit(
                tuple((f"text/{at}", arm) for at in group),
                lambda group=group, arm=arm: run_text(group, arm),
            )
            for arm in arms
        ]
        keys = tuple((f"own/{at}", arm) for arm in arms for at in group)
        units.append(Unit(keys, lambda group=group: run_own(group)))
    return Task("ppl", _about(passages, settings, runtime), units)


def _agreement(runtime: Runtime, arms: Mapping[str, Policy], settings: Settings) -> Task:
    if settings.prompts is None:
        heads = [passage[: settings.prompt_tokens] for passage in _passages(runtime, settings)]
    else:
        heads = [_encode(runtime, prompt, settings.chat) for prompt in data.prompts(settings.prompts)]
        heads = heads[: settings.texts]
    length = settings.continued_tokens

    def run(group: Sequence[int]) -> Iterator[tuple[str, str, Result]]:
        prompts = [heads[at] for at in group]
        tokens, lengths, truth = continued(runtime, prompts, length, logits=True)
        for arm, policy in arms.items():
            runtime.policy = policy
            yield from _named("", group, arm, compared(runtime, prompts, tokens, lengths, truth))

    units = [
        Unit(tuple((str(at), arm) for arm in arms for at in group), lambda group=group: run(group))
        for group in _groups(len(heads), runtime)
    ]
    return Task("agreement", _about(heads, settings, runtime), units)


def _about(passages: Sequence[Tensor], settings: Settings, runtime: Runtime) -> dict[str, Any]:
    return {
        "passages": [passage.tolist() for passage in passages],
        "prompt_tokens": settings.prompt_tokens,
        "continued_tokens": settings.continued_tokens,
        "rows": min(ROWS, runtime.batch_size),
    }


def _groups(count: int, runtime: Runtime) -> list[range]:
    """The passages that are read together: always the same ones, also in a run that is continued."""
    rows = min(ROWS, runtime.batch_size)
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def _passages(runtime: Runtime, settings: Settings) -> list[Tensor]:
    """settings.texts pieces of prompt_tokens + continued_tokens tokens, evenly spread over the text."""
    ids = runtime.tokenizer(
        data.text(settings.text), add_special_tokens=False, return_tensors="pt", verbose=False
    ).input_ids[0]
    first, start = runtime.tokenizer("a").input_ids[0], runtime.tokenizer.bos_token_id
    bos = torch.tensor([start] if start is not None and first == start else [], dtype=torch.int64)
    length = settings.prompt_tokens + settings.continued_tokens - len(bos)
    there = len(ids) // length
    if there < 1:
        raise ValueError(
            f"the text has {len(ids)} tokens, and one passage takes {length}: prompt_tokens and continued_tokens."
        )
    count = min(settings.texts, there)
    starts = [at * there // count * length for at in range(count)]
    return [torch.cat([bos, ids[start : start + length]]) for start in starts]


def _encode(runtime: Runtime, prompt: str, chat: bool) -> Tensor:
    tokenizer = runtime.tokenizer
    if not chat:
        return tokenizer(prompt, return_tensors="pt", verbose=False).input_ids[0]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"][0]


def continued(
    runtime: Runtime, prompts: Sequence[Tensor], length: int, logits: bool
) -> tuple[Tensor, list[int], list[Tensor]]:
    """Full depth's greedy tokens [B, length], how many of each row count (its end-of-sequence is the last), and each
    step's log-probabilities [B, V] if they are wanted."""
    runtime.policy = FullDepth()
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    out = runtime.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=length,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=logits,
    )
    tokens = out.sequences[:, width:]
    ends = _ends(runtime)
    lengths = [
        next((at + 1 for at, token in enumerate(row) if token in ends), length) for row in tokens.tolist()
    ]
    return tokens, lengths, [F.log_softmax(each, dim=-1) for each in out.logits] if logits else []


def _ends(runtime: Runtime) -> set[int]:
    ends = runtime.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def losses(
    runtime: Runtime, prompts: Sequence[Tensor], tokens: Tensor, lengths: Sequence[int] | None = None
) -> Iterator[Result]:
    """Each row's NLL by position, in nats, and cost."""
    steps = zip(runtime.forced_logits(prompts, tokens), tokens.T, strict=True)
    found = torch.stack([F.cross_entropy(logits, each, reduction="none") for logits, each in steps], dim=1)
    for row, length in enumerate(lengths or [tokens.shape[1]] * len(tokens)):
        yield {
            "nll": found[row, :length].tolist(),
            "cost": asdict(Cost.of(runtime.last_run, length, timed=False)),
        }


def compared(
    runtime: Runtime,
    prompts: Sequence[Tensor],
    tokens: Tensor,
    lengths: Sequence[int],
    truth: Sequence[Tensor],
) -> Iterator[Result]:
    """Each row's agreement (1 or 0), KL and NLL by position, and cost."""
    same, kl, nll = [], [], []
    for logits, full, chosen in zip(runtime.forced_logits(prompts, tokens), truth, tokens.T, strict=True):
        logs = F.log_softmax(logits, dim=-1)
        same.append(logits.argmax(dim=-1) == chosen)
        kl.append((full.exp() * (full - logs)).sum(dim=-1, dtype=torch.float64))
        nll.append(-logs.gather(1, chosen[:, None])[:, 0])
    columns = {name: torch.stack(each, dim=1) for name, each in (("agree", same), ("kl", kl), ("nll", nll))}
    for row, length in enumerate(lengths):
        result = {name: column[row, :length].tolist() for name, column in columns.items()}
        result["agree"] = [int(each) for each in result["agree"]]
        yield result | {"cost": asdict(Cost.of(runtime.last_run, length, timed=False))}


def _named(
    kind: str, group: Sequence[int], arm: str, results: Iterator[Result]
) -> Iterator[tuple[str, str, Result]]:
    for at, result in zip(group, results, strict=True):
        yield (f"{kind}/{at}" if kind else str(at)), arm, result
