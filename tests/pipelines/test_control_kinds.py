"""Kinds of condition images in calls with control models: made of the given image, recorded, refused."""

from __future__ import annotations

import sys
from pathlib import Path

import controls
import numpy as np
import pytest
import tiny
import torch
from commands import run
from PIL import Image

from ldm.conditions.table import KINDS, condition
from ldm.errors import LdmError
from pipelines import Pipeline

STEPS = {"steps": 2, "seed": 1, "output": "latents"}


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("models") / "control"
    controls.folder(controls.controlnet(tiny.family("sd15"), 0), folder)
    return Pipeline(tiny.model("sd15"), control_models=folder)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.model])
def test_a_condition_image_is_made_of_the_given_one(pipeline: Pipeline, photo: Path, kind: str) -> None:
    made = pipeline("a cat", control=f"{kind}={photo}", **STEPS)
    ready = pipeline("a cat", control=condition(kind, Image.open(photo)), **STEPS)
    assert torch.equal(made.latents[0], ready.latents[0])
    (record,) = made.settings[0]["control"]
    assert (record["kind"], record["path"]) == (kind, str(photo))
    again = pipeline("a cat", control=made.settings[0]["control"], **STEPS)
    assert torch.equal(again.latents[0], made.latents[0])


def test_what_makes_them_is_looked_for_before_the_run(
    pipeline: Pipeline, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "cv2", None)
    for kind, message in (
        ("depth", "Depth-Anything-V2-Small-hf, which makes condition images, cannot be read"),
        ("pose", "rtdetr_r50vd_coco_o365, which makes condition images, cannot be read"),
        ("canny", "edges are drawn by OpenCV, which is missing"),
        ("cany", "the kind 'cany' of condition images does not exist; did you mean canny"),
    ):
        with pytest.raises(LdmError, match=message):
            pipeline.request("a cat", control={kind: photo})
        code, _, err = run(capsys, monkeypatch, "generate", "a cat", "--control", f"{kind}={photo}")
        assert code == 1 and message in err
