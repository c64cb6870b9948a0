"""Sheets: many images on one, with labels beside their columns and rows if there are any.

The labels are in Pillow's own font, which has the letters of English alone: accents are left out, dashes are hyphens,
and a `?` stands for each other character. A long label is wrapped, and shortened with `…` where its place ends.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.errors import LdmError

LETTERS = frozenset(map(chr, range(32, 127))) | frozenset("“”‘’«»°±·")  # of the font
DASHES = dict.fromkeys("‐‑‒–—−", "-")
SMALLEST, LARGEST = 12, 36  # pixels of the font's size
LINES = 4  # of a column's label
NARROWEST = 8  # font sizes: the least width of a labelled cell, so that a label has place for its words
GAP = 4  # pixels between labelled cells


def grid(images: Sequence[Image.Image], columns: int = 0) -> Image.Image:
    """A contact sheet of images; by default with about as many columns as rows."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


@dataclass(frozen=True)
class Layout:
    """The measures of a labelled sheet in pixels, and the lines of its labels."""

    font: ImageFont.FreeTypeFont
    line: int  # the height of a line
    cell: tuple[int, int]  # width and height
    margin: int  # left of the cells
    top: int  # above them
    columns: list[list[str]]
    rows: list[list[str]]  # none of a sheet that has one row without a label

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        width, height = (length + GAP for length in self.cell)
        return self.margin + len(self.columns) * width - GAP, self.top + max(len(self.rows), 1) * height - GAP


def layout(image: tuple[int, int], columns: Sequence[str], rows: Sequence[str] = ()) -> Layout:
    """The layout of a sheet whose largest images have this width and height.

    Raises:
        LdmError: Pillow has no FreeType.
    """
    width, height = image
    size = min(max(width // 24, SMALLEST), LARGEST)
    font, line = _font(size), size * 5 // 4
    width = max(width, NARROWEST * size)
    above = [wrapped(label, font, width, LINES) for label in columns]
    left = [wrapped(label, font, max(width, 2 * NARROWEST * size), max(height // line, 1)) for label in rows]
    margin = max((int(font.getlength(text)) for texts in left for text in texts), default=0) + 2 * GAP * bool(rows)
    return Layout(font, line, (width, height), margin, max(map(len, above)) * line + 2 * GAP, above, left)


def labelled(images: Mapping[int, Image.Image], columns: Sequence[str], rows: Sequence[str] = ()) -> Image.Image:
    """A white sheet of images with a label above each column and, if there are any, left of each row.

    Args:
        images: by number, row after row, at least one; the place of one that is missing is gray. Cells have one size,
            in which smaller images are centred.
        columns: the labels of the columns.
        rows: the labels of the rows; without any there is one row.

    Raises:
        LdmError: as `layout`.
    """
    largest = max(image.width for image in images.values()), max(image.height for image in images.values())
    plan = layout(largest, columns, rows)
    width, height = plan.cell
    sheet = Image.new("RGB", plan.size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, texts in enumerate(plan.columns):
        _write(draw, texts, plan, (plan.margin + column * (width + GAP) + width / 2, plan.top / 2))
    for row, texts in enumerate(plan.rows):
        _write(draw, texts, plan, (plan.margin / 2, plan.top + row * (height + GAP) + height / 2))
    for index in range(len(columns) * max(len(rows), 1)):
        x = plan.margin + index % len(columns) * (width + GAP)
        y = plan.top + index // len(columns) * (height + GAP)
        image = images.get(index)
        if image is None:
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill="lightgray")
        else:
            sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise LdmError("this Pillow is built without FreeType, by which labels are written; install it by pip")
    return font


def _write(draw: ImageDraw.ImageDraw, texts: Sequence[str], plan: Layout, centre: tuple[float, float]) -> None:
    """Draw lines of text around a point."""
    for number, text in enumerate(texts):
        place = (centre[0], centre[1] + (number - (len(texts) - 1) / 2) * plan.line)
        draw.text(place, text, fill="black", font=plan.font, anchor="mm")


def wrapped(label: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """The lines of a label that is at most so many pixels wide; what does not fit ends in `…`.

    A line ends between words, or within one that has no place in a line.
    """
    found: list[str] = []
    rest = written(label)
    while rest and len(found) < lines:
        end = _fitting(rest, font, width)
        if end < len(rest):
            if len(found) == lines - 1:
                return [*found, rest[: _fitting(rest, font, width - font.getlength("…"))].rstrip() + "…"]
            end = max(rest.rfind(" ", 1, end + 1), 0) or end
        found.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return found or [""]


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """The number of a text's first characters that fit into a width, at least one."""
    end = 1
    while end < len(text) and font.getlength(text[: end + 1]) <= width:
        end += 1
    return end


def written(label: str) -> str:
    """A label in the font's characters, in one line."""
    plain = unicodedata.normalize("NFKD", " ".join(label.split()))
    letters = (DASHES.get(letter, letter) for letter in plain if not unicodedata.combining(letter))
    return "".join(letter if letter in LETTERS else "?" for letter in letters)
