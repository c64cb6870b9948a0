"""The loss of a diffusion model: noise is added to latents, and the U-Net's prediction compared with what was added.

Ho et al. 2020 (arXiv 2006.11239), equation 14, for every prediction type, distribution of timesteps and weighting.

B batch, C latent channels, h×w height and width of the latents
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.data.keyed import generator, uniform
from ldm.errors import LdmError
from ldm.families import NoiseSchedule


@dataclass(frozen=True)
class Timesteps:
    """How timesteps are distributed in training."""

    low: int = 0  # the first
    high: int = 999  # and the last, included
    distribution: str = "uniform"  # or "logit-normal" (Esser et al. 2024, arXiv 2403.03206, section 3.1)
    mean: float = 0.0  # of the logit-normal distribution; above 0: more noise
    std: float = 1.0

    def at(self, quantiles: Tensor) -> Tensor:
        """Timesteps (B,) at these quantiles (B,) of the distribution, from 0 to 1 without 1."""
        if self.distribution == "logit-normal":
            quantiles = torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantiles))
        span = self.high - self.low + 1
        return (self.low + (quantiles * span).long()).clamp(self.low, self.high)


@dataclass(frozen=True)
class Draw:
    """What is random in the loss of a batch: a function of the seed and of each sample's key and epoch."""

    noise: Tensor  # (B, C, h, w) standard normal
    timestep: Tensor  # (B,) whole numbers

    def to(self, device: torch.device) -> Draw:
        """The same on a device."""
        return Draw(self.noise.to(device, non_blocking=True), self.timestep.to(device, non_blocking=True))


class DiffusionLoss:
    """Noise, target and weight for a noise schedule.

    Raises:
        LdmError: the timesteps are not the schedule's, or nothing can be learned at one of them.
    """

    def __init__(
        self, schedule: NoiseSchedule, timesteps: Timesteps, min_snr: float = 0.0, noise_offset: float = 0.0
    ) -> None:
        if not 0 <= timesteps.low <= timesteps.high < schedule.train_steps:
            raise LdmError(
                f"timesteps {timesteps.low} to {timesteps.high}: they must lie within 0 to {schedule.train_steps - 1}"
            )
        self.schedule = schedule
        self.timesteps = timesteps
        self.min_snr = min_snr
        self.noise_offset = noise_offset
        bars = schedule.alpha_bars()
        self.signal, self.sigma = bars.sqrt().float(), (1 - bars).sqrt().float()  # (train_steps,) each
        self.snr = (bars / (1 - bars)).float()
        if schedule.prediction_type == "epsilon" and float(self.signal[timesteps.high]) == 0:
            raise LdmError("at a timestep of pure noise there is nothing to predict as noise; use v_prediction")

    def draw(self, shape: Sequence[int], seed: int, keys: Sequence[str], epochs: Sequence[int]) -> Draw:
        """Noise and timesteps for latents of `shape` (C, h, w), one for each sample."""
        rows = []
        for key, epoch in zip(keys, epochs, strict=True):
            random = generator(seed, "noise", key, epoch)
            noise = torch.randn(tuple(shape), generator=random)
            if self.noise_offset:
                noise = noise + self.noise_offset * torch.randn((shape[0], 1, 1), generator=random)
            rows.append(noise)
        quantiles = [uniform(seed, "timestep", key, epoch) for key, epoch in zip(keys, epochs, strict=True)]
        return Draw(torch.stack(rows), self.timesteps.at(torch.tensor(quantiles, dtype=torch.float64)))

    def noisy(self, latents: Tensor, draw: Draw) -> Tensor:
        """√ᾱ · latents + √(1 - ᾱ) · noise: (B, C, h, w)."""
        a, s = self._scales(draw, latents)
        return a * latents + s * draw.noise

    def target(self, latents: Tensor, draw: Draw) -> Tensor:
        """What the U-Net should predict: the noise, v (Salimans and Ho 2022, arXiv 2202.00512, D), or the latents."""
        if self.schedule.prediction_type == "epsilon":
            return draw.noise
        if self.schedule.prediction_type == "sample":
            return latents
        a, s = self._scales(draw, latents)
        return a * draw.noise - s * latents

    def weight(self, timestep: Tensor) -> Tensor:
        """Weights (B,) of the squared errors: 1, or min-SNR-γ (Hang et al. 2023, arXiv 2303.09556, section 3.4)."""
        if not self.min_snr:
            return torch.ones(timestep.shape, device=timestep.device)
        snr = self._of("snr", timestep)
        capped = snr.clamp(max=self.min_snr)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return capped / divisor[self.schedule.prediction_type]

    def __call__(self, prediction: Tensor, latents: Tensor, draw: Draw) -> Tensor:
        """The weighted mean squared error of each sample: (B,), float32."""
        errors = (prediction.float() - self.target(latents, draw).float()) ** 2
        return self.weight(draw.timestep) * errors.mean(dim=(1, 2, 3))

    def _scales(self, draw: Draw, like: Tensor) -> tuple[Tensor, Tensor]:
        a, s = (self._of(table, draw.timestep).to(like) for table in ("signal", "sigma"))
        return a[:, None, None, None], s[:, None, None, None]

    def _of(self, table: str, timestep: Tensor) -> Tensor:
        """The numbers of a table at timesteps (B,): it goes where they are and stays there, so that nobody waits."""
        values = getattr(self, table).to(timestep.device)
        setattr(self, table, values)
        return values[timestep]
