"""The built-in adapters: found by name, small, and of an effect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.errors import LdmError
from ldm.weights.builtin import ADAPTERS, builtin_adapter, builtin_adapters
from pipelines import Pipeline

MOST = 3 * 10**6  # bytes of all adapters
STEPS = 4


def drawn(pipeline: Pipeline, prompt: str = "octopus", **settings: object) -> np.ndarray:
    return np.asarray(pipeline(prompt, seed=1, steps=STEPS, **settings).images[0], float)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(dtype=torch.float32, device="cpu")


def test_they_are_small_and_say_whose_art_they_learned_from() -> None:
    assert sum(path.stat().st_size for path in builtin_adapters().values()) <= MOST
    notice = (ADAPTERS / "NOTICE.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in notice for name in builtin_adapters())


def test_a_lora_by_name_in_the_setting_and_in_a_prompt(pipeline: Pipeline) -> None:
    by_setting, by_tag = drawn(pipeline, adapters="contrast"), drawn(pipeline, "octopus <lora:contrast:1>")
    assert np.array_equal(by_setting, by_tag)
    assert np.abs(by_setting - drawn(pipeline)).mean() > 2  # of 255


def test_a_path_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert builtin_adapter("contrast") == ADAPTERS / "contrast.safetensors"
    monkeypatch.chdir(tmp_path)
    Path("contrast").mkdir()
    assert builtin_adapter("contrast") is None
    assert builtin_adapter("../adapters/contrast") is None


def test_a_name_that_is_nearly_right(pipeline: Pipeline) -> None:
    with pytest.raises(LdmError, match="did you mean contrast"):
        drawn(pipeline, adapters="contras")


def test_an_embedding_by_name(pipeline: Pipeline) -> None:
    learned = Pipeline(dtype=torch.float32, device="cpu", embeddings="ink")
    found = [drawn(one, "tired face, ink style") for one in (learned, pipeline)]
    assert np.abs(found[0] - found[1]).mean() > 2


def test_a_control_model_by_name(pipeline: Pipeline) -> None:
    """It acts by its scale, and the condition image is made of an image in the call."""
    ring = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(ring).ellipse((16, 16, 80, 80), fill="red")
    controlled = Pipeline(dtype=torch.float32, device="cpu", control_models="edges")
    made = [drawn(controlled, control={"canny": ring}, control_scale=scale) for scale in (0, 1)]
    assert np.array_equal(made[0], drawn(pipeline, size=(96, 96)))
    assert np.abs(made[1] - made[0]).mean() > 2
