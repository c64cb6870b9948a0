"""A report as tables for the terminal, narrow enough for 80 characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import table as rich_table
from rich.console import RenderableType
from rich.text import Text

from ldm.evaluation.pages.words import estimate_line, heading, lines, notes
from ldm.evaluation.report import Report, Sweep, Table

ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}  # the direction that is better
DIGEST = 12  # characters of a digest that are shown


def tables(report: Report) -> list[RenderableType]:
    """Everything but images, histograms and intervals along a setting: what rich prints, one after the other."""
    names = [side.name for side in report.sides]
    parts: list[RenderableType] = [_facts(report)]
    for table in report.tables:
        parts += [Text(""), *_table(table, names)]
    for sweep in report.sweeps:
        parts += [Text(""), _sweep(sweep, names)]
    if report.notes:
        parts += [Text(""), *(Text(note) for note in report.notes)]
    return parts


def _grid(show_header: bool = True) -> rich_table.Table:
    return rich_table.Table(box=None, padding=(0, 2, 0, 0), show_header=show_header)


def _facts(report: Report) -> rich_table.Table:
    facts = _grid(show_header=False)
    sides = [(side.name, side) for side in report.sides]
    for name, side in sides + ([("reference", report.reference)] if report.reference else []):
        facts.add_row(name, Text(side.source, overflow="fold"), f"{side.count:,} images", Text(side.digest[:DIGEST]))
    return facts


def _table(table: Table, names: Sequence[str]) -> Iterator[RenderableType]:
    """The network, its figures, the verdicts of comparisons, and the reasons why intervals are missing."""
    used = table.extractor
    yield Text(heading(table), "bold") + Text(f"  {used.preparation}  {used.digest[:DIGEST]}" if used else "", "dim")
    grid = _grid()
    grid.add_column("metric")
    for header in ("", "value", "corrected", "95 % interval"):
        grid.add_column(header, no_wrap=True)
    for row in table.rows:
        for index, line in enumerate(lines(row, names)):
            label = Text(row.label + ARROWS[row.better] if index == 0 else "")
            grid.add_row(label, line.name, line.value, line.corrected, line.interval)
    yield grid
    for row in table.rows:
        if row.verdict:
            yield Text(f"{row.label}: {row.verdict}")
    for note in notes(table, names):
        yield Text(note, "dim")


def _sweep(sweep: Sweep, names: Sequence[str]) -> rich_table.Table:
    grid = _grid()
    for header in (sweep.over, "", *(row.label + ARROWS[row.better] for row in sweep.rows[0])):
        grid.add_column(Text(header))
    for label, rows in zip(sweep.labels, sweep.rows, strict=True):
        for side, name in enumerate(names):
            figures = (estimate_line(name, row.estimates[side]).value for row in rows)
            grid.add_row(label if side == 0 else "", name, *figures)
    return grid
