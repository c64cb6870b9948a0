"""The tables of `ldm bench`: seconds of all sides, and ratios with their interquartile ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median, quantiles

from rich.box import SIMPLE
from rich.table import Table

from ldm.bench.cold import Cold
from ldm.bench.comparison import TimeChange
from ldm.bench.measuring import STAGES, Seconds
from ldm.bench.options import OURS


def ratios(others: Sequence[float], own: Sequence[float]) -> str:
    """The ratios of the others' times to ours, round by round: median and interquartile range."""
    found = [other / mine for other, mine in zip(others, own, strict=True)]
    low, _, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else (found[0],) * 3
    return f"{median(found):.2f} ({low:.2f}–{high:.2f})"


def speed_tables(found: dict[str, list[Seconds]], memory: dict[str, float], limit: float) -> tuple[Table, Table]:
    """A table of the seconds of all sides, and a table of the ratios of the others' times to ours."""
    seconds = Table("seconds", *STAGES, "of the limit", "memory, GB", box=SIMPLE)
    against = Table("times ours", *STAGES, box=SIMPLE)
    for name, rows in found.items():
        columns = [[getattr(one, stage) for one in rows] for stage in STAGES]
        share = limit / median(one.step for one in rows)
        times = (f"{median(column):.3f}" for column in columns)
        seconds.add_row(name, *times, f"{share:.0%}", f"{memory[name]:.2f}")
        if name != OURS:
            own = [[getattr(one, stage) for one in found[OURS]] for stage in STAGES]
            against.add_row(name, *(ratios(*both) for both in zip(columns, own, strict=True)))
    return seconds, against


def cold_table(found: dict[str, list[Cold]]) -> Table:
    table = Table("new process", *found, "times ours", box=SIMPLE)
    labels = {
        "seconds": "command to image, s", "memory": "memory, GB", "imports": "importing, s", "load": "loading, s",
    }  # fmt: skip
    for field, label in labels.items():
        columns = {name: [getattr(one, field) for one in rows] for name, rows in found.items()}
        medians = (f"{median(column):.2f}" for column in columns.values())
        table.add_row(label, *medians, ratios(columns["diffusers"], columns[OURS]))
    return table


def phases_table(found: Sequence[Mapping[str, float]]) -> Table:
    """A table of the phases of a new process of ours, with their medians in order of time."""
    table = Table("phase of a new process", "s", box=SIMPLE)
    for name in dict.fromkeys(name for one in found for name in one):
        table.add_row(name, f"{median(one.get(name, 0.0) for one in found):.3f}")
    table.add_row("together", f"{median(sum(one.values()) for one in found):.3f}")
    return table


def change_table(changes: Sequence[TimeChange]) -> Table:
    """A table of the seconds of each side and stage, earlier and now."""
    table = Table("seconds", "stage", "then", "now", "times then", box=SIMPLE)
    for one in changes:
        spread = f"{one.ratio:.2f} ({one.low:.2f}–{one.high:.2f})"
        table.add_row(one.side, one.stage, f"{one.before:.3f}", f"{one.now:.3f}", spread)
    return table
