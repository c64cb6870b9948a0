"""Adapters in a pipeline whose networks are fused, offloaded or quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapter_files import adapter, saved

from pipelines import Pipeline

WAYS = [{}, {"offload": "components"}, {"offload": "layers"}, {"quantize": "int8-weights"}, {"quantize": "int8"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a LoRA of the U-Net and of both text towers."""
    root, model = tmp_path_factory.mktemp("tuned"), tiny.model("sdxl")
    model.save_pretrained(root / "model")
    torch.manual_seed(0)
    saved(adapter(model, "kohya-sgm"), root / "style.safetensors")
    return root


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_of_running(folder: Path, way: dict[str, Any]) -> None:
    """The same latents as with plain layers, or, with rounded weights, nearly; another call is as before."""
    mix = {folder / "style.safetensors": 0.5}
    settings = {"steps": 3, "seed": 1, "output": "latents"}
    plain = Pipeline(folder / "model", dtype=torch.float32, device="cpu", quick=False)
    pipeline = Pipeline(folder / "model", dtype=torch.float32, device="cpu", **way)
    before, with_it, after = (
        torch.stack(pipeline("a cat", **settings, **more).latents) for more in ({}, {"adapters": mix}, {})
    )
    wanted = torch.stack(plain("a cat", adapters=mix, **settings).latents)
    without = torch.stack(plain("a cat", **settings).latents)
    assert torch.equal(before, after)
    moved = float((wanted - without).norm())
    assert float((with_it - wanted).norm()) < (0.1 if "quantize" in way else 1e-4) * moved
