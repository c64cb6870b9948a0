"""A problem whose answer is known: a mixture of Gaussians in one dimension, and its true denoiser in the U-Net's place.

y noisy latents at the scale of the clean ones, y = latents + s · noise; s noise level sigma
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.process import NoiseSchedule
from ldm.sampling.loop import Time, sample
from ldm.sampling.noise import Noise
from ldm.sampling.schedulers import make, step_arguments

CENTRES, WIDTH = torch.tensor([-1.8, 0.3, 1.5], dtype=torch.float64), 0.4  # equally likely; the mean is 0
ORDER = {  # what the deterministic methods claim: halving the steps' length divides the error by 2^order
    "ddim": 1, "pndm": 2, "lms": 4, "euler": 1, "heun": 2, "dpm2": 2, "dpm++2m": 2, "dpm++2s": 2, "deis": 2,
    "unipc": 3,  # a second-order predictor, which its corrector raises by one
}  # fmt: skip


def schedule(prediction: str = "epsilon") -> NoiseSchedule:
    """That of SD 1 and 2, without options that a model is published with."""
    return NoiseSchedule(prediction, scheduler="DDIMScheduler", options={"clip_sample": False, "steps_offset": 0})


def denoised(y: Tensor, s: float) -> Tensor:
    """E[latents | y], what a perfect model knows."""
    variance = WIDTH**2 + s**2
    away = y[..., None] - CENTRES
    weight = torch.softmax(-(away**2) / (2 * variance), dim=-1)
    return (weight * (CENTRES + WIDTH**2 / variance * away)).sum(-1)


def below(y: Tensor, s: float) -> Tensor:
    """The share of the distribution at noise level s that is below y."""
    return torch.special.ndtr((y[..., None] - CENTRES) / math.sqrt(WIDTH**2 + s**2)).mean(-1)


def flowed(y: Tensor, start: float, end: float) -> Tensor:
    """Where the probability-flow ODE takes y from one noise level to another.

    In one dimension no paths cross, so that the share below stays what it was; it is inverted by bisection.
    """
    share = below(y, start)
    low, high = torch.full_like(y, -100.0), torch.full_like(y, 100.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (torch.where(below(middle, end) < share, a, b) for a, b in ((middle, low), (high, middle)))
    return low


def quantiles(count: int) -> Tensor:
    """The exact distribution's own sorted samples: (count,)."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return flowed(torch.special.ndtri(share) * 1e6, 1e6, 0.0)


@dataclass
class Model:
    """The perfect model of a noise schedule, which notes where it was called."""

    schedule: NoiseSchedule
    seen: list[tuple[Tensor, float]] = field(default_factory=list)  # y and s of each call

    def __post_init__(self) -> None:
        bars = self.schedule.alpha_bars()
        self.levels = (((1 - bars) / bars).log() / 2).tolist()

    def level(self, t: float) -> float:
        """Sigma at a timestep; between two, its logarithm is interpolated, as schedulers do."""
        low = min(int(t), len(self.levels) - 1)
        high = min(low + 1, len(self.levels) - 1)
        return math.exp(self.levels[low] + (self.levels[high] - self.levels[low]) * (t - low))

    def __call__(self, x: Tensor, time: Time) -> Tensor:
        s = self.level(time.value)
        a = 1 / math.sqrt(1 + s**2)
        y = x.double() / a
        self.seen.append((y.flatten(), s))
        return self.schedule.parametrisation.from_clean(denoised(y, s), x.double(), a, a * s).to(x.dtype)


@dataclass(frozen=True)
class Outcome:
    """A run's samples: (count,) each, float64."""

    samples: Tensor
    first: tuple[Tensor, float]  # y and s where the model was called first …
    last: tuple[Tensor, float]  # … and last

    def error(self) -> float:
        """Root mean square distance from the ODE's solution where the model was called last.

        The step from there to the clean latents is of the first order with every scheduler, and says nothing.
        """
        return (self.last[0] - flowed(*self.first, self.last[1])).square().mean().sqrt().item()

    def distance(self) -> float:
        """Wasserstein distance of the samples from the exact distribution."""
        return (self.samples.sort().values - quantiles(len(self.samples))).abs().mean().item()

    def residual(self) -> float:
        """What the samples still differ by from the model's last word: noise that the last step left or added."""
        return (self.samples - denoised(*self.last)).square().mean().sqrt().item()


def run(
    schedule: NoiseSchedule, name: str, steps: int, spacing: Any = "default", count: int = 4096, eta: float = 0.0
) -> Outcome:
    """Samples of the mixture, from evenly spread quantiles of noise."""
    plan = make(schedule, steps, name, spacing)
    noise = Noise([1])
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x = torch.special.ndtri(share).view(1, 1, 1, count) * plan.scheduler.init_noise_sigma
    model = Model(schedule)
    for step in sample(model, plan, x, step_arguments(plan.scheduler, noise.generator, eta)):  # noqa: B007
        pass
    return Outcome(step.latents.flatten().double(), model.seen[0], model.seen[-1])


def geometric(steps: int, start: float = 14.6, end: float = 0.03) -> tuple[float, ...]:
    """Noise levels with equal ratios: the smoothest spacing for methods that step in log s."""
    return tuple(start * (end / start) ** (i / (steps - 1)) for i in range(steps)) if steps > 1 else (start,)
