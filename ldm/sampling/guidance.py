"""Guidance: wrappers that turn a U-Net and conditionings into one denoiser.

B images, C latent channels, h×w height and width of the latents
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.unet import Conditioning, UNet
from ldm.patches.patching import patched
from ldm.process import NoiseSchedule
from ldm.runtime.precomputing import TimeTable, precomputed
from ldm.sampling.loop import Denoise, Time


@dataclass(frozen=True)
class Guidance:
    """The settings of guidance, which pushes predictions towards the prompt."""

    scale: float = 7.5  # of classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); at most 1: none
    rescale: float = 0.0  # guidance rescale; 1: the standard deviation without guidance (Lin et al. 2023, 2305.08891)
    interval: tuple[float, float] = (0.0, 1.0)  # guidance interval: the part of the run with guidance (2404.07724)
    threshold: float = 0.0  # dynamic threshold's percentile of the predicted latents (Saharia et al. 2022); 0: none
    perturbed: float = 0.0  # scale of perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377)
    image: float = 1.5  # guidance scale of the image, in editing by instruction (Brooks et al. 2022, 2211.09800)

    @property
    def classifier_free(self) -> bool:
        """Whether classifier-free guidance is on, for which the U-Net also reads the negative prompt."""
        return self.scale > 1

    @property
    def embedded(self) -> float | None:
        """The scale that the U-Net reads as an input, if it does."""
        return None


class EmbeddedGuidance(Guidance):
    """Guidance whose scale is an input of the U-Net, which then predicts once for each image."""

    @property
    def classifier_free(self) -> bool:
        return False

    @property
    def embedded(self) -> float | None:
        return self.scale


def join(*conds: Conditioning) -> Conditioning:
    """Conditionings joined into one batch."""
    first = conds[0]
    return Conditioning(
        torch.cat([cond.text for cond in conds]),
        None if first.pooled is None else torch.cat([cond.pooled for cond in conds]),  # type: ignore[misc]
        None if first.size is None else torch.cat([cond.size for cond in conds]),  # type: ignore[misc]
        {name: torch.cat([cond.more[name] for cond in conds]) for name in first.more},
    )


def plain(unet: UNet, cond: Conditioning, times: Sequence[float], extra: Tensor | None = None) -> Denoise:
    """The U-Net's prediction for `cond` alone, at the timesteps of a run.

    `extra` (B or 1, C, h, w) are channels that the U-Net reads beside the latents, such as an inpainting mask.
    """
    table = TimeTable(precomputed(unet, cond), cond, times)
    channels = None if extra is None else extra.expand(len(cond.text), -1, -1, -1)

    def denoise(x: Tensor, time: Time) -> Tensor:
        table.set(time.value)
        return table.unet(x if channels is None else torch.cat([x, channels], dim=1), time.tensor, cond)

    return denoise


def guided(
    unet: UNet,
    cond: Conditioning,
    negative: Conditioning,
    guidance: Guidance,
    schedule: NoiseSchedule,
    times: Sequence[float],
    extra: Tensor | None = None,
) -> Denoise:
    """The U-Net's prediction for `cond`, pushed away from the one for `negative` as `guidance` says.

    At steps without guidance, the U-Net runs once for each image. `times` and `extra` are as for `plain`.
    """
    g = guidance
    alone = cache(partial(plain, unet, cond, times, extra))  # built only if a step needs it
    if not g.classifier_free and not g.perturbed:
        return thresholded(alone(), g.threshold, schedule) if g.threshold else alone()
    groups = {"negative": negative} if g.classifier_free else {}  # parts of one batch, in this order
    groups["prompt"] = cond
    if g.perturbed:
        groups["perturbed"] = cond
    model = patched(unet, {"perturbed_groups": len(groups) if g.perturbed else 0})
    rows = None if extra is None else torch.cat([extra.expand(len(cond.text), -1, -1, -1)] * len(groups))
    together = plain(model, join(*groups.values()), times, rows)

    def denoise(x: Tensor, time: Time) -> Tensor:
        progress = 1 - time.value / (schedule.train_steps - 1)
        if not g.interval[0] <= progress <= g.interval[1]:
            return alone()(x, time)
        predictions = together(torch.cat([x] * len(groups)), time).chunk(len(groups))
        of = dict(zip(groups, predictions, strict=True))
        result = wanted = of["prompt"]
        if g.classifier_free:
            result = of["negative"] + g.scale * (wanted - of["negative"])
        if g.perturbed:
            result = result + g.perturbed * (wanted - of["perturbed"])
        if g.rescale:
            result = rescaled(result, wanted, g.rescale)
        return result

    return thresholded(denoise, g.threshold, schedule) if g.threshold else denoise


def edited(
    unet: UNet,
    cond: Conditioning,
    negative: Conditioning,
    guidance: Guidance,
    schedule: NoiseSchedule,
    times: Sequence[float],
    image: Tensor,
) -> Denoise:
    """The guided prediction of a U-Net that edits an image by instruction.

    Brooks et al. 2022 (arXiv 2211.09800), equation 3. `image` (B, C, h, w) are the image's latents, not scaled.
    """
    g = guidance
    if not g.classifier_free:
        alone = plain(unet, cond, times, image)
        return thresholded(alone, g.threshold, schedule) if g.threshold else alone
    images = torch.cat([image, image, torch.zeros_like(image)])
    together = plain(unet, join(cond, negative, negative), times, images)

    def denoise(x: Tensor, time: Time) -> Tensor:
        told, shown, alone = together(torch.cat([x] * 3), time).chunk(3)
        result = alone + g.scale * (told - shown) + g.image * (shown - alone)
        return rescaled(result, told, g.rescale) if g.rescale else result

    return thresholded(denoise, g.threshold, schedule) if g.threshold else denoise


def rescaled(guided: Tensor, wanted: Tensor, amount: float) -> Tensor:
    """`guided` with each image's standard deviation moved by `amount` towards that of `wanted` (Lin et al. 2023)."""
    axes = list(range(1, wanted.ndim))
    same_spread = guided * (wanted.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * same_spread + (1 - amount) * guided


def thresholded(denoise: Denoise, percentile: float, schedule: NoiseSchedule) -> Denoise:
    """A denoiser with dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3), image by image.

    Latents usually have a standard deviation of 1. Where the given percentile of the predicted latents' absolute values
    is above 3, values beyond it are clipped, and all are scaled down so that it is 3.
    """
    parametrisation = schedule.parametrisation

    def limited(x: Tensor, time: Time) -> Tensor:
        prediction = denoise(x, time)
        scales = schedule.scales(time.value)
        latents = parametrisation.to_clean(prediction, x, *scales)
        sizes = latents.flatten(1).abs().float()
        limit = torch.quantile(sizes, percentile, dim=1).clamp(min=3.0).to(latents.dtype)[:, None, None, None]
        return parametrisation.from_clean(latents.clamp(-limit, limit) * (3 / limit), x, *scales)

    return limited


def check_finite(latents: Tensor, stage: str, remedy: str) -> None:
    """Raise unless all numbers are finite.

    Raises:
        LdmError: with the stage and the remedy.
    """
    if not bool(torch.isfinite(latents).all()):
        raise LdmError(f"the {stage} gave numbers that are not finite; {remedy}")
