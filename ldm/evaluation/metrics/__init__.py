"""Metrics: their table, formulas, intervals and comparisons."""
