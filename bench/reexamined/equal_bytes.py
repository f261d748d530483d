"""(d) Every policy at the same mean bytes: which layers to leave out, and does it matter when?

Each policy's knob is set so that a decode step runs `target` layers on average over the longest answer; what it really
read is printed beside its quality. Those that are searched (ShortGPT, greedy, D3's start, CALM's threshold) are
searched on other texts and prompts than they are judged on."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import d3rt
from d3rt import search
from d3rt.evaluation import data
from d3rt.evaluation.intervals import sign_flip
from d3rt.policies import CALM, D3, FullDepth, Policy, SkipDecode, StaticLayers, UnifiedSkip
from reexamined.forcing import FULL, Item, Teacher, compare_all, figures

TARGETS = (0.9, 0.8)  # of the layers
STARTS = (0.2, 0.3, 0.5, 0.7)
TUNING = 4  # prompts, and texts, that are searched on
TASKS = {"own": "its own answers", "text": "WikiText-2"}


def depth_of(policy: Policy, num_layers: int, new: int) -> float:
    """Mean layers of a decode step over `new` tokens."""
    return sum(policy.schedule(num_layers, new).depths[1:]) / (new - 1)


def bisect(depth: Callable[[float], float], low: float, high: float, target: float, steps: int = 40) -> float:
    """The argument at which the rising function `depth` comes to `target`, between low and high."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if depth(middle) < target else (low, middle)
    return high


def d3(start: float, target: float, num_layers: int, new: int) -> D3:
    """D3 whose alpha gives that mean depth."""
    return D3(bisect(lambda alpha: depth_of(D3(alpha, start), num_layers, new), 0.5, 1.0, target), start)


def arms(
    fast: d3rt.Runtime, options: argparse.Namespace, tuning: Sequence[Item]
) -> dict[str, tuple[str, Policy]]:
    """name -> the family's name, its policy; for each target."""
    layers, new = fast.config.num_hidden_layers, options.new
    model = options.model_object
    texts = [list(item.prompt + item.tokens) for item in tuning]
    found: dict[str, tuple[str, Policy]] = {}
    for share in TARGETS:
        keep = round(share * layers)
        left_out = layers - keep
        middle = layers // 2
        rivals: dict[str, Policy] = {
            **{f"D3, start {start:g}": d3(start, keep, layers, new) for start in STARTS},
            "SkipDecode": SkipDecode(layers, 2 * keep - layers, new),
            "Unified Layer Skipping": UnifiedSkip(layers / keep, "balanced"),
            "one window in the middle": StaticLayers(
                tuple(each for each in range(layers) if not middle <= each < middle + left_out)
            ),
            "LayerDrop, every other": search.layerdrop(layers, left_out / layers),
            "ShortGPT": search.shortgpt(model, texts, keep=keep, tokenizer=fast.tokenizer),
            "greedy": search.greedy(model, texts, keep=keep, tokenizer=fast.tokenizer),
            "CALM, state": _calm(fast, keep, new, tuning),
        }
        found |= {f"{share:g}: {name}": (name, policy) for name, policy in rivals.items()}
    return found


def _calm(fast: d3rt.Runtime, target: float, new: int, tuning: Sequence[Item]) -> CALM:
    """CALM whose threshold gives that mean depth on the prompts it is tuned on."""
    teacher = Teacher(fast)
    first = math.ceil(fast.config.num_hidden_layers / 2)

    def depth(threshold: float) -> float:
        costs = [cost for _, cost in teacher.logs(tuning, CALM(threshold, min_exit=first))]
        return sum(cost.depth for cost in costs) / sum(cost.steps for cost in costs)

    return CALM(round(bisect(depth, 0.5, 1.0, target, steps=9), 5), min_exit=first)


def items(fast: d3rt.Runtime, options: argparse.Namespace) -> tuple[dict[str, list[Item]], list[Item]]:
    """What is judged on, by task; and the answers to other prompts that are searched on."""
    teacher = Teacher(fast)
    answers = []
    for at, prompt in enumerate(data.prompts(options.prompts)[: options.texts + TUNING]):
        rendered = fast.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        answers.append(Item(str(at), tuple(rendered), teacher.greedy(rendered, options.new)[0]))
    answers = [item for item in answers if len(item.tokens) > 1]
    ids = fast.tokenizer(data.text(options.text), add_special_tokens=False).input_ids
    length = options.prompt + options.new
    there = len(ids) // length
    passages = []
    for at in range(min(options.texts, there)):
        start = at * there // min(options.texts, there) * length
        passage = tuple(ids[start : start + length])
        passages.append(Item(str(at), passage[: options.prompt], passage[options.prompt :]))
    return {"own": answers[TUNING:], "text": passages}, answers[:TUNING]


def measure(fast: d3rt.Runtime, options: argparse.Namespace) -> dict[str, Any]:
    """Quality and bytes of every policy at every target."""
    of, tuning = items(fast, options)
    chosen = arms(fast, options, tuning)
    policies = {FULL: FullDepth()} | {arm: policy for arm, (_, policy) in chosen.items()}
    settings = {"part": "equal bytes", "policies": {arm: str(policy) for arm, policy in policies.items()}}
    results = compare_all(fast, policies, of, options.out / "equal_bytes.jsonl", settings)
    layers = fast.config.num_hidden_layers
    found: dict[str, Any] = {"policies": settings["policies"], "tasks": {}}
    for task, items_of in of.items():
        figure = {arm: figures(results, task, arm, layers) for arm in policies}
        for arm in chosen:  # against the paper's own choice at the same bytes, over the same items
            rival = f"{arm.split(':')[0]}: D3, start 0.5"
            mine, theirs = (
                [sum(results[task, item.name, which]["kl"]) / len(item.tokens) for item in items_of]
                for which in (arm, rival)
            )
            differences = [a - b for a, b in zip(mine, theirs, strict=True)]
            figure[arm]["against_d3"] = {
                "difference": sum(differences) / len(differences),
                "p": sign_flip(differences) if any(differences) else 1.0,
            }
        found["tasks"][task] = figure
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """A table for each target, the best first."""
    lines = []
    for share in TARGETS:
        arms = [arm for arm in found["policies"] if arm.startswith(f"{share:g}: ")]
        arms.sort(key=lambda arm: found["tasks"]["own"][arm]["kl"]["mean"])
        lines += [
            "",
            f"Mean depth {share:.0%} of the layers; KL from full depth in nats a token (95%)",
            "",
            "| policy | bytes | KL, its own answers | same token | p to D3 .5 | NLL, WikiText-2 | p to D3 .5 | as |",
            "|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        for arm in arms:
            own, text = found["tasks"]["own"][arm], found["tasks"]["text"][arm]
            lines.append(
                f"| {arm.partition(': ')[2]} | {own['bytes']:.1%} | {own['kl']['mean']:.3f} ({own['kl']['low']:.2f}-"
                f"{own['kl']['high']:.2f}) | {own['agree']['mean']:.0%} | {own['against_d3']['p']:.3f} "
                f"| {text['nll']['mean']:+.3f} ({text['nll']['low']:.2f}-{text['nll']['high']:.2f}) "
                f"| {text['against_d3']['p']:.3f} | `{found['policies'][arm]}` |"
            )
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> Path:
    """KL on its own answers, a bar a policy, with its interval."""
    from matplotlib.figure import Figure

    from d3rt.evaluation.pictures import COLOURS, GRID

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(TARGETS), squeeze=False)[0]
    for axis, share in zip(axes, TARGETS, strict=True):
        arms = [arm for arm in found["policies"] if arm.startswith(f"{share:g}: ")]
        arms.sort(key=lambda arm: -found["tasks"]["own"][arm]["kl"]["mean"])
        kl = [found["tasks"]["own"][arm]["kl"] for arm in arms]
        names = [f"{arm.partition(': ')[2]} ({found['tasks']['own'][arm]['bytes']:.0%})" for arm in arms]
        colours = [COLOURS[1] if ": D3" in arm else COLOURS[0] for arm in arms]
        spread = [[each["mean"] - each["low"] for each in kl], [each["high"] - each["mean"] for each in kl]]
        axis.barh(names, [each["mean"] for each in kl], xerr=spread, color=colours, capsize=2, height=0.65)
        axis.set_title(f"{share:.0%} of the layers on average (bytes)", size=9, loc="left")
        axis.set_xlabel("KL from full depth, nats a token", size=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    figure.savefig(path)
    return path
