"""Layer sets and plans: which sublayers a step runs, and what happens at each sublayer.

A `LayerSet` is a policy's answer for one step; a `Plan` adds what becomes of the K,V of the skipped attention
sublayers, and is the key under which a step is recorded. Both are small immutable values: a set is two
integers, so comparing thousands of steps costs next to nothing. Attention and MLP have a bit each because
there are methods that skip them apart. Which set a step gets is up to policies/; running a plan is up to the
decoder.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from d3rt.errors import PolicyError


def layers_of_mask(mask: int) -> tuple[int, ...]:
    """The indices of the bits that are set in `mask` (>= 0), ascending."""
    layers = []
    while mask:
        lowest = mask & -mask
        layers.append(lowest.bit_length() - 1)
        mask ^= lowest
    return tuple(layers)


def format_ranges(layers: Iterable[int], separator: str = ",") -> str:
    """Ascending layer indices as compact ranges: (0, 1, 2, 5) -> "0-2,5"; no layer at all -> "none"."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return separator.join(str(low) if low == high else f"{low}-{high}" for low, high in ranges) or "none"


def parse_ranges(text: str) -> tuple[int, ...]:
    """Reads what `format_ranges` writes; parts are separated by "+" or ",". PolicyError on anything else."""
    if text.strip() == "none":
        return ()
    layers: list[int] = []
    for part in text.replace("+", ",").split(","):
        low, dash, high = part.strip().partition("-")
        # isdecimal alone would also accept the digits of other scripts.
        if not (low.isascii() and low.isdecimal()) or (dash and not (high.isascii() and high.isdecimal())):
            raise PolicyError(
                f"layer ranges {text!r}: {part!r} is no index and no range; write 0-15+29-31, for example, "
                "or none."
            )
        first, last = int(low), int(high or low)
        if last < first:
            raise PolicyError(
                f"layer ranges {text!r}: the range {part!r} runs backwards; write {last}-{first}."
            )
        # A slip of the finger must not fill the memory before anyone can say that the model is smaller.
        if last > 9999:
            raise PolicyError(
                f"layer ranges {text!r}: no model has a layer {last}; the highest index is 9999."
            )
        layers.extend(range(first, last + 1))
    return tuple(layers)


def _checked_num_layers(num_layers: int) -> int:
    try:
        count = operator.index(num_layers)
    except TypeError:
        raise PolicyError(f"num_layers={num_layers!r}: the number of layers must be an integer.") from None
    if count < 1:
        raise PolicyError(f"num_layers={count}: a model has at least 1 layer.")
    return count


def _mask(layers: Iterable[int], num_layers: int, what: str) -> int:
    """The bit mask of `layers`; refuses what is no index, out of range or named twice."""
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise PolicyError(
            f"{what} {layers!r}: give layer indices as a sequence of integers, such as (0, 1, 31)."
        )
    mask = 0
    for layer in layers:
        try:
            index = operator.index(layer)
        except TypeError:
            raise PolicyError(f"{what} {layer!r}: a layer index must be an integer.") from None
        if not 0 <= index < num_layers:
            raise PolicyError(
                f"{what} {index}: this model has {num_layers} layers, so an index must be in "
                f"0..{num_layers - 1}."
            )
        if mask >> index & 1:
            raise PolicyError(f"{what} {index} is named twice; name each layer once.")
        mask |= 1 << index
    return mask


@dataclass(frozen=True, slots=True, repr=False)
class LayerSet:
    """The sublayers that a step runs: bit l of `attention` and `mlp` says whether layer l runs that one.

    `a <= b` means that every sublayer in a is in b. PolicyError when a bit lies outside the model, when
    num_layers < 1, or when nothing at all would run.
    """

    num_layers: int
    attention: int
    mlp: int

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise PolicyError(f"LayerSet(num_layers={self.num_layers}): a model has at least 1 layer.")
        for what, mask in (("attention", self.attention), ("mlp", self.mlp)):
            if mask < 0 or mask >> self.num_layers:
                raise PolicyError(
                    f"LayerSet({what}={mask:#b}): a mask has one bit for each of the {self.num_layers} "
                    f"layers, so it must be in 0..2**{self.num_layers} - 1."
                )
        if not self.attention | self.mlp:
            raise PolicyError(
                f"LayerSet of {self.num_layers} layers retains none: at least one sublayer must run; retain "
                "a layer."
            )

    @classmethod
    def full(cls, num_layers: int) -> LayerSet:
        """Every sublayer of a model of num_layers layers."""
        num_layers = _checked_num_layers(num_layers)
        mask = (1 << num_layers) - 1
        return cls(num_layers, mask, mask)

    @classmethod
    def of(cls, layers: Iterable[int], num_layers: int) -> LayerSet:
        """Whole layers, by index, in any order; PolicyError for an index out of range or named twice."""
        num_layers = _checked_num_layers(num_layers)
        mask = _mask(layers, num_layers, "layer")
        return cls(num_layers, mask, mask)

    @classmethod
    def of_sublayers(cls, attention: Iterable[int], mlp: Iterable[int], num_layers: int) -> LayerSet:
        """The attention and the MLP sublayers apart, each by layer index."""
        num_layers = _checked_num_layers(num_layers)
        return cls(
            num_layers, _mask(attention, num_layers, "attention layer"), _mask(mlp, num_layers, "mlp layer")
        )

    @classmethod
    def except_window(cls, start: int, stop: int, num_layers: int) -> LayerSet:
        """Every layer but those in [start, stop); nothing is left out where stop <= start."""
        mask = (1 << num_layers) - 1
        if stop > start:
            mask &= ~(((1 << (stop - start)) - 1) << start)
        return cls(num_layers, mask, mask)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers in which at least one sublayer runs, ascending."""
        return layers_of_mask(self.attention | self.mlp)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers whose attention runs, ascending."""
        return layers_of_mask(self.attention)

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """The layers whose MLP runs, ascending."""
        return layers_of_mask(self.mlp)

    @property
    def depth(self) -> int | float:
        """Retained layers; each sublayer counts one half where attention and MLP differ (then a float)."""
        if self.attention == self.mlp:
            return self.attention.bit_count()
        return (self.attention.bit_count() + self.mlp.bit_count()) / 2

    @property
    def is_full(self) -> bool:
        """Whether every sublayer runs."""
        return self.attention == self.mlp == (1 << self.num_layers) - 1

    def __le__(self, other: LayerSet) -> bool:
        if not isinstance(other, LayerSet):
            return NotImplemented
        if self.num_layers != other.num_layers:
            raise PolicyError(
                f"layer sets of {self.num_layers} and of {other.num_layers} layers: only sets of one model "
                "compare."
            )
        return not (self.attention & ~other.attention or self.mlp & ~other.mlp)

    def __str__(self) -> str:
        if self.attention == self.mlp:
            return format_ranges(self.layers)
        return f"attention {format_ranges(self.attention_layers)}; mlp {format_ranges(self.mlp_layers)}"

    def __repr__(self) -> str:
        if self.is_full:
            return f"LayerSet.full({self.num_layers})"
        if self.attention == self.mlp:
            return f"LayerSet.of({self.layers}, {self.num_layers})"
        return f"LayerSet.of_sublayers({self.attention_layers}, {self.mlp_layers}, {self.num_layers})"


class Action(enum.Enum):
    """What a step does at a sublayer."""

    RUN = "run"
    """Compute it."""
    FILL = "fill"
    """Attention only: do not compute it, but write its K,V from the last computed hidden state."""
    KEEP = "keep"
    """Attention only: do not compute it, but keep that hidden state, from which its K,V can be written later."""
    SKIP = "skip"
    """Do nothing; an attention sublayer leaves a hole at this position."""

    # A plan is a dictionary key of 2L actions; enum's own hash runs Python code for each of them.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """One step's action for each sublayer, by layer. Hashable: the key under which a step is recorded.

    Iterating yields (layer, attention action, mlp action). PolicyError when the two tuples differ in length,
    when an MLP is to be filled (it has no K,V), or when nothing runs.
    """

    attention: tuple[Action, ...]
    mlp: tuple[Action, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", tuple(self.attention))
        object.__setattr__(self, "mlp", tuple(self.mlp))
        for what, actions in (("attention", self.attention), ("mlp", self.mlp)):
            for layer, action in enumerate(actions):
                if not isinstance(action, Action):
                    raise PolicyError(f"Plan: {what} of layer {layer} is {action!r}, which is not an Action.")
        if len(self.attention) != len(self.mlp):
            raise PolicyError(
                f"Plan: {len(self.attention)} attention actions and {len(self.mlp)} mlp actions; a plan has "
                "one of each for every layer."
            )
        for layer, action in enumerate(self.mlp):
            if action in (Action.FILL, Action.KEEP):
                raise PolicyError(
                    f"Plan: mlp of layer {layer} is {action.name}, but an MLP has no K,V; use RUN or SKIP."
                )
        if Action.RUN not in self.attention and Action.RUN not in self.mlp:
            raise PolicyError("Plan: no sublayer runs; at least one must.")

    @classmethod
    def of(cls, layer_set: LayerSet, fill: Iterable[int] = (), keep: Iterable[int] = ()) -> Plan:
        """Runs `layer_set`, fills the K,V of the layers in `fill`, keeps the hidden state for those in `keep`, skips
        the rest.

        PolicyError for a layer in `fill` or `keep` that does not exist, or is in both, or whose attention runs and so
        writes K,V.
        """
        filled = _mask(fill, layer_set.num_layers, "fill layer")
        kept = _mask(keep, layer_set.num_layers, "keep layer")
        return cls._of_masks(layer_set, filled, kept)

    @classmethod
    def _of_masks(cls, layer_set: LayerSet, filled: int, kept: int) -> Plan:
        if both := (filled | kept) & layer_set.attention:
            raise PolicyError(
                f"Plan: layers {format_ranges(layers_of_mask(both))} are to be filled, but their attention "
                "runs and writes their K,V itself; fill only layers whose attention is skipped."
            )
        if both := filled & kept:
            raise PolicyError(
                f"Plan: layers {format_ranges(layers_of_mask(both))} are to be filled now and later; choose one."
            )
        run, skip = Action.RUN, Action.SKIP
        layers = range(layer_set.num_layers)
        absent = (Action.FILL if filled >> n & 1 else Action.KEEP if kept >> n & 1 else skip for n in layers)
        return cls(
            tuple(
                run if layer_set.attention >> n & 1 else other
                for n, other in zip(layers, absent, strict=True)
            ),
            tuple(run if layer_set.mlp >> n & 1 else skip for n in layers),
        )

    def __iter__(self) -> Iterator[tuple[int, Action, Action]]:
        return zip(range(len(self.attention)), self.attention, self.mlp, strict=True)

    @property
    def num_layers(self) -> int:
        """Layers of the model, run or not."""
        return len(self.attention)

    @property
    def layer_set(self) -> LayerSet:
        """The sublayers that run."""
        return LayerSet.of_sublayers(
            (layer for layer, action, _ in self if action is Action.RUN),
            (layer for layer, _, action in self if action is Action.RUN),
            self.num_layers,
        )

    @property
    def fill_layers(self) -> tuple[int, ...]:
        """The layers whose K,V is filled, ascending."""
        return tuple(layer for layer, action, _ in self if action is Action.FILL)

    @property
    def keep_layers(self) -> tuple[int, ...]:
        """The layers for whose K,V a hidden state is kept, ascending."""
        return tuple(layer for layer, action, _ in self if action is Action.KEEP)

    @property
    def gaps(self) -> tuple[int | None, ...]:
        """Of each layer the number of its gap, None for layers that keep nothing. Layers of one gap have the same
        hidden state in front of them: between two of them no sublayer runs."""
        numbers: list[int | None] = []
        gap, changed = -1, True
        for _, attention, mlp in self:
            if attention is Action.RUN:
                changed = True
            if attention is Action.KEEP and changed:
                gap, changed = gap + 1, False
            numbers.append(gap if attention is Action.KEEP else None)
            changed |= mlp is Action.RUN
        return tuple(numbers)

    @property
    def num_gaps(self) -> int:
        """Hidden states that one step keeps."""
        return max((gap for gap in self.gaps if gap is not None), default=-1) + 1

    def __str__(self) -> str:
        fill, keep = self.fill_layers, self.keep_layers
        text = f"run {self.layer_set}" + (f"; fill {format_ranges(fill)}" if fill else "")
        return text + (f"; keep for {format_ranges(keep)}" if keep else "")

    def __repr__(self) -> str:
        parts = [("fill", self.fill_layers), ("keep", self.keep_layers)]
        return f"Plan.of({self.layer_set!r}" + "".join(f", {name}={at}" for name, at in parts if at) + ")"
