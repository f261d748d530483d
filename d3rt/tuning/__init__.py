"""Which policy for your task: searched on one part of its items, chosen on another, told on a third.

The parts are drawn once (split.py). Halving (halving.py) sees the first alone; the choice (choice.py) is made on the
second, by bounds that hold for all candidates at once; the third is opened once, after the choice, for one figure. What
a drop is, what bounds it, and when it can be told, is in budget.py. Scores are kept as they come (scorer.py), so that a
run can be stopped and continued."""

from __future__ import annotations

from d3rt.tuning.budget import METRICS, Budget
from d3rt.tuning.candidates import FAMILIES
from d3rt.tuning.run import Settings, tune
from d3rt.tuning.transfer import transferred

__all__ = ["FAMILIES", "METRICS", "Budget", "Settings", "transferred", "tune"]
