"""Kinds of condition images in calls with control models: made of the given image, recorded, refused."""

from __future__ import annotations

from pathlib import Path

import controls
import numpy as np
import pytest
import tiny
import torch
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


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not (kind.model or kind.mask)])
def test_a_condition_image_is_made_of_the_given_one(pipeline: Pipeline, photo: Path, kind: str) -> None:
    made = pipeline("a cat", control=f"{kind}={photo}", **STEPS)
    ready = pipeline("a cat", control=condition(kind, Image.open(photo)), **STEPS)
    assert torch.equal(made.latents[0], ready.latents[0])
    (record,) = made.settings[0]["control"]
    assert (record["kind"], record["path"]) == (kind, str(photo))
    again = pipeline("a cat", control=made.settings[0]["control"], **STEPS)
    assert torch.equal(again.latents[0], made.latents[0])


def test_a_network_that_is_not_there(pipeline: Pipeline, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LdmError, match="Depth-Anything-V2-Small-hf cannot be opened as a model for depth-estimation"):
        pipeline("a cat", control={"depth": photo}, **STEPS)
    with pytest.raises(LdmError, match="the kind 'cany' of condition images does not exist; did you mean canny"):
        pipeline("a cat", control={"cany": photo}, **STEPS)
