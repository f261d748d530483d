"""d3rt report: what `d3rt eval`, `d3rt bench` and `d3rt tune` found, on one page that needs nothing else."""

from __future__ import annotations

from d3rt.reporting.page import ReportInputError, page

__all__ = ["ReportInputError", "page"]
