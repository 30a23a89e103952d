"""Outcomes, reports, progress and metrics of a run."""
