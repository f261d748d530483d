"""(a) The printed averages and FLOPs ratios, from the formulas; and what the same settings give at real lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from d3rt.policies import D3

LENGTHS = {
    "bbh": (2, 5, 20, 200),
    "gsm8k": (64, 128, 256, 1024),
}  # tokens; the last is what the paper averages over


@dataclass(frozen=True)
class Llama2:
    """The shape of a Llama-2, from its config.json."""

    name: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_key_value_heads: int
    head_dim: int = 128
    vocab_size: int = 32000

    @property
    def head_in_layers(self) -> float:
        """The lm_head's weights, in layers: the FLOPs of a token that do not depend on the context go as weights."""
        attention = self.hidden_size * (2 * self.hidden_size + 2 * self.num_key_value_heads * self.head_dim)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.vocab_size * self.hidden_size / layer


MODELS = (
    Llama2("7B", 32, 4096, 11008, 32),
    Llama2("13B", 40, 5120, 13824, 40),
    Llama2("70B", 80, 8192, 28672, 8),
)
# Table 6: mean layers and FLOPs ratio of D3. Table 7: speed-up of the wall clock, GSM8K.
PRINTED = {
    ("bbh", "7B"): (19.17, 1.64),
    ("bbh", "13B"): (20.33, 1.94),
    ("bbh", "70B"): (48.43, 1.65),
    ("gsm8k", "7B"): (29.90, 1.07),
    ("gsm8k", "13B"): (37.51, 1.06),
    ("gsm8k", "70B"): (75.53, 1.05),
}
CLOCK = {"7B": 1.12, "13B": 1.23, "70B": 1.14}


def flops_ratio(model: Llama2, mean_depth: float) -> float:
    """Of a token at full depth to one of mean_depth layers, the lm_head counted in both."""
    head = model.head_in_layers
    return (model.num_hidden_layers + head) / (mean_depth + head)


def measure() -> dict[str, Any]:
    """Each printed cell beside what the formula gives: over the paper's length, and over real ones."""
    rows = []
    for (task, name), (layers, ratio) in PRINTED.items():
        model = next(each for each in MODELS if each.name == name)
        policy = D3.paper(task, model.num_hidden_layers)
        depths = {n: policy.schedule(model.num_hidden_layers, n).mean_depth for n in LENGTHS[task]}
        rows.append(
            {
                "task": task,
                "model": name,
                "policy": str(policy),
                "printed_layers": layers,
                "layers": depths[LENGTHS[task][-1]],
                "printed_ratio": ratio,
                "ratio": flops_ratio(model, depths[LENGTHS[task][-1]]),
                "ratio_at": {n: flops_ratio(model, depth) for n, depth in depths.items()},
                "clock": CLOCK[name] if task == "gsm8k" else None,
            }
        )
    return {"rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "| task, Llama-2 | setting found | layers printed | by formula | FLOPs ratio printed | by formula "
        "| at real lengths | wall clock printed |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for row in found["rows"]:
        at = ", ".join(f"{n}: {ratio:.2f}x" for n, ratio in list(row["ratio_at"].items())[:-1])
        clock = f"{row['clock']:.2f}x" if row["clock"] else "-"
        lines.append(
            f"| {row['task']}, {row['model']} | `{row['policy']}` | {row['printed_layers']:.2f} "
            f"| {row['layers']:.2f} "
            f"| {row['printed_ratio']:.2f}x | {row['ratio']:.2f}x | {at} | {clock} |"
        )
    return "\n".join(lines)
