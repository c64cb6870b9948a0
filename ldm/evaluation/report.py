"""What an evaluation found, as data: written to `report.json`, shown as tables and as a page.

A report holds no time and no machine: the same evaluation gives the same file.
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

DISTANCES = ("fid", "kid", "fd-clip")  # metrics that a sweep draws against the CLIP score, if it has both
CLIP_SCORE = "clip-score"


@dataclass(frozen=True)
class Side:
    """One of the things that are evaluated: a model, or a folder of images."""

    name: str  # "A" or "B"
    source: str  # as it was given
    digest: str  # of the model's weights, or of the images
    count: int  # images
    settings: dict[str, Any] = field(default_factory=dict)  # they were made with; none for a folder


@dataclass(frozen=True)
class Used:
    """A network that images were looked at with. Figures of different ones are never in one table."""

    name: str
    digest: str  # SHA-256 of its weights
    preparation: str  # how images were resized for it


@dataclass(frozen=True)
class Row:
    """One metric of every side."""

    metric: str  # as it is named on the command line
    label: str  # as people write it
    better: str  # "lower", "higher", or "" where neither is
    estimates: tuple[Estimate, ...]  # of each side
    comparison: Comparison | None = None  # of the two sides
    verdict: str = ""  # what the comparison says, in words
    difference: str = "A − B"  # what is compared; of the Inception score, logarithms: "ln A − ln B"


@dataclass(frozen=True)
class Table:
    """The metrics that one network gives."""

    extractor: Used | None  # none is needed for what compares pixels
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Shown:
    """Images to look at: one prompt, or one image of the reference, and what each side made of it."""

    text: str  # the prompt
    images: tuple[str, ...]  # of each side; files relative to the report's folder
    scores: tuple[float, ...] = ()  # of the first of them, as many as have one


@dataclass(frozen=True)
class Gallery:
    """Images under one heading, such as those that follow their prompts worst."""

    title: str
    columns: tuple[str, ...]  # what each image of a row is, such as the sides' names
    score: str  # what the scores are; "" if there are none
    rows: tuple[Shown, ...]


@dataclass(frozen=True)
class Histogram:
    """How the values of single images are distributed."""

    title: str
    edges: tuple[float, ...]  # of the bins, one more than there are bins
    names: tuple[str, ...]  # of the distributions
    counts: tuple[tuple[int, ...], ...]  # of each distribution


Value = float | str  # of a setting: a number, or the name of what is chosen


def shown(value: Value) -> str:
    """A setting's value as it is shown."""
    return value if isinstance(value, str) else f"{value:g}"


@dataclass(frozen=True)
class Sweep:
    """Metrics along one setting, the others fixed."""

    over: str  # the setting, such as guidance
    values: tuple[Value, ...]  # one at least
    rows: tuple[tuple[Row, ...], ...]  # at each value: the same metrics in the same order

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values, if they are numbers."""
        found = tuple(value for value in self.values if not isinstance(value, str))
        return found if len(found) == len(self.values) else ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The values as they are shown."""
        return tuple(map(shown, self.values))


@dataclass(frozen=True)
class Report:
    """One evaluation."""

    sides: tuple[Side, ...]
    reference: Side | None
    tables: tuple[Table, ...]
    galleries: tuple[Gallery, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader must know: skipped images, too few images


def check_report(report: Report) -> None:
    """Raise unless every figure of the report is a finite number: what is not known is None, and says why.

    Raises:
        LdmError: one is not.
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
        LdmError: as `check_report`, or it cannot be written.
    """
    check_report(report)
    with replacing(path, folder=False, overwrite=True, need=0) as temporary:
        write_json(temporary, asdict(report))
