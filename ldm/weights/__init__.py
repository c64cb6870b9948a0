"""Weights: every format that models of these families come in and go out in."""
