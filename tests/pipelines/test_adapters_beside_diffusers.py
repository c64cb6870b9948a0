"""Runs with LoRAs against diffusers' own, on the same weights and numbers: `load_lora_weights` and `set_adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_files
import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from rounding import near

from ldm.weights.adapters.names import Place
from pipelines import Pipeline

APART = 1e-4
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def in_the_unet(place: Place) -> bool:
    """Attention in the U-Net: in text towers, these versions of diffusers and transformers do not read LoRAs."""
    return place.component == "unet" and adapter_files.attention(place)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and a folder with a tiny model and two LoRAs, `one` in diffusers' names, `two` in kohya's."""
    root, model = tmp_path_factory.mktemp("beside"), tiny.model(request.param, shallow=True)
    model.save_pretrained(root / "model")
    ours = ("lora_A.weight", "lora_B.weight")
    torch.manual_seed(3)
    one = adapter_files.adapter(model, "diffusers", lambda value: adapter_files.lora(value, ours), in_the_unet)
    adapter_files.saved(one, root / "one.safetensors")
    kohya = "kohya" if request.param == "sd15" else "kohya-sgm"
    two = adapter_files.adapter(
        model, kohya, lambda value: adapter_files.lora(value) | {"alpha": adapter_files.alpha(2)}, in_the_unet
    )
    adapter_files.saved(two, root / "two.safetensors")
    return request.param, root


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("task", ["text", "image", "mask"])
def test_a_run_with_two_loras(given: tuple[str, Path], task: str) -> None:
    name, root = given
    kind = {"text": "", "image": "Img2Img", "mask": "Inpaint"}[task]
    family = "StableDiffusionXL" if name == "sdxl" else "StableDiffusion"
    reference = getattr(diffusers, f"{family}{kind}Pipeline").from_pretrained(root / "model")
    reference.set_progress_bar_config(disable=True)
    for adapter in ("one", "two"):
        reference.load_lora_weights(root, weight_name=f"{adapter}.safetensors", adapter_name=adapter)
    reference.set_adapters(["one", "two"], [0.8, -0.5])
    sizes = {"text": {"width": 64, "height": 64}, "image": {}, "mask": {"width": 64, "height": 64}}
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 24:56] = 255
    more: dict[str, Any] = {} if task == "text" else {"image": Image.fromarray(pixels), "strength": 0.8}
    masked = more | ({"mask_image": Image.fromarray(mask)} if task == "mask" else {})
    theirs = reference(
        "a cat", negative_prompt="bad", num_inference_steps=5, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3), output_type="latent", **sizes[task], **masked,
    ).images  # fmt: skip
    ours = Pipeline(root / "model", dtype=torch.float32, device="cpu", lora_dir=root)
    settings = {"negative": "bad", "num_inference_steps": 5, "guidance": 4.0, "seed": 3, "rng": "diffusers"}
    made = ours("a cat <lora:one:0.8>", adapters={"two": -0.5}, output="latents", **settings, **masked).latents[0]
    near(made[None], theirs, APART)
    plain = ours("a cat", output="latents", **settings, **masked).latents[0]
    assert (plain - made).abs().max() > 100 * APART
