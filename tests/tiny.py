"""Tiny models of every family: the real structure with few channels, so that a test takes milliseconds."""

from __future__ import annotations

from dataclasses import replace

import torch

from ldm.families import FAMILIES, Family
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.clip_text import TextEncoderConfig

PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd15-inpaint": "StableDiffusionInpaintPipeline",
    "sd15-edit": "StableDiffusionInstructPix2PixPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2-inpaint": "StableDiffusionInpaintPipeline",
    "sd2-v": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl-edit": "StableDiffusionXLInstructPix2PixPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "emoji": "StableDiffusionXLPipeline",
    "emoji-refiner": "StableDiffusionXLImg2ImgPipeline",
}  # diffusers' classes, by family


def is_variant(name: str) -> bool:
    """Whether a family has the layers of another, with other channels of its input or another prediction."""
    return name.endswith(("-inpaint", "-edit", "-v"))


def tower(config: TextEncoderConfig) -> TextEncoderConfig:
    """A text tower with 3 layers and a vocabulary of 1,000."""
    return replace(
        config,
        width=48 if config.projection else 32,
        layers=3,
        heads=4,
        hidden=64,
        projection=40 if config.projection else 0,
        vocab_size=1000,
    )


def family(name: str, shallow: bool = False) -> Family:
    """The named family, small: latents 8 times smaller than the image, all levels and layers there.

    A `shallow` one has a third of the layers, on two levels, for what does not depend on their number.
    """
    real = FAMILIES[name]
    levels = 2 if shallow else len(real.unet.channels)
    layers = {"layers": 1} if shallow else {}
    text = tuple(tower(config) for config in real.text)
    unet = replace(
        real.unet,
        channels=(32, 64, 64, 64)[:levels],
        heads=(4,) * levels if len(set(real.unet.heads)) == 1 else (2, 4, 4, 4)[:levels],
        depth=tuple(min(depth, 2) for depth in real.unet.depth[:levels]),
        mid_depth=min(real.unet.mid_depth, 2),
        text_dim=sum(config.width for config in text),
        groups=16,
        pooled_dim=40 if real.unet.pooled_dim else 0,
        size_dim=16 if real.unet.pooled_dim else 256,
        sample_size=8,
        **layers,
    )
    autoencoder = replace(real.autoencoder, channels=(16, 32, 32, 32), groups=8, sample_size=64, **layers)
    return replace(real, unet=unet, autoencoder=autoencoder, text=text, name="custom")


def model(name: str, seed: int = 0, shallow: bool = False) -> LatentDiffusion:
    """A tiny model with random weights, norms included, so that no weight could be missing unnoticed."""
    result = LatentDiffusion.from_family(family(name, shallow), seed)
    generator = torch.Generator().manual_seed(seed)
    for module in result.modules().values():
        module.eval()
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return result


def same_weights(a: LatentDiffusion, b: LatentDiffusion) -> bool:
    """Whether all networks of two models hold the same numbers under the same names."""
    ours, theirs = a.modules(), b.modules()
    if ours.keys() != theirs.keys():
        return False
    for name in ours:
        x, y = ours[name].state_dict(), theirs[name].state_dict()
        if x.keys() != y.keys() or not all(torch.equal(x[key], y[key]) for key in x):
            return False
    return True
