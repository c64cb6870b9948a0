"""What an evaluation found, as data: written to `report.json`, shown as tables and as a page.

A report holds no time and no machine: the same evaluation gives the same file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm.evaluation.comparison import Comparison
from ldm.evaluation.uncertainty import Estimate
from ldm.weights.files import replacing, write_json


@dataclass(frozen=True)
class Side:
    """One of the things that are evaluated: a model, or a folder of pictures."""

    name: str  # "A" or "B"
    source: str  # as it was given
    digest: str  # of the model's weights, or of the pictures
    count: int  # pictures
    settings: dict[str, Any] = field(default_factory=dict)  # they were made with; none for a folder


@dataclass(frozen=True)
class Used:
    """A network that pictures were looked at with. Figures of different ones are never in one table."""

    name: str
    digest: str  # SHA-256 of its weights
    preparation: str  # how pictures were resized for it


@dataclass(frozen=True)
class Row:
    """One metric of every side."""

    metric: str  # as it is named on the command line
    label: str  # as people write it
    better: str  # "lower", "higher", or "" where neither is
    estimates: tuple[Estimate, ...]  # of each side
    comparison: Comparison | None = None  # of the two sides
    verdict: str = ""  # what the comparison says, in words


@dataclass(frozen=True)
class Table:
    """The metrics that one network gives."""

    extractor: Used | None  # none is needed for what compares pixels
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Shown:
    """Pictures to look at: one prompt, or one picture of the reference, and what each side made of it."""

    text: str  # the prompt
    pictures: tuple[str, ...]  # of each side; files relative to the report's folder
    scores: tuple[float, ...] = ()  # of each side; none if it has none


@dataclass(frozen=True)
class Gallery:
    """Pictures under one heading, such as those that follow their prompts worst."""

    title: str
    columns: tuple[str, ...]  # what each picture of a row is, such as the sides' names
    score: str  # what the scores are; "" if there are none
    rows: tuple[Shown, ...]


@dataclass(frozen=True)
class Histogram:
    """How the values of single pictures are distributed."""

    title: str
    edges: tuple[float, ...]  # of the bins, one more than there are bins
    names: tuple[str, ...]  # of the distributions
    counts: tuple[tuple[int, ...], ...]  # of each distribution


@dataclass(frozen=True)
class Sweep:
    """Metrics along one setting, the others fixed."""

    over: str  # the setting, such as guidance
    values: tuple[float, ...]
    rows: tuple[tuple[Row, ...], ...]  # at each value


@dataclass(frozen=True)
class Report:
    """One evaluation."""

    sides: tuple[Side, ...]
    reference: Side | None
    tables: tuple[Table, ...]
    galleries: tuple[Gallery, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader must know: skipped pictures, too few images


def save_report(report: Report, path: Path) -> None:
    """Write `report.json`, whole or not at all.

    Raises:
        LdmError: it cannot be written.
    """
    with replacing(path, folder=False, overwrite=True, need=0) as temporary:
        write_json(temporary, asdict(report))
