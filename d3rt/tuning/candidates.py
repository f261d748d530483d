"""The grid of each family of policies, for a model of num_layers layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from d3rt.errors import PolicyError
from d3rt.policies import CALM, D3, Policy, SkipDecode, StaticLayers, UnifiedSkip

FAMILIES = ("d3", "skipdecode", "unified", "shortgpt", "greedy", "calm")
DEFAULT_FAMILIES = (
    "d3",
    "skipdecode",
    "unified",
    "shortgpt",
    "calm",
)  # greedy reads the train texts many times
DROPPED = (1, 2, 3, 4, 6, 8)  # layers that a searched set leaves out
_STARTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # arXiv 2503.08524, table 9
_ALPHAS = (0.9, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)


def check_families(families: Sequence[str]) -> None:
    """ValueError for a name that is none."""
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"policy family {family!r}: there are {', '.join(FAMILIES)}.")
    if not families:
        raise ValueError(f"no policy family: choose of {', '.join(FAMILIES)}.")


def candidates(
    family: str,
    num_layers: int,
    steps: int,
    influence: Callable[[], Sequence[float]],
    removed: Callable[[], Sequence[int]],
) -> list[Policy]:
    """The family's policies that fit the model. Of those with one and the same schedule over `steps`, the first.

    influence: each layer's, asked for by shortgpt alone. removed: layers in the order in which a greedy search leaves
    them out, asked for by greedy alone."""
    found: dict[object, Policy] = {}
    for make in _grid(family, num_layers, steps, influence, removed):
        try:
            policy = make()
            policy.validate(num_layers)
        except PolicyError:  # a grid's corner that this many layers do not have
            continue
        key = policy if family == "calm" else policy.schedule(num_layers, steps).sets[1:]
        found.setdefault(key, policy)
    return list(found.values())


def _grid(
    family: str,
    layers: int,
    steps: int,
    influence: Callable[[], Sequence[float]],
    removed: Callable[[], Sequence[int]],
) -> Iterator[Callable[[], Policy]]:
    if family == "d3":
        yield from (lambda a=a, s=s: D3(alpha=a, start=s) for a in _ALPHAS for s in _STARTS)
        yield from (lambda task=task: D3.paper(task, layers) for task in ("gsm8k", "bbh"))
    elif family == "skipdecode":
        for most in (1.0, 0.9, 0.8, 0.67):
            for least in (0.9, 0.75, 0.5, 0.33):
                if least <= most:
                    yield lambda m=most, n=least: SkipDecode(
                        round(m * layers), round(n * layers), max(2, steps)
                    )
    elif family == "unified":
        yield from (lambda r=r: UnifiedSkip(ratio=r) for r in (1.05, 1.1, 1.25, 1.5, 2.0))
    elif family in ("shortgpt", "greedy"):
        if family == "greedy":
            order = list(removed())
        else:
            order = sorted(range(layers), key=lambda layer: (influence()[layer], layer))
        for dropped in DROPPED:
            if dropped < layers and dropped <= len(order):
                yield lambda n=dropped: StaticLayers.without(order[:n], layers)
    else:
        for threshold in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
            yield lambda t=threshold: CALM(
                threshold=t, min_exit=max(1, layers // 2), exit_interval=max(1, layers // 10)
            )
