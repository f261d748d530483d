"""The policies, and `parse`, which reads one from a line of text.

    full                                          every layer
    d3:alpha=0.999,start=0.5                      name:field=value,...
    d3.paper:task=gsm8k,num_layers=32             name.maker:..., a class method that picks the fields
    static:layers=0-15+29-31,prompt=skipped       layers are ranges, joined by "+"
    schedule:sets=0-31/0-15+29-31,cycle=true      lists of sets are joined by "/"
    run/policy.json                               a file that Policy.save wrote

`str(policy)` writes this form. It is what a command line and a log line need; JSON is the form to keep.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable
from typing import Any

from d3rt.errors import PolicyError
from d3rt.plan import Action, LayerSet, Plan
from d3rt.policies.base import TEXT_FORMS, Policy, Schedule, check_integer, find_policy, known_policies
from d3rt.policies.calm import CALM
from d3rt.policies.d3 import D3
from d3rt.policies.early_exit import EarlyExit, ExitSchedule
from d3rt.policies.full_depth import FullDepth
from d3rt.policies.layer_schedule import LayerSchedule
from d3rt.policies.skip_decode import SkipDecode
from d3rt.policies.static_layers import StaticLayers
from d3rt.policies.unified_skip import UnifiedSkip

__all__ = [
    "Action",
    "CALM",
    "D3",
    "EarlyExit",
    "ExitSchedule",
    "FullDepth",
    "LayerSchedule",
    "LayerSet",
    "Plan",
    "Policy",
    "Schedule",
    "SkipDecode",
    "StaticLayers",
    "UnifiedSkip",
    "known_policies",
    "parse",
]


def parse(text: str, num_layers: int | None = None) -> Policy:
    """The policy that `text` describes, in the forms at the top of this file.

    num_layers: the model's, if it is known: the policy is then checked against it, and a form that depends on
    it ("d3.paper:task=gsm8k") need not name it.

    PolicyError for an unknown policy, maker or field, a missing field, a value that does not read, or a
    policy that cannot serve that model.
    """
    if not isinstance(text, str):
        raise PolicyError(f"policy {text!r}: parse reads text such as 'd3:alpha=0.999,start=0.5'.")
    text = text.strip()
    if num_layers is not None:
        num_layers = check_integer("parse", "num_layers", num_layers)
    policy = Policy.load(text) if text.endswith(".json") else _parse_options(text, num_layers)
    if num_layers is not None:
        policy.validate(num_layers)
    return policy


def _parse_options(text: str, num_layers: int | None) -> Policy:
    head, _, tail = text.partition(":")
    name, dot, maker = head.partition(".")
    try:
        kind = find_policy(name)
    except PolicyError as error:
        raise PolicyError(
            f"policy {text!r}: {error} A path that ends in .json reads a policy file."
        ) from None
    options = _split(text, tail)
    if not dot:
        hints = typing.get_type_hints(kind)
        types = {field.name: hints[field.name] for field in kind._fields()}
        return kind.from_fields(_read(text, options, types, kind.short_names))
    if maker not in kind.makers:
        known = ", ".join(f"{name}.{each}" for each in kind.makers) or "none"
        raise PolicyError(f"policy {text!r}: {name!r} has no maker {maker!r}; there are: {known}.")
    make = getattr(kind, maker)
    parameters = inspect.signature(make).parameters
    hints = typing.get_type_hints(make)
    values = _read(text, options, {parameter: hints[parameter] for parameter in parameters}, {})
    if num_layers is not None and "num_layers" in parameters:
        if values.setdefault("num_layers", num_layers) != num_layers:
            raise PolicyError(
                f"policy {text!r} is for num_layers={values['num_layers']}, but the model has {num_layers}; "
                "leave it out."
            )
    for parameter, about in parameters.items():
        if about.default is inspect.Parameter.empty and parameter not in values:
            raise PolicyError(
                f"policy {text!r} lacks {parameter}; add {parameter}=..."
                + (", or pass num_layers to parse." if parameter == "num_layers" else ".")
            )
    return make(**values)


def _split(text: str, tail: str) -> dict[str, str]:
    """The options "a=1,b=2" as a dictionary."""
    options: dict[str, str] = {}
    for part in tail.split(",") if tail else ():
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not option or not equals:
            hint = " (layer ranges are joined by '+')" if part.strip().replace("-", "").isdecimal() else ""
            raise PolicyError(f"policy {text!r}: {part!r} is not field=value{hint}.")
        if option in options:
            raise PolicyError(f"policy {text!r}: {option} is given twice; give it once.")
        options[option] = value
    return options


def _read(
    text: str, options: dict[str, str], types: dict[str, Any], short_names: dict[str, str]
) -> dict[str, Any]:
    """The option texts as values of the types that the fields or parameters have."""
    values: dict[str, Any] = {}
    for option, written in options.items():
        field = short_names.get(option, option)
        if field not in types:
            raise PolicyError(f"policy {text!r} has no field {option!r}; {_names(types, short_names)}.")
        if field in values:
            raise PolicyError(f"policy {text!r}: {field} is given twice; give it once.")
        form = TEXT_FORMS.get(types[field])
        if form is None:
            raise PolicyError(f"policy {text!r}: {field} cannot be written as text; use a .json file.")
        try:
            values[field] = form.read(written)
        except PolicyError as error:
            raise PolicyError(f"policy {text!r}: {option}: {error}") from None
        except (ValueError, KeyError):
            raise PolicyError(f"policy {text!r}: {option}={written!r} is not {form.what}.") from None
    return values


def _names(types: Iterable[str], short_names: dict[str, str]) -> str:
    short = {field: text for text, field in short_names.items()}
    listed = ", ".join(short.get(field, field) for field in types)
    return f"its fields are: {listed}" if listed else "it has no fields"
