"""The noise process: noise schedules, and the parametrisations (prediction types) of the network's output.

Noisy latents are x = α · latents + σ · noise with α² + σ² = 1, and ᾱ = α². A noise level is σ / α, the standard
deviation of the noise in y = x / α = latents + level · noise.
B batch, C latent channels, h×w height and width of the latents
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.errors import LdmError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SMALLEST = 1e-4  # smallest α or σ used as a divisor


# --- parametrisations -------------------------------------------------------------------------------------------------


class Parametrisation(ABC):
    """The meaning of a prediction for noisy latents x (B, C, h, w), or y; α and σ are numbers or broadcast to x."""

    defined_at_zero_snr: ClassVar[bool] = True  # the prediction for pure noise (α = 0) determines the clean latents
    log_timesteps: ClassVar[bool] = False  # diffusers' "continuous" timesteps, log(level) / 4, are supported

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The correct prediction for these latents and this noise."""

    @abstractmethod
    def to_clean(self, prediction: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The clean latents implied by a prediction for x."""

    @abstractmethod
    def from_clean(self, latents: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The prediction for x that implies these clean latents: the inverse of `to_clean`."""

    @abstractmethod
    def to_noise(self, prediction: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The noise implied by a prediction for x."""

    @abstractmethod
    def denoised(self, prediction: Tensor, y: Tensor, level: Tensor) -> Tensor:
        """The clean latents implied by a prediction for y at a noise level ()."""

    @abstractmethod
    def weight(self, snr: Tensor, limit: float) -> Tensor:
        """min-SNR-γ weights (B,) of the squared errors of predictions at SNR = α² / σ² (B,).

        Hang et al. 2023 (arXiv 2303.09556), section 3.4; `limit` is γ. For clean latents the weight is min(SNR, γ).
        """


class Epsilon(Parametrisation):
    """The network predicts the noise (Ho et al. 2020, arXiv 2006.11239)."""

    defined_at_zero_snr = False

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def to_clean(self, prediction: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (x - sigma * prediction) / max(alpha, SMALLEST)

    def from_clean(self, latents: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (x - alpha * latents) / max(sigma, SMALLEST)

    def to_noise(self, prediction: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return prediction

    def denoised(self, prediction: Tensor, y: Tensor, level: Tensor) -> Tensor:
        return y - level * prediction

    def weight(self, snr: Tensor, limit: float) -> Tensor:
        return snr.clamp(max=limit) / snr


class Velocity(Parametrisation):
    """The network predicts v = α · noise - σ · latents (Salimans and Ho 2022, arXiv 2202.00512, appendix D)."""

    log_timesteps = True

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * latents

    def to_clean(self, prediction: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return alpha * x - sigma * prediction

    def from_clean(self, latents: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (alpha * x - latents) / max(sigma, SMALLEST)

    def to_noise(self, prediction: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return alpha * prediction + sigma * x

    def denoised(self, prediction: Tensor, y: Tensor, level: Tensor) -> Tensor:
        return prediction * (-level / (level**2 + 1) ** 0.5) + y / (level**2 + 1)

    def weight(self, snr: Tensor, limit: float) -> Tensor:
        return snr.clamp(max=limit) / (snr + 1)


class Sample(Parametrisation):
    """The network predicts the clean latents."""

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return latents

    def to_clean(self, prediction: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return prediction

    def from_clean(self, latents: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return latents

    def to_noise(self, prediction: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (x - alpha * prediction) / max(sigma, SMALLEST)

    def denoised(self, prediction: Tensor, y: Tensor, level: Tensor) -> Tensor:
        return prediction

    def weight(self, snr: Tensor, limit: float) -> Tensor:
        return snr.clamp(max=limit)


PARAMETRISATIONS: dict[str, Parametrisation] = {  # keys are diffusers' prediction types
    "epsilon": Epsilon(), "v_prediction": Velocity(), "sample": Sample(),
}  # fmt: skip


# --- noise schedules --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule of training, and the scheduler with which the model is published."""

    prediction_type: str = "epsilon"  # a key of `PARAMETRISATIONS`
    beta_start: float = 0.00085  # variance added in the first step
    beta_end: float = 0.012  # variance added in the last step
    beta_schedule: str = "scaled_linear"  # interpolation of betas; "scaled_linear": linear in the square root
    train_steps: int = 1000
    zero_terminal_snr: bool = False  # betas rescaled so that the last step is pure noise (Lin et al. 2023)
    scheduler: str = "PNDMScheduler"  # diffusers' class of the sampler
    options: Mapping[str, Any] = field(default_factory=dict)  # further options of the scheduler

    def __post_init__(self) -> None:
        if self.prediction_type not in PARAMETRISATIONS:
            raise LdmError(f"prediction type {self.prediction_type!r}; known are {', '.join(PARAMETRISATIONS)}")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise LdmError(f"beta schedule {self.beta_schedule!r}; known are {', '.join(BETA_SCHEDULES)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise LdmError(f"betas from {self.beta_start!r} to {self.beta_end!r}: they must rise within (0, 1)")
        if not isinstance(self.train_steps, int) or not 1 <= self.train_steps <= 100_000:
            raise LdmError(f"{self.train_steps!r} training timesteps; a whole number from 1 to 100000 is needed")

    @property
    def parametrisation(self) -> Parametrisation:
        """The parametrisation of `prediction_type`."""
        return PARAMETRISATIONS[self.prediction_type]

    def betas(self) -> Tensor:
        """Variance added in each step: (train_steps,), float64."""
        return betas(self.beta_schedule, self.beta_start, self.beta_end, self.train_steps, torch.float64)

    def alpha_bars(self) -> Tensor:
        """ᾱ at each timestep, the clean latents' share of the variance: (train_steps,), float64."""
        bars = (1 - self.betas()).cumprod(0)
        return with_zero_terminal_snr(bars) if self.zero_terminal_snr else bars

    @cached_property
    def _bars(self) -> list[float]:
        return self.alpha_bars().tolist()

    def scales(self, t: float) -> tuple[float, float]:
        """α and σ at a timestep, which may be fractional."""
        bars = self._bars
        low = min(int(t), len(bars) - 1)
        high = min(low + 1, len(bars) - 1)
        bar = bars[low] + (bars[high] - bars[low]) * (t - low)
        return math.sqrt(bar), math.sqrt(1 - bar)


def betas(kind: str, start: float, end: float, steps: int, dtype: torch.dtype) -> Tensor:
    """Variance added in each step of a schedule of `BETA_SCHEDULES`: (steps,)."""
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=dtype)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2
    # Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 17
    bars = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
    return torch.tensor([min(1 - later / bar, 0.999) for bar, later in pairwise(bars)], dtype=dtype)


def with_zero_terminal_snr(bars: Tensor) -> Tensor:
    """ᾱ (train_steps,) rescaled so that the last value is 0 (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    roots = bars.sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2


def noise_levels(bars: Tensor) -> Tensor:
    """The noise levels σ / α for values of ᾱ; the shape is the same."""
    return ((1 - bars) / bars) ** 0.5


def alpha_at(level: float) -> float:
    """α at a noise level."""
    return 1 / math.sqrt(level**2 + 1)
