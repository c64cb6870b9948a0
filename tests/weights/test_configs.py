"""The configurations that come with the project: each can be read, and the tiny one trains the whole family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from ldm.latent_diffusion import LatentDiffusion
from ldm.training.config import load
from ldm.training.phases import phases
from ldm.training.run import train
from ldm.training.start import starting_model
from ldm.weights.contrastive import load_clip
from pipelines import Pipeline

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_can_be_read(path: Path) -> None:
    config = load(path, ["data.source=images"])
    for stage in config.stages:
        found = phases(getattr(config, stage))
        assert found[-1].end == getattr(config, stage).steps
        assert all(phase.parts(processes) for phase in found for processes in (1, 2, 4, 8) if processes <= phase.batch)
    head = path.read_text().split("\n\n")[0].split("\nstages")[0]
    assert f" configs/{path.name}" in head  # the command


@pytest.mark.parametrize("path", [path for path in CONFIGS if "emoji" in path.name], ids=lambda path: path.stem)
def test_the_emoji_family_is_small(path: Path) -> None:
    """At most 36 MB in fp16: base, refiner, and what both share."""
    config = load(path)
    with torch.device("meta"):
        base, refiner = starting_model(config.model, 0), starting_model(config.refiner.model, 0, "refiner.model")
    assert refiner.family.text == base.family.text[-1:]  # so that they share it
    assert refiner.family.autoencoder == base.family.autoencoder
    networks = (base.unet, base.autoencoder, base.text_encoders, refiner.unet)
    assert sum(parameter.numel() for network in networks for parameter in network.parameters()) <= 36e6 / 2


def test_the_whole_family_from_nothing(tmp_path: Path) -> None:
    """Four stages, each from the one before; then an image of base and refiner together."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    draw = random.Random(0)
    for number in range(48):
        name, colour = draw.choice([("red", (220, 40, 40)), ("blue", (50, 70, 220))])
        image = Image.new("RGB", (32, 32), "white")
        left, top = draw.randint(2, 14), draw.randint(2, 14)
        ImageDraw.Draw(image).ellipse((left, top, left + 14, top + 14), fill=colour)
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {name} circle")
    path = next(path for path in CONFIGS if path.stem == "tiny")
    few = [f"{stage}.{key}" for stage in ("autoencoder", "text", "base", "refiner") for key in ("steps=4", "batch=8")]
    settings = load(path, [f"data.source={folder}", f"output={tmp_path / 'r'}", *few])
    told: list[str] = []
    torch.set_num_threads(1)
    train(settings, report=lambda stage, step, steps, figures: told.append(stage))
    assert list(dict.fromkeys(told)) == ["autoencoder", "text", "base", "refiner"]
    models = {name: LatentDiffusion.from_pretrained(tmp_path / "r" / name / "model") for name in settings.stages}
    scale = models["autoencoder"].autoencoder.config.scaling_factor
    assert scale != 0.13025
    assert models["refiner"].autoencoder.config.scaling_factor == scale
    pair = load_clip(tmp_path / "r" / "text" / "clip", models["base"])
    assert pair.encode_texts(["a red circle"]).shape == (1, 32)
    pipeline = Pipeline(models["base"], refiner=models["refiner"], device="cpu")
    assert pipeline("a red circle", steps=5, refiner_at=0.6).images[0].size == (32, 32)
    told.clear()
    train(settings, report=lambda stage, step, steps, figures: told.append(stage))
    assert told == []
