"""What a policy is, the pure rule (step, num_layers) -> retained layers, and the schedule of its answers.

A policy holds parameters and nothing else: no model, no state, no randomness. That is why a schedule can be
computed before the first token, each distinct set recorded once, and whether skipped K,V will ever be read
decided up front. Policies are frozen dataclasses, found by `name`, and written three ways that read back
equal: `repr` (Python), `str` (command line) and JSON. A new policy is one new file; this one does not change.
What a given rule is, is up to the file that bears its name; reading the command line form is up to
policies/__init__.py.
"""

from __future__ import annotations

import json
import math
import operator
import os
import typing
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet, Plan, format_ranges, layers_of_mask, parse_ranges

PROMPTS = ("full", "skipped")
KV_FILLS = ("auto", "eager", "deferred", "recompute")

_registry: dict[str, type[Policy]] = {}


def known_policies() -> dict[str, type[Policy]]:
    """Every policy class by name, in alphabetical order."""
    return dict(sorted(_registry.items()))


class Policy(ABC):
    """The rule by which a decode step's layers are chosen. Subclasses are frozen dataclasses.

    A subclass gives itself a `name` (its key in JSON and on the command line) and answers `layer_set`; it
    checks its own parameters in `__post_init__` and the model's size in `validate`.

    `prompt` says which layers the prefill runs: "full" (all of them) or "skipped" (the set of step 0).
    """

    name: ClassVar[str]
    prompt = "full"
    short_names: ClassVar[dict[str, str]] = {}
    """Command line name -> field, for fields that are called otherwise there."""
    makers: ClassVar[tuple[str, ...]] = ()
    """Class methods that the command line may call, as in "d3.paper:task=gsm8k"."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        name = cls.__dict__.get("name")
        if name is None:
            return
        taken = _registry.get(name)
        # The same class again (a reloaded module) replaces itself; another would change what files mean.
        if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PolicyError(
                f"policy name {name!r} of {cls.__qualname__} is taken by {taken.__qualname__}; choose "
                "another."
            )
        _registry[name] = cls

    @abstractmethod
    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        """The sublayers retained at `step` (0, 1, ...) of a model of `num_layers` layers.

        The rule's own answer, for step 0 too; which layers the prefill really runs is `prompt_set`.
        """

    def validate(self, num_layers: int) -> None:
        """PolicyError when this policy cannot serve a model of `num_layers` layers."""
        if check_integer("validate", "num_layers", num_layers) < 1:
            raise PolicyError(f"validate(num_layers={num_layers}): a model has at least 1 layer.")

    def prompt_set(self, num_layers: int) -> LayerSet:
        """The sublayers that the prefill runs; token 0 comes from it."""
        return LayerSet.full(num_layers) if self.prompt == "full" else self.layer_set(0, num_layers)

    def retained(self, step: int, num_layers: int) -> tuple[int, ...]:
        """`layer_set` as ascending indices of the layers in which at least one sublayer runs."""
        self.validate(num_layers)
        return self.layer_set(step, num_layers).layers

    def plan(self, step: int, num_layers: int, fill: Iterable[int] = ()) -> Plan:
        """The plan of one step (of the prefill for step 0), filling the K,V of the layers in `fill`."""
        self.validate(num_layers)
        layer_set = self.layer_set(step, num_layers) if step else self.prompt_set(num_layers)
        return Plan.of(layer_set, fill)

    def schedule(self, num_layers: int, num_steps: int, first: int = 0) -> Schedule:
        """The answers for steps 0..num_steps-1 (num_steps >= 1, the prefill's step included).

        first: a schedule that goes on where an earlier one of `first` steps ended: step 0 is again a prefill's, and
        after it come the rule's steps first + 1, first + 2, ...
        """
        self.validate(num_layers)
        if check_integer("schedule", "num_steps", num_steps) < 1:
            raise PolicyError(
                f"schedule(num_steps={num_steps}): step 0 is the prefill, so it must be at least 1."
            )
        # Equal sets become one object: there are few distinct ones, and identity is quick to compare.
        same: dict[LayerSet, LayerSet] = {}
        if check_integer("schedule", "first", first) < 0:
            raise PolicyError(f"schedule(first={first}): it counts steps, so it must be at least 0.")
        steps = (0, *range(first + 1, first + num_steps))
        sets = (self.layer_set(step, num_layers) for step in steps)
        return Schedule(self, num_layers, tuple(same.setdefault(each, each) for each in sets))

    @classmethod
    def _fields(cls) -> tuple[Field, ...]:
        if not is_dataclass(cls):
            raise PolicyError(f"{cls.__qualname__} is not a dataclass; a policy is a frozen dataclass.")
        return fields(cls)

    def to_dict(self) -> dict[str, Any]:
        """Name and every field, in types that JSON knows (tuples as lists)."""
        if getattr(type(self), "name", None) is None:
            raise PolicyError(
                f"{type(self).__qualname__} has no name, so no file could name it; give it a `name`."
            )
        values = {field.name: _listed(getattr(self, field.name)) for field in self._fields()}
        return {"name": self.name} | values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Policy:
        """The policy that `to_dict` wrote. PolicyError for an unknown name or field, or a missing one."""
        if not isinstance(values, dict) or "name" not in values:
            raise PolicyError(
                f"policy {values!r}: a policy is an object with a name, such as {dict(name='full')}."
            )
        kind = find_policy(values["name"])
        if not issubclass(kind, cls):
            raise PolicyError(
                f"{cls.__name__}.from_dict: this is a {kind.__name__}; read it with Policy.from_dict."
            )
        return kind.from_fields({name: value for name, value in values.items() if name != "name"})

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> Policy:
        """Builds this class from its fields; PolicyError names a field that is unknown or missing."""
        known = {field.name: field for field in cls._fields()}
        for name in values:
            if name not in known:
                raise PolicyError(f"policy {cls.name!r} has no field {name!r}; {_list_fields(known)}.")
        required = [name for name, field in known.items() if _is_required(field)]
        missing = [name for name in required if name not in values]
        if missing:
            raise PolicyError(
                f"policy {cls.name!r} lacks {' and '.join(missing)}; it must have {' and '.join(required)}."
            )
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON text that ends in a newline."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The policy that `to_json` wrote."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise PolicyError(f"policy text is not JSON: {error}.") from error
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json` to `path`, all or nothing: a reader sees the old file or the new one.

        OSError when the folder cannot be written to.
        """
        path = Path(path)
        text = self.to_json()
        # Beside the target, since only a rename within one file system is atomic.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """The policy in the file `path`; PolicyError, naming the file, when there is none."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"policy file {os.fspath(path)!r} cannot be read: {error}.") from error
        except PolicyError as error:
            raise PolicyError(f"policy file {os.fspath(path)!r}: {error}") from error

    def __str__(self) -> str:
        """The command line form, which policies.parse reads back; fields at their default are left out."""
        short = {field: text for text, field in self.short_names.items()}
        hints = typing.get_type_hints(type(self))
        parts = []
        for field in self._fields():
            value = getattr(self, field.name)
            if value != field.default:
                form = TEXT_FORMS.get(hints[field.name])
                parts.append(f"{short.get(field.name, field.name)}={form.write(value) if form else value}")
        name = getattr(self, "name", type(self).__name__)
        return f"{name}:{','.join(parts)}" if parts else name


@dataclass(frozen=True)
class Schedule:
    """A policy's answers for steps 0..N-1 on a model of `num_layers` layers: one `LayerSet` each.

    `sets[0]` is the rule's answer for step 0, which the averages of the papers count in; the prefill runs it
    only if the policy's prompt is "skipped", and all layers otherwise (`prompt_set`).

    PolicyError when a step would attend in a layer that the prompt skipped: no fill can make up for the whole
    prompt's K,V.
    """

    policy: Policy
    num_layers: int
    sets: tuple[LayerSet, ...]

    def __post_init__(self) -> None:
        if self.policy.prompt == "full":
            return
        absent = ~self.sets[0].attention
        for step, layer_set in enumerate(self.sets):
            if layer_set.attention & absent:
                holes = format_ranges(layers_of_mask(layer_set.attention & absent))
                raise PolicyError(
                    f"{type(self.policy).__name__}(prompt={self.policy.prompt!r}): step {step} runs the "
                    f"attention of layers {holes}, which the prompt skipped, so it would read K,V that does "
                    "not exist; use prompt='full', or retain these layers at step 0."
                )

    @property
    def prompt_set(self) -> LayerSet:
        """The sublayers that the prefill runs."""
        return LayerSet.full(self.num_layers) if self.policy.prompt == "full" else self.sets[0]

    @property
    def depths(self) -> tuple[int | float, ...]:
        """Retained layers of each step."""
        depth = {layer_set: layer_set.depth for layer_set in self.distinct}
        return tuple(depth[layer_set] for layer_set in self.sets)

    @property
    def mean_depth(self) -> float:
        """Retained layers, averaged over the steps."""
        return sum(self.depths) / len(self.sets)

    @property
    def nested(self) -> bool:
        """Whether each decode step's set is a subset of the one before; for step 1 that is the prefill's.

        Then K,V that a step skipped is never read in this generation.
        """
        before = self.prompt_set
        for layer_set in self.sets[1:]:
            if layer_set is not before:
                if not layer_set <= before:
                    return False
                before = layer_set
        return True

    @property
    def distinct(self) -> tuple[LayerSet, ...]:
        """The different sets, in order of first use."""
        return tuple(dict.fromkeys(self.sets))

    def plans(self, kv_fill: str = "auto") -> tuple[Plan, ...]:
        """The plan of every step; index 0 is the prefill's, which never fills. Equal plans are one object.

        kv_fill "auto" and "recompute": a step fills each layer whose attention it skips and a later step of this
        schedule runs; so a nested schedule never fills. "eager": every decode step fills every layer whose attention
        it skips, which keeps the K,V whole for what comes after this schedule. "deferred": a step fills as under
        "auto", and keeps the hidden state for the other layers. In none is anything done for a layer that the prompt
        skipped: its K,V would stay incomplete, so nothing could ever read it.

        PolicyError for any other kv_fill.
        """
        if kv_fill not in KV_FILLS:
            raise PolicyError(f"kv_fill={kv_fill!r}: plans are made for {' or '.join(map(repr, KV_FILLS))}.")
        in_prompt = self.prompt_set.attention
        wanted = in_prompt if kv_fill == "eager" else 0
        kept = in_prompt if kv_fill == "deferred" else 0
        known: dict[tuple[LayerSet, int], Plan] = {}
        plans = []
        # Backwards, so that what later steps attend to is known when a step is reached.
        last, last_fill, plan = None, 0, None
        for layer_set in reversed(self.sets[1:]):
            fill = wanted & ~layer_set.attention
            if layer_set is not last or fill != last_fill:  # most steps are like the one after them
                last, last_fill = layer_set, fill
                plan = known.get((layer_set, fill)) or _plan(layer_set, fill, kept)
                known[layer_set, fill] = plan
            plans.append(plan)
            wanted |= layer_set.attention
        first = self.prompt_set, 0
        plans.append(known[first] if first in known else Plan.of(self.prompt_set))
        return tuple(reversed(plans))

    def every_plan(self, kv_fill: str = "auto") -> tuple[Plan, ...]:
        """The different plans of the decode steps of this schedule and of every shorter one of the same policy.

        But under "eager" these are more than `plans` has: what a step fills depends on how many steps follow.
        """
        if kv_fill == "eager":
            return tuple(dict.fromkeys(self.plans(kv_fill)[1:]))
        kept = self.prompt_set.attention if kv_fill == "deferred" else 0
        known: dict[tuple[LayerSet, int], None] = {}
        # What the steps that follow attend to, for each number of them: a growing chain, so at most L + 1.
        wanted = {0}
        for layer_set in reversed(self.sets[1:]):
            known.update(dict.fromkeys((layer_set, layers & ~layer_set.attention) for layers in wanted))
            wanted = {0} | {layers | layer_set.attention for layers in wanted}
        return tuple(_plan(layer_set, fill, kept) for layer_set, fill in known)

    @property
    def fill_words(self) -> str:
        """When K,V of skipped layers is written under "auto", for people."""
        filling = sum(bool(plan.fill_layers) for plan in self.plans())
        return f"filled at {filling} steps" if filling else "never read again, so never filled"

    def table(self) -> str:
        """Runs of equal steps, one a line: "steps 1-9: 31 layers 0-15,17-31"."""
        return "\n".join(self._rows())

    def _rows(self) -> Iterator[str]:
        yield f"step 0 (prefill): {_layers(self.prompt_set)}"
        step = 1
        for layer_set, run in groupby(self.sets[1:]):
            last = step + sum(1 for _ in run) - 1
            yield f"{f'step {step}' if step == last else f'steps {step}-{last}'}: {_layers(layer_set)}"
            step = last + 1

    def __str__(self) -> str:
        return (
            f"{self.policy} on {self.num_layers} layers, {len(self.sets)} steps: mean depth "
            f"{self.mean_depth:.3f}, {len(self.distinct)} distinct sets, "
            f"{'nested' if self.nested else 'not nested'}\n{self.table()}"
        )


def _plan(layer_set: LayerSet, fill: int, kept: int) -> Plan:
    """The plan that fills the layers of a mask, and keeps for those of another that it neither runs nor fills."""
    return Plan.of(layer_set, layers_of_mask(fill), layers_of_mask(kept & ~fill & ~layer_set.attention))


def _layers(layer_set: LayerSet) -> str:
    return f"{layer_set.depth} layer{'' if layer_set.depth == 1 else 's'} {layer_set}"


def find_policy(name: str) -> type[Policy]:
    """The policy class of that name; PolicyError lists those that exist."""
    if not isinstance(name, str) or name not in _registry:
        raise PolicyError(f"unknown policy {name!r}; there are: {', '.join(known_policies())}.")
    return _registry[name]


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _list_fields(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f"its fields are: {listed}" if listed else "it has no fields"


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


# ---- checks that the policies share: `owner` is the policy class's name, `name` the field ----


def check_real(owner: str, name: str, value: Any) -> float:
    """`value` as a finite float; PolicyError when it is not a number."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise PolicyError(f"{owner}({name}={value!r}): {name} must be a number.") from None
    if not math.isfinite(number):
        raise PolicyError(f"{owner}({name}={value!r}): {name} must be a finite number.")
    return number


def check_integer(owner: str, name: str, value: Any) -> int:
    """`value` as an int; PolicyError when it is not an integer (True and 2.0 are not)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise PolicyError(f"{owner}({name}={value!r}): {name} must be an integer.") from None


def check_choice(owner: str, name: str, value: Any, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`; PolicyError lists them."""
    choices = tuple(choices)
    if value not in choices:
        raise PolicyError(
            f"{owner}({name}={value!r}): {name} must be one of {', '.join(map(repr, choices))}."
        )
    return value


def check_layers(owner: str, name: str, value: Any) -> tuple[int, ...]:
    """`value` as an ascending tuple of layer indices; PolicyError for a negative or repeated one."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise PolicyError(f"{owner}({name}={value!r}): {name} must be a sequence of layer indices.")
    layers = sorted(check_integer(owner, name, layer) for layer in value)
    if layers and layers[0] < 0:
        raise PolicyError(
            f"{owner}({name}=...): layer {layers[0]} is negative; layers count from 0, from the bottom."
        )
    for layer, following in zip(layers, layers[1:], strict=False):
        if layer == following:
            raise PolicyError(f"{owner}({name}=...): layer {layer} is named twice; name each layer once.")
    return tuple(layers)


def check_step(step: int) -> None:
    """PolicyError for a step below 0."""
    if step < 0:
        raise PolicyError(
            f"step {step}: steps count generated tokens from 0 (the prefill's), so it must be >= 0."
        )


# ---- how a field is written on a command line, by its type ----


class TextForm(typing.NamedTuple):
    """Reads a field from text (ValueError if it cannot) and writes it so that it reads back equal."""

    read: Callable[[str], Any]
    write: Callable[[Any], str]
    what: str


def _read_flag(text: str) -> bool:
    return {"true": True, "false": False}[text]


# Commas part fields on a command line, so layer ranges are joined by "+", and the sets of a list by "/".
_LAYERS = TextForm(parse_ranges, lambda layers: format_ranges(layers, "+"), "layer ranges such as 0-15+29-31")
_SETS = TextForm(
    lambda text: tuple(parse_ranges(part) for part in text.split("/")),
    lambda sets: "/".join(_LAYERS.write(layers) for layers in sets),
    "layer ranges, a step each, such as 0-31/0-15+29-31",
)
TEXT_FORMS: dict[Any, TextForm] = {
    float: TextForm(float, lambda number: repr(number).removesuffix(".0"), "a number"),
    int: TextForm(int, str, "an integer"),
    bool: TextForm(_read_flag, lambda flag: "true" if flag else "false", "true or false"),
    str: TextForm(str, str, "a word"),
    tuple[int, ...]: _LAYERS,
    tuple[int, ...] | None: _LAYERS,
    Iterable[int]: _LAYERS,
    tuple[tuple[int, ...], ...]: _SETS,
}
