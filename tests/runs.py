"""Training runs of tiny models on drawn shapes, and what they leave behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from ldm.cli.train import make_images
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.config import Config, load
from ldm.training.loop import Training
from ldm.training.run import TrainingRun, train
from ldm.training.stages.stage import MakeImages

TINY: dict[str, Any] = {
    "trackers": [],
    "data": {"holdout": 6, "workers": 0, "bucket_step": 8},
    "model": {
        "family": "sd15",
        "unet": {
            "channels": [16, 32], "depth": [0, 1], "heads": [2, 2], "groups": 8, "text_dim": 32, "layers": 1,
            "sample_size": 8,
        },
        "autoencoder": {
            "channels": [8, 16, 16], "attention": [False] * 3, "mid_attention": False, "layers": 1, "groups": 8,
            "sample_size": 32, "scaling_factor": 2.0,
        },
        "text": [{"width": 32, "layers": 2, "heads": 2, "hidden": 32, "vocab_size": 600, "context": 16}],
    },
    "base": {
        "steps": 6, "batch": 8, "sizes": [{"size": 32}], "optimizer": {"learning_rate": 2e-3, "warmup": 2},
        "log_every": 1, "save_every": 3, "validate_every": 6, "preview_every": 100, "ema": {"decay": 0.99},
    },
}  # fmt: skip
DEEP = "model.unet.depth=[1,1]"  # transformers on both levels


@contextmanager
def first_run() -> Iterator[None]:
    """A run that is a process's first, whatever ran there before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Each run is a process's first."""
    with first_run():
        yield


def config(shapes: Path, output: Path, *overrides: str) -> Config:
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(TINY))
    usual = {"data.source": shapes, "output": output}
    given = {override.partition("=")[0] for override in overrides}
    return load(path, [*(f"{key}={value}" for key, value in usual.items() if key not in given), *overrides])


def on_top(shapes: Path, output: Path, usual: Sequence[str], *overrides: str) -> Config:
    """The configuration with usual settings, those left out that are overridden."""
    given = {override.partition("=")[0] for override in overrides}
    return config(shapes, output, *(one for one in usual if one.partition("=")[0] not in given), *overrides)


def ready(chosen: Config) -> Training:
    """A run's only stage, ready to train."""
    run = TrainingRun(chosen, None, lambda *_: None)
    (stage,) = chosen.stages
    return run.training(stage, run.start(stage, None), run.folder / stage)


def lines(output: Path, stage: str = "base") -> list[dict[str, Any]]:
    """The log, without what depends on the time."""
    rows = [json.loads(line) for line in (output / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "waiting", "tflops")} for row in rows]


def weights(output: Path, stage: str = "base") -> bytes:
    return (output / stage / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def losses(output: Path, stage: str = "base") -> list[float]:
    return [row["loss/unet"] for row in lines(output, stage) if "loss/unet" in row]


def check_golden(name: str, found: list[float]) -> None:
    """Compare a loss curve with the recorded one, which a refactor must not change; GOLDEN=write records it anew."""
    path = Path(__file__).parent / "recorded" / "golden_loss.json"
    recorded = json.loads(path.read_text())
    if os.environ.get("GOLDEN") == "write":
        recorded[name] = [round(value, 6) for value in found]
        rows = [f"{json.dumps(key)}: {json.dumps(recorded[key])}" for key in sorted(recorded)]
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    assert found == pytest.approx(recorded[name], rel=1e-3)


class Pulled(Exception):  # noqa: N818
    """The plug."""


def interrupted(settings: Config, after: int) -> None:
    """A run that ends without warning after so many updates are logged."""

    def report(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if step == after and "loss/unet" in figures:
            raise Pulled

    with pytest.raises(Pulled):
        train(settings, report=report)


def whole_and_parts(settings: Callable[[Path], Config], folder: Path) -> tuple[Path, Path]:
    """The outputs of a run in one go and of one that was interrupted after a checkpoint, whose logs are the same.

    Both have the same name, which files may hold.
    """
    (folder / "parts").mkdir()
    whole, parts = folder / "style", folder / "parts" / "style"
    train(settings(whole))
    again = settings(parts)
    interrupted(again, after=5)
    train(again)
    for stage in again.stages:
        assert lines(parts, stage) == lines(whole, stage)
    return whole, parts


def noting(seen: list[list[str]]) -> MakeImages:
    """Makes images in two steps, and notes the names of the settings of each call."""

    def make(
        model: LatentDiffusion,
        prompts: list[str],
        size: tuple[int, int],
        seeds: Sequence[int],
        with_: Mapping[str, Any],
    ) -> list[Image.Image]:
        seen.append(sorted(with_))
        return make_images(model, prompts, size, seeds, {**with_, "steps": 2})

    return make
