"""The loss of a diffusion model: noise is added to latents, and the U-Net's prediction compared with its target.

Ho et al. 2020 (arXiv 2006.11239), equation 14, for every parametrisation, distribution of timesteps and weighting.

B batch, C latent channels, h×w height and width of the latents
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.data.keyed import generator, uniform
from ldm.errors import LdmError
from ldm.process import NoiseSchedule


@dataclass(frozen=True)
class Timesteps:
    """How timesteps are distributed in training."""

    low: int = 0  # the first
    high: int = 999  # and the last, included
    # or "logit-normal" (Esser et al. 2024, arXiv 2403.03206, section 3.1), "cubic" (Mou et al. 2023, arXiv 2302.08453,
    # section 3.4)
    distribution: str = "uniform"
    mean: float = 0.0  # of the logit-normal distribution; above 0: more noise
    std: float = 1.0

    def at(self, quantiles: Tensor) -> Tensor:
        """Timesteps (B,) at these quantiles (B,) of the distribution, from 0 to 1 without 1."""
        if self.distribution == "logit-normal":
            quantiles = torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantiles))
        if self.distribution == "cubic":
            quantiles = 1 - quantiles**3
        span = self.high - self.low + 1
        return (self.low + (quantiles * span).long()).clamp(self.low, self.high)


@dataclass(frozen=True)
class Draw:
    """The random numbers in the loss of a batch, which depend on the seed and on each sample's key and epoch."""

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
        self.alpha, self.sigma = bars.sqrt().float(), (1 - bars).sqrt().float()  # (train_steps,) each
        self.snr = (bars / (1 - bars)).float()
        if not schedule.parametrisation.defined_at_zero_snr and float(self.alpha[timesteps.high]) == 0:
            raise LdmError(
                f"timestep {timesteps.high} is pure noise, from which {schedule.prediction_type} cannot be learned; "
                "use v_prediction, or end before it"
            )

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
        """α · latents + σ · noise: (B, C, h, w)."""
        alpha, sigma = self._scales(draw, latents)
        return alpha * latents + sigma * draw.noise

    def target(self, latents: Tensor, draw: Draw) -> Tensor:
        """The target (B, C, h, w) of the prediction, for these latents and this noise."""
        return self.schedule.parametrisation.target(latents, draw.noise, *self._scales(draw, latents))

    def weight(self, timestep: Tensor) -> Tensor:
        """Weights (B,) of the squared errors: 1, or min-SNR-γ."""
        if not self.min_snr:
            return torch.ones(timestep.shape, device=timestep.device)
        return self.schedule.parametrisation.weight(self._of("snr", timestep), self.min_snr)

    def __call__(self, prediction: Tensor, latents: Tensor, draw: Draw, areas: Tensor | None = None) -> Tensor:
        """The weighted mean squared error of each sample: (B,), float32; the mean by `areas` (B, 1, h, w), if given."""
        errors = (prediction.float() - self.target(latents, draw).float()) ** 2
        return self.weight(draw.timestep) * mean_by(errors, areas)

    def _scales(self, draw: Draw, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of a draw, to multiply latents by: (B, 1, 1, 1) each."""
        alpha, sigma = (self._of(table, draw.timestep).to(like) for table in ("alpha", "sigma"))
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def _of(self, table: str, timestep: Tensor) -> Tensor:
        """The values of a table at timesteps (B,). The table stays on their device, so that no step waits for it."""
        values = getattr(self, table).to(timestep.device)
        setattr(self, table, values)
        return values[timestep]


def mean_by(errors: Tensor, areas: Tensor | None) -> Tensor:
    """The mean (B,) of errors (B, C, h, w), or the mean weighted by areas (B, 1, h, w); 0 where all weights are 0."""
    if areas is None:
        return errors.mean(dim=(1, 2, 3))
    sums = (errors.mean(dim=1, keepdim=True) * areas).sum(dim=(1, 2, 3))
    return sums / areas.sum(dim=(1, 2, 3)).clamp(min=torch.finfo(areas.dtype).tiny)
