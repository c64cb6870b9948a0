"""The report of an evaluation, as data: written to `report.json`, shown as tables and as a page.

A report holds nothing about time and machine, so that the same evaluation gives the same file.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.evaluation.metrics.comparison import Comparison
from ldm.evaluation.metrics.intervals import Estimate
from ldm.files import replacing, write_json

REPORT = "report.json"
PAGE = "report.html"  # beside it


@dataclass(frozen=True)
class Side:
    """A model or a folder of images that is evaluated."""

    name: str  # "A" or "B"
    source: str  # its source, as the user named it
    digest: str  # digest of the model's weights, or of the images
    count: int  # images
    settings: dict[str, Any] = field(default_factory=dict)  # of the model; none for a folder


@dataclass(frozen=True)
class UsedNetwork:
    """A network that gave features. Figures of different networks are never in one table."""

    name: str
    digest: str  # SHA-256 of its weights
    preparation: str  # how images are resized for it


@dataclass(frozen=True)
class Row:
    """One metric of every side."""

    metric: str  # its name on the command line
    label: str  # its usual name
    better: str  # "lower", "higher", or "" where neither is
    estimates: tuple[Estimate, ...]  # one for each side
    comparison: Comparison | None = None  # of the two sides
    verdict: str = ""  # of the comparison, as text
    difference: str = "A − B"  # of the comparison; of the Inception score, one of logarithms: "ln A − ln B"


@dataclass(frozen=True)
class Table:
    """The metrics of one network."""

    extractor: UsedNetwork | None  # none for metrics of pixels
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class GalleryRow:
    """Images beside each other: each side's image of one prompt, or an image and the one that it is compared with."""

    text: str  # the prompt, or the name of the image
    images: tuple[str, ...]  # paths relative to the report's folder
    scores: tuple[float, ...] = ()  # of the first images of the row


@dataclass(frozen=True)
class Gallery:
    """Images under one heading, such as those that follow their prompts worst."""

    title: str
    columns: tuple[str, ...]  # names of the images in a row, such as those of the sides
    score: str  # name of the scores; "" if there are none
    rows: tuple[GalleryRow, ...]


@dataclass(frozen=True)
class Histogram:
    """Distributions of numbers of single images."""

    title: str
    edges: tuple[float, ...]  # of the bins, one more than there are bins
    names: tuple[str, ...]  # of the distributions
    counts: tuple[tuple[int, ...], ...]  # of each distribution


Value = float | str  # value of a setting: a number, or a name


def value_text(value: Value) -> str:
    """A setting's value as text."""
    return value if isinstance(value, str) else f"{value:g}"


@dataclass(frozen=True)
class Sweep:
    """Metrics along one setting, the others fixed."""

    over: str  # the setting, such as guidance
    values: tuple[Value, ...]  # at least one
    rows: tuple[tuple[Row, ...], ...]  # at each value: the same metrics in the same order

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values, if they are numbers."""
        found = tuple(value for value in self.values if not isinstance(value, str))
        return found if len(found) == len(self.values) else ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The values as text."""
        return tuple(map(value_text, self.values))


@dataclass(frozen=True)
class Report:
    """One evaluation."""

    sides: tuple[Side, ...]
    reference: Side | None
    tables: tuple[Table, ...]
    galleries: tuple[Gallery, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    notes: tuple[str, ...] = ()  # for readers: skipped images, too few images


def check_report(report: Report) -> None:
    """Raise unless every figure of the report is a finite number; an unknown figure is None, with a note.

    Raises:
        LdmError: a figure is not finite.
    """
    _check_finite(asdict(report), "report")


def _check_finite(content: Any, place: str) -> None:
    if isinstance(content, float) and not math.isfinite(content):
        raise LdmError(f"{place} is {content}; a report holds finite numbers, or none with a note that says why")
    if isinstance(content, dict):
        for key, value in content.items():
            _check_finite(value, f"{place}.{key}")
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            _check_finite(value, f"{place}[{index}]")


def save_report(report: Report, path: Path) -> None:
    """Write `report.json`, whole or not at all.

    Raises:
        LdmError: as `check_report`; or the file cannot be written.
    """
    check_report(report)
    with replacing(path, folder=False, overwrite=True, need=0) as temporary:
        write_json(temporary, asdict(report))
