"""Plots as SVG for the page, whose style sheet colours lines and text, also in dark mode and in print.

The class of a series is its number: `s0` is the first. Lengths are pixels of the plot's own canvas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from ldm.evaluation.pages.words import number

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 462, 28, 226  # of the area within the axes
STRIP_WIDTH, STRIP_HEIGHT = 140, 16
CHARACTER, LINE = 7, 14  # about the size of text

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """A point of a curve."""

    x: float
    y: float
    low: float | None  # the interval of y
    high: float | None
    text: str  # a description
    label: str = ""  # beside the point


@dataclass(frozen=True)
class Axis:
    """A linear scale from numbers to pixels."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """About four to eight round numbers: their pixels and texts."""
        rough = (self.high - self.low) / 7
        places = -math.floor(math.log10(rough))
        step = next(s for s in (1, 2, 5, 10) if s >= rough * 10.0**places * (1 - 1e-9)) * 10.0**-places
        if step >= 10.0 ** (1 - places) * (1 - 1e-9):
            places -= 1
        found = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(self.at(index * step), number(index * step, places)) for index in found]


def _axis(values: Sequence[float], start: float, end: float, margin: float = 0.05) -> Axis:
    """An axis over the values with a margin; centred on the value if all are equal."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = abs(low) / 10 or 1.0
        return Axis(low - around, high + around, start, end)
    more = margin * (high - low)
    return Axis(low - more, high + more, start, end)


# --- plots ------------------------------------------------------------------------------------------------------------


def curves(title: str, x: str, y: str, series: Sequence[Sequence[Point]]) -> str:
    """Points joined in their order, with the band of their intervals; `x` and `y` name the axes."""
    points = [point for line in series for point in line]
    ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    across = _axis([point.x for point in points], LEFT, RIGHT)
    up = _axis(ends, BOTTOM, TOP)
    svg = _canvas(title, across, up, x, y)
    for index, line in enumerate(series):
        upper = [(across.at(p.x), up.at(p.high)) for p in line if p.high is not None]
        lower = [(across.at(p.x), up.at(p.low)) for p in line if p.low is not None]
        if len(upper) == len(lower) == len(line) and len(line) > 1:
            _add(svg, "polygon", f"band s{index}", points=_joined(upper + lower[::-1]))
        _add(svg, "polyline", f"line s{index}", points=_joined([(across.at(p.x), up.at(p.y)) for p in line]))
    taken: list[Box] = []
    for index, line in enumerate(series):
        for point in line:
            at_x, at_y = across.at(point.x), up.at(point.y)
            dot = _add(svg, "circle", f"dot s{index}", cx=at_x, cy=at_y, r=3.5)
            ElementTree.SubElement(dot, "title").text = point.text
            taken.append((at_x - 4, at_y - 4, at_x + 4, at_y + 4))
        for a, b in itertools.pairwise(line):  # labels keep clear of the line too
            steps = [(across.at(a.x + (b.x - a.x) * k / 20), up.at(a.y + (b.y - a.y) * k / 20)) for k in range(1, 20)]
            taken += [(at_x - 1, at_y - 1, at_x + 1, at_y + 1) for at_x, at_y in steps]
    for index, line in enumerate(series):
        for point in line:
            if point.label:
                where, anchor = _beside(across.at(point.x), up.at(point.y), CHARACTER * len(point.label), taken)
                _text(svg, where[0], where[1], point.label, anchor, f"label s{index}")
    return _written(svg)


def histogram(title: str, x: str, edges: Sequence[float], counts: Sequence[Sequence[int]]) -> str:
    """Shares of each distribution in bins, so that distributions of different size can be compared."""
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in counts]
    across = _axis(edges, LEFT, RIGHT, margin=0.02)
    up = Axis(0.0, 1.05 * max((share for row in shares for share in row), default=0.0) or 1.0, BOTTOM, TOP)
    svg = _canvas(title, across, up, x, "% of images")
    for index, row in enumerate(shares):
        corners = [(across.at(edges[0]), up.at(0))]
        for left, right, share in zip(edges[:-1], edges[1:], row, strict=True):
            corners += [(across.at(left), up.at(share)), (across.at(right), up.at(share))]
        corners.append((across.at(edges[-1]), up.at(0)))
        _add(svg, "polygon", f"band s{index}", points=_joined(corners))
        _add(svg, "polyline", f"line s{index}", points=_joined(corners))
    return _written(svg)


def strip(series: int, middle: float, low: float | None, high: float | None, ends: Sequence[float]) -> str:
    """An interval and its middle on one line; `ends` is the range that strips in a column share."""
    across = _axis(ends, 0, STRIP_WIDTH)
    svg = ElementTree.Element(
        "svg",
        {"viewBox": f"0 0 {STRIP_WIDTH} {STRIP_HEIGHT}", "class": "strip", "aria-hidden": "true"},
    )
    half = STRIP_HEIGHT / 2
    if across.low < 0 < across.high:
        _add(svg, "line", "zero", x1=across.at(0), x2=across.at(0), y1=0, y2=STRIP_HEIGHT)
    if low is not None and high is not None:
        _add(svg, "line", f"line s{series}", x1=across.at(low), x2=across.at(high), y1=half, y2=half)
    _add(svg, "circle", f"dot s{series}", cx=across.at(middle), cy=half, r=3.5)
    return _written(svg)


# --- parts of plots ---------------------------------------------------------------------------------------------------


def _canvas(title: str, across: Axis, up: Axis, x: str, y: str) -> ElementTree.Element:
    svg = ElementTree.Element(
        "svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "class": "plot", "role": "img", "aria-label": title}
    )
    for at, text in up.ticks():
        _add(svg, "line", "grid", x1=LEFT, x2=RIGHT, y1=at, y2=at)
        _text(svg, LEFT - 8, at + 4, text, "end")
    for at, text in across.ticks():
        _add(svg, "line", "grid", x1=at, x2=at, y1=BOTTOM, y2=BOTTOM + 4)
        _text(svg, at, BOTTOM + 18, text, "middle")
    _add(svg, "line", "axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM)
    _text(svg, (LEFT + RIGHT) / 2, HEIGHT - 6, x, "middle", "name")
    _text(svg, LEFT - 8, LINE, y, "start", "name")
    return svg


def _beside(x: float, y: float, width: float, taken: list[Box]) -> tuple[tuple[float, float], str]:
    """The place and the anchor of a label beside a point, clear of the boxes in `taken`, which its own box joins."""
    places = {(7, -7): "start", (-7, -7): "end", (7, 16): "start", (-7, 16): "end", (9, 4): "start", (-9, 4): "end"}
    boxes = {}
    for (right, down), anchor in places.items():
        left = x + right - (width if anchor == "end" else 0)
        boxes[right, down] = (left, y + down - LINE + 3, left + width, y + down + 3)
    clear = (where for where, box in boxes.items() if _inside(box) and not any(_meet(box, other) for other in taken))
    where = next(clear, (7, -7))
    taken.append(boxes[where])
    return (x + where[0], y + where[1]), places[where]


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[1] >= 0 and box[2] <= WIDTH and box[3] <= BOTTOM


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _add(parent: ElementTree.Element, tag: str, name: str, **values: float | str) -> ElementTree.Element:
    texts = {key: value if isinstance(value, str) else f"{value:.1f}" for key, value in values.items()}
    return ElementTree.SubElement(parent, tag, {"class": name} | texts)


def _text(parent: ElementTree.Element, x: float, y: float, text: str, anchor: str, name: str = "tick") -> None:
    text_element = _add(parent, "text", name, x=x, y=y)
    text_element.set("text-anchor", anchor)
    text_element.text = text


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _written(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
