"""`ldm generate --xy` and `compare`: sheets whose cells are the images of single calls, and that can be made again."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import adapter_files
import numpy as np
import pytest
import tiny
from commands import ldm
from launched import Program
from PIL import Image

from ldm.cli.saving import Saver
from ldm.errors import LdmError
from ldm.images import read_settings, save_png
from ldm.sheets import GAP, Layout, layout
from pipelines import Pipeline
from pipelines.comparison import compare

__all__ = ["ldm"]  # a fixture
FIXED = ["--steps", 2, "--seed", 7]


def cell(sheet: Image.Image, plan: Layout, column: int, row: int) -> np.ndarray:
    """The pixels of a cell of 64×64 pixels."""
    width, height = plan.cell
    x, y = plan.margin + column * (width + GAP) + (width - 64) // 2, plan.top + row * (height + GAP)
    return np.asarray(sheet.crop((x, y, x + 64, y + 64)))


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def recorded(path: str | Path) -> dict[str, Any]:
    record, _ = read_settings(Path(path))
    assert record is not None
    return record


def test_cells_are_the_images_of_single_calls(ldm: Any) -> None:
    code, out, err = ldm("generate", "a cat", "--seed", 7, "--out", "o", "--xy", "steps=1,2", "guidance=1,3")
    assert (code, err) == (0, "")
    assert out.split() == [f"o/0000{number}-7.png" for number in range(4)] + ["o/00004-xy.png"]
    plan = layout((64, 64), ["steps 1", "steps 2"], ["guidance 1", "guidance 3"])
    sheet = Image.open("o/00004-xy.png")
    assert sheet.size == plan.size
    for index, (column, row) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        own = ["--steps", column + 1, "--guidance", (1, 3)[row], "--seed", 7, "--out", "one.png"]
        assert ldm("generate", "a cat", *own)[0] == 0
        assert np.array_equal(cell(sheet, plan, column, row), pixels("one.png"))
        assert np.array_equal(pixels(f"o/0000{index}-7.png"), pixels("one.png"))
        assert recorded(f"o/0000{index}-7.png") == recorded("one.png")
    record = recorded("o/00004-xy.png")
    assert (record["prompt"], record["seed"], "steps" in record) == ("a cat", 7, False)
    assert record["xy"]["columns"] == ["steps 1", "steps 2"]
    assert [(one["steps"], one["guidance"]["scale"]) for one in record["xy"]["cells"]] == [
        (1, 1),
        (2, 1),
        (1, 3),
        (2, 3),
    ]
    assert ldm("repro", "o/00004-xy.png", "--out", "again.png")[1].startswith("identical")
    assert np.array_equal(pixels("again.png"), np.asarray(sheet)) and recorded("again.png") == record
    assert ldm("repro", "o/00002-7.png")[1].startswith("identical")


def test_cells_that_share_a_batch_and_two_models(ldm: Any, models: Path, tmp_path: Path) -> None:
    """In bf16 the last bit depends on the batch: of six cells of each model, of which four have the same steps."""
    axes = ["--xy", f"model={models / 'sd15'},{models / 'sdxl'}", 'prompt=a cat,a dog,"a fox, oil"']
    code, out, err = ldm("generate", *FIXED, "--dtype", "bf16", "--out", "s.png", "--json", *axes, model=None)
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    record = recorded("s.png")
    assert json.loads(line) == {"path": "s.png", **record}
    assert (record["xy"]["columns"], record["xy"]["rows"]) == (
        ["model sd15", "model sdxl"],
        ["a cat", "a dog", "a fox, oil"],
    )
    own = record["xy"]["cells"]
    assert [one["source"] for one in own] == [str(models / name) for name in ("sd15", "sdxl")] * 3
    assert ([one["place"] for one in own], record["batch"]) == ([0, 0, 1, 1, 2, 2], 3)
    assert ldm("repro", "s.png")[1].startswith("identical")
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    wrong = ldm("repro", "s.png", "--model", models / "sd15")
    assert wrong[0] == 1 and "was made with other weights" in wrong[2]


def test_weights_of_an_adapter_and_images_to_start_from(ldm: Any, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    adapter_files.saved(adapter_files.adapter(tiny.model("sd15", shallow=True), "kohya"), file)
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(f"{name}.png")
    axes = ["--xy", "lora-weight=0,0.5", "image=red.png,blue.png"]
    code, _, err = ldm("generate", "a cat", *FIXED, "--lora", file, "--strength", 0.6, "--out", "s.png", *axes)
    assert (code, err) == (0, "")
    record = recorded("s.png")
    assert (record["xy"]["columns"][1], record["xy"]["rows"][0]) == ("LoRA weight 0.5", "image red.png")
    assert ldm("repro", "s.png")[1].startswith("identical")
    sheet, plan = Image.open("s.png"), layout((64, 64), record["xy"]["columns"], record["xy"]["rows"])
    own = ["--lora", f"{file}:0.5", "--strength", 0.6, "--image", "blue.png", "--out", "one.png"]
    assert ldm("generate", "a cat", *FIXED, *own)[0] == 0
    assert np.array_equal(cell(sheet, plan, 1, 1), pixels("one.png"))
    missing = ldm("generate", "a cat", *FIXED, "--strength", 0.6, "--xy", "image=red.png,green.png")
    assert missing == (1, "", "ldm: green.png does not exist\n")


def test_the_plan_of_a_sheet_is_printed_and_nothing_made(ldm: Any, tmp_path: Path) -> None:
    code, out, _ = ldm("generate", "a cat", *FIXED, "--dry-run", "--xy", "guidance=1,3,5")
    plan = json.loads(out)
    assert (code, plan["images"], plan["columns"], plan["rows"]) == (
        0,
        3,
        ["guidance 1", "guidance 3", "guidance 5"],
        [],
    )
    assert plan["settings"]["guidance"]["scale"] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--xy", "steps=1,2", "--prompts", "p.txt"], "of one prompt; give others as --xy prompt="),
        (["a", "b", "--xy", "steps=1,2"], "--xy compares images of one prompt"),
        (["a", "--xy", "steps=1,2", "-n", "2"], "-n 2: a cell of --xy has one image; compare seeds by --xy seed=1,2"),
        (["a", "--xy", "steps=1,2", "--grid"], "--xy makes a sheet of its own; leave out --grid"),
        (["a", "--xy", "steps=1,2", "seed=1", "guidance=3"], "one for its rows; leave out guidance=3"),
        (["--xy", "steps=1,2"], "no prompt: give one, or an axis prompt="),
        (["a", "--xy", "prompt=b,c"], "--xy prompt: prompt is given besides the axis; leave one out"),
        (["a", "--steps", "3", "--xy", "steps=1,2"], "--xy steps: steps is given besides the axis"),
        (["a", "--xy", "steps=1,2", "--out", "no/s.png"], "does not exist; create it first"),
        (["a", "--xy", "steps=1,2", "size=64,33"], "cell steps 1, size 33: width 33: a multiple of 8"),
        (["a", "--xy", "model=nowhere,emoji"], "nowhere does not exist; give a model folder"),
        (["a", "--xy", "size=64,10240"], "the sheet would have 20484×10293 pixels; at most 100,000,000 are read"),
        (["a", "--xy", "model=SDXL,SD15", "prompt_2=b"], "cell model sd15, prompt 2: b: "),
    ],
)  # fmt: skip
def test_wrong_sheets_get_one_line(
    ldm: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Before a model is loaded."""
    monkeypatch.setattr(Saver, "save", None)
    monkeypatch.setattr("ldm.cli.making.Pipeline", None)
    (tmp_path / "p.txt").write_text("a\n")
    named = [word.replace("SDXL", str(models / "sdxl")).replace("SD15", str(models / "sd15")) for word in arguments]
    code, out, err = ldm("generate", *named, model=None if any(word.startswith("model=") for word in named) else "sd15")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert not list(tmp_path.rglob("*.png"))


def test_a_sheet_is_made_by_one_process(ldm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (
        "--xy makes its sheet in one process; start it without a launcher" in ldm("generate", "a", "--xy", "steps=1")[2]
    )


def test_a_stopped_sheet_has_what_is_made(ldm: Any, models: Path, tmp_path: Path) -> None:
    values = ",".join(str(1 + number / 10) for number in range(60))
    process = Program(
        "-m", "ldm", "generate", "a cat", "--model", models / "sd15", "--dtype", "fp32", "--device", "cpu",
        "--steps", 12, "--seed", 1, "--out", tmp_path / "o", "--xy", f"guidance={values}",
    )  # fmt: skip
    while len(list(tmp_path.glob("o/*-1.png"))) < 2 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in err
    record = recorded("o/00060-xy.png")
    made = sum(one is not None for one in record["xy"]["cells"])
    assert 2 <= made < 60 and f"ldm: the sheet has {made} of 60 images" in err
    assert out.split()[-1].endswith("o/00060-xy.png") and len(out.split()) == made + 1
    assert len(list(tmp_path.glob("o/*-1.png"))) == made
    assert ldm("repro", "o/00060-xy.png")[1].startswith("identical")


def test_quoted_values_and_names_of_other_programs(ldm: Any) -> None:
    axes = ["--xy", 'prompt="a fox, oil",a cat', "sampler=DPM++ 2M Karras,ddim"]
    assert ldm("generate", "--steps", 1, "--out", "s.png", *axes)[:2] == (0, "s.png\n")
    record = recorded("s.png")
    assert record["xy"]["columns"] == ["a fox, oil", "a cat"]
    assert [one["scheduler"] for one in record["xy"]["cells"]] == ["dpm++2m", "dpm++2m", "ddim", "ddim"]


@pytest.mark.parametrize(
    "change",
    [3, {}, {"cells": [{}]}, {"columns": [1, 2]}, {"cells": [None, None]}, {"cells": [3, None]}, {"rows": "a"}],
)
def test_damaged_records_of_sheets(ldm: Any, change: Any) -> None:
    whole = {"columns": ["a", "b"], "rows": [], "cells": [{}, None]}
    damaged = {**whole, **change} if isinstance(change, dict) and change else change
    save_png(Image.new("RGB", (64, 64)), Path("s.png"), {"prompt": "a", "xy": damaged})
    assert ldm("repro", "s.png") == (1, "", "ldm: the sheet's record is damaged\n")


def test_a_comparison_in_python(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(models / "sd15", device="cpu")
    found = compare("a cat", {"steps": [1, 2], "seed": [3, 4]}, pipeline=pipeline, guidance=2)
    assert (found.columns, found.rows) == (("steps 1", "steps 2"), ("seed 3", "seed 4"))
    single = pipeline(["a cat"] * 2, steps=2, seed=[3, 4], guidance=2)
    assert [np.asarray(found.images[index]).tobytes() for index in (1, 3)] == [
        image.tobytes() for image in single.images
    ]
    assert found.settings[1] == single.settings[0]
    assert found.image().size == layout((64, 64), found.columns, found.rows).size
    both = compare("a cat", {"model": [models / "sd15", models / "sdxl"]}, steps=1, seed=1, device="cpu", refiner=None)
    assert [both.settings[index]["source"] for index in (0, 1)] == [str(models / name) for name in ("sd15", "sdxl")]
    white = Image.new("RGB", (64, 64), "white")
    assert len(compare(None, {"prompt": ["a", "b"]}, pipeline=pipeline, image=white, steps=2).images) == 2
    monkeypatch.setattr(Pipeline, "make", None)
    for axes, given, message in (
        ({"steps": [1]}, {"n": 2}, "n: a comparison has one prompt and one image in each cell"),
        ({"model": ["emoji"]}, {"pipeline": pipeline}, "pipeline is a loaded model"),
        ({"steps": [1]}, {"pipeline": pipeline, "device": "cpu"}, "pipeline is a loaded model"),
        ({"width": [64, 33]}, {"pipeline": pipeline}, "cell width 33: width 33"),
        ({"size": ["64x64", "10240x8192"]}, {"pipeline": pipeline}, "the sheet would have"),
        ({"replace": ["dog", "fox"]}, {"pipeline": pipeline}, "axes: replace 'dog': the prompts do not have it"),
    ):
        with pytest.raises(LdmError, match=message):
            compare("a cat", axes, **given)
