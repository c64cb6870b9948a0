"""The log of a stage as curves of few points, and its last lines, read in bounded time and memory however long it is.

A log is `metrics.jsonl`: a line of JSON for each report, with its step and figures by name. Lines that cannot be read
(a run that is writing one, or was killed) are counted and left out.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

WHOLE = 16 * 2**20  # bytes of a log that is read as a whole
PIECES, PIECE = 500, 2**14  # of a longer one so many pieces are read, of so many bytes
TAIL = 2**16  # bytes at the end from which the last lines are taken
LONGEST = 2**16  # bytes of a line
CURVES = 100  # of a log
POINTS = 500  # of a curve
STRETCHES = POINTS // 2 - 1
NAME = re.compile(r"[\w./+@-]{1,80}", re.ASCII)
LOOKS = ("validation/", "evaluation/")  # what names of figures begin with that are not of training steps


@dataclass(frozen=True)
class LogLine:
    """A line of a log."""

    step: int
    figures: Mapping[str, float]

    @property
    def of_training(self) -> bool:
        """Whether its figures are means over training steps."""
        return not all(name.startswith(LOOKS) for name in self.figures)


@dataclass
class Curves:
    """The figures of a log by name: points (step, value) in the order of steps."""

    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    damaged: int = 0  # lines that cannot be read
    sampled: bool = False  # whether only parts of the log were read, because it is long


def read_line(data: bytes) -> LogLine | None:
    """A line of a log with its finite figures; None if it is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
        return None
    figures = {name: float(value) for name, value in found.items() if name != "step" and _is_figure(name, value)}
    return LogLine(step, figures)


def _is_figure(name: str, value: Any) -> bool:
    number = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53)
    return number and math.isfinite(value) and NAME.fullmatch(name) is not None


def last_lines(file: BinaryIO) -> list[LogLine]:
    """The whole lines at the end of a log, the oldest first."""
    size = file.seek(0, io.SEEK_END)
    read = (read_line(line) for line in _lines_of(file, max(size - TAIL, 0), size))
    return [line for line in read if line is not None]


def curves(file: BinaryIO) -> Curves:
    """All curves of a log, thinned."""
    size = file.seek(0, io.SEEK_END)
    found = Curves(sampled=size > WHOLE)
    values: dict[str, dict[int, float]] = {}
    for data in _lines(file, size):
        line = read_line(data)
        if line is None:
            found.damaged += 1
            continue
        for name, value in line.figures.items():
            if name in values or len(values) < CURVES:
                values.setdefault(name, {})[line.step] = value
    found.points = {name: thinned(sorted(points.items())) for name, points in values.items()}
    return found


def _lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The lines of a log; of a long one, those of pieces at even distances, and of its end."""
    if size <= WHOLE:
        yield from _lines_of(file, 0, size)
        return
    for number in range(PIECES):
        start = (size - TAIL) * number // PIECES
        yield from _lines_of(file, start, start + PIECE)
    yield from _lines_of(file, size - TAIL, size)


def _lines_of(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The whole lines between two places of a file, which are in its middle or its ends."""
    before = max(start - 1, 0)  # if a line ends there, the first one is whole
    file.seek(before)
    data = file.read(end - before)
    first = data.find(b"\n") + 1 if start else 0
    last = data.rfind(b"\n")
    if (start and not first) or last < first:
        return
    for line in data[first:last].split(b"\n"):
        if len(line) <= LONGEST:
            yield line
        else:
            yield b""  # counted as damaged


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` of a curve's points: its ends, and of each stretch between them the lowest and the highest."""
    if len(points) <= POINTS:
        return points
    inner, found = points[1:-1], points[:1]
    for number in range(STRETCHES):
        stretch = inner[len(inner) * number // STRETCHES : len(inner) * (number + 1) // STRETCHES]
        ends = {min(stretch, key=_value), max(stretch, key=_value)}
        found += sorted(ends)
    return [*found, points[-1]]


def _value(point: tuple[int, float]) -> float:
    return point[1]
