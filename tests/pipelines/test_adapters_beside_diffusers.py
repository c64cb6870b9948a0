"""Images with LoRAs against diffusers' on the same weights, files and noise, and with every way to run the U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from adapter_files import adapter, alpha, lora, saved
from PIL import Image
from rounding import RUN, near
from torch import Tensor

from ldm.weights.adapters.names import Place
from pipelines import Pipeline

NOISE = {"rng": "diffusers", "weights": False, "seed": 3, "output": "latents"}
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def changeable(place: Place) -> bool:
    """Attention, but not in CLIP's first tower, which diffusers 0.42 cannot change."""
    return "attn" in place.layer and place.component != "text_encoder"


def with_alpha(value: Tensor) -> dict[str, Tensor]:
    return {**lora(value), "alpha": alpha(2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, each with two LoRAs."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for family, naming in (("sd15", "kohya"), ("sdxl", "kohya-sgm")):
        model = tiny.model(family)
        model.save_pretrained(root / family)
        for name in ("one", "two"):
            saved(adapter(model, naming, with_alpha, changeable), root / f"{family}-{name}.safetensors")
    return root


IMAGE = Image.effect_noise((64, 64), 90).convert("RGB")
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (16, 16, 56, 40))
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "text to image": ("", {"width": 64, "height": 72}),
    "image to image": ("Img2Img", {"image": IMAGE, "strength": 0.6}),
    "inpainting": ("Inpaint", {"image": IMAGE, "mask_image": MASK, "strength": 0.8}),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_latents(folder: Path, family: str, task: str) -> None:
    ending, inputs = TASKS[task]
    xl = "XL" if family == "sdxl" else ""
    theirs = getattr(diffusers, f"StableDiffusion{xl}{ending}Pipeline").from_pretrained(folder / family)
    theirs.set_progress_bar_config(disable=True)
    weights = {"one": 0.8, "two": -0.4}
    for name in weights:
        theirs.load_lora_weights(folder, weight_name=f"{family}-{name}.safetensors", adapter_name=name)
    theirs.set_adapters(list(weights), list(weights.values()))
    settings = {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": "bad"}
    wanted = theirs(
        "a cat", generator=torch.Generator().manual_seed(3), output_type="latent", **settings, **inputs
    ).images  # fmt: skip
    pipeline = Pipeline(folder / family, dtype=torch.float32, device="cpu", quick=False)
    adapters = {folder / f"{family}-{name}.safetensors": weight for name, weight in weights.items()}
    made = torch.stack(pipeline("a cat", adapters=adapters, **settings, **inputs, **NOISE).latents)
    near(made, wanted, RUN)
    plain = torch.stack(pipeline("a cat", **settings, **inputs, **NOISE).latents)
    assert float((plain - made).abs().max()) > 0.01 * float(made.abs().max())


@pytest.mark.parametrize(
    "way",
    [{}, {"offload": "components"}, {"offload": "layers"}, {"quantize": "int8-weights"}, {"quantize": "int8"}],
    ids=str,
)
def test_every_way_of_running(folder: Path, way: dict[str, Any]) -> None:
    """The same latents as with plain layers, or, with rounded weights, nearly; another call is as before."""
    file = {folder / "sdxl-one.safetensors": 0.5}
    settings = {"steps": 3, "seed": 1, "output": "latents"}
    plain = Pipeline(folder / "sdxl", dtype=torch.float32, device="cpu", quick=False)
    pipeline = Pipeline(folder / "sdxl", dtype=torch.float32, device="cpu", **way)
    before, with_it, after = (
        torch.stack(pipeline("a cat", **settings, **more).latents) for more in ({}, {"adapters": file}, {})
    )
    wanted = torch.stack(plain("a cat", adapters=file, **settings).latents)
    without = torch.stack(plain("a cat", **settings).latents)
    assert torch.equal(before, after)
    moved = float((wanted - without).norm())
    assert float((with_it - wanted).norm()) < (0.1 if "quantize" in way else 1e-4) * moved
