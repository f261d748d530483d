"""A policy found on one model, for another of more or fewer layers: by relative depth."""

from __future__ import annotations

import json
from pathlib import Path

from d3rt.errors import PolicyError
from d3rt.policies import CALM, D3, FullDepth, Policy, SkipDecode, StaticLayers, UnifiedSkip


def tuned_layers(folder: Path) -> int:
    """Layers of the model that `d3rt tune` wrote this folder for. PolicyError where it holds no tune.json."""
    try:
        return int(json.loads((folder / "tune.json").read_text(encoding="utf-8"))["num_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(
            f"{str(folder)!r} is no folder that d3rt tune wrote ({error!r}); give a policy file and --layers."
        ) from error


def transferred(policy: Policy, num_layers: int, to: int) -> Policy:
    """The policy at the same relative depths of `to` layers. Untested there: nothing says that it fits.

    D3 and UnifiedSkip are shares of the depth already. Counts of layers are scaled and rounded. A skipped layer l
    becomes the layers whose middles lie in [l, l + 1) / num_layers. PolicyError for a kind without relative form."""
    policy.validate(num_layers)
    if isinstance(policy, D3 | UnifiedSkip | FullDepth):
        moved: Policy = policy
    elif isinstance(policy, SkipDecode):
        most, least = (
            max(1, round(count * to / num_layers)) for count in (policy.max_layers, policy.min_layers)
        )
        moved = SkipDecode(most, least, policy.length, policy.warmup)
    elif isinstance(policy, CALM):
        exit_, interval = (
            max(1, round(count * to / num_layers)) for count in (policy.min_exit, policy.exit_interval)
        )
        moved = CALM(policy.threshold, policy.measure, exit_, interval, policy.decay, policy.horizon)
    elif isinstance(policy, StaticLayers) and policy.layers is not None:
        dropped = set(range(num_layers)) - set(policy.layers)
        moved = StaticLayers.without(
            [at for at in range(to) if (2 * at + 1) * num_layers // (2 * to) in dropped], to, policy.prompt
        )
    else:
        raise PolicyError(f"{policy}: it has no form by relative depth; tune it on the other model.")
    moved.validate(to)
    return moved
