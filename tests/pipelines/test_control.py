"""Runs with ControlNets and T2I-Adapters against diffusers' on the same weights and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import controls
import diffusers
import numpy as np
import pytest
import tiny
import torch
from images import image
from PIL import Image
from rounding import RUN, near
from torch import Tensor

from ldm.images import mask_to_tensor
from pipelines import Pipeline

PROMPTS, NEGATIVE = ["a cat on a mat", "a dog"], ["bad", ""]
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def square() -> Image.Image:
    """A mask: white in the middle."""
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 24:56] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = ("sd15", "sd2-v", "sdxl", "sd15-inpaint")
    for name in names:
        tiny.model(name).save_pretrained(root / name)
        for seed in (0, 1):
            controls.folder(controls.controlnet(tiny.family(name), seed), root / f"{name}-control-{seed}")
    for name, kind in (("sd15", "full_adapter"), ("sdxl", "full_adapter_xl"), ("sd15", "light_adapter")):
        for seed in (0, 1):
            controls.folder(controls.t2i_adapter(kind, tiny.family(name), seed), root / f"{name}-{kind}-{seed}")
    return {path.name: path for path in root.iterdir()}


def reference(folders: dict[str, Path], kind: str, name: str, counts: int, adapter: str = "") -> Any:
    """diffusers' pipeline with one or two control models."""
    load = diffusers.T2IAdapter if adapter else diffusers.ControlNetModel
    parts = [load.from_pretrained(folders[f"{name}-{adapter or 'control'}-{seed}"]) for seed in range(counts)]
    one: Any = parts[0]
    if counts > 1:
        one = diffusers.MultiAdapter(parts) if adapter else diffusers.models.controlnets.MultiControlNetModel(parts)
    pipeline = getattr(diffusers, kind).from_pretrained(folders[name], **{"adapter" if adapter else "controlnet": one})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, **settings: Any) -> Tensor:
    usual = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "generator": torch.Generator().manual_seed(3)}
    return pipeline(**{**usual, "output_type": "latent", **settings}).images


def ours(source: Any, models: Any, **settings: Any) -> Tensor:
    pipeline = Pipeline(source, control_models=models, dtype=torch.float32, device="cpu", quick=False)
    usual = {"rng": "diffusers", "weights": False, "batch": 2, "seed": 3, "output": "latents"}
    usual |= {} if "negative_prompt" in settings else {"negative": NEGATIVE}
    return torch.stack(pipeline(**{"prompt": PROMPTS, **usual, **settings}).latents)


@pytest.mark.parametrize("name", ["sd15", "sd2-v", "sdxl"])
@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (1, {"controlnet_conditioning_scale": 0.7}),
        (1, {"guess_mode": True, "guidance_scale": 3.0}),
        (2, {"controlnet_conditioning_scale": [0.7, 1.2], "control_guidance_start": [0.0, 0.3],
             "control_guidance_end": [0.6, 1.0]}),
    ],
    ids=["one", "guess", "two"],
)  # fmt: skip
def test_text_to_image(name: str, count: int, settings: dict[str, Any], folders: dict[str, Path]) -> None:
    """ControlNets of one kind and of several, with diffusers' names of the settings."""
    kind = "StableDiffusionXLControlNetPipeline" if name == "sdxl" else "StableDiffusionControlNetPipeline"
    images = [image(seed) for seed in range(count)]
    common = {"num_inference_steps": 5, "guidance_scale": 5.0, **settings}
    wanted = theirs(
        reference(folders, kind, name, count), image=images if count > 1 else images[0], width=64, height=64, **common
    )
    found = ours(folders[name], [folders[f"{name}-control-{seed}"] for seed in range(count)], control=images, **common)
    near(found, wanted, RUN)
    plain = ours(folders[name], (), width=64, height=64, steps=5, guidance=common["guidance_scale"])
    assert float((found - plain).abs().max()) > 100 * float((found - wanted).abs().max())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_image_to_image(name: str, folders: dict[str, Path]) -> None:
    xl = "XL" if name == "sdxl" else ""
    pipeline = reference(folders, f"StableDiffusion{xl}ControlNetImg2ImgPipeline", name, 1)
    common: dict[str, Any] = {"image": image(7), "control_image": image(1), "strength": 0.6, "num_inference_steps": 6}
    common |= {"guidance_scale": 5.0, "control_guidance_end": 0.7, "controlnet_conditioning_scale": 0.8}
    near(ours(folders[name], folders[f"{name}-control-0"], **common), theirs(pipeline, **common), RUN)


@pytest.mark.parametrize("name", ["sd15", "sd15-inpaint"])
def test_inpainting(name: str, folders: dict[str, Path]) -> None:
    pipeline = reference(folders, "StableDiffusionControlNetInpaintPipeline", name, 1)
    common: dict[str, Any] = {"image": image(7), "num_inference_steps": 4, "strength": 1.0, "guidance_scale": 5.0}
    common |= {"controlnet_conditioning_scale": 0.9}
    condition = torch.from_numpy(np.asarray(image(7)).copy()).permute(2, 0, 1)[None] / 255
    condition[mask_to_tensor(square(), 64, 64).expand_as(condition) >= 0.5] = -1
    wanted = theirs(pipeline, **common, mask_image=square(), control_image=condition, width=64, height=64)
    found = ours(folders[name], folders[f"{name}-control-0"], **common, mask=square(), control={"inpaint": image(7)})
    near(found, wanted, RUN)


@pytest.mark.parametrize(
    ("name", "adapter", "count"),
    [
        ("sd15", "full_adapter", 1),
        ("sd15", "light_adapter", 1),
        ("sdxl", "full_adapter_xl", 1),
        ("sd15", "full_adapter", 2),
    ],
)
def test_t2i_adapters(name: str, adapter: str, count: int, folders: dict[str, Path]) -> None:
    xl = "XL" if name == "sdxl" else ""
    pipeline = reference(folders, f"StableDiffusion{xl}AdapterPipeline", name, count, adapter)
    images = [image(seed) for seed in range(count)]
    scale = [0.6, 0.9][:count] if count > 1 else 0.6
    common: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 5.0, "width": 64, "height": 64}
    common |= {"prompt": "a cat", "negative_prompt": "bad"}  # diffusers does not repeat features for several
    common |= {"adapter_conditioning_scale": scale} | ({"adapter_conditioning_factor": 0.6} if xl else {})
    wanted = theirs(pipeline, image=images if count > 1 else images[0], **common)
    models = [folders[f"{name}-{adapter}-{seed}"] for seed in range(count)]
    near(ours(folders[name], models, control=images, **common), wanted, RUN)
