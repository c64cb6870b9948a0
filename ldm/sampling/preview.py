"""Previews of latents without the autoencoder: each pixel's colour is a linear function of its latent channels.

B images, C latent channels, h×w height and width of the latents, and of the preview in pixels
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.autoencoder import Autoencoder
from ldm.process import NoiseSchedule
from ldm.sampling.loop import Step

Factors = Sequence[Sequence[float]]  # a row (red, green, blue) for each latent channel, and a last one that is added


def clean(step: Step, schedule: NoiseSchedule) -> Tensor:
    """The clean latents (B, C, h, w) that the model predicts in this step."""
    return schedule.parametrisation.to_clean(step.prediction, step.model_input, *schedule.scales(step.time.value))


def to_pixels(latents: Tensor, factors: Factors) -> Tensor:
    """Scaled latents (B, C, h, w) to pixels (B, 3, h, w) in about [-1, 1], float32 on the CPU."""
    *rows, constant = torch.tensor(factors, dtype=torch.float32)
    return torch.einsum("bchw,cr->brhw", latents.float().cpu(), torch.stack(rows)) + constant[:, None, None]


@torch.inference_mode()
def fit(autoencoder: Autoencoder, pixels: Tensor | None = None) -> list[list[float]]:
    """The factors that predict an autoencoder's pixels best, by least squares.

    Args:
        autoencoder: encodes the images that the factors are fitted to.
        pixels: the images (B, 3, H, W) in [-1, 1]; by default smooth random colours.
    """
    config, weight = autoencoder.config, next(autoencoder.parameters())
    if pixels is None:
        side = 16 * config.factor
        coarse = torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 2.4 - 1.2
        pixels = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)
    modes = torch.cat([autoencoder.encode(row.to(weight)).mode().float().cpu() for row in pixels.split(1)])
    latents = (modes - config.shift_factor) * config.scaling_factor  # (B, C, h, w)
    colours = F.adaptive_avg_pool2d(pixels, (latents.shape[2], latents.shape[3])).movedim(1, -1).flatten(0, 2)  # (N, 3)
    inputs = latents.movedim(1, -1).flatten(0, 2)  # (N, C)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    return torch.linalg.lstsq(inputs.double(), colours.double(), driver="gelsd").solution.float().tolist()
