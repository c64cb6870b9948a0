"""No test reaches the network; models are tiny and made here."""

# ruff: noqa: E402

from __future__ import annotations

import gc
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

# before PyTorch is imported, and for the processes that tests start, too
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to others
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # it need not compile a program for each kind of vectors first
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes: as many threads as there are cores, in all
    THREADS = max((os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(THREADS)

gc.disable()  # until all tests are found: searches for garbage take a quarter of that time

import pytest
import tiny
import torch
import transformers
from PIL import Image, ImageDraw

LONG = [  # the files that take longest: begun first, so that several test processes end together
    "test_train", "test_cluster", "test_page", "test_pipelines", "test_scale", "test_generate", "test_compilation",
    "test_saving", "test_adapter_stage", "test_autoencoder_stage", "test_selftest", "test_eval_command", "test_readme",
    "test_engine", "test_single_file", "test_textual_inversion_stage", "test_served_repro", "test_text_stage",
    "test_training_evaluation", "test_evaluation", "test_controlnet_stage", "test_fused_gpu", "test_trainings",
    "test_control", "test_page_train", "test_stage_table", "test_cli", "test_fused_cpu", "test_editing",
    "test_adapters_tuned", "test_intervals", "test_autoencoder", "test_folder",
]  # fmt: skip

os.fsync = lambda handle: None  # no test cuts the power: files need not be on the disk, which takes milliseconds each

logging.getLogger("xformers").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # which begins with the files that have the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


MANY = 50  # modules that tests have imported
FROZEN = {"modules": 0}


def pytest_collection_finish() -> None:
    """Leave all that is imported out of searches for garbage: a training run ends with one, which takes a second."""
    gc.collect()
    gc.freeze()
    gc.enable()
    FROZEN["modules"] = len(sys.modules)


def pytest_runtest_setup() -> None:
    """What tests have imported since then, too."""
    if len(sys.modules) > FROZEN["modules"] + MANY:
        pytest_collection_finish()


def pytest_unconfigure() -> None:
    """Give it back, so that nothing is left at exit: some libraries tell."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def own_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What PyTorch compiles is compiled here: what others left in its folder may be for another processor."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))


FORECASTS: dict[str, list[Any]] = {}
IN_NO_FORECAST = {  # keys of a stage: when something is done, how fast it learns, and what is drawn
    "steps", "log_every", "save_every", "validate_every", "preview_every", "keep", "prompts", "min_snr", "noise_offset",
    "drop_caption", "drop_together", "drop_size", "drop_before", "drop_both", "text_learning_rate", "up_rate", "alpha",
    "max_norm", "dtype", "timestep_range", "timesteps", "logit_mean", "logit_std", "outside_mask", "evaluation",
}  # fmt: skip
NOR_OF_OPTIMIZERS = {"learning_rate", "warmup", "schedule", "cooldown", "weight_decay", "epsilon", "betas"}


@pytest.fixture(autouse=True)
def forecasts_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that train the same networks share a forecast, which takes them as long as a few steps."""
    run = sys.modules.get("ldm.training.run")
    if run is None:
        return
    forecast = run.forecast
    without = dict.fromkeys(IN_NO_FORECAST, True) | {"optimizer": NOR_OF_OPTIMIZERS}

    def kept(config: Any, processes: int = 1) -> list[Any]:
        sections = [getattr(config, name).model_dump_json(exclude=without) for name in config.stages]
        key = str((config.stages, sections, config.model, config.data.cache, config.precision, processes))
        if key not in FORECASTS:
            FORECASTS[key] = forecast(config, processes)
        return FORECASTS[key]

    monkeypatch.setattr(run, "forecast", kept)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Random inputs are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, by the names of their families."""
    root = tmp_path_factory.mktemp("models")
    for name in ("sd15", "sd15-edit", "sdxl", "sdxl-refiner"):
        tiny.model(name, shallow=True).save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty small images of coloured shapes, wide and tall ones too, with captions."""
    colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}
    folder = tmp_path_factory.mktemp("shapes")
    draw = random.Random(0)
    for number in range(50):
        colour, shape = draw.choice(list(colours)), draw.choice(["circle", "square"])
        width, height = draw.choice([(32, 32), (48, 32), (32, 40)])
        image = Image.new("RGB", (width, height), "white")
        left, top = draw.randint(2, width - 18), draw.randint(2, height - 18)
        kind = ImageDraw.Draw(image).ellipse if shape == "circle" else ImageDraw.Draw(image).rectangle
        kind((left, top, left + 14, top + 14), fill=colours[colour])
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {colour} {shape}")
    return folder
