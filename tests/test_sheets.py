"""Sheets: the places of images, and labels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from ldm.errors import LdmError
from ldm.sheets import GAP, LINES, NARROWEST, SMALLEST, grid, labelled, layout, wrapped, written

COLOURS = ["red", "green", "blue", "black"]


def font() -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(SMALLEST)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


def ink(image: Image.Image) -> int:
    """The number of pixels that are not white."""
    return int((np.asarray(image.convert("L")) < 255).sum())


def test_images_have_their_places_and_labels_theirs() -> None:
    images = {index: Image.new("RGB", (128, 96), colour) for index, colour in enumerate(COLOURS)}
    columns, rows = ["steps 10", "steps 20"], ["guidance 1", "guidance 3"]
    plan, sheet = layout((128, 96), columns, rows), labelled(images, columns, rows)
    assert sheet.size == plan.size == (plan.margin + 2 * 128 + GAP, plan.top + 2 * 96 + GAP)
    for index, image in images.items():
        x, y = plan.margin + index % 2 * (128 + GAP), plan.top + index // 2 * (96 + GAP)
        assert sheet.crop((x, y, x + 128, y + 96)).tobytes() == image.tobytes()
        assert index > 1 or ink(sheet.crop((x, 0, x + 128, plan.top)))
        assert index % 2 or ink(sheet.crop((0, y, plan.margin, y + 96)))
    assert not ink(sheet.crop((0, 0, plan.margin, plan.top)))


def test_one_row_has_no_labels_beside_it_and_small_images_stand_in_wide_cells() -> None:
    sheet = labelled({0: Image.new("RGB", (64, 64)), 2: Image.new("RGB", (48, 64))}, ["a", "b", "c"])
    width, top = NARROWEST * SMALLEST, layout((64, 64), ["a"]).top
    assert sheet.size == (3 * (width + GAP) - GAP, top + 64)
    assert sheet.getpixel((width + GAP, top)) == sheet.getpixel((2 * width + GAP - 1, top + 63)) == (211, 211, 211)
    assert [sheet.getpixel((x, top)) for x in (15, 16, 79, 80)] == [(255,) * 3, (0,) * 3, (0,) * 3, (255,) * 3]
    assert sheet.getpixel((2 * (width + GAP) + 24, top)) == (0, 0, 0)


def test_long_labels_are_wrapped_and_shortened() -> None:
    assert wrapped("a red fox in the snow", font(), 70, LINES) == ["a red fox in", "the snow"]
    lines = wrapped("a red fox in the snow " * 9, font(), 70, LINES)
    assert len(lines) == LINES and lines[-1].endswith("…")
    assert all(font().getlength(line) <= 70 for line in lines)
    assert "".join(wrapped("x" * 30, font(), 70, LINES)) == "x" * 30
    assert wrapped("", font(), 70, LINES) == [""]
    assert layout((512, 64), ["a"], ["a long label of a row " * 9]).size[1] > 64


def test_what_the_font_cannot_show() -> None:
    assert written("a café\n– naïve 狐") == "a cafe - naive ?"


def test_a_sheet_without_labels() -> None:
    images = [Image.new("RGB", (8, 8), colour) for colour in COLOURS[:3]]
    assert grid(images).size == (16, 16)
    assert grid(images, columns=3).size == (24, 8)


def test_labels_need_freetype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFont, "load_default", lambda size: ImageFont.ImageFont())
    with pytest.raises(LdmError, match="this Pillow is built without FreeType"):
        layout((64, 64), ["a"])
