"""Schedulers on a problem whose exact answer is known: a mixture of Gaussians and its true score instead of a U-Net."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.families import FAMILIES, NoiseSchedule
from ldm.sampling.guidance import from_latents
from ldm.sampling.loop import Time, sample
from ldm.sampling.noise import Noise
from ldm.sampling.schedulers import (
    NO_SAMPLE_PREDICTION,
    SCHEDULERS,
    make,
    own_name,
    spacings,
    step_arguments,
)

CENTRES, WIDTH = torch.tensor([-1.5, 0.5, 2.0]), 0.2  # equally likely
ODE = [
    name
    for name in SCHEDULERS
    if name in ("ddim", "pndm", "lms", "euler", "heun", "dpm2", "dpm++2m", "dpm++2s", "unipc", "deis")
]


def denoiser(schedule: NoiseSchedule) -> Any:
    """What a perfect U-Net would predict, from E[latents | noisy latents]."""
    bars = schedule.alpha_bars()

    def predict(x: Tensor, time: Time) -> Tensor:
        low = min(int(time.value), len(bars) - 1)
        high = min(low + 1, len(bars) - 1)
        # between two timesteps, schedulers interpolate the logarithm of the noise level
        ratio = [math.log((1 - bars[i].item()) / bars[i].item()) / 2 for i in (low, high)]
        sigma = math.exp(ratio[0] + (ratio[1] - ratio[0]) * (time.value - low))
        a = 1 / math.sqrt(1 + sigma**2)
        s = sigma * a
        wide = x.double()[..., None]
        variance = (a * WIDTH) ** 2 + s**2
        weight = torch.softmax(-((wide - a * CENTRES) ** 2) / (2 * variance), dim=-1)
        mean = CENTRES + a * WIDTH**2 / variance * (wide - a * CENTRES)
        latents = (weight * mean).sum(-1)
        return from_latents(latents, x.double(), a, s, schedule.prediction_type).to(x.dtype)

    return predict


def run(schedule: NoiseSchedule, name: str, steps: int, spacing: Any = "default", count: int = 4096) -> Tensor:
    plan = make(schedule, steps, name, spacing)
    noise = Noise([1])
    x = noise.draw((1, 1, 64, count // 64), torch.float64, "cpu") * plan.scheduler.init_noise_sigma
    arguments = step_arguments(plan.scheduler, noise.generator, 0.0)
    for step in sample(denoiser(schedule), plan, x, arguments):  # noqa: B007
        pass
    return step.latents.flatten().float()


def schedule(prediction: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule(prediction, scheduler="DDIMScheduler", options={"clip_sample": False, "steps_offset": 0})


def distance(samples: Tensor) -> float:
    """Wasserstein distance to the exact distribution: mean difference of sorted samples from its quantiles."""
    generator = torch.Generator().manual_seed(0)
    centres = CENTRES[torch.arange(len(samples)) % len(CENTRES)]
    exact = centres + WIDTH * torch.randn(len(samples), generator=generator)
    return (samples.sort().values - exact.sort().values).abs().mean().item()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("lcm", "tcd", "ddpm")])
def test_samples_land_where_they_should(name: str, prediction: str) -> None:
    """60 steps: the samples have the mixture's distribution, and no noise is left on them.

    That includes the third-order SDE solver, whose error in diffusers itself grows with the number of steps.
    """
    spacing = "trailing" if "trailing" in spacings(name) else "default"
    if prediction == "sample" and name in NO_SAMPLE_PREDICTION:
        with pytest.raises(LdmError, match=f"scheduler {re.escape(name)} cannot use a model that predicts the picture"):
            make(schedule(prediction), 60, name)
        return
    samples = run(schedule(prediction), name, 60, spacing)
    assert distance(samples) < 0.12
    spread = (samples[:, None] - CENTRES).abs().min(dim=1).values
    assert spread.std() < 2 * WIDTH


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_distilled_samplers_return_the_denoised_picture(name: str) -> None:
    samples = run(schedule(), name, 8)
    assert (samples[:, None] - CENTRES).abs().min(dim=1).values.mean() < 2 * WIDTH


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_spacing_of_every_scheduler_works(name: str) -> None:
    for spacing in spacings(name):
        levels: Any = tuple(14.6 * 0.83**i for i in range(30)) if spacing == "list" else spacing
        samples = run(schedule(), name, 30, levels, count=512)
        assert samples.isfinite().all()
        assert distance(samples) < (1.0 if name in ("lcm", "tcd", "ddpm") else 0.6), spacing


@pytest.mark.parametrize("name", ODE)
def test_more_steps_are_nearer(name: str) -> None:
    coarse, fine = (
        distance(run(schedule(), name, steps, "linspace" if "linspace" in spacings(name) else "default"))
        for steps in (6, 48)
    )
    assert fine < coarse


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    zero = NoiseSchedule(
        "v_prediction", zero_terminal_snr=True, scheduler="DDIMScheduler", options={"clip_sample": False}
    )
    assert zero.alpha_bars()[-1] == 0
    plan = make(zero, 10, "ddim", "trailing")
    assert plan.scheduler.alphas_cumprod[-1] < 1e-6
    with pytest.raises(
        LdmError, match="cannot start from pure noise, which this model needs; choose ddim, ddpm, euler"
    ):
        make(zero, 10, "heun")


def test_published_schedulers_have_short_names() -> None:
    assert [own_name(FAMILIES[name].schedule) for name in ("sd15", "sd2-v", "sdxl")] == ["pndm", "ddim", "euler"]
