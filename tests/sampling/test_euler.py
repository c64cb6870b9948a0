"""Euler's method of our own against diffusers', number by number."""

from __future__ import annotations

from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.process import NoiseSchedule
from ldm.sampling.euler import EulerDiscreteScheduler
from ldm.sampling.schedulers import make, step_arguments

PUBLISHED: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS: list[dict[str, Any]] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 80.0},
    {"use_exponential_sigmas": True, "sigma_min": 0.1},
    {"use_beta_sigmas": True, "sigma_max": 9.0},
    {"interpolation_type": "log_linear"},
    {"final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    {"rescale_betas_zero_snr": True},
    {"steps_offset": 1},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
    {"num_train_timesteps": 300},
]


def pair(steps: int, **options: Any) -> tuple[EulerDiscreteScheduler, Any]:
    """Ours and diffusers', at the beginning of a run."""
    both = EulerDiscreteScheduler(**PUBLISHED | options), diffusers.EulerDiscreteScheduler(**PUBLISHED | options)
    for scheduler in both:
        scheduler.set_timesteps(steps, device="cpu")
        scheduler.set_begin_index(0)
    return both


def latents(scheduler: Any, begin: int, dtype: torch.dtype) -> list[Tensor]:
    """What comes out of every step from one on, with a made-up model, and what is drawn beside it."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 4, 3, 5, generator=generator).to(dtype) for _ in range(2))
    scheduler.set_begin_index(begin)
    x = scheduler.add_noise(clean, noise, scheduler.timesteps[begin][None])
    seen = [x, noise * scheduler.init_noise_sigma]
    arguments = step_arguments(scheduler, generator, 0.0)
    for t in scheduler.timesteps[begin:-1]:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.tanh(scaled) + 0.3 * scaled.roll(1, -1), t, x, **arguments)[0]
        seen += [scaled, x, scheduler.add_noise(clean, noise, t[None])]
    return seen


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("options", LEVELS, ids=str)
def test_levels_and_timesteps_are_those_of_diffusers(options: dict[str, Any], spacing: str) -> None:
    for steps in (1, 2, 7, 20, 150):
        ours, theirs = pair(steps, timestep_spacing=spacing, **options)
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-6)
        if not options.get("use_beta_sigmas"):
            assert torch.equal(ours.sigmas, theirs.sigmas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_steps_are_those_of_diffusers(spacing: str, prediction: str, dtype: torch.dtype) -> None:
    """To the bit: images stay what they were."""
    for (steps, begin), zero in product([(2, 0), (20, 0), (20, 13)], [False, True]):
        ours, theirs = pair(
            steps, timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=zero, steps_offset=1
        )
        for mine, other in zip(latents(ours, begin, dtype), latents(theirs, begin, dtype), strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, other)


def test_continuous_timesteps_are_those_of_diffusers() -> None:
    options = {"timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 120.0}
    for prediction in ("v_prediction", "epsilon"):
        ours, theirs = pair(9, prediction_type=prediction, **options)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_spread_levels_are_those_of_diffusers_given_the_whole_range(spacing: str) -> None:
    leading = {"timestep_spacing": "leading", "steps_offset": 1}
    for steps in (1, 8, 25):
        ours: Any = make(NoiseSchedule(options=leading), steps, "euler", spacing).scheduler
        low, high = ours.trained[[0, -1]].tolist()
        options = {**PUBLISHED, **leading, f"use_{spacing}_sigmas": True, "sigma_min": low, "sigma_max": high}
        theirs = diffusers.EulerDiscreteScheduler(**options)
        theirs.set_timesteps(steps, device="cpu")
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)


def test_levels_of_ones_own() -> None:
    plan = make(NoiseSchedule(), 3, "euler", (9.0, 3.0, 0.2))
    scheduler: Any = plan.scheduler
    assert scheduler.sigmas.tolist() == torch.tensor([9.0, 3.0, 0.2, 0.0]).tolist()
    levels = torch.from_numpy(scheduler.trained)
    for t, level in zip(plan.timesteps, (9.0, 3.0, 0.2), strict=True):
        assert levels[int(t)] <= level <= levels[int(t) + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_spacing": "wide"}, "timestep_spacing 'wide' of scheduler euler: choose linspace or leading"),
        ({"final_sigmas_type": 0}, "final_sigmas_type 0 of scheduler euler: choose zero or sigma_min"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_exponential_sigmas and use_beta_sigmas, set one"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        make(NoiseSchedule(options=options), 5, "euler")
