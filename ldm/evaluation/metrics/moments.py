"""Moments of features, and features in blocks.

Moments are D² numbers, however many images there are; Fréchet distances need no more. Kernels, neighbours and
intervals need the features: N·D numbers, in memory or mapped from a file.

N images, D features of an image
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ldm.errors import LdmError

NUMBERS = 2**24  # float64 numbers in the largest temporary tensor: 128 MB


def blocks(features: Tensor, width: int | None = None) -> Iterator[Tensor]:
    """The rows of `features` (N, D) in float64, few at a time, so that temporaries of `width` columns stay small."""
    for rows in features.split(max(1, NUMBERS // max(features.shape[1], width or 1, 1))):
        yield rows.double()


def check_features(what: str, features: Tensor, least: int = 2, like: Tensor | None = None) -> None:
    """Raise unless `features` is a matrix of finite numbers, with enough rows and the columns of `like`.

    Raises:
        LdmError: the features are not such a matrix.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise LdmError(f"{what}: features of shape {tuple(features.shape)}; one row for each image is needed")
    if len(features) < least:
        raise LdmError(f"{what}: {len(features)} images; at least {least} are needed")
    if like is not None and like.shape[1] != features.shape[1]:
        raise LdmError(
            f"{what}: {features.shape[1]} features of an image, compared with {like.shape[1]}; use one extractor for "
            "both"
        )
    for number, rows in enumerate(features.split(2**14)):
        finite = rows.isfinite().all(dim=1)
        if not bool(finite.all()):
            row = number * 2**14 + int(finite.logical_not().nonzero()[0])
            raise LdmError(f"{what}: the features of image {row} are not finite; run the extractor in float32")


# --- moments ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """The moments of the features seen so far; float64. Memory is the same for any number of images: 8·D² bytes."""

    count: Tensor  # (): images
    mean: Tensor  # (D,)
    scatter: Tensor  # (D, D): sum of the outer products of the differences from the mean

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance: (D, D)."""
        return self.scatter / (self.count - 1)


def measure(features: Tensor) -> Moments:
    """The moments of features (N, D), N ≥ 1, on their device.

    Raises:
        LdmError: there are no features, or they are not finite.
    """
    check_features("moments", features, least=1)
    return reduce(merge, (_measure(rows) for rows in blocks(features)))


def _measure(values: Tensor) -> Moments:
    mean = values.mean(dim=0)
    centred = values - mean
    return Moments(torch.tensor(len(values), dtype=torch.float64, device=mean.device), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both together (Chan, Golub and LeVeque 1983), which lose no digits as sums of squares would."""
    count = a.count + b.count
    delta = b.mean - a.mean
    scatter = a.scatter + b.scatter + torch.outer(delta, delta) * (a.count * b.count / count)
    return Moments(count, a.mean + delta * (b.count / count), scatter)
