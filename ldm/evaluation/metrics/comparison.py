"""Tests of whether two models differ, on their images for the same prompts and seeds.

The test exchanges the models' images, prompt by prompt, and counts how often the figures then differ as much (Fisher
1935). If the models are equal in distribution, its p-value is exact for any number of images and of features; biases of
finite N are the same in both models and cancel. The reference is taken as fixed. For most metrics a difference is one
of means over single images, so that thousands of exchanges cost little.

N prompts, M images of the reference, D features of an image, C classes, B exchanges
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.metrics.distances import (
    Kernel,
    balls_around,
    check_moments,
    distances,
    information,
    kernel_sums,
    mean_log,
    radii,
)
from ldm.evaluation.metrics.intervals import LEVEL, Z, optimal_map
from ldm.evaluation.metrics.moments import NUMBERS, Moments, blocks, check_features, measure, merge

if TYPE_CHECKING:
    from scipy.sparse import csr_array

POWER = 0.8  # chance to find a difference, with the number of pairs in `Comparison.needed`
FEWEST = math.ceil(1 - math.log2(1 - LEVEL))  # pairs: with fewer, the 2^N exchanges cannot give so small a p
ROUNDING = 1e-6  # part of the largest value by which equal images may differ: features round by batch
EXCHANGES = 4000  # random ones: the smallest p is 1 / 4001


@dataclass(frozen=True)
class Comparison:
    """Model A minus model B, on the same prompts and seeds."""

    difference: float  # of the figures; for the Inception score, of their logarithms
    error: float  # standard error of the difference
    low: float  # the interval of 95 %
    high: float
    p: float  # two-sided: the chance of so large a difference, either way, between equal models
    count: int  # pairs of images
    needed: int | None  # pairs to find this difference with a chance of 80 %; None: found, or no difference


def _exchanges(count: int, seed: int, width: int = 1) -> Iterator[np.ndarray]:
    """Random signs (count, B), -1 where the models exchange a prompt's images; `EXCHANGES` columns in all.

    Few enough columns at a time that a temporary with `width` rows stays small.
    """
    generator = np.random.default_rng(seed)
    columns = max(1, min(EXCHANGES, NUMBERS // max(count, width)))
    for start in range(0, EXCHANGES, columns):
        shape = (count, min(columns, EXCHANGES - start))
        yield 2.0 * generator.integers(0, 2, size=shape, dtype=np.int8) - 1.0


def _compared(difference: float, error: float, others: np.ndarray, count: int) -> Comparison:
    """A comparison from the differences (EXCHANGES,) after exchanges; ties, up to rounding, raise p."""
    scale = float(np.abs(others).max(initial=abs(difference)))
    reached = int((np.abs(others) >= abs(difference) - 1e-9 * scale).sum())
    p = (1 + reached) / (1 + len(others))
    reach = Z * error
    needed = None
    if p > 1 - LEVEL and abs(difference) > 1e-9 * scale:
        needed = max(
            count + 1, FEWEST, math.ceil(count * ((Z + NormalDist().inv_cdf(POWER)) * error / difference) ** 2)
        )
    return Comparison(difference, error, difference - reach, difference + reach, p, count, needed)


def p_number(p: float) -> str:
    """`0.012` or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_text(p: float) -> str:
    """`p = 0.012` or `p < 0.001`."""
    return f"p {p_number(p)}" if p < 0.001 else f"p = {p_number(p)}"


def compare(a: Tensor, b: Tensor, seed: int = 0) -> Comparison:
    """The difference of the means of two models' values (N,), (N,) for the same prompts and seeds.

    Values are CLIP scores and the like, or an image's part in a metric of the whole set (`frechet_parts`, `mmd_parts`,
    `inception_parts`, `precision_parts`, `density_parts`). The test exchanges the two values of random prompts
    (Fisher 1935).

    Raises:
        LdmError: not as many values on both sides, fewer than two, or some that are not finite.
    """
    _check_pairs(a[:, None], b[:, None])
    values = torch.stack([a, b]).double().cpu().numpy()
    pairs = values[0] - values[1]
    pairs[np.abs(pairs) <= ROUNDING * np.abs(values).max()] = 0
    others = np.concatenate([pairs @ signs for signs in _exchanges(len(pairs), seed)]) / len(pairs)
    error = float(pairs.std(ddof=1)) / math.sqrt(len(pairs))
    return _compared(float(pairs.mean()), error, others, len(pairs))


def _check_pairs(a: Tensor, b: Tensor) -> None:
    check_features("model A", a)
    check_features("model B", b, like=a)
    if len(a) != len(b):
        raise LdmError(
            f"{len(a)} images of model A and {len(b)} of model B; a comparison needs the same prompts for both"
        )


def frechet_parts(a: Tensor, b: Tensor, reference: Moments) -> tuple[Tensor, Tensor]:
    """Each image's part in the Fréchet distance of both models together from the reference: (N,), (N,).

    The difference of the parts' means is that of the models' distances: the derivative is taken half-way between the
    models, so that the error is of third order. The bias of finite N cancels. N may be smaller than D.

    Raises:
        LdmError: not as many images on both sides, or as `check_moments`.
    """
    _check_pairs(a, b)
    together = merge(measure(a), measure(b))
    check_moments(together, reference)
    optimal = optimal_map(together, reference)
    first, second = (torch.cat([optimal.influence(rows - together.mean) for rows in blocks(x)]) for x in (a, b))
    return first, second


def mmd_parts(kernel: Kernel, a: Tensor, b: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's part in the discrepancy: (N,), (N,). The difference of their means is that of `mmd`, exactly.

    Raises:
        LdmError: not as many images on both sides, or as `mmd`.
    """
    _check_pairs(a, b)
    check_features("reference", reference, like=a)
    first, second = (
        (kernel_sums(kernel, x, x, same=True) + kernel_sums(kernel, x, y)) / (len(x) - 1)
        - 2 * kernel_sums(kernel, x, reference) / len(reference)
        for x, y in ((a, b), (b, a))
    )
    return first, second


def inception_parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p(y|x) ‖ p(y)) of each image, p(y) that of both models together: (N,), (N,), of logits (N, C), (N, C).

    The difference of their means is that of the logarithms of the models' scores, to third order, as in
    `frechet_parts`.

    Raises:
        LdmError: not as many images on both sides.
    """
    _check_pairs(a, b)
    marginal = mean_log(torch.cat([a, b]))
    return information(a, marginal), information(b, marginal)


def precision_parts(a: Tensor, b: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each image's part in precision, 0 or 1: (N,), (N,). Their means are the models' figures.

    Raises:
        LdmError: not as many images on both sides, or as `manifold`.
    """
    first, second = _held(a, b, reference, k)
    return (first > 0).double(), (second > 0).double()


def density_parts(a: Tensor, b: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each image's part in density: (N,), (N,). Their means are the models' figures.

    Raises:
        LdmError: not as many images on both sides, or as `manifold`.
    """
    first, second = _held(a, b, reference, k)
    return first / k, second / k


def _held(a: Tensor, b: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many balls of the reference hold each image: (N,), (N,)."""
    _check_pairs(a, b)
    check_features("reference", reference, least=k + 1, like=a)
    own = radii(reference, k)
    return balls_around(a, reference, own), balls_around(b, reference, own)


def compare_coverage(a: Tensor, b: Tensor, reference: Tensor, k: int, seed: int = 0) -> Comparison:
    """The difference of the models' coverage of the reference, tested as in `compare`.

    Raises:
        LdmError: not as many images on both sides, or as `manifold`.
    """
    _check_pairs(a, b)
    check_features("reference", reference, least=k + 1, like=a)
    own = radii(reference, k)[:, None]
    return _compare_reached(reference, a, b, own, own, seed)


def compare_recall(a: Tensor, b: Tensor, reference: Tensor, k: int, seed: int = 0) -> Comparison:
    """The difference of the models' recall of the reference, tested as in `compare`.

    Balls must not change when images are exchanged: they reach to the 2k-th neighbour among the images of both models,
    about the k-th among those of one. So the difference is close to that of the models' `recall`, but not equal.

    Raises:
        LdmError: not as many images on both sides, or as `manifold`.
    """
    _check_pairs(a, b)
    check_features("reference", reference, least=1, like=a)
    first, second = radii(torch.cat([a, b]), 2 * k).split(len(a))
    return _compare_reached(reference, a, b, first[None], second[None], seed)


def _compare_reached(reference: Tensor, a: Tensor, b: Tensor, first: Tensor, second: Tensor, seed: int) -> Comparison:
    """Compare shares of the reference with an image of a model within a distance, (M, 1) or (1, N) for each model."""
    of_a, of_b = (_within(reference, x, reach) for x, reach in ((a, first), (b, second)))
    both, apart = of_a + of_b, of_a - of_b
    total = np.asarray(both.sum(axis=1))[:, None]

    def difference(signs: np.ndarray) -> np.ndarray:
        """How many more of the reference A reaches than B after exchanges (N, B), as a share: (B,)."""
        more = apart @ signs  # images of A than of B near each reference image
        return ((more > -total).astype(float) - (more < total)).mean(axis=0)

    found = float(difference(np.ones((len(a), 1)))[0])
    others = np.concatenate([difference(signs) for signs in _exchanges(len(a), seed, len(reference))])
    return _compared(found, float(others.std()), others, len(a))


def _within(reference: Tensor, images: Tensor, reach: Tensor) -> csr_array:
    """Which images (N) are within `reach` of each of the reference (M): a sparse (M, N) of ones."""
    rows, columns = [], []
    start = 0
    for block in blocks(reference, width=len(images)):
        limit = reach[start : start + len(block)] if len(reach) > 1 else reach
        found = (distances(block, images) <= limit).nonzero().cpu().numpy()
        rows.append(found[:, 0] + start)
        columns.append(found[:, 1])
        start += len(block)
    from scipy.sparse import csr_array

    at = np.concatenate(rows), np.concatenate(columns)
    return csr_array((np.ones(len(at[0])), at), shape=(len(reference), len(images)))
