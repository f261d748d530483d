"""What a skipped layer costs: tasks run at full depth and with policies, on the same items, compared in pairs.

    report = d3rt.evaluation.evaluate(fast, Settings(tasks=("gsm8k", "agreement"),
    policies=("d3:alpha=0.998,start=0.5",))) print(report.markdown())

Four tasks (tasks.py): gsm8k and bbh generate and are scored as lm-evaluation-harness scores them (scoring.py has the
traps); ppl and agreement force given tokens through the steps that a policy records. Depth and bytes are those of the
steps that really ran, at the lengths that the answers really had, never a formula's mean over the longest. Every result
is kept in a journal at once (journal.py), so that an evaluation can be stopped and continued."""

from __future__ import annotations

from d3rt.evaluation.report import Report
from d3rt.evaluation.run import evaluate
from d3rt.evaluation.settings import Settings

__all__ = ["Report", "Settings", "evaluate"]
