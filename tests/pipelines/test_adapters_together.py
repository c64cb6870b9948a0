"""A ControlNet, a LoRA and an IP-Adapter in one run, against diffusers' with all three."""

from __future__ import annotations

from pathlib import Path

import adapter_files
import controls
import diffusers
import image_prompts
import pytest
import tiny
import torch
from images import image
from rounding import RUN, near
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipelines import Pipeline

KINDS = {"sd15": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", KINDS)
def test_a_control_image_an_adapter_and_an_image_prompt(name: str, tmp_path: Path) -> None:
    model, family = tiny.model(name, shallow=True), tiny.family(name, shallow=True)
    model.save_pretrained(tmp_path / "model")
    controls.folder(controls.controlnet(family), tmp_path / "control")
    state = image_prompts.saved(tmp_path / "ip.safetensors", family, "plus")
    encoder = image_prompts.encoder()
    encoder.save_pretrained(tmp_path / "image_encoder")
    tensors = adapter_files.adapter(
        model, "diffusers", lambda value: adapter_files.lora(value, ("lora_A.weight", "lora_B.weight")),
        lambda place: place.component == "unet" and adapter_files.attention(place),
    )  # fmt: skip
    lora = adapter_files.saved(tensors, tmp_path / "style.safetensors")

    size = encoder.config.image_size
    theirs = getattr(diffusers, KINDS[name]).from_pretrained(
        tmp_path / "model", controlnet=diffusers.ControlNetModel.from_pretrained(tmp_path / "control"),
        image_encoder=encoder, feature_extractor=CLIPImageProcessorPil(size=size, crop_size=size),
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(lora, adapter_name="style")
    theirs.set_adapters("style", 0.8)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    theirs.unet._load_ip_adapter_weights([image_prompts.groups(state)], low_cpu_mem_usage=False)
    theirs.set_ip_adapter_scale(0.6)
    wanted = theirs(
        "a cat", image=image(1), ip_adapter_image=image(2), controlnet_conditioning_scale=0.7, num_inference_steps=4,
        guidance_scale=5.0, generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip

    pipeline = Pipeline(
        tmp_path / "model", control_models=tmp_path / "control", ip_adapter=tmp_path / "ip.safetensors",
        adapters={lora: 0.8}, dtype=torch.float32, device="cpu", quick=False,
    )  # fmt: skip
    settings = {"steps": 4, "guidance": 5.0, "seed": 3, "rng": "diffusers", "output": "latents"}
    made = pipeline("a cat", control=image(1), control_scale=0.7, image_prompt=(image(2), 0.6), **settings)
    near(made.latents[0][None], wanted, RUN)
    without = pipeline("a cat", control=image(1), control_scale=0.7, adapters={}, **settings)
    assert not torch.allclose(without.latents[0], made.latents[0], atol=1e-2)
