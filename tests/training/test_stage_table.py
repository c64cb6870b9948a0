"""The stage table: what the forecast counts is what a stage trains; a new kind is one file, a section and a row."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from launched import PATIENCE
from safetensors.torch import load_file
from torch import nn

from ldm.evaluation.networks.lpips import LPIPS, save_lpips
from ldm.training.selftest import Ground, lay_out
from ldm.training.stages.autoencoder import AutoencoderStage
from ldm.training.stages.ip_adapter import ImagePromptStage
from ldm.training.stages.sections import SECTIONS
from ldm.training.stages.table import KINDS

ROOT = Path(__file__).parents[2]
CASES: dict[str, list[dict[str, Any]]] = {  # options of each kind that change what is trained, or what runs beside it
    "autoencoder": [
        {}, {"adversarial_weight": 0, "perceptual": "LPIPS"}, {"decoder_only": True},
        {"discriminator": {"channels": 16}, "ema": {"widths": [0.1]}}, {"codebook": 8},
        {"codebook": 8, "codebook_decay": 0},
    ],
    "text": [{}, {"image_only": True}],
    "base": [{}, {"train_text": True, "ema": {"decay": 0, "widths": [0.1, 0.2]}}],
    "refiner": [{"train_text": True}],
    "adapter": [
        {}, {"train_text": True, "ema": {"decay": 0.9}}, {"kind": "loha", "rank_dropout": 0},
        {"dora": True, "rank_dropout": 0},
    ],
    "textual-inversion": [{}, {"pivotal": True, "train_text": True, "ema": {"decay": 0.9}}],
    "controlnet": [{"ema": {"decay": 0.9}}],
    "t2i-adapter": [{}],
    "ip-adapter": [{}, {"kind": "base"}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Each run is a process's first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    lay_out(folder)
    torch.manual_seed(1)
    save_lpips(LPIPS("alex"), folder / "LPIPS.safetensors", {})
    return Ground(folder, "no", 8)


def test_every_kind_is_here() -> None:
    assert list(CASES) == list(SECTIONS) == [kind.name for kind in KINDS]


def test_names_and_results_are_those_of_published_runs() -> None:
    """Configurations, folders and checkpoints hold them."""
    assert [(kind.name, kind.result) for kind in KINDS] == [
        ("autoencoder", "model"), ("text", "model"), ("base", "model"), ("refiner", "model"),
        ("adapter", "adapter.safetensors"), ("textual-inversion", "embeddings"), ("controlnet", "controlnet"),
        ("t2i-adapter", "t2i-adapter"), ("ip-adapter", "ip-adapter.safetensors"),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), [(name, options) for name, rows in CASES.items() for options in rows])
def test_the_forecast_counts_what_the_stage_trains(ground: Ground, name: str, options: dict[str, Any]) -> None:
    changes: dict[str, Any] = {f"{name}__{key}": value for key, value in options.items() if key != "codebook"}
    if "perceptual" in options:
        changes |= {"autoencoder__perceptual": str(ground.folder / "LPIPS.safetensors")}
    if "codebook" in options:
        changes |= {"model__autoencoder__codebook": 8, "model__autoencoder__codebook_dim": 4}
    number = sum(path.is_dir() for path in ground.folder.iterdir())
    run = ground.run(f"{number}", stages=[name], **changes)
    before = None
    if name == "refiner":
        before = run.start("base", None)
    training = run.training(name, run.start(name, before), run.folder / name)
    (row,) = run.forecasts
    stage = training.stage
    networks: list[nn.Module] = [*stage.model.modules().values(), *(one.module for one in stage.players.values())]
    if isinstance(stage, AutoencoderStage) and stage.perceptual:
        networks.append(stage.perceptual)
    if isinstance(stage, ImagePromptStage):
        networks.append(stage.encoder.tower)
    everything = {id(p): p for network in networks for p in network.parameters()}.values()
    trained = sum(p.numel() for p in everything if p.requires_grad)
    in_optimizers = sum(
        p.numel() for one in stage.players.values() for group in one.optimizer.param_groups for p in group["params"]
    )
    assert row.trained == trained == in_optimizers
    assert row.frozen == sum(p.numel() for p in everything) - trained
    kept = [tensor for one in training.weights.averages.values() for rows in one.averages for tensor in rows]
    assert row.averages == sum(tensor.nbytes for tensor in kept)
    assert row.activations > 0
    training.accelerator.free_memory()


def test_a_decoder_alone_costs_less(ground: Ground) -> None:
    from ldm.training.forecast import forecast

    whole, decoder = (
        forecast(ground.config("x", stages=["autoencoder"], autoencoder__decoder_only=alone))[0]
        for alone in (False, True)
    )
    assert decoder.trained < whole.trained
    assert decoder.activations < whole.activations
    assert decoder.flops_per_image < whole.flops_per_image


# --- a made-up kind ---------------------------------------------------------------------------------------------------


def blocks(title: str) -> list[tuple[str, str]]:
    """The language and the text of each block in a section of CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", text, re.S)


def patched(text: str, diff: str) -> str:
    """A text with a diff applied: hunks of lines that begin with a blank, - or +, separated by @@."""
    for hunk in diff.split("@@\n"):
        rows = hunk.splitlines(keepends=True)
        old = "".join(row[1:] for row in rows if row[0] != "+")
        assert text.count(old) == 1
        text = text.replace(old, "".join(row[1:] for row in rows if row[0] != "-"))
    return text


USE = """
import json, sys
import torch
torch.set_num_threads(1)
from ldm.training.config import describe
from ldm.training.forecast import forecast
from ldm.training.run import train
from ldm.training.selftest import Ground

ground = Ground(__import__("pathlib").Path(sys.argv[1]), "no", 8)
config = ground.config("run", stages=["biases"], biases__steps=1, data__cache=True, trackers=[])
train(config)
row = forecast(config)[0]
print(json.dumps({"trained": row.trained, "keys": [name for name, *_ in describe() if name.startswith("biases.")]}))
"""


def test_a_new_kind_is_one_file_a_section_and_a_row(ground: Ground, tmp_path: Path) -> None:
    """That of CONTRIBUTING, in a copy of the package: it is configured, planned, trained and written."""
    shutil.copytree(ROOT / "ldm", tmp_path / "ldm", ignore=shutil.ignore_patterns("__pycache__"))
    stages = tmp_path / "ldm" / "training" / "stages"
    (_, stage), (_, section), (_, row) = blocks("Add a training stage")
    (stages / "biases.py").write_text(stage, encoding="utf-8")
    for path, diff in ((stages / "sections.py", section), (stages / "table.py", row)):
        path.write_text(patched(path.read_text(encoding="utf-8"), diff), encoding="utf-8")
    work = tmp_path / "work"
    shutil.copytree(ground.folder / "images", work / "images")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(work)], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
        check=False, env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert "biases.optimizer.learning_rate" in told["keys"]
    after = load_file(work / "run" / "biases" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    before = ground.run("start").start("base", None).unet.state_dict()
    changed = {key for key, weight in after.items() if not torch.equal(weight, before[key])}
    assert changed
    assert all(key.endswith("bias") for key in changed)
    assert told["trained"] == sum(weight.numel() for key, weight in after.items() if key.endswith("bias"))
    assert json.loads((work / "run" / "biases" / "done.json").read_text())["steps"] == 1
