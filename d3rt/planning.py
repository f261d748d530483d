"""`d3rt plan`: what a policy would be worth on a GPU that is not here: modelled, not measured.

Puts the pieces together: a config (models/loading.py), the nodes of its steps (nodes.py), a GPU (gpus.py) and the time
of a node (roofline.py). `check` holds the same model against figures that others published, and says how far off it is.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table

from d3rt.errors import UnsupportedOptionError
from d3rt.gpus import GPUS, Gpu
from d3rt.models.loading import load_config
from d3rt.nodes import Outline, packed_tile
from d3rt.plan import LayerSet, Plan
from d3rt.policies import D3, EarlyExit, Policy, parse
from d3rt.quantize import FORMATS, Widths
from d3rt.roofline import (
    STATUS,
    Node,
    eager_kernels,
    eager_nodes,
    eager_seconds,
    memory_needed,
    step_bytes,
    step_seconds,
)

SHARES = (1.0, 0.75, 0.5)  # of the layers, where the table goes by depth


@dataclass(frozen=True)
class Line:
    """One line of the table. Seconds and bytes are those of the mean decode step."""

    what: str
    layers: float  # mean
    step_seconds: float
    bytes_read: float  # weights and K,V
    bandwidth_share: float  # of the data sheet's
    over_full: float | None  # times as fast as d3rt at full depth, by time
    expected: float | None  # the same by bytes alone
    over_hf: float | None  # times as fast as Hugging Face
    nodes: float  # kernels of a step

    def as_dict(self) -> dict[str, Any]:
        return {"status": STATUS, **asdict(self), "tokens_per_second": 1 / self.step_seconds}


@dataclass(frozen=True)
class Forecast:
    """What `d3rt plan` shows."""

    title: str
    gpu: Gpu
    settings: dict[str, Any]
    lines: tuple[Line, ...]
    # of each decode step of the schedule: Hugging Face, d3rt at full depth, d3rt with the policy
    step_seconds: dict[str, tuple[float, ...]]

    def as_dict(self) -> dict[str, Any]:
        gpu = {"status": STATUS, **asdict(self.gpu)}
        lines = [line.as_dict() for line in self.lines]
        return {"status": STATUS, "gpu": gpu, "settings": self.settings, "lines": lines}


def widths_for(hf_config: Any, gpu: Gpu, weights: str | None) -> Widths:
    """The widths of compile(weights=); None is the config's own 16 bit type, or the one that the GPU has.

    UnsupportedOptionError for bfloat16 where the GPU has none.
    """
    if weights is None:
        own = getattr(hf_config, "dtype", None)
        weights = "bf16" if gpu.has_bfloat16 and own != torch.float16 else "fp16"
    widths = Widths.parse(None, weights, None, None)
    if widths.kv_cache is torch.bfloat16 and not gpu.has_bfloat16 and widths.weights in FORMATS:
        widths = replace(widths, kv_cache=torch.float16)
    if torch.bfloat16 in (widths.weights, widths.lm_head) and not gpu.has_bfloat16:
        raise UnsupportedOptionError(
            f"weights={weights!r} on {gpu.name}: sm_{gpu.arch} has no bfloat16; choose fp16, int8 or int4."
        )
    return widths.of_model(torch.float16)


def forecast(
    hf_config: Any,
    gpu: Gpu,
    policy: Policy | str,
    weights: str | None = None,
    prompt: int = 32,
    tokens: int = 256,
    rows: int = 1,
) -> Forecast:
    """What decoding `tokens` tokens a row after `prompt` takes, on average over the decode steps (the prefill is left
    out): Hugging Face at full depth, d3rt by depth, d3rt with the policy.

    UnsupportedOptionError for what cannot be: sizes below 1, a model that does not fit the GPU.
    """
    for name, value, least in (("prompt", prompt, 1), ("tokens", tokens, 2), ("batch", rows, 1)):
        if value < least:
            raise UnsupportedOptionError(f"{name}={value}: it must be at least {least}.")
    if rows > 16:
        raise UnsupportedOptionError(f"batch={rows}: d3rt decodes 16 rows at most.")
    outline = Outline(hf_config, widths_for(hf_config, gpu, weights))
    config = outline.config
    longest = prompt + tokens
    if longest > config.max_position_embeddings:
        raise UnsupportedOptionError(
            f"prompt={prompt}, tokens={tokens}: the model ends at {config.max_position_embeddings} positions."
        )
    needed = memory_needed(config, outline.weight_bytes, outline.line_bytes, rows, longest)
    if needed > gpu.memory:
        raise UnsupportedOptionError(
            f"weights and K,V take {needed / 2**30:.1f} GiB, and {gpu.name} has {gpu.memory / 2**30:.0f} GiB; choose "
            "narrower weights, fewer rows or a larger GPU."
        )
    layers = config.num_hidden_layers
    chosen = parse(policy, num_layers=layers) if isinstance(policy, str) else policy
    if isinstance(chosen, EarlyExit):
        raise UnsupportedOptionError(
            f"policy {str(chosen)!r}: it decides the depth while a step runs, so there is no schedule to model a time "
            "from, and the cuda backend does not run it; choose a policy with a schedule, such as "
            "'d3:alpha=0.998,start=0.5'."
        )
    plans = chosen.schedule(layers, tokens).plans()
    full = [Plan.of(LayerSet.full(layers))] * tokens

    dense = outline
    if outline.widths.any_packed:  # Hugging Face has no int8 or int4 of its own
        dense = Outline(hf_config, widths_for(hf_config, gpu, "bf16" if gpu.has_bfloat16 else "fp16"))
    hf_times = eager_times(dense, gpu, full, prompt, rows)
    full_times = d3rt_times(outline, gpu, full, prompt, rows)
    hf_seconds, full_seconds = statistics.fmean(hf_times), statistics.fmean(full_times)
    full_bytes = mean_bytes(outline, full, prompt, rows)

    def line(what: str, plans: Sequence[Plan], times: Sequence[float]) -> Line:
        seconds, moved = statistics.fmean(times), mean_bytes(outline, plans, prompt, rows)
        return Line(
            what=what,
            layers=statistics.fmean(plan.layer_set.depth for plan in plans[1:]),
            step_seconds=seconds,
            bytes_read=moved,
            bandwidth_share=moved / seconds / gpu.bandwidth,
            over_full=full_seconds / seconds,
            expected=full_bytes / moved,
            over_hf=hf_seconds / seconds,
            nodes=statistics.fmean(outline.nodes(plan, rows).total() for plan in plans[1:]),
        )

    hf_nodes = eager_nodes(dense.nodes(full[0], rows))
    hf_moved = statistics.fmean(step_bytes(hf_nodes, [prompt + step] * rows) for step in range(1, tokens))
    name = str(dense.widths.weights).removeprefix("torch.")
    lines = [
        Line(
            *(
                f"HF eager, {name}",
                float(layers),
                hf_seconds,
                hf_moved,
                hf_moved / hf_seconds / gpu.bandwidth,
            ),
            *(None, None, None, eager_kernels(layers)),
        )
    ]
    for share in SHARES:
        depth = max(1, round(share * layers))
        start = depth // 2
        kept = [Plan.of(LayerSet.except_window(start, start + layers - depth, layers))] * tokens
        lines.append(
            line(f"d3rt, {depth} of {layers} layers", kept, d3rt_times(outline, gpu, kept, prompt, rows))
        )
    policy_times = d3rt_times(outline, gpu, plans, prompt, rows)
    lines.append(line(f"d3rt, {chosen}", plans, policy_times))
    model = getattr(hf_config, "name_or_path", "") or config.model_type
    return Forecast(
        title=f"{gpu.product}, {model}, {outline.widths}: {STATUS}",
        gpu=gpu,
        settings={
            **{"model": model, "policy": str(chosen), "widths": str(outline.widths)},
            **{"prompt": prompt, "tokens": tokens, "batch": rows, "memory_needed": needed},
        },
        lines=tuple(lines),
        step_seconds={
            "HF eager": tuple(hf_times),
            "d3rt, full depth": tuple(full_times),
            f"d3rt, {chosen}": tuple(policy_times),
        },
    )


def d3rt_times(outline: Outline, gpu: Gpu, plans: Sequence[Plan], prompt: int, rows: int) -> list[float]:
    """Seconds of decode steps 1, 2, ...; plans[0] is the prefill's."""
    return [
        step_seconds(outline.nodes(plan, rows), gpu, [prompt + step] * rows)
        for step, plan in enumerate(plans[1:], 1)
    ]


def eager_times(outline: Outline, gpu: Gpu, plans: Sequence[Plan], prompt: int, rows: int) -> list[float]:
    """The same of transformers, run eagerly; of fewer layers where the plans have fewer."""
    of_plan = {
        plan: (eager_nodes(outline.nodes(plan, rows)), plan.layer_set.depth) for plan in set(plans[1:])
    }
    return [
        eager_seconds(*of_plan[plan], gpu, [prompt + step] * rows) for step, plan in enumerate(plans[1:], 1)
    ]


def mean_bytes(outline: Outline, plans: Sequence[Plan], prompt: int, rows: int) -> float:
    """Weight and K,V bytes of a decode step, on average."""
    return statistics.fmean(
        step_bytes(outline.nodes(plan, rows), [prompt + step] * rows)
        for step, plan in enumerate(plans[1:], 1)
    )


# -- published figures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A figure of others, and what the model says in its place."""

    source: str
    what: str
    published: float
    modelled: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too much."""
        return self.modelled / self.published - 1

    def as_dict(self) -> dict[str, Any]:
        return {"status": STATUS, **asdict(self), "error": self.error}


# gpt-fast's README: batch 1, prompt of 5 tokens, A100-80GB limited to 330 W, "seems like peak bandwidth is about 1700
# GB/s". Its compiled step has about ten kernels a layer (model.py: two norms, wqkv, RoPE, the cache's update, attention
# in two, wo, the gated product, w2) where d3rt has five.
GPT_FAST = "gpt-fast README"
GPT_FAST_GPU = replace(GPUS["a100-80"], efficiency=1700 / 2039)
GPT_FAST_MORE_NODES = 5
GPT_FAST_FIGURES = {
    ("meta-llama/Llama-2-7b-hf", "bf16"): 104.9,
    ("meta-llama/Llama-2-7b-hf", "int8"): 155.58,
    ("meta-llama/Llama-2-7b-hf", "int4"): 196.80,
    ("meta-llama/Llama-2-70b-hf", "int8"): 19.13,
    ("meta-llama/Llama-2-70b-hf", "int4"): 25.25,
}
GPT_FAST_TOKENS = 200
# Its bytes a weight: int8 has one scale a row, int4 a scale and a zero point, both bfloat16, a group of 32.
GPT_FAST_BYTES = {"int8": 1.0, "int4": 0.5 + 4 / 32}
# pytorch.org/blog/accelerating-generative-ai-2: the same model before anything was done about it.
GPT_FAST_EAGER = 25.5

# arXiv 2503.08524, Table 7: "actual time" of GSM8K, transformers with and without D3, alpha .9999. 7B and 13B on V100s
# with 32 GB, batch 4; 70B on A100s with 40 GB, batch 8. No unit is given, nor lengths: answers are taken to be as long
# as the task's limit of 1024 tokens, after a 3-shot prompt of 600; neither weighs much. Eight GPUs of 40 GB cannot hold
# the 70B model eight times over, so its layers are taken to lie on them in turn.
TABLE_7 = "D3 paper, Table 7"
TABLE_7_TIMES = {
    "meta-llama/Llama-2-7b-hf": ("v100", 4, 6218, 5559),
    "meta-llama/Llama-2-13b-hf": ("v100", 4, 10428, 8427),
    "meta-llama/Llama-2-70b-hf": ("a100-40", 8, 12893, 11294),
}
TABLE_7_PROMPT, TABLE_7_TOKENS = 600, 1024


def check() -> list[Published]:
    """The model beside what others measured. It knows no engine's faults, so it should be ahead of them."""
    found = []
    for (model, weights), figure in GPT_FAST_FIGURES.items():
        hf_config = load_config(model)
        outline = Outline(hf_config, Widths.parse(None, weights, weights, "bf16"))
        layers = outline.config.num_hidden_layers
        plans = [Plan.of(LayerSet.full(layers))] * GPT_FAST_TOKENS
        nodes = Counter({Node("other"): GPT_FAST_MORE_NODES * layers})
        for node, count in outline.nodes(plans[0]).items():
            share = 1.0
            if weights in GPT_FAST_BYTES:
                tile = packed_tile(weights)
                share = GPT_FAST_BYTES[weights] * tile.rows * tile.cols / tile.nbytes
            nodes[replace(node, weight_bytes=int(node.weight_bytes * share))] += count
        seconds = statistics.fmean(
            step_seconds(nodes, GPT_FAST_GPU, [5 + step]) for step in range(1, GPT_FAST_TOKENS)
        )
        name = model.rpartition("/")[2]
        found.append(Published(GPT_FAST, f"{name} {weights}, tokens/s", figure, 1 / seconds))
        if (model, weights) == ("meta-llama/Llama-2-7b-hf", "bf16"):
            eager = statistics.fmean(eager_times(outline, GPT_FAST_GPU, plans, 5, 1))
            what = f"{name} bf16, eager PyTorch, tokens/s"
            found.append(Published("pytorch.org blog on gpt-fast", what, GPT_FAST_EAGER, 1 / eager))
    full_seconds = {}
    for model, (gpu, rows, before, after) in TABLE_7_TIMES.items():
        outline = Outline(load_config(model), Widths.parse(None, "fp16", None, None))
        layers = outline.config.num_hidden_layers
        full = [Plan.of(LayerSet.full(layers))] * TABLE_7_TOKENS
        skipping = D3.paper("gsm8k", layers).schedule(layers, TABLE_7_TOKENS).plans()
        times = [
            statistics.fmean(eager_times(outline, GPUS[gpu], plans, TABLE_7_PROMPT, rows))
            for plans in (full, skipping)
        ]
        name = model.rpartition("/")[2]
        full_seconds[name] = times[0], before
        found.append(
            Published(TABLE_7, f"{name}: D3 over full depth, times", before / after, times[0] / times[1])
        )
    for (small, (low, low_time)), (large, (high, high_time)) in itertools.pairwise(full_seconds.items()):
        if "70b" not in large:  # on other GPUs, and another number of them
            found.append(
                Published(
                    TABLE_7, f"{large} over {small}, HF full depth, times", high_time / low_time, high / low
                )
            )
    return found


# -- as tables -------------------------------------------------------------------------------------------------------


def forecast_table(forecast: Forecast) -> Table:
    """The lines of a forecast; each says that it is modelled."""
    settings = forecast.settings
    table = Table(
        title=forecast.title,
        caption=f"prompt {settings['prompt']}, {settings['tokens']} new tokens, batch {settings['batch']}: the mean "
        f"decode step, {STATUS}; {settings['memory_needed'] / 2**30:.1f} of {forecast.gpu.memory / 2**30:.0f} GiB",
        box=box.MARKDOWN,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in ("layers", "ms", "tokens/s", "GB read", "of the bandwidth", "kernels"):
        table.add_column(name, justify="right")
    for name in ("expected by bytes", "over full depth", "over HF", "status"):
        table.add_column(name, justify="right")
    for line in forecast.lines:
        table.add_row(
            *(
                line.what,
                f"{line.layers:.1f}",
                f"{1e3 * line.step_seconds:.3f}",
                f"{1 / line.step_seconds:.0f}",
            ),
            *(f"{line.bytes_read / 1e9:.2f}", f"{line.bandwidth_share:.0%}", f"{line.nodes:.0f}"),
            *(_times(line.expected), _times(line.over_full), _times(line.over_hf), STATUS),
        )
    return table


def check_table(found: Sequence[Published]) -> Table:
    """Published figures beside the model's, with the error."""
    table = Table(
        title=f"published figures beside this model's: {STATUS}", box=box.MARKDOWN, title_justify="left"
    )
    for name in ("source", "figure"):
        table.add_column(name)
    for name in ("published", "modelled", "error", "status"):
        table.add_column(name, justify="right")
    for each in found:
        table.add_row(
            *(
                each.source,
                each.what,
                f"{each.published:.2f}",
                f"{each.modelled:.2f}",
                f"{each.error:+.0%}",
                STATUS,
            )
        )
    return table


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
