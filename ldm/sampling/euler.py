"""The Euler scheduler (SDXL's), written here because importing diffusers takes longer than making a small image.

Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without churn. The numbers are those of diffusers' class of the same
name to the bit, since the precision and the order of operations are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.process import BETA_SCHEDULES, PARAMETRISATIONS, betas, noise_levels, with_zero_terminal_snr

_KNOWN = {
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": tuple(PARAMETRISATIONS),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
SPREADS = ("karras", "exponential", "beta")  # spacings of noise levels between two ends


def spread(kind: str, steps: int, low: float, high: float) -> np.ndarray:
    """Falling noise levels (steps,) from `high` to `low`, by a name of `SPREADS`."""
    if kind == "karras":  # Karras et al. 2022, equation 5
        low, high = low ** (1 / 7), high ** (1 / 7)
        return (high + np.linspace(0, 1, steps) * (low - high)) ** 7
    if kind == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    from scipy.special import betaincinv  # Lee et al. 2024 (arXiv 2407.12173)

    return low + betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps)) * (high - low)


@dataclass(eq=False)
class EulerDiscreteScheduler:
    """The falling noise levels sigma of one run, and the index of its next step. Options are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    interpolation_type: str = "linear"  # between trained noise levels; "log_linear": between their logarithms
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None  # lowest level of these three; by default that of the last timestep
    sigma_max: float | None = None  # highest level; by default that of the first timestep
    timestep_spacing: str = "linspace"
    timestep_type: str = "discrete"  # "continuous": with v-prediction, timesteps are log(sigma) / 4
    steps_offset: int = 0  # added to the timesteps of the spacing "leading"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"  # "sigma_min": the run ends at the lowest trained level

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise LdmError(f"{name} {getattr(self, name)!r} of scheduler euler: choose {' or '.join(known)}")
        if sum(map(bool, (self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas))) > 1:
            raise LdmError("scheduler euler: of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas, set one")
        variances = betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps, torch.float32)
        if self.rescale_betas_zero_snr:
            bars = with_zero_terminal_snr((1 - variances).cumprod(0))
            variances = 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])  # in diffusers' order, for its rounding
        self.alphas_cumprod = (1 - variances).cumprod(0)
        if self.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # so that the highest noise level is finite
        self.trained = noise_levels(self.alphas_cumprod).numpy()
        self.set_levels(self.trained[::-1])

    @property
    def config(self) -> dict[str, Any]:
        """All options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def init_noise_sigma(self) -> Tensor:
        """The standard deviation of the noise that a run starts from: ()."""
        highest = self.sigmas.max()
        return highest if self.timestep_spacing != "leading" else (highest**2 + 1) ** 0.5

    def _set(self, levels: np.ndarray, timesteps: np.ndarray) -> None:
        last = 0.0 if self.final_sigmas_type == "zero" else self.trained[0]
        self.sigmas = torch.from_numpy(np.append(levels, last).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32))
        if self.timestep_type == "continuous" and PARAMETRISATIONS[self.prediction_type].log_timesteps:
            self.timesteps = 0.25 * self.sigmas[:-1].log()
        self.index = 0  # of the next step

    def set_levels(self, levels: np.ndarray) -> None:
        """Set up for a run through these noise levels, at the (fractional) timesteps trained with them."""
        self._set(levels, np.interp(np.log(levels), np.log(self.trained), np.arange(len(self.trained))))

    def set_timesteps(self, num_inference_steps: int, *, device: Any = "cpu") -> None:
        """Set up for a run of that many steps; the timesteps go to `device`, the noise levels stay on the CPU."""
        steps, count = num_inference_steps, self.num_train_timesteps
        if self.timestep_spacing == "linspace":
            timesteps = np.linspace(0, count - 1, steps, dtype=np.float32)[::-1]
        elif self.timestep_spacing == "leading":
            timesteps = (np.arange(steps) * (count // steps))[::-1].astype(np.float32) + self.steps_offset
        else:
            timesteps = np.arange(count, 0, -count / steps).round().astype(np.float32) - 1
        if self.interpolation_type == "linear":
            levels = np.interp(timesteps, np.arange(count), self.trained)
        else:
            ends = np.log(self.trained)
            levels = torch.linspace(ends[-1], ends[0], steps + 1).exp().numpy()
        low = levels[-1].item() if self.sigma_min is None else self.sigma_min
        high = levels[0].item() if self.sigma_max is None else self.sigma_max
        kind = next((kind for kind in SPREADS if getattr(self, f"use_{kind}_sigmas")), None)
        if kind:
            self.set_levels(spread(kind, steps, low, high))
        else:
            self._set(levels, timesteps)
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int) -> None:
        """Set the index of the first step."""
        self.index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """The model's input (B, C, h, w) for noisy latents, scaled to unit variance."""
        return sample / (self.sigmas[self.index] ** 2 + 1) ** 0.5

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor]:
        """Noisy latents (B, C, h, w) at the next noise level, from those at this one and the prediction for them."""
        x = sample.float()
        sigma, following = self.sigmas[self.index], self.sigmas[self.index + 1]
        clean = PARAMETRISATIONS[self.prediction_type].denoised(model_output, x, sigma)
        self.index += 1
        return ((x + (x - clean) / sigma * (following - sigma)).to(model_output.dtype),)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) with noise at the next step's level; `timesteps` is ignored."""
        return original_samples + noise * self.sigmas[self.index].to(original_samples.dtype)
