"""Choice: which of the policies that validation saw is taken.

The best of several means flatters itself: of many candidates some look better than they are, and the choice takes just
those. So it goes by each candidate's bound, which is taken for all of them at once (budget.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from d3rt.tuning.budget import LEAST_ITEMS, Budget, Drop

Arm = TypeVar("Arm")


@dataclass(frozen=True)
class Choice(Generic[Arm]):
    """What was chosen; by its "bound", by its "mean", or, as full depth is, by "none"; and the same in words."""

    arm: Arm
    by: str
    words: str


def choose(found: Mapping[Arm, Drop], full: Arm, budget: Budget) -> Choice[Arm]:
    """What saves the most bytes of those whose bound is within the budget; else of those whose mean is; else full
    depth. What saves none is no candidate.

    found: full depth and every candidate on validation, each bound taken among all candidates."""
    saving = {arm: drop for arm, drop in found.items() if arm != full and drop.saved > 0}
    bounded = {arm: drop for arm, drop in saving.items() if drop.items >= LEAST_ITEMS}
    within = [arm for arm, drop in bounded.items() if drop.bound <= budget.max_drop]
    likely = [arm for arm, drop in saving.items() if drop.drop <= budget.max_drop]
    if within:
        arm = max(within, key=lambda each: saving[each].saved)
        return Choice(
            arm,
            "bound",
            f"Chosen by its bound: validation bounds the drop by {found[arm].bound:.2%}, with 95% certainty for all "
            f"{len(found) - 1} candidates together.",
        )
    if likely:
        arm = max(likely, key=lambda each: saving[each].saved)
        items = found[arm].items
        why = (
            f"{items} items bound no candidate by the budget"
            if items >= LEAST_ITEMS
            else f"{items} items are fewer than {LEAST_ITEMS}, which bound nothing"
        )
        return Choice(
            arm,
            "mean",
            f"Chosen by its mean: {why}. The best mean of {len(found) - 1} flatters: expect a larger drop, or give "
            "more items.",
        )
    return Choice(full, "none", "No candidate is within the budget on validation.")
