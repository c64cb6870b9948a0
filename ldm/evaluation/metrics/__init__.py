"""Metrics: the table of all by name, their formulas, intervals and comparisons."""
