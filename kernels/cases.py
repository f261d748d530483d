"""The shapes every op is tested on and timed on: one list for the tests, the benches and the Triton kernels.

A Case names an op and its sizes; `make` builds its arguments, `call` runs it on anything that has the op under its own
name (kernels/reference.py, a native Tape), `outputs` says which elements the op owns. Nobody else defines shapes. What
is right is said by reference.py, how close is close enough by the tests.

Buffers are made so that a mistake shows: outputs hold NaN before the call, the cache holds NaN wherever the op must not
read, and each tensor lies between slack elements that belong to nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from d3rt.kernels import kv_line
from d3rt.kernels.reference import FillLayer

EPS = 1e-5
ROPE_THETA = 10000.0
LINES = 20  # of a cache that has more than the op has slots
OPS = (
    *("embed", "norm_qkv_rope", "attention", "proj_add", "norm_gate_up", "kv_fill", "keep_hidden"),
    "norm_logits",
)
# Of early exit, which kernels/cuda does not have.
EXIT_OPS = ("copy_hidden", "hidden_cosine", "top2_margin")
ALL_OPS = (*OPS, *EXIT_OPS)


@dataclass(frozen=True)
class Case:
    """One op at one size. Letters as in reference.py; those that an op does not use stay 0.

    proj_add takes K inputs to D outputs. pos holds one position a slot; row_gap is how many elements lie between two
    rows of a weight matrix; window 0 is no window.
    """

    op: str
    name: str
    dtype: torch.dtype  # of weights, and of the cache too where it is not int8
    B: int = 1
    D: int = 0
    H: int = 0
    G: int = 0
    d: int = 0
    F: int = 0
    K: int = 0
    V: int = 0
    S: int = 0
    pos: tuple[int, ...] = ()
    window: int = 0
    layers: int = 0
    bias: bool = False
    head_norm: bool = False
    row_gap: int = 0
    int8_cache: bool = False
    lines: tuple[int, ...] = ()  # of the cache, one a slot; the cache then has LINES of them

    def __post_init__(self):
        if self.S and (len(self.pos) != self.B or not all(0 <= p < self.S for p in self.pos)):
            raise ValueError(
                f"{self.op} {self.name}: pos {self.pos} must be {self.B} positions in 0..{self.S - 1}"
            )

    def __str__(self) -> str:
        """What pytest and the benches show, e.g. "attention-gqa3-bfloat16-B1"."""
        cache = "-int8_cache" if self.int8_cache else ""
        cache += "-lines" * bool(self.lines)
        return f"{self.op}-{self.name}-{str(self.dtype).removeprefix('torch.')}{cache}-B{self.B}"

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.int8 if self.int8_cache else self.dtype


def make(case: Case, seed: int = 0, slack: int = 0) -> dict[str, Any]:
    """The op's arguments by name. slack: unowned NaN elements before and after each tensor, in its storage."""
    return _Maker(case, seed, slack).arguments()


def call(ops: Any, case: Case, arguments: dict[str, Any]) -> None:
    """Runs (reference) or records (Tape) the op."""
    getattr(ops, case.op)(**arguments)


def tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the arguments with its name; those of kv_fill's layers as "layers[i].name"."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif name == "layers":
            for i, layer in enumerate(value):
                for part, tensor in zip(FillLayer._fields, layer, strict=True):
                    if tensor is not None:
                        yield f"layers[{i}].{part}", tensor


def outputs(case: Case, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What the op writes, by name; of a cache the lines [B, G, d] at pos, of an int8 one what they stand for. Copies:
    read them after the call."""
    names = {
        "embed": ["x"],
        "norm_qkv_rope": ["q", "k_cache", "v_cache"],
        "attention": ["out"],
        "proj_add": ["x"],
        "norm_gate_up": ["h"],
        "keep_hidden": ["hidden"],
        "kv_fill": [f"layers[{i}].{part}" for i in range(case.layers) for part in ("k_cache", "v_cache")],
        "norm_logits": ["logits"],
        **{op: ["out"] for op in EXIT_OPS},
    }[case.op]
    found = dict(tensors(arguments))
    written = {name: found[name][owned(case, name)].clone() for name in names}
    return {
        name: kv_line.read(tensor) if tensor.dtype == torch.int8 else tensor
        for name, tensor in written.items()
    }


def owned(case: Case, name: str) -> Any:
    """Index of the elements of output `name` that the op writes."""
    if name == "hidden":
        return _lines_of(case), torch.tensor(case.pos)
    if name.endswith("_cache"):
        return _lines_of(case), slice(None), torch.tensor(case.pos)
    return slice(None)


def _lines_of(case: Case) -> Tensor:
    return torch.tensor(case.lines) if case.lines else torch.arange(case.B)


def bytes_moved(case: Case) -> int:
    """Bytes that the op has to read and write at least once: each weight, cache line and activation."""
    kept = case.dtype.itemsize
    read = sum(min(p + 1, case.window or p + 1) for p in case.pos)  # positions, over all slots
    biases = 4 * case.bias
    qkv_rows = (case.H + 2 * case.G) * case.d
    kv_rows = 2 * case.G * case.d
    line = kv_line.width(case.d, case.cache_dtype) * case.cache_dtype.itemsize
    lines = 2 * case.G * line  # K and V of one position
    rope = case.B * case.d * 4
    x = case.B * case.D * 4
    if case.op == "embed":
        return case.B * case.D * kept + x
    if case.op == "norm_qkv_rope":
        weights = qkv_rows * (case.D * kept + biases) + case.D * 4 + 2 * case.d * 4 * case.head_norm
        return weights + x + rope + case.B * (case.H * case.d * 4 + lines)
    if case.op == "attention":
        return read * lines + 2 * case.B * case.H * case.d * 4
    if case.op == "proj_add":
        return case.D * (case.K * kept + biases) + case.B * case.K * 4 + 2 * x
    if case.op == "norm_gate_up":
        return 2 * case.F * (case.D * kept + biases) + case.D * 4 + x + case.B * case.F * 4
    if case.op == "kv_fill":
        weights = kv_rows * (case.D * kept + biases) + case.D * 4 + case.d * 4 * case.head_norm
        return case.layers * (weights + case.B * lines) + x + rope
    if case.op == "keep_hidden":
        return x + case.B * case.D * kept
    if case.op == "norm_logits":
        return case.V * case.D * kept + case.D * 4 + x + case.B * case.V * 4
    if case.op in ("copy_hidden", "hidden_cosine"):
        return 2 * x + (case.B * 4 if case.op == "hidden_cosine" else 0)
    if case.op == "top2_margin":
        return case.B * (case.V + 1) * 4
    raise ValueError(f"op {case.op!r}: choose one of {', '.join(ALL_OPS)}")


class _Maker:
    """Builds the arguments of one case from one seed."""

    def __init__(self, case: Case, seed: int, slack: int):
        self.case, self.slack = case, slack
        self.generator = torch.Generator().manual_seed(seed)

    def arguments(self) -> dict[str, Any]:
        return getattr(self, self.case.op)()

    def place(self, values: Tensor) -> Tensor:
        """values in a storage of their own, between `slack` elements of NaN (or of a token nobody has)."""
        poison = {torch.int32: -(2**31), torch.int8: kv_line.POISON}.get(values.dtype, float("nan"))
        storage = torch.full((values.numel() + 2 * self.slack,), poison, dtype=values.dtype)
        inner = storage[self.slack : self.slack + values.numel()].view(values.shape)
        return inner.copy_(values)

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator)

    def activation(self, *sizes: int) -> Tensor:
        return self.place(self.random(*sizes))

    def poisoned(self, *sizes: int) -> Tensor:
        return self.place(torch.full(sizes, float("nan")))

    def norm(self, n: int) -> Tensor:
        return self.place(1.0 + 0.1 * self.random(n))

    def optional(self, wanted: bool, *sizes: int) -> Tensor | None:
        return self.activation(*sizes) if wanted else None

    def weight(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] of variance 1 / columns, as a trained layer has; NaN in the gap after each row."""
        values = (self.random(rows, columns) / columns**0.5).to(self.case.dtype)
        if not self.case.row_gap:
            return self.place(values)
        gap = torch.full((rows, self.case.row_gap), float("nan"), dtype=self.case.dtype)
        return self.place(torch.cat([values, gap], dim=1))[:, :columns]

    def positions(self) -> Tensor:
        return self.place(torch.tensor(self.case.pos, dtype=torch.int32))

    def cache(self, readable: bool) -> Tensor:
        """[B, G, S, d], as int8 [B, G, S, d + 4]: NaN, but for the positions that attention reads when `readable`."""
        case = self.case
        cache = torch.full((LINES if case.lines else case.B, case.G, case.S, case.d), float("nan"))
        for line, last in zip(_lines_of(case).tolist(), case.pos if readable else (), strict=False):
            first = max(0, last + 1 - case.window) if case.window else 0
            cache[line, :, first : last + 1] = self.random(case.G, last + 1 - first, case.d)
        return self.place(kv_line.kept_as(cache, case.cache_dtype))

    def line_table(self) -> dict[str, Tensor]:
        lines = self.case.lines
        return {"lines": self.place(torch.tensor(lines, dtype=torch.int32))} if lines else {}

    def rope(self) -> dict[str, Tensor]:
        case = self.case
        inverse = ROPE_THETA ** (-torch.arange(case.d // 2, dtype=torch.float64) / max(case.d // 2, 1))
        angle = torch.arange(case.S, dtype=torch.float64)[:, None] * inverse
        return {"cos": self.place(angle.cos().float()), "sin": self.place(angle.sin().float())}

    def embed(self) -> dict[str, Any]:
        case = self.case
        token = torch.randint(0, case.V, (case.B,), generator=self.generator, dtype=torch.int32)
        token[0], token[-1] = case.V - 1, 0  # both ends of the table
        return {
            "x": self.poisoned(case.B, case.D),
            "token": self.place(token),
            "table": self.weight(case.V, case.D),
        }

    def norm_qkv_rope(self) -> dict[str, Any]:
        case = self.case
        kv_rows = case.G * case.d
        return {
            "q": self.poisoned(case.B, case.H, case.d),
            "k_cache": self.cache(readable=False),
            "v_cache": self.cache(readable=False),
            "x": self.activation(case.B, case.D),
            "norm": self.norm(case.D),
            "wq": self.weight(case.H * case.d, case.D),
            "wk": self.weight(kv_rows, case.D),
            "wv": self.weight(kv_rows, case.D),
            "bq": self.optional(case.bias, case.H * case.d),
            "bk": self.optional(case.bias, kv_rows),
            "bv": self.optional(case.bias, kv_rows),
            "q_norm": self.norm(case.d) if case.head_norm else None,
            "k_norm": self.norm(case.d) if case.head_norm else None,
            **self.rope(),
            "pos": self.positions(),
            "eps": EPS,
            **self.line_table(),
        }

    def attention(self) -> dict[str, Any]:
        case = self.case
        return {
            "out": self.poisoned(case.B, case.H, case.d),
            "q": self.activation(case.B, case.H, case.d),
            "k_cache": self.cache(readable=True),
            "v_cache": self.cache(readable=True),
            "pos": self.positions(),
            "scale": case.d**-0.5,
            "window": case.window,
            **self.line_table(),
        }

    def proj_add(self) -> dict[str, Any]:
        case = self.case
        return {
            "x": self.activation(case.B, case.D),
            "a": self.activation(case.B, case.K),
            "w": self.weight(case.D, case.K),
            "bias": self.optional(case.bias, case.D),
        }

    def norm_gate_up(self) -> dict[str, Any]:
        case = self.case
        return {
            "h": self.poisoned(case.B, case.F),
            "x": self.activation(case.B, case.D),
            "norm": self.norm(case.D),
            "w_gate": self.weight(case.F, case.D),
            "w_up": self.weight(case.F, case.D),
            "b_gate": self.optional(case.bias, case.F),
            "b_up": self.optional(case.bias, case.F),
            "eps": EPS,
        }

    def kv_fill(self) -> dict[str, Any]:
        case = self.case
        kv_rows = case.G * case.d
        layers = [
            FillLayer(
                k_cache=self.cache(readable=False),
                v_cache=self.cache(readable=False),
                norm=self.norm(case.D),
                wk=self.weight(kv_rows, case.D),
                wv=self.weight(kv_rows, case.D),
                bk=self.optional(case.bias, kv_rows),
                bv=self.optional(case.bias, kv_rows),
                k_norm=self.norm(case.d) if case.head_norm else None,
            )
            for _ in range(case.layers)
        ]
        x = self.activation(case.B, case.D)
        places = {**self.rope(), "pos": self.positions(), "eps": EPS, **self.line_table()}
        return {"layers": layers, "x": x, **places}

    def keep_hidden(self) -> dict[str, Any]:
        case = self.case
        kept = (LINES if case.lines else case.B, case.S, case.D)
        return {
            "hidden": self.place(torch.full(kept, float("nan"), dtype=case.dtype)),
            "x": self.activation(case.B, case.D),
            "pos": self.positions(),
            **self.line_table(),
        }

    def norm_logits(self) -> dict[str, Any]:
        case = self.case
        return {
            "logits": self.poisoned(case.B, case.V),
            "x": self.activation(case.B, case.D),
            "norm": self.norm(case.D),
            "w": self.weight(case.V, case.D),
            "eps": EPS,
        }

    def copy_hidden(self) -> dict[str, Any]:
        case = self.case
        return {"out": self.poisoned(case.B, case.D), "x": self.activation(case.B, case.D)}

    def hidden_cosine(self) -> dict[str, Any]:
        """A state and what a layer makes of it: cosines near 0.9. Of unrelated states they would be near 0, and their
        rounding errors not small beside them."""
        case = self.case
        before = self.random(case.B, case.D)
        after = before + 0.5 * self.random(case.B, case.D)
        return {"out": self.poisoned(case.B), "a": self.place(before), "b": self.place(after)}

    def top2_margin(self) -> dict[str, Any]:
        """One token leads clearly in each row, the first and the last among them."""
        case = self.case
        logits = self.random(case.B, case.V)
        for slot in range(case.B):
            logits[slot, (case.V - 1) * slot // max(case.B - 1, 1)] += 8.0
        return {"out": self.poisoned(case.B), "logits": self.place(logits)}


def _spread(batch: int, length: int) -> tuple[int, ...]:
    """Positions of a batch: the first and the last there are, and some between."""
    return tuple((length - 1) * (batch - 1 - slot) // max(batch - 1, 1) for slot in range(batch))


def _both(cases: list[Case]) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in (torch.float32, torch.bfloat16)]


_ANY = torch.float32  # replaced by _both


def _test_cases() -> dict[str, list[Case]]:
    """Awkward on purpose: sizes that no SIMD width or tile divides, single rows, odd counts, strided rows, both ends of
    the cache, chunks of 128 positions (csrc's attention) just full and just over."""

    def embed(name: str, **sizes: Any) -> Case:
        return Case("embed", name, _ANY, **sizes)

    def qkv(name: str, op: str = "norm_qkv_rope", **sizes: Any) -> Case:
        sizes.setdefault("pos", _spread(sizes.get("B", 1), sizes["S"]))
        return Case(op, name, _ANY, **sizes)

    def attention(name: str, **sizes: Any) -> Case:
        return qkv(name, "attention", **sizes)

    def fill(name: str, **sizes: Any) -> Case:
        return qkv(name, "kv_fill", **sizes)

    def keep(name: str, **sizes: Any) -> Case:
        return qkv(name, "keep_hidden", **sizes)

    def proj(name: str, **sizes: Any) -> Case:
        return Case("proj_add", name, _ANY, **sizes)

    def gate(name: str, **sizes: Any) -> Case:
        return Case("norm_gate_up", name, _ANY, **sizes)

    def logits(name: str, **sizes: Any) -> Case:
        return Case("norm_logits", name, _ANY, **sizes)

    def of(op: str, *sizes: tuple[str, dict[str, int]]) -> list[Case]:
        return [Case(op, name, torch.float32, **each) for name, each in sizes]

    states = (
        ("one", dict(D=1)),
        ("odd", dict(D=67, B=3)),
        ("full_batch", dict(D=130, B=16)),
        ("long_rows", dict(D=5003, B=2)),
    )
    return {
        "copy_hidden": of("copy_hidden", *states),
        "hidden_cosine": of("hidden_cosine", *states),
        "top2_margin": of(
            "top2_margin",
            ("one", dict(V=1)),
            ("two", dict(V=2, B=2)),
            ("odd", dict(V=131, B=3)),
            ("full_batch", dict(V=67, B=16)),
            ("chunk_full", dict(V=4096)),
            ("chunk_over", dict(V=4097, B=2)),
            ("many_rows", dict(V=13007, B=3)),
        ),
        "embed": _both(
            [
                embed("one", D=1, V=1),
                embed("odd", D=67, V=13, B=3),
                embed("full_batch", D=64, V=32, B=16),
                embed("gapped", D=33, V=9, B=2, row_gap=7),
            ]
        ),
        "norm_qkv_rope": _both(
            [
                qkv("smallest", D=1, H=1, G=1, d=2, S=1),
                qkv("head_dim6", D=10, H=2, G=1, d=6, S=3, B=3),
                qkv("gqa3", D=72, H=9, G=3, d=8, S=40, pos=(0,)),
                qkv("head_dim64", D=129, H=3, G=1, d=64, S=17, B=2, bias=True),
                qkv("head_dim80", D=97, H=2, G=2, d=80, S=9, B=5),
                qkv("head_dim128", D=130, H=2, G=1, d=128, S=5, B=4, head_norm=True),
                qkv("gqa16", D=31, H=16, G=1, d=2, S=7, B=16, bias=True, head_norm=True),
                qkv("gqa9", D=61, H=9, G=1, d=10, S=70, B=7),
                qkv("gapped", D=45, H=4, G=2, d=16, S=6, B=2, row_gap=3, bias=True),
                qkv("long_rows", D=1000, H=1, G=1, d=4, S=3, head_norm=True),
            ]
        ),
        "attention": _both(
            [
                attention("smallest", H=1, G=1, d=2, S=1),
                attention("first_position", H=3, G=1, d=64, S=50, pos=(0,)),
                attention("chunk_full", H=4, G=2, d=16, S=128),
                attention("chunk_over", H=4, G=2, d=16, S=129),
                attention("gqa3", H=9, G=3, d=64, S=200, B=3),
                attention("gqa9", H=9, G=1, d=6, S=130, B=2),
                attention("gqa16", H=32, G=2, d=80, S=700, B=2, pos=(0, 699)),
                attention("head_dim128", H=2, G=2, d=128, S=300, pos=(257,)),
                attention("head_dim96", H=15, G=3, d=96, S=130, B=2),
                attention("head_dim32", H=11, G=1, d=32, S=259, B=2, pos=(258, 6)),
                attention("head_dim6", H=5, G=5, d=6, S=33, B=16),
                attention("head_dim512", H=2, G=1, d=512, S=70),
                attention("window1", H=3, G=3, d=10, S=140, B=3, window=1),
                attention("window_in_chunk", H=4, G=1, d=20, S=150, B=4, window=17),
                attention("window_over_chunks", H=2, G=1, d=64, S=300, B=2, window=100),
                attention("window_all", H=2, G=1, d=8, S=20, B=2, window=20),
            ]
        ),
        "proj_add": _both(
            [
                proj("one", D=1, K=1),
                proj("odd", D=7, K=67),
                proj("pairs", D=6, K=66, B=2),
                proj("triple", D=33, K=130, B=3, bias=True),
                proj("tile_and_rest", D=19, K=129, B=5),
                proj("two_tiles", D=5, K=31, B=8),
                proj("fifteen", D=9, K=4, B=15, bias=True),
                proj("full_batch", D=12, K=200, B=16),
                proj("gapped", D=11, K=45, B=6, row_gap=5),
                proj("long_rows", D=3, K=5003),
                proj("longer_than_L1_holds", D=21, K=3136, bias=True),
                proj("gapped_long_rows", D=10, K=4160, row_gap=5),
                proj("many_rows", D=701, K=40, B=7, bias=True),
            ]
        ),
        "norm_gate_up": _both(
            [
                gate("one", D=1, F=1),
                gate("odd", D=67, F=65, bias=True),
                gate("block_full", D=32, F=128, B=2),
                gate("block_over", D=33, F=129, B=3),
                gate("tile_and_rest", D=50, F=31, B=5, bias=True),
                gate("full_batch", D=70, F=77, B=16),
                gate("gapped", D=45, F=19, B=4, row_gap=9),
                gate("long_rows", D=1100, F=67),
                gate("pairs", D=128, F=70, bias=True),
                gate("longer_than_L1_holds", D=3200, F=39, bias=True),
            ]
        ),
        "kv_fill": _both(
            [
                fill("one_layer", D=10, G=1, d=2, S=1, layers=1),
                fill("three_layers", D=67, G=3, d=64, S=20, B=2, layers=3),
                fill("head_dim6", D=33, G=1, d=6, S=9, B=5, layers=2, bias=True, head_norm=True),
                fill("head_dim80", D=45, G=2, d=80, S=4, B=3, layers=4, row_gap=5),
                fill("full_batch", D=29, G=2, d=10, S=17, B=16, layers=5, head_norm=True),
                fill("head_dim128", D=130, G=1, d=128, S=8, pos=(0,), layers=7, bias=True),
            ]
        ),
        "keep_hidden": _both(
            [
                keep("one", D=1, S=1),
                keep("odd", D=67, S=5, B=3),
                keep("full_batch", D=576, S=40, B=16),
            ]
        ),
        "norm_logits": _both(
            [
                logits("one", D=1, V=1),
                logits("odd", D=67, V=131),
                logits("triple", D=130, V=77, B=3),
                logits("tile_and_rest", D=64, V=33, B=6),
                logits("full_batch", D=35, V=101, B=16),
                logits("gapped", D=45, V=19, B=2, row_gap=3),
                logits("many_rows", D=80, V=2003),
            ]
        ),
    }


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a published model, for timing."""

    name: str
    D: int
    H: int
    G: int
    d: int
    F: int
    V: int


MODEL_SHAPES = (
    ModelShape("SmolLM2-135M", D=576, H=9, G=3, d=64, F=1536, V=49152),
    ModelShape("Llama-3.2-1B", D=2048, H=32, G=8, d=64, F=8192, V=32000),
    ModelShape("Llama-2-7B", D=4096, H=32, G=32, d=128, F=11008, V=32000),
)
TIMED_BATCHES = (1, 4, 16)
TIMED_LENGTH = 1024  # positions in the cache; attention reads all of them
TIMED_FILL_LAYERS = 4


def _timed_cases() -> dict[str, list[Case]]:
    """What a decode step of each model runs, by op."""
    cases: dict[str, list[Case]] = {op: [] for op in ALL_OPS}
    for m in MODEL_SHAPES:
        for B in TIMED_BATCHES:
            cached = {"S": TIMED_LENGTH, "pos": (TIMED_LENGTH - 1,) * B}
            heads = {"H": m.H, "G": m.G, "d": m.d}
            of_model = [
                Case("embed", m.name, _ANY, B=B, D=m.D, V=m.V),
                Case("norm_qkv_rope", m.name, _ANY, B=B, D=m.D, **heads, **cached),
                Case("attention", m.name, _ANY, B=B, **heads, **cached),
                Case("proj_add", f"{m.name}-o_proj", _ANY, B=B, D=m.D, K=m.H * m.d),
                Case("proj_add", f"{m.name}-down_proj", _ANY, B=B, D=m.D, K=m.F),
                Case("norm_gate_up", m.name, _ANY, B=B, D=m.D, F=m.F),
                Case("kv_fill", m.name, _ANY, B=B, D=m.D, G=m.G, d=m.d, layers=TIMED_FILL_LAYERS, **cached),
                Case("keep_hidden", m.name, _ANY, B=B, D=m.D, **cached),
                Case("norm_logits", m.name, _ANY, B=B, D=m.D, V=m.V),
            ]
            for case in of_model:
                cases[case.op] += _both([case])
            for op in ("copy_hidden", "hidden_cosine"):
                cases[op].append(Case(op, m.name, torch.float32, B=B, D=m.D))
            cases["top2_margin"].append(Case("top2_margin", m.name, torch.float32, B=B, V=m.V))
            cases["attention"].append(
                Case("attention", m.name, torch.float32, B=B, int8_cache=True, **heads, **cached)
            )
    return cases


# Of the shapes above, those whose lines are awkward: any length, so that most begin at odd addresses.
_INT8_CACHE_SHAPES = {
    "norm_qkv_rope": "smallest head_dim6 gqa3 head_dim80 head_dim128 gqa16 gapped",
    "attention": "smallest first_position chunk_over gqa9 gqa16 head_dim128 head_dim6 window1 window_in_chunk "
    "window_over_chunks",
    "kv_fill": "one_layer head_dim6 head_dim80 full_batch",
}


def _int8_cache_cases() -> dict[str, list[Case]]:
    cases = {
        op: [replace(case, int8_cache=True) for case in TEST_CASES[op] if case.name in names.split()]
        for op, names in _INT8_CACHE_SHAPES.items()
    }
    # Attention has no weights, and rotates nothing: its head_dim may be odd.
    cases["attention"] = [case for case in cases["attention"] if case.dtype == torch.float32] + [
        Case(
            *("attention", f"head_dim{d}", torch.float32),
            **dict(B=2, H=6, G=2, d=d, S=70, pos=(69, 3), int8_cache=True),
        )
        for d in (1, 7, 67)
    ]
    return cases


# Of the shapes above, those with several slots: here on lines of a larger cache, in no order.
_LINE_SHAPES = {
    "norm_qkv_rope": "head_dim6 head_dim64 gqa16",
    "attention": "gqa3 gqa16 window_in_chunk",
    "kv_fill": "three_layers full_batch",
    "keep_hidden": "one odd full_batch",
}


def _line_cases() -> dict[str, list[Case]]:
    return {
        op: [
            replace(case, lines=tuple((7 * slot + 5) % LINES for slot in range(case.B)))
            for case in TEST_CASES[op]
            if case.name in names.split()
        ]
        for op, names in _LINE_SHAPES.items()
    }


TEST_CASES: dict[str, list[Case]] = _test_cases()
INT8_CACHE_CASES: dict[str, list[Case]] = _int8_cache_cases()
LINE_CASES: dict[str, list[Case]] = _line_cases()
TIMED_CASES: dict[str, list[Case]] = _timed_cases()
