"""d3rt report: what `d3rt eval` and `d3rt bench` found, on one page that needs nothing else."""

from __future__ import annotations

from d3rt.reporting.page import ReportInputError, page

__all__ = ["ReportInputError", "page"]
