"""Figures and comparisons as text, the same in the terminal and on the page.

A figure has as many digits as its interval justifies: two significant ones of its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.evaluation.metrics.comparison import Comparison, p_number, p_text
from ldm.evaluation.metrics.intervals import LEVEL, Estimate
from ldm.evaluation.report import Row, Table

ABSENT = "–"  # for an unknown number
ROUNDING = 1e-9  # part of a value: smaller errors are rounding
DIGITS = 4  # significant ones of a figure without an error


@dataclass(frozen=True)
class Line:
    """A line of a table: the figure of one side, or the difference of two."""

    name: str
    value: str
    corrected: str  # empty for a difference
    interval: str
    count: str  # images, or pairs of them
    p: str  # of a difference


def number(value: float | None, places: int) -> str:
    """A number with so many decimal places (below 0: whole tens, hundreds …); `ABSENT` for None and infinity."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if abs(value) >= 1e9 or places > 8:
        digits = places + _exponent(value, 6)
        text = f"{value:.{digits}e}" if value and digits >= 0 else "0"
    else:
        text = f"{round(value, places) + 0.0:,.{max(places, 0)}f}"  # adding 0 makes 0 of -0
    return text.replace("-", "−")


def decimal_places(value: float, error: float | None) -> int:
    """The decimal places for two significant digits of the error; without an error, for `DIGITS` of the value."""
    if error and math.isfinite(error) and error > ROUNDING * abs(value):
        return 1 - _exponent(error, 1)
    return DIGITS - 1 - _exponent(value, DIGITS - 1) if value and math.isfinite(value) else 0


def _exponent(value: float, digits: int) -> int:
    """The exponent of a value's power of ten, after rounding to so many digits behind the first."""
    return int(f"{value:.{digits}e}".partition("e")[2])


def _interval(low: float | None, high: float | None, places: int) -> str:
    return ABSENT if low is None or high is None else f"{number(low, places)} to {number(high, places)}"


def lines(row: Row, names: Sequence[str]) -> list[Line]:
    """The lines of a metric: one for each side, and the difference if they are compared."""
    found = [estimate_line(name, estimate) for name, estimate in zip(names, row.estimates, strict=True)]
    if row.comparison:
        c = row.comparison
        places = decimal_places(c.difference, c.error)
        interval = _interval(c.low, c.high, places)
        found.append(Line(row.difference, number(c.difference, places), "", interval, f"{c.count:,}", p_number(c.p)))
    return found


def estimate_line(name: str, estimate: Estimate) -> Line:
    """The line of one side."""
    error = estimate.error
    if not error and estimate.low is not None and estimate.high is not None:
        error = (estimate.high - estimate.low) / 2  # a share of 0 or 1 has standard error 0
    places = decimal_places(estimate.value, error)
    interval = _interval(estimate.low, estimate.high, places)
    corrected = number(estimate.corrected, places)
    return Line(name, number(estimate.value, places), corrected, interval, f"{estimate.count:,}", "")


def alone(value: float) -> str:
    """A number without an error."""
    return number(value, decimal_places(value, None))


def notes(table: Table, names: Sequence[str]) -> list[str]:
    """Reasons why figures of a table have no interval; `names` are those of the sides."""
    found = []
    for row in table.rows:
        of = {name: estimate.note for name, estimate in zip(names, row.estimates, strict=True)}
        if len(of) > 1 and len(set(of.values())) == 1:
            of = {" and ".join(names): row.estimates[0].note}
        found += [f"{row.label}, {name}: {note}" for name, note in of.items() if note]
    return found


def heading(table: Table) -> str:
    """A table's heading: its network, or "Pixels" without one."""
    return table.extractor.name if table.extractor else "Pixels"


def verdict(comparison: Comparison, better: str) -> str:
    """A comparison of A and B in words: which is better, that too few images cannot tell, or that they do not differ.

    Args:
        comparison: A minus B.
        better: "lower" or "higher" figures; "" if neither is better: the text then says which is higher.
    """
    p = p_text(comparison.p)
    if comparison.p <= 1 - LEVEL:
        higher, lower = ("A", "B") if comparison.difference > 0 else ("B", "A")
        return f"{lower if better == 'lower' else higher} {'better' if better else 'higher'}, {p}"
    if comparison.needed is None:
        return "no difference"
    unit = 10 ** max(_exponent(comparison.needed, 1) - 1, 0)
    needed = math.ceil(comparison.needed / unit) * unit  # rounded up to two digits, so more than `count`
    return f"cannot tell with {comparison.count:,} images ({p}); about {needed:,} would be needed"
