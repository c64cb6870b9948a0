"""Features whose true figures are known, and how often intervals and tests are right about them.

N images of the model, M images of the reference, D features of an image
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.evaluation.metrics.comparison import (
    Comparison,
    compare,
    compare_coverage,
    compare_recall,
    density_parts,
    frechet_parts,
    inception_parts,
    mmd_parts,
    precision_parts,
)
from ldm.evaluation.metrics.distances import frechet_distance, polynomial
from ldm.evaluation.metrics.intervals import (
    Estimate,
    coverage_interval,
    density_interval,
    precision_interval,
    recall_interval,
)
from ldm.evaluation.metrics.moments import Moments, measure

NEIGHBOURS = {
    "precision": precision_interval, "recall": recall_interval,
    "density": density_interval, "coverage": coverage_interval,
}  # fmt: skip


def comparisons(k: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Comparison]]:
    """Comparisons of two models with a reference, by metric; neighbourhoods reach as far as the k-th neighbour."""
    return {
        "FD": lambda a, b, r: compare(*frechet_parts(a, b, measure(r))),
        "KID": lambda a, b, r: compare(*mmd_parts(polynomial, a, b, r)),
        "Inception score": lambda a, b, r: compare(*inception_parts(a, b)),
        "precision": lambda a, b, r: compare(*precision_parts(a, b, r, k)),
        "density": lambda a, b, r: compare(*density_parts(a, b, r, k)),
        "recall": lambda a, b, r: compare_recall(a, b, r, k),
        "coverage": lambda a, b, r: compare_coverage(a, b, r, k),
    }


@dataclass(frozen=True)
class Gaussian:
    """A distribution of features."""

    mean: Tensor  # (D,)
    factor: Tensor  # (D, D): a root of the covariance

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` images: (N, D)."""
        noise = torch.randn(count, len(self.mean), dtype=torch.float64, generator=generator)
        return noise @ self.factor.T + self.mean

    @property
    def moments(self) -> Moments:
        """The true ones, as those of very many images."""
        count = torch.tensor(1e15, dtype=torch.float64)
        return Moments(count, self.mean, self.factor @ self.factor.T * (count - 1))


def pair(dim: int, decay: float, shift: float, change: float, seed: int = 0) -> tuple[Gaussian, Gaussian, float]:
    """A model, a reference, and their true Fréchet distance.

    Args:
        decay: the variances of the reference fall as i^-decay.
        shift: of the mean, in standard deviations of each direction.
        change: how much variances and directions differ.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    scales = torch.arange(1, dim + 1, dtype=torch.float64) ** (-decay / 2)
    directions = torch.linalg.qr(random(dim, dim)).Q
    turned = torch.linalg.qr(directions + 0.3 * change * random(dim, dim)).Q
    reference = Gaussian(torch.zeros(dim, dtype=torch.float64), directions * scales)
    model = Gaussian(shift * random(dim) * scales, turned * scales * torch.exp(change / 2 * random(dim)))
    return model, reference, frechet_distance(model.moments, reference.moments)


def coverage(estimate: Callable[[torch.Generator], Estimate], truth: float, trials: int, seed: int = 0) -> float:
    """How often the interval of `estimate`, handed a generator, holds the truth: a share of the trials."""
    generator = torch.Generator().manual_seed(seed)
    found = [estimate(generator) for _ in range(trials)]
    return sum(e.low is not None and e.high is not None and e.low <= truth <= e.high for e in found) / trials


def detections(test: Callable[[torch.Generator], Comparison], trials: int, seed: int = 0) -> float:
    """How often `test`, handed a generator, calls two models different at 5 %: a share of the trials."""
    generator = torch.Generator().manual_seed(seed)
    return sum(test(generator).p <= 0.05 for _ in range(trials)) / trials
