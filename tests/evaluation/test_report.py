"""A report in words, in the terminal, as JSON and as a page that nothing from outside can break."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from images import place_image
from PIL import Image
from rich.console import Console

from ldm.errors import LdmError
from ldm.evaluation.metrics.comparison import Comparison
from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.pages import page
from ldm.evaluation.pages.page import write_page
from ldm.evaluation.pages.plots import Axis, Point, curves, histogram, strip
from ldm.evaluation.pages.tables import tables
from ldm.evaluation.pages.words import decimal_places, estimate_line, number, p_number, verdict
from ldm.evaluation.report import (
    Gallery,
    GalleryRow,
    Histogram,
    Report,
    Row,
    Side,
    Sweep,
    Table,
    UsedNetwork,
    save_report,
)

NOTE = "64 images are too few for 2048 features"
UNICODE = "一只红狐狸 🦊 ثعلب"
HOSTILE = "\"'></td><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)>{{ 7 * 7 }}[bold]&lt;"


def estimate(value: float, error: float, corrected: float | None = None) -> Estimate:
    middle = value if corrected is None else corrected
    return Estimate(value, middle, error, middle - 2 * error, middle + 2 * error, 1024)


def without_interval(value: float) -> Estimate:
    return Estimate(value, None, None, None, None, 64, NOTE)


def comparison(difference: float, error: float, p: float, needed: int | None = None) -> Comparison:
    return Comparison(difference, error, difference - 2 * error, difference + 2 * error, p, 64, needed)


FOUND = comparison(1.69, 0.52, 0.003)
INCEPTION = UsedNetwork("Inception v3", "6f2d" * 16, "299×299, bicubic, antialiased")
FID = Row(
    "fid", "FID", "lower", (estimate(24.83, 0.41, 22.31), estimate(23.12, 0.4, 20.6)), FOUND, verdict(FOUND, "lower")
)
SCORE = Row("clip-score", "CLIP score", "higher", (estimate(31.4, 0.11), estimate(30.9, 0.12)))
FEW = Row("fd-clip", "FD", "lower", (without_interval(141.32), without_interval(140.07)))
A = Side("A", "runs/mine/model", "3f1c" * 16, 1024, {"guidance": 5.0, "steps": 30, "negative": None})
B = Side("B", "other.safetensors", "a09e" * 16, 1024, {"guidance": 7.5, "steps": 30})
REFERENCE = Side("reference", "coco/val", "77b2" * 16, 5000)


def at(shift: float) -> tuple[Row, ...]:
    """A sweep's rows at one value."""
    moved = [replace(e, value=e.value + shift, corrected=(e.corrected or 0) + shift) for e in FID.estimates]
    return (replace(FID, estimates=tuple(moved)), SCORE, FEW)


def full(folder: Path) -> Report:
    """Two sides with everything that a report can have, and its images."""
    for name in ("a.png", "b.png"):
        place_image(300, 200).save(folder / name)
    gallery = (
        GalleryRow("a red fox", ("a.png", "b.png"), (18.25, 21.5)),
        GalleryRow(UNICODE, ("a.png", "gone.png"), (18.0, 22.0)),
    )
    return Report(
        (A, B),
        REFERENCE,
        (Table(INCEPTION, (FID, FEW)), Table(None, (Row("psnr", "PSNR", "higher", SCORE.estimates),))),
        (Gallery("Worst prompts", ("A", "B"), "CLIP score", gallery),),
        (Histogram("CLIP score", (20.0, 25.0, 30.0), ("A", "held out"), ((3, 5), (10, 0))),),
        (Sweep("guidance", (1.0, 3.0, 5.0), (at(0), at(-3), at(2))),),
        ("3 images could not be read",),
    )


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "better", "words"),
    [
        (comparison(1.0, 0.3, 0.003), "lower", "B better, p = 0.003"),
        (comparison(-1.0, 0.3, 0.003), "lower", "A better, p = 0.003"),
        (comparison(1.0, 0.1, 0.0002), "higher", "A better, p < 0.001"),
        (comparison(-1.0, 0.3, 0.05), "higher", "B better, p = 0.05"),
        (comparison(-1.0, 0.3, 0.02), "", "B higher, p = 0.02"),
        (comparison(0.1, 0.3, 0.41, 861), "lower", "cannot tell with 64 images (p = 0.41); about 870 would be needed"),
        (comparison(0.1, 9.0, 0.9, 48211), "", "cannot tell with 64 images (p = 0.9); about 49,000 would be needed"),
        (comparison(0.1, 0.3, 0.06, 65), "lower", "cannot tell with 64 images (p = 0.06); about 65 would be needed"),
        (comparison(0.0, 0.0, 1.0), "lower", "no difference"),
    ],
)
def test_verdicts(found: Comparison, better: str, words: str) -> None:
    assert verdict(found, better) == words


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.0234, "12.346"),
        (12.3456, 0.0996, "12.35"),  # rounds to 0.10
        (12.3456, 2.3, "12.3"),
        (1234567.0, 1234.0, "1,234,600"),
        (-0.00123, 0.00021, "−0.00123"),
        (-0.001, 0.3, "0.00"),
        (0.5, 1e-17, "0.5000"),  # rounding, no error
        (0.5, 0.0, "0.5000"),
        (28.1, None, "28.10"),
        (0.0, None, "0"),
        (1.5e-12, 2.5e-13, "1.50e−12"),
        (1e-20, 2.5e-13, "0"),
        (1.2345e300, 1e298, "1.234e+300"),
        (1.2345e15, None, "1.234e+15"),
        (math.nan, 1.0, "–"),
        (math.inf, None, "–"),
        (3.14159, math.nan, "3.142"),
    ],
)
def test_as_many_digits_as_the_error_justifies(value: float, error: float | None, text: str) -> None:
    assert number(value, decimal_places(value, error)) == text


def test_lines_of_estimates() -> None:
    line = estimate_line("A", estimate(24.83, 0.41, 22.31))
    assert (line.value, line.corrected, line.interval, line.count) == ("24.83", "22.31", "21.49 to 23.13", "1,024")
    absent = estimate_line("A", without_interval(141.32))
    assert (absent.value, absent.corrected, absent.interval) == ("141.3", "–", "–")
    none_of_64 = estimate_line("A", Estimate(0.0, 0.0, 0.0, 0.0, 0.0566, 64))  # Wilson's interval
    assert (none_of_64.value, none_of_64.interval) == ("0.000", "0.000 to 0.057")
    equal = estimate_line("A", Estimate(0.25, 0.25, 0.0, 0.25, 0.25, 64))
    assert (equal.value, equal.interval) == ("0.2500", "0.2500 to 0.2500")


def test_p() -> None:
    assert [p_number(p) for p in (0.00025, 0.001, 0.0123, 0.4149, 1.0)] == ["< 0.001", "0.001", "0.012", "0.41", "1"]


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_holds_the_report(tmp_path: Path) -> None:
    report = full(tmp_path)
    path = tmp_path / "report.json"
    save_report(report, path)
    content = json.loads(path.read_text(encoding="utf-8"))
    few = content["tables"][0]["rows"][1]
    assert few["estimates"][0]["corrected"] is None and few["comparison"] is None
    assert content["tables"][1]["extractor"] is None
    assert content["galleries"][0]["rows"][1]["text"] == UNICODE
    save_report(replace(report, reference=None), path)
    assert json.loads(path.read_text(encoding="utf-8"))["reference"] is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_written(tmp_path: Path, wrong: float) -> None:
    row = replace(FID, estimates=(FID.estimates[0], replace(FID.estimates[1], high=wrong)))
    report = Report((A, B), None, (Table(None, (SCORE, row)),))
    with pytest.raises(LdmError, match=re.escape(f"report.tables[0].rows[1].estimates[1].high is {wrong}")):
        save_report(report, tmp_path / "report.json")
    with pytest.raises(LdmError, match="finite"):
        write_page(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_of_files_that_are_no_utf8(tmp_path: Path) -> None:
    source = os.fsdecode(b"images-\xff")
    report = Report((replace(A, source=source),), None, ())
    save_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["sides"][0]["source"] == source
    assert r"images-\udcff" in write_page(report, tmp_path).read_text(encoding="utf-8")


# --- the page ---------------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Parsed(HTMLParser):
    """What a page is made of; every element that is opened must be closed in its turn."""

    def __init__(self, page: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += " ".join(data.split()) + "\n" if data.strip() else ""

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_self_contained(parsed: Parsed) -> None:
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "image", "use"}
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "style")], tag
    assert all(image["src"].startswith("data:image/webp;base64,") for image in parsed.of("img"))


def test_a_page_of_everything(tmp_path: Path) -> None:
    path = write_page(full(tmp_path), tmp_path)
    assert path == tmp_path / "report.html"
    parsed = Parsed(path)
    check_self_contained(parsed)
    source = path.read_text(encoding="utf-8")
    assert "url(" not in source and "@import" not in source and "://" not in source
    for text in (
        "runs/mine/model", "other.safetensors", "coco/val", "3f1c" * 16, "77b2" * 16, "none",  # what was evaluated
        "Inception v3", "6f2d" * 16, "Images: 299×299, bicubic, antialiased. Weights: SHA-256", "Pixels",
        "lower is better", "24.83", "22.31", "21.49 to 23.13", "A − B", "0.65 to 2.73", "0.003", "B better, p = 0.003",
        f"FD, A and B: {NOTE}", "3 images could not be read",
        "Worst prompts", "18.25", "gone.png does not exist", UNICODE,
        "FID over guidance (lower is better)", "FID against CLIP score, at each value of guidance", "held out",
    ):  # fmt: skip
        assert f"{text}\n" in parsed.text or f"{text} " in parsed.text, text
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", parsed.text)


def test_a_page_can_be_read_without_seeing_it(tmp_path: Path) -> None:
    parsed = Parsed(write_page(full(tmp_path), tmp_path))
    assert parsed.of("html") == [{"lang": "en"}]
    assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in parsed.of("th"))
    assert [image["alt"] for image in parsed.of("img")] == ["A: a red fox", "B: a red fox", f"A: {UNICODE}"]
    plots = [svg for svg in parsed.of("svg") if svg["class"] == "plot"]
    assert len(plots) == 3 + 2 + 1  # metrics, FID and FD against the score, the histogram
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in plots)


def hostile(value: Any) -> Any:
    """The same data with markup in every text but files and the words that decide something."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = {"metric", "better", "images"}
        return replace(value, **{f.name: hostile(getattr(value, f.name)) for f in fields(value) if f.name not in kept})
    if isinstance(value, dict):
        return {f"{key}{HOSTILE}": hostile(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(hostile, value))
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_nothing_from_outside_is_markup(tmp_path: Path) -> None:
    report = full(tmp_path)
    named = GalleryRow("x", (f"{HOSTILE.replace('/', '')}.png", "a.png"))
    report = hostile(replace(report, galleries=(*report.galleries, Gallery("files", ("A", "B"), "", (named,)))))
    parsed = Parsed(write_page(report, tmp_path))
    check_self_contained(parsed)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert {tag for tag, _ in parsed.elements} == {tag for tag, _ in Parsed(write_page(full(plain), plain)).elements}
    assert parsed.text.count(HOSTILE) > 20 and parsed.of("img")[0]["alt"] == f"A{HOSTILE}: a red fox{HOSTILE}"


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    report = full(first)
    shutil.copytree(first, second)
    (second / "report.html").write_text("an older one")
    assert write_page(report, first).read_bytes() == write_page(report, second).read_bytes()
    assert sorted(path.name for path in second.iterdir()) == ["a.png", "b.png", "report.html"]


def test_one_side_without_a_reference(tmp_path: Path) -> None:
    row = replace(FID, estimates=FID.estimates[:1], comparison=None, verdict="")
    report = Report((A,), None, (Table(INCEPTION, (row,)),))
    parsed = Parsed(write_page(report, tmp_path))
    check_self_contained(parsed)
    assert "24.83" in parsed.text
    for text in ("reference", "A − B", "\np\n", "other"):
        assert text not in parsed.text
    heads = [cell for cell in parsed.of("th") if cell["scope"] == "rowgroup"]
    assert [cell["rowspan"] for cell in heads] == ["1"]


def test_images_are_small_and_damaged_ones_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_image(640, 320).save(tmp_path / "wide.png")
    place_image(20, 30).save(tmp_path / "tiny.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "wide.png").read_bytes()[:200])
    files = ("wide.png", "tiny.png", "broken.png", "nul\0.png", ".")
    gallery = Gallery("Samples", ("A",), "", tuple(GalleryRow("", (file,)) for file in files))
    report = Report((A,), None, (), (gallery,))
    parsed = Parsed(write_page(report, tmp_path))
    data = [base64.b64decode(image["src"].partition(",")[2]) for image in parsed.of("img")]
    assert [Image.open(io.BytesIO(one)).size for one in data] == [(160, 80), (20, 30)]
    assert [(image["width"], image["height"]) for image in parsed.of("img")] == [("160", "80"), ("20", "30")]
    assert parsed.text.count("cannot be read as an image") == 3 and str(tmp_path) not in parsed.text
    monkeypatch.setattr(page, "MOST_BYTES", 1)
    parsed = Parsed(write_page(report, tmp_path))
    assert len(parsed.of("img")) == 1 and "tiny.png: the page holds no more images" in parsed.text


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="does not exist"):
        write_page(Report((A,), None, ()), tmp_path / "nowhere")


# --- plots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-3.2, 7.9), (0.0081, 0.0083), (1e-12, 3e-12), (1e299, 5e300), (99_000.0, 101_000.0), (0.9, 1.1)],
)
def test_ticks_are_round_and_tell_apart(low: float, high: float) -> None:
    axis = Axis(low, high, 0.0, 100.0)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 9
    assert len({text for _, text in ticks}) == len(ticks)
    assert all(-1e-6 <= where <= 100 + 1e-6 for where, _ in ticks)
    for where, text in ticks:
        value = float(text.replace(",", "").replace("−", "-"))
        assert axis.at(value) == pytest.approx(where, abs=1e-3)


def drawn(svg: str) -> dict[str, list[ElementTree.Element]]:
    """Elements of an SVG by their class, with every coordinate on the canvas."""
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    found: dict[str, list[ElementTree.Element]] = {}
    for element in root.iter():
        if "class" in element.attrib:
            found.setdefault(element.attrib["class"], []).append(element)
        pairs = [pair.split(",") for pair in element.get("points", "").split()]
        across = [x for x, _ in pairs] + [element.get(name, "0") for name in ("x", "x1", "x2", "cx")]
        down = [y for _, y in pairs] + [element.get(name, "0") for name in ("y", "y1", "y2", "cy")]
        assert all(-1 <= float(x) <= width + 1 for x in across) and all(-1 <= float(y) <= height + 1 for y in down)
    return found


def line_of(*values: float, error: float | None = None) -> list[Point]:
    ends = [(None, None) if error is None else (value - error, value + error) for value in values]
    return [
        Point(x, y, low, high, f"at {x}", str(x)) for x, (y, (low, high)) in enumerate(zip(values, ends, strict=True))
    ]


def test_curves() -> None:
    found = drawn(curves("title", "x", "y", [line_of(1, 3, 2, error=0.5), line_of(2, 2.5, 3)]))
    assert len(found["band s0"]) == 1 and "band s1" not in found
    heights = [float(dot.attrib["cy"]) for dot in found["dot s0"]]
    assert heights[1] < heights[2] < heights[0]  # 3, 2, 1: up is less
    assert [dot.findtext("title") for dot in found["dot s0"]] == ["at 0", "at 1", "at 2"]
    assert [text.text for text in found["label s1"]] == ["0", "1", "2"]


def test_labels_of_close_points_keep_apart() -> None:
    points = [Point(30 + x / 100, 20 + x / 100, None, None, "", str(x)) for x in range(3)]
    far = [Point(0.0, 0.0, None, None, "", ""), Point(60.0, 60.0, None, None, "", "")]
    places = [(text.attrib["x"], text.attrib["y"]) for text in drawn(curves("t", "x", "y", [points, far]))["label s0"]]
    assert len(set(places)) == 3


@pytest.mark.parametrize("values", [(5.0,), (5.0, 5.0), (0.0, 0.0), (1e300, 2e300), (1e-300, 2e-300), (-1e-9, 1e9)])
def test_plots_of_unusual_numbers(values: tuple[float, ...]) -> None:
    svg = curves("title", "x", "y", [line_of(*values)])
    assert len(drawn(svg)["dot s0"]) == len(values)
    small = strip(0, values[0], values[0], values[-1], values)
    drawn(small)
    assert "nan" not in svg + small and "inf" not in svg + small


def test_figures_without_intervals_in_a_sweep_have_no_band(tmp_path: Path) -> None:
    rows = ((FEW,), (replace(FEW, estimates=(estimate(150.0, 2.0), estimate(150.0, 2.0))),))
    source = write_page(Report((A, B), None, (), sweeps=(Sweep("steps", (10.0, 20.0), rows),)), tmp_path)
    assert 'class="band' not in source.read_text(encoding="utf-8")


def test_histograms_compare_shares() -> None:
    found = drawn(histogram("title", "x", (0.0, 1.0, 2.0), ((1, 1), (500, 500), (0, 0))))
    assert found["line s0"][0].attrib["points"] == found["line s1"][0].attrib["points"]
    assert found["line s2"][0].attrib["points"] != found["line s0"][0].attrib["points"]


# --- the terminal -----------------------------------------------------------------------------------------------------


def printed(report: Report, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in tables(report):
        console.print(part)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_tables_in_the_terminal(tmp_path: Path) -> None:
    lines = printed(full(tmp_path))
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    for pattern in (
        r"A +runs/mine/model +1,024 images +3f1c3f1c3f1c",
        r"reference +coco/val +5,000 images +77b277b277b2",
        r"Inception v3  299×299, bicubic, antialiased  6f2d6f2d6f2d",
        r"metric +value +corrected +95 % interval",
        r"FID ↓ +A +24.83 +22.31 +21.49 to 23.13",
        r" +B +23.12 +20.60 +19.80 to 21.40",
        r" +A − B +1.69 +0.65 to 2.73",
        r"FD ↓ +A +141.3 +– +–",
        r"FID: B better, p = 0.003",
        rf"FD, A and B: {NOTE}",
        r"Pixels",
        r"guidance +FID ↓ +CLIP score ↑ +FD ↓",
        r"3 +A +21.83 +31.40 +141.3",
        r"3 images could not be read",
    ):
        assert re.search(f"^{pattern}$", text, re.MULTILINE), pattern
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_long_labels_do_not_break_figures(tmp_path: Path) -> None:
    row = replace(FID, label="Fréchet distance on features of a very long name", difference="ln A − ln B")
    text = "\n".join(printed(Report((A, B), None, (Table(INCEPTION, (row,)),))))
    assert re.search(r"24.83 +22.31 +21.49 to 23.13$", text, re.MULTILINE)
    assert re.search(r"ln A − ln B +1.69 +0.65 to 2.73$", text, re.MULTILINE)


def test_names_are_not_markup_in_the_terminal() -> None:
    row = replace(FID, label="[red]FID", estimates=FID.estimates[:1], comparison=None, verdict="")
    text = "\n".join(printed(Report((replace(A, source="[bold]x[/bold]"),), None, (Table(None, (row,)),))))
    assert "[bold]x[/bold]" in text and "[red]FID ↓" in text
