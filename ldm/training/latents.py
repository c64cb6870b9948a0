"""The mean and standard deviation of latents, measured batch by batch, for the autoencoder's scale and shift.

Chan, Golub and LeVeque 1983: count, mean and squared deviations of two parts give those of the whole, and lose no
digits as a sum of squares would. Memory is the same for any number of latents.

B batch, C channels of the latents, h×w their height and width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.training.parallel.ranks import Reduce


@dataclass(frozen=True)
class LatentMoments:
    """The moments of the latents seen so far; float64, on the CPU."""

    count: Tensor  # (): how many numbers of each channel
    mean: Tensor  # (C,)
    squares: Tensor  # (C,): sums of squared differences from the mean

    @property
    def channel_std(self) -> Tensor:
        """Standard deviation of each channel: (C,)."""
        return (self.squares / self.count).sqrt()

    @property
    def shift(self) -> float:
        """The mean of all channels together: `shift_factor`, if the autoencoder is to have one."""
        return float(self.mean.mean())

    @property
    def scale(self) -> float:
        """1 / the standard deviation of all channels together: `scaling_factor` (Rombach et al. 2022, appendix G)."""
        variance = (self.squares / self.count + (self.mean - self.mean.mean()).square()).mean()
        return float(variance.rsqrt())


def measure(latents: Tensor) -> LatentMoments:
    """The moments of unscaled latents (B, C, h, w), as sampled from the posterior."""
    values = latents.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)  # (C, B · h · w)
    mean = values.mean(dim=1)
    count = torch.tensor(values.shape[1], dtype=torch.float64)
    return LatentMoments(count, mean, (values - mean.unsqueeze(1)).square().sum(dim=1))


def merge(a: LatentMoments, b: LatentMoments) -> LatentMoments:
    """The moments of both sets of latents together."""
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return LatentMoments(count, mean, a.squares + b.squares + delta.square() * (a.count * b.count / count))


def over_ranks(moments: LatentMoments, reduce: Reduce) -> LatentMoments:
    """The moments of all ranks together, the same on each.

    Args:
        reduce: gives the sum over all ranks of a float64 tensor on the CPU.
    """
    counted = reduce(torch.cat([moments.count.view(1), moments.count * moments.mean]))
    mean = counted[1:] / counted[0]
    squares = reduce(moments.squares + moments.count * (moments.mean - mean).square())
    return LatentMoments(counted[0], mean, squares)
