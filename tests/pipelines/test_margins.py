"""Outpainting by margins: the same as inpainting on a canvas made by hand; what is kept; what is refused, and where."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import controls
import numpy as np
import pytest
import tiny
import torch
from commands import ldm
from images import UPPER, encoded, image, place_image, png
from PIL import Image, ImageDraw, ImageFilter

from ldm.errors import LdmError
from ldm.images import MOST_PIXELS, read_settings
from pipelines import Pipeline
from pipelines.margins import OVERLAP, canvas_size, extended, rounded_margins

__all__ = ["ldm"]  # a fixture
FIXED: dict[str, Any] = {"steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def opened() -> Callable[[str], Pipeline]:
    """Pipelines of tiny models by name, each loaded once."""
    found: dict[str, Pipeline] = {}

    def of(name: str) -> Pipeline:
        if name not in found:
            found[name] = Pipeline(tiny.model(name, shallow=True), dtype=torch.float32, device="cpu")
        return found[name]

    return of


@pytest.fixture
def pipeline(opened: Callable[[str], Pipeline]) -> Pipeline:
    return opened("sd15")


def by_hand(
    start: Image.Image, left: int, top: int, right: int, bottom: int, overlap: int = 16
) -> tuple[Image.Image, Image.Image]:
    """A canvas and its mask, made with PIL."""
    width, height = start.size
    canvas = Image.new("RGB", (left + width + right, top + height + bottom))
    canvas.paste(start.crop((0, 0, width, 1)).resize((width, max(top, 1))), (left, 0))
    canvas.paste(start.crop((0, height - 1, width, height)).resize((width, max(bottom, 1))), (left, top + height))
    canvas.paste(start, (left, top))
    canvas.paste(canvas.crop((left, 0, left + 1, canvas.height)).resize((max(left, 1), canvas.height)), (0, 0))
    edge = left + width
    canvas.paste(canvas.crop((edge - 1, 0, edge, canvas.height)).resize((max(right, 1), canvas.height)), (edge, 0))
    canvas = canvas.filter(ImageFilter.GaussianBlur(8))
    canvas.paste(start, (left, top))
    mask = Image.new("L", canvas.size, 255)
    box = [left + overlap * (left > 0), top + overlap * (top > 0)]
    box += [edge - overlap * (right > 0) - 1, top + height - overlap * (bottom > 0) - 1]
    ImageDraw.Draw(mask).rectangle(tuple(box), fill=0)
    return canvas, mask


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd15-inpaint"])
@pytest.mark.parametrize("margins", [8, (0, 0, 24, 0), (8, 16, 0, 24)])
def test_as_made_by_hand(name: str, margins: Any, opened: Callable[[str], Pipeline]) -> None:
    """With the default strength, and one at which the canvas's colours count: the same latents and the same bytes."""
    start = image(1)
    canvas, mask = by_hand(start, *(margins if isinstance(margins, tuple) else (margins,) * 4))
    for more in ({}, {"strength": 0.7}):
        found = opened(name)("a cat", image=start, margins=margins, **FIXED, **more)
        wanted = opened(name)("a cat", image=canvas, mask=mask, **FIXED, **more)
        assert torch.equal(found.latents[0], wanted.latents[0])
        assert found.images[0].tobytes() == wanted.images[0].tobytes()
        assert found.settings[0]["strength"] == more.get("strength", 1.0)


def test_the_image_stays_as_it_is(pipeline: Pipeline) -> None:
    """All of it but the strips beside its margins; on a side without a margin up to the edge."""
    start = image(2, 96, 80)
    made = pipeline("a cat", image=start, margins=(16, 0, 0, 8), **FIXED).images[0]
    assert made.size == (112, 88)
    kept = (OVERLAP, 0, 96, 80 - OVERLAP)
    assert made.crop((16 + kept[0], kept[1], 16 + kept[2], kept[3])).tobytes() == start.crop(kept).tobytes()
    assert made.crop((16, 0, 16 + OVERLAP, 80)).tobytes() != start.crop((0, 0, OVERLAP, 80)).tobytes()


def test_a_mask_is_added(pipeline: Pipeline) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (30, 24, 40, 40))
    request = pipeline.request("a cat", image=image(), mask=mask, margins=(0, 0, 0, 8))
    wanted = Image.new("L", (64, 72))
    wanted.paste(255, (0, 48, 64, 72))
    wanted.paste(255, (30, 24, 40, 40))
    assert request.mask is not None and request.mask.tobytes() == wanted.tobytes()
    black = pipeline.request("a cat", image=image(), mask=Image.new("L", (64, 64)), margins=(0, 0, 0, 8))
    assert black.mask is not None and black.mask.getbbox() == (0, 48, 64, 72)


@pytest.mark.parametrize(
    ("size", "given", "settled"),
    [
        ((64, 64), 8, (8, 8, 8, 8)),
        ((60, 52), 10, (10, 10, 10, 10)),
        ((60, 52), (3, 0, 1, 0), (3, 0, 1, 4)),  # height without a margin: below
        ((64, 64), (1, 2, 0, 0), (8, 8, 0, 0)),  # the margin that is asked for
        ((64, 64), (1, 0, 1, 0), (1, 0, 7, 0)),
        ((513, 512), (0, 0, 0, 64), (0, 0, 7, 64)),
        ((1, 1), 1, (1, 1, 6, 6)),
    ],
)
def test_sides_become_multiples(
    size: tuple[int, int], given: Any, settled: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Which is told; settled margins stay as they are."""
    found = rounded_margins(given, size, 8)
    assert found == settled and not any(side % 8 for side in canvas_size(size, found))
    told = caplog.text.count("are enlarged to " + ",".join(map(str, settled)))
    assert told == (canvas_size(size, given) != canvas_size(size, settled))
    caplog.clear()
    assert rounded_margins(found, size, 8) == found and not caplog.text


@pytest.mark.parametrize(
    ("size", "margins", "kept"),
    [
        ((512, 512), (64, 64, 64, 64), (16, 16, 496, 496)),
        ((1024, 768), (64, 0, 64, 64), (32, 0, 992, 736)),  # wider strips
        ((60, 96), (0, 0, 36, 0), (0, 0, 48, 96)),  # to the end of a latent: 48 pixels
        ((60, 60), (3, 0, 1, 4), (13, 0, 45, 48)),  # at 16, 48 and 48 of the canvas
        ((20, 40), (4, 0, 0, 0), (4, 0, 20, 40)),  # a fourth, to 8 of the canvas
    ],
)
def test_strips_end_where_latents_do(size: tuple[int, int], margins: Any, kept: tuple[int, ...]) -> None:
    _, mask = extended(image(0, *size), None, margins)
    left, top, right, bottom = mask.point(lambda shade: 255 - shade).getbbox() or (0, 0, 0, 0)
    assert (left - margins[0], top - margins[1], right - margins[0], bottom - margins[1]) == kept


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (20, 12), (1500, 40)])
def test_a_half_of_a_small_image_stays(size: tuple[int, int]) -> None:
    canvas, mask = extended(image(0, *size), None, (8, 8, 8, 8))
    assert canvas.size == mask.size == (size[0] + 16, size[1] + 16)
    left, top, right, bottom = mask.point(lambda shade: 255 - shade).getbbox() or (0, 0, 0, 0)
    assert right - left >= size[0] / 2 and bottom - top >= size[1] / 2
    assert mask.getextrema() == (0, 255)


def test_a_size_scales_the_canvas(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """As it scales an image and its mask; one of another shape stretches it, and is told."""
    canvas, mask = by_hand(image(), 32, 32, 32, 32)
    found = pipeline("a cat", image=image(), margins=32, size="64", **FIXED)
    wanted = pipeline("a cat", image=canvas, mask=mask, size="64", **FIXED)
    assert found.images[0].size == (64, 64) and found.images[0].tobytes() == wanted.images[0].tobytes()
    assert not caplog.text
    assert pipeline.request("a cat", image=image(), margins=32, width=64).height == 128
    assert "the image to start from has 128×128 pixels and is stretched to 64×128" in caplog.text


def test_other_passes_and_several_images(opened: Callable[[str], Pipeline]) -> None:
    """As with a mask: a second pass enlarges the whole, the refiner keeps the original's pixels, images their seeds."""
    pipeline, (canvas, mask) = opened("sdxl"), by_hand(image(), 0, 0, 32, 0)
    refined = Pipeline(pipeline.model, refiner=tiny.model("sdxl-refiner", shallow=True), dtype=torch.float32)
    for made_by, more in ((pipeline, {"hires": 1.5}), (refined, {"steps": 4}), (pipeline, {"n": 2, "batch": 2})):
        settings = {**FIXED, **more}
        found = made_by("a cat", image=image(), margins=(0, 0, 32, 0), **settings).images
        wanted = made_by("a cat", image=canvas, mask=mask, **settings).images
        assert [one.tobytes() for one in found] == [one.tobytes() for one in wanted]
        if "hires" in more:
            assert found[0].size == (144, 96)
        else:
            assert found[0].crop((0, 0, 48, 64)).tobytes() == image().crop((0, 0, 48, 64)).tobytes()


def test_images_of_every_kind(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Grey, with a palette, transparent, animated, larger than the model's, and in numpy's numbers of margins."""
    plain = place_image(64, 48)
    clear = plain.convert("RGBA")
    clear.putalpha(UPPER.resize((64, 48)))
    moving = encoded(plain.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (64, 48), 1)])
    for given, wanted in (
        (plain.convert("L"), plain.convert("L").convert("RGB")),
        (plain.quantize(16), plain.quantize(16).convert("RGB")),
        (io.BytesIO(png(plain)), plain),
        (clear, None),
        (io.BytesIO(moving), None),
        (image(0, 400, 300), image(0, 400, 300)),
    ):
        request = pipeline.request("a cat", image=given, margins=np.array([8, 0, 0, 4]))
        assert request.image is not None and request.image.mode == "RGB" and request.mask is not None
        if wanted is not None:
            box = (8, 0, 8 + wanted.width, wanted.height)
            assert request.image.crop(box).tobytes() == wanted.tobytes()
    assert "become white" in caplog.text and "the first alone is used" in caplog.text
    assert request.image.size == (408, 304) and request.mask.size == (408, 304)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"margins": 0},
        "margins 0: a whole number from 1 to 16384, or four, LEFT,TOP,RIGHT,BOTTOM, of which some",
    ),
    ({"margins": (0, 0, 0, 0)}, r"margins \(0, 0, 0, 0\): a whole"),
    ({"margins": -8}, "margins -8: a whole"),
    ({"margins": (8, 8, -8, 8)}, r"margins \(8, 8, -8, 8\): a whole"),
    ({"margins": 8.0}, "margins 8.0: a whole"),
    ({"margins": (8, 8, 8, 0.5)}, "a whole number from 1"),
    ({"margins": True}, "margins True: a whole"),
    ({"margins": "wide"}, "margins 'wide': a whole"),
    ({"margins": "8,8,8"}, r"margins \(8, 8, 8\): a whole"),
    ({"margins": [8]}, r"margins \(8,\): a whole"),
    ({"margins": 16_385}, "margins 16385: a whole"),
    ({"margins": 16_384}, r"margins 16384,.*: the image would have 32832×32832 pixels; at most 16384 a side"),
    ({"margins": (16_320, 0, 0, 16_320)}, f"16384×16384 pixels; at most 16384 a side, and {MOST_PIXELS:,} in all"),
    ({"margins": 8, "image": None}, "margins without an image: give the image that they extend"),
    ({"margins": 8, "mask": Image.new("L", (80, 80), 255)}, "the mask has 80×80 pixels, its image 64×64"),
    ({"margins": 8, "image": "nowhere.png"}, "nowhere.png does not exist"),
    ({"margins": 8, "outpaint": 16}, "margins 8 and outpaint 16 are one setting"),
    ({"margins": 8, "strength": 0.01}, "less than one step"),
    ({"margins": 8, "size": "65"}, "width 65: a multiple of 8"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_margins_are_named(given: dict[str, Any], message: str, pipeline: Pipeline) -> None:
    with pytest.raises(LdmError, match=message):
        pipeline.request("a cat", **{"image": image(), **given})


def test_models_and_conditions_without_margins(opened: Callable[[str], Pipeline]) -> None:
    with pytest.raises(LdmError, match="edits an image by instruction, and cannot extend it; leave margins out"):
        opened("sd15-edit").request("make it blue", image=image(), margins=8)
    with pytest.raises(LdmError, match="fills in images in one pass; leave hires out"):
        opened("sd15-inpaint").request("a cat", image=image(), margins=8, hires=1.5)
    model = opened("sd15").model
    steered = Pipeline(model, control_models={"inpaint": controls.controlnet(model.family)})
    settings = {"image": image(), "margins": 8}
    with pytest.raises(LdmError, match="control inpaint: with margins its image needs them too, 80×80 pixels"):
        steered.request("a cat", control={"inpaint": image()}, **settings)
    assert steered.request("a cat", control={"inpaint": image(0, 80, 80)}, **settings).mask is not None


# --- the command ------------------------------------------------------------------------------------------------------


def record_of(path: str) -> dict[str, Any]:
    record, _ = read_settings(Path(path))
    assert record is not None
    return record


def test_records_and_repetition(ldm: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With margins that were enlarged, a mask, a size; each again to the same bytes."""
    image(3, 60, 52).save("in.png")
    UPPER.resize((60, 52)).save("mask.png")
    for case in (["--margins", "0,10,9,0"], ["--outpaint", 8, "--mask", "mask.png"], ["--margins", 6, "--size", 96]):
        code, _, err = ldm("generate", "a cat", "--steps", 2, "--seed", 1, "--image", "in.png", "--out", "a.png", *case)
        assert code == 0, err
        record = record_of("a.png")
        assert record["task"] == "inpaint" and record["strength"] == 1 and record["image"]["path"] == "in.png"
        assert ("mask" in record) == ("--mask" in case)
        caplog.clear()
        code, out, err = ldm("repro", "a.png")
        assert out.startswith("identical"), err
        assert "enlarged" not in caplog.text + err
    assert (record["margins"], record["width"]) == ([6, 6, 6, 6], 96)


def test_lists_and_sheets(ldm: Any, tmp_path: Path) -> None:
    """A line of a list with margins of its own, beside others of one group; cells of a sheet; not for `ldm eval`."""
    image(3).save("in.png")
    UPPER.save("mask.png")
    lines = [{"margins": 8}, {"margins": [0, 0, 16, 0], "mask": "mask.png"}, {"margins": "8"}, {}]
    text = "".join(json.dumps({"prompt": f"cat {number}", **line}) + "\n" for number, line in enumerate(lines))
    (tmp_path / "p.jsonl").write_text(text)
    options = ["--steps", 2, "--image", "in.png"]
    code, out, err = ldm("generate", "--prompts", "p.jsonl", *options)
    assert code == 0, err
    paths = sorted(out.split())
    sizes = [Image.open(path).size for path in paths]
    assert sizes == [(80, 80), (80, 64), (80, 80), (64, 64)]
    for path in paths[:2]:
        assert ldm("repro", path)[1].startswith("identical")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "margins": [1, 2]}\n')
    assert "p.jsonl, line 1: margins (1, 2): a whole number" in ldm("generate", "--prompts", "p.jsonl", *options)[2]
    axes = ["--xy", 'margins=8,"0,0,16,0"', "--seed", 1, "--out", "s.png"]
    assert ldm("generate", "a cat", *options, *axes)[0] == 0
    assert record_of("s.png")["xy"]["columns"] == ["margins 8", "margins 0,0,16,0"]
    assert ldm("repro", "s.png")[1].startswith("identical")
    refused = ldm("eval", "emoji", "--data", tmp_path, "--with", "margins=8")
    assert refused[0] == 1 and "is not taken here: images are made of prompts alone" in refused[2]
    assert ldm("generate", "a cat", "--margins", "-8")[2].startswith("ldm: --margins -8: a whole number")
