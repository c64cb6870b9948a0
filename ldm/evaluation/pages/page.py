"""A report as one HTML file: tables, plots and small images, without scripts or external files.

`report.html.jinja` is the template. The same report and images give the same bytes.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ldm.errors import LdmError
from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.metrics.table import METRICS
from ldm.evaluation.pages.plots import Point, curves, strip
from ldm.evaluation.pages.plots import histogram as histogram_plot
from ldm.evaluation.pages.words import alone, estimate_line, heading, lines, notes
from ldm.evaluation.report import PAGE, Histogram, Report, Row, Sweep, check_report
from ldm.files import replacing
from ldm.images import load_image

TEMPLATE = "report.html.jinja"
SIDE = 160  # pixels of a small image's longer side
MOST_BYTES = 7_500_000  # of all small images, which base64 makes a third larger


def write_page(report: Report, folder: Path) -> Path:
    """Write `report.html` into the report's folder, whole or not at all, and return where it is.

    A missing or damaged image is replaced by a note.

    Raises:
        LdmError: the page cannot be written, or as `check_report`.
    """
    check_report(report)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        report=report,
        names=[side.name for side in report.sides],
        compared=any(row.comparison for table in report.tables for row in table.rows),
        settings=_settings(report),
        lines=lines,
        estimate_line=estimate_line,
        strips=_strips,
        image=_Thumbnails(folder).show,
        histogram=_histogram,
        sweep_plots=_sweep_plots,
        alone=alone,
        heading=heading,
        notes=notes,
        side=SIDE,
    )
    content = text.encode("utf-8", "backslashreplace")  # file names may be no UTF-8
    path = folder / PAGE
    with replacing(path, folder=False, overwrite=True, need=len(content)) as temporary:
        temporary.write_bytes(content)
    return path


def _settings(report: Report) -> list[tuple[str, list[str], bool]]:
    """For each setting: its name, its value on each side ("" if it has none), and whether the sides differ."""
    found = []
    for name in dict.fromkeys(name for side in report.sides for name in side.settings):
        values = [_text(side.settings[name]) if name in side.settings else "" for side in report.sides]
        found.append((name, values, len(set(values)) > 1))
    return found


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# --- tables -----------------------------------------------------------------------------------------------------------


def _middle(estimate: Estimate) -> float:
    return estimate.value if estimate.corrected is None else estimate.corrected


def _strips(row: Row) -> list[str]:
    """Drawings of the intervals of a row's `lines`, in their order."""
    ends = [end for e in row.estimates for end in (_middle(e), e.low, e.high) if end is not None]
    found = [strip(side, _middle(e), e.low, e.high, ends) for side, e in enumerate(row.estimates)]
    if row.comparison:
        c = row.comparison
        found.append(strip(len(found), c.difference, c.low, c.high, [c.low, c.high, 0.0]))
    return found


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Thumbnail:
    """A small image, or the reason why there is none."""

    data: str = ""  # its bytes, as a URL
    width: int = 0
    height: int = 0
    reason: str = ""


class _Thumbnails:
    """Small images of files, up to the page's largest size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0

    def show(self, file: str) -> _Thumbnail:
        """The small image of a file."""
        if self.bytes >= MOST_BYTES:
            return _Thumbnail(reason=f"{file}: the page holds no more images")
        try:
            image = load_image(self.folder / file, name=file, least=SIDE)
        except LdmError as error:
            return _Thumbnail(reason=str(error))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=80)
        self.bytes += stream.tell()
        data = base64.b64encode(stream.getvalue()).decode()
        return _Thumbnail(f"data:image/webp;base64,{data}", image.width, image.height)


# --- plots ------------------------------------------------------------------------------------------------------------


def _histogram(histogram: Histogram) -> str:
    title = f"{histogram.title}: how many images have which value, {', '.join(histogram.names)}"
    return histogram_plot(title, histogram.title, histogram.edges, histogram.counts)


def _sweep_plots(sweep: Sweep, names: Sequence[str]) -> list[tuple[str, str]]:
    """Captions and plots: each metric along the setting, then distances against the CLIP score."""
    metrics = list(zip(*sweep.rows, strict=True)) if sweep.numbers else []  # each metric at all values
    found = []
    for rows in metrics:
        label, better = rows[0].label, rows[0].better
        caption = f"{label} over {sweep.over}" + (f" ({better} is better)" if better else "")
        series = [_curve(sweep, rows, side) for side in range(len(names))]
        found.append((caption, curves(caption, sweep.over, label, series)))
    scores = next((rows for rows in metrics if rows[0].metric == "clip-score"), ())
    for rows in metrics:
        if scores and METRICS[rows[0].metric].tradeoff:
            caption = f"{rows[0].label} against {scores[0].label}, at each value of {sweep.over}"
            series = [_tradeoff(sweep, scores, rows, side) for side in range(len(names))]
            found.append((caption, curves(caption, scores[0].label, rows[0].label, series)))
    return found


def _curve(sweep: Sweep, rows: Sequence[Row], side: int) -> list[Point]:
    """A side's figures along the setting; corrected and with intervals if all of them are."""
    whole = all(row.estimates[side].corrected is not None for row in rows)
    points = []
    for value, row in zip(sweep.numbers, rows, strict=True):
        e = row.estimates[side]
        line = estimate_line(f"{sweep.over} {value:g}", e)
        if whole:
            points.append(Point(value, _middle(e), e.low, e.high, f"{line.name}: {line.corrected} ({line.interval})"))
        else:
            points.append(Point(value, e.value, None, None, f"{line.name}: {line.value}"))
    return points


def _tradeoff(sweep: Sweep, scores: Sequence[Row], distances: Sequence[Row], side: int) -> list[Point]:
    points = zip(_curve(sweep, scores, side), _curve(sweep, distances, side), strict=True)
    return [Point(x.y, y.y, None, None, f"{y.text}; {scores[0].label} {x.text}", f"{y.x:g}") for x, y in points]
