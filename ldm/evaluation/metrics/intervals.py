"""Figures with 95 % intervals, for every metric.

Means get Student's interval (CLIP score), shares Wilson's (near copies), chances both (R-precision). Distances and the
Inception score are smooth functions of the distribution: the influence of each image (the functional's derivative, the
infinitesimal jackknife) gives the standard error, and the second derivative the bias of order 1/N, which a bootstrap
would double. Statistics of neighbours are not smooth, and duplicates in a bootstrap sample are each other's neighbours:
they get a jackknife over groups of images.

Images count as independent draws: several images of one prompt are not, and make an interval too narrow.

N images of the model, M images of the reference, D features of an image, G groups
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from ldm.evaluation.metrics.distances import (
    Kernel,
    distances,
    frechet_distance,
    inception_score,
    information,
    kernel_sums,
    mean_log,
    root,
)
from ldm.evaluation.metrics.moments import Moments, blocks, check_features, measure

LEVEL = 0.95  # of every interval
GROUPS = 20  # G of the jackknife
PER_DIMENSION = 2.5  # images for each dimension that the features span: with fewer, the bias of FID is unknown

Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


def t_quantile(degrees: int) -> float:
    """The reach of an interval in standard errors, by Student's distribution with so many degrees of freedom."""
    from scipy.stats import t  # takes a second

    return float(t.ppf(0.5 + LEVEL / 2, degrees))


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval."""

    value: float  # by the published definition
    corrected: float | None  # without its bias of order 1/N, the middle of the interval; None: unknown
    error: float | None  # standard error
    low: float | None  # the interval of 95 %
    high: float | None
    count: int  # images of the model
    note: str = ""  # why there is no interval


def _around(value: float, middle: float, error: float, count: int, least: float, most: float) -> Estimate:
    """An estimate with a symmetric interval, cut to the range of the metric."""
    low, high = middle - Z * error, middle + Z * error
    return Estimate(value, middle, error, min(max(low, least), most), max(min(high, most), least), count)


# --- intervals of means and shares ------------------------------------------------------------------------------------


def mean_interval(values: Tensor, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """The mean of independent values (N,), such as CLIP scores, and Student's interval, cut to the range of the means.

    Raises:
        LdmError: fewer than two values, or some that are not finite.
    """
    check_features("mean", values[:, None])
    count, mean = len(values), float(values.double().mean())
    error = float(values.double().std()) / math.sqrt(count)
    reach = t_quantile(count - 1) * error
    return Estimate(mean, mean, error, max(mean - reach, least), min(mean + reach, most), count)


def share_interval(hits: Tensor) -> Estimate:
    """The share of independent images for which something holds (N,), bool, and Wilson's interval (1927).

    Raises:
        LdmError: there are no images.
    """
    check_features("share", hits[:, None], least=1)
    count, share = len(hits), float(hits.double().mean())
    low, high = _wilson(share, share * (1 - share), count)
    return Estimate(share, share, math.sqrt(share * (1 - share) / count), low, high, count)


def chance_interval(chances: Tensor) -> Estimate:
    """The mean of independent chances (N,), such as R-precision, and an interval.

    It is Student's interval, which is far too narrow where nearly all chances are 1; so it is widened to Wilson's with
    the variance of the chances in place of the binomial variance.

    Raises:
        LdmError: fewer than two chances.
    """
    found = mean_interval(chances, 0.0, 1.0)
    low, high = _wilson(found.value, float(chances.double().var(correction=0)), len(chances))
    assert found.low is not None
    assert found.high is not None
    return replace(found, low=min(low, found.low), high=max(high, found.high))


def _wilson(share: float, variance: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share, with the binomial variance; of chances, with their own."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z * math.sqrt(variance / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


# --- intervals of distances -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimalMap:
    """Terms of the derivatives of the Fréchet distance from N(μ₁, Σ₁) to N(μ₂, Σ₂) by μ₁ and Σ₁."""

    shift: Tensor  # (D,): μ₁ - μ₂
    basis: Tensor  # (D, D): z = basisᵀ (x - μ₁) has the covariance diag(scales²)
    scales: Tensor  # (D,): their sum is tr (Σ₁Σ₂)^½
    inverse: Tensor  # (D,): 1 / scales; 0 for directions that are not spanned

    @property
    def rank(self) -> int:
        return int((self.inverse > 0).sum())

    def influence(self, centred: Tensor) -> Tensor:
        """2 (x - μ₁)·(μ₁ - μ₂) + (x - μ₁)ᵀ (I - T) (x - μ₁): (B,); T is the optimal map from Σ₁ to Σ₂."""
        z = centred @ self.basis
        return centred @ (2 * self.shift) + centred.square().sum(dim=1) - z.square() @ self.inverse


def optimal_map(own: Moments, other: Moments) -> OptimalMap:
    """The optimal transport between two Gaussians (Dowson and Landau 1982), and the basis in which it is diagonal."""
    half = root(other.covariance)
    values, vectors = torch.linalg.eigh(half @ own.covariance @ half)
    scales = values.clamp(min=0).sqrt()
    spanned = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(spanned, 1 / scales, torch.zeros_like(scales))
    return OptimalMap(own.mean - other.mean, half @ vectors, scales, inverse)


def _expansion(features: Tensor, own: Moments, optimal: OptimalMap) -> tuple[float, float]:
    """Bias and variance of the Fréchet distance that the sampling of `features` causes, to order 1/N."""
    count = len(features)
    fourth = torch.zeros_like(own.scatter)  # sums of z_i² z_j²
    influences = []
    for rows in blocks(features):
        centred = rows - own.mean
        squares = (centred @ optimal.basis).square()
        fourth += squares.T @ squares
        influences.append(optimal.influence(centred))
    spread = (fourth / count - torch.diag(optimal.scales**4)) / count  # variances of the covariances of z
    sums = (optimal.scales[:, None] + optimal.scales).clamp(min=torch.finfo(torch.float64).tiny)
    curvature = (optimal.inverse[:, None] * optimal.inverse / sums * spread).sum() / 2
    return float(own.covariance.trace() / count + curvature), float(torch.cat(influences).var()) / count


def _corrected(samples: Tensor, reference: Tensor | Moments) -> tuple[float, float, int]:
    """The Fréchet distance without its bias of order 1/N, its variance, and the number of shared dimensions."""
    own = measure(samples)
    other = reference if isinstance(reference, Moments) else measure(reference)
    optimal = optimal_map(own, other)
    traces = float(own.covariance.trace() + other.covariance.trace())
    distance = float(optimal.shift.square().sum() - 2 * optimal.scales.sum()) + traces
    bias, variance = _expansion(samples, own, optimal)
    if not isinstance(reference, Moments):
        more = _expansion(reference, other, optimal_map(other, own))
        bias, variance = bias + more[0], variance + more[1]
    return distance - bias, variance, optimal.rank


def frechet_interval(samples: Tensor, reference: Tensor | Moments) -> Estimate:
    """The Fréchet distance of features (N, D) from (M, D), and an interval for that of infinitely many images.

    The plain distance of few images is too large, as Chong and Forsyth (2020) saw. Here the bias of order 1/N is
    computed: half the second derivative times the covariance of the moments, which needs the features' fourth moments.
    That of order 1/N² is removed by Richardson's extrapolation from the two halves of the images. The standard error is
    that of the influences. Near 0, where the distance is no longer linear in the moments, the interval is too wide
    rather than too narrow (tools/check_intervals.py measures both).

    A reference of moments alone is taken as exact: the interval is then about the model's images only.
    Without enough images there is a value, a note, and no interval.
    Costs 15 decompositions of D×D matrices (9 with a known reference), and a few passes over the features.

    Raises:
        LdmError: as `frechet_distance`, or features are not finite.
    """
    check_features("model", samples)
    value = frechet_distance(measure(samples), reference if isinstance(reference, Moments) else measure(reference))
    fewest = len(samples) if isinstance(reference, Moments) else min(len(samples), len(reference))
    first, variance, rank = _corrected(samples, reference)
    if fewest < max(PER_DIMENSION * rank, 8):
        note = (
            f"{fewest} images are too few for {samples.shape[1]} features: the distance is far too large, by an "
            f"unknown amount; an interval needs about {math.ceil(PER_DIMENSION * samples.shape[1]):,} images"
        )
        return Estimate(value, None, None, None, None, len(samples), note)
    halves = [
        _corrected(samples[i::2], reference if isinstance(reference, Moments) else reference[i::2])[0] for i in (0, 1)
    ]
    return _around(value, (4 * first - sum(halves) / 2) / 3, math.sqrt(variance), len(samples), 0.0, math.inf)


def mmd_interval(kernel: Kernel, samples: Tensor, reference: Tensor) -> Estimate:
    """The squared discrepancy `mmd` and its interval: KID with `polynomial`; CMMD with `gaussian` on `unit` embeddings.

    The standard error is that of 2 (E k(x, x') - E k(x, y)) over the images of both sides. The figure is unbiased.
    Near 0 the interval is too wide rather than too narrow.

    Raises:
        LdmError: as `mmd`.
    """
    check_features("model", samples)
    check_features("reference", reference, like=samples)
    value = variance = 0.0
    for x, y in ((samples, reference), (reference, samples)):
        witness = kernel_sums(kernel, x, x, same=True) / (len(x) - 1) - kernel_sums(kernel, x, y) / len(y)
        value += float(witness.mean())
        variance += 4 * float(witness.var()) / len(x)
    return _around(value, value, math.sqrt(variance), len(samples), -math.inf, math.inf)


def inception_interval(logits: Tensor, splits: int = 10) -> Estimate:
    """The Inception score of logits (N, C), and an interval for that of infinitely many images.

    Each part's marginal p(y) is estimated, which makes the score too small by a factor that depends on the number of
    images; to order 1/N its logarithm misses Σ_c var p(c|x) / (2 N p(c)). The standard error of the logarithm is that
    of KL(p(y|x) ‖ p(y)) over the images.

    Raises:
        LdmError: as `inception_score`.
    """
    value = inception_score(logits, splits)
    check_features("Inception score", logits)
    marginal = mean_log(logits)
    gains = information(logits, marginal)
    squares = sum((rows.log_softmax(dim=1) * 2 - marginal).exp().sum() for rows in blocks(logits)) / len(logits)
    missed = float(squares - 1) / (2 * len(logits))  # Σ_c (E p² - (E p)²) / E p, and the means add up to 1
    middle, reach = float(gains.mean()) + missed, float(gains.std()) / math.sqrt(len(logits))
    low, high = (math.exp(max(middle + sign * Z * reach, 0.0)) for sign in (-1, 1))
    return Estimate(value, math.exp(middle), math.exp(middle) * reach, low, high, len(logits))


# --- intervals of neighbours ------------------------------------------------------------------------------------------


def _by_group(apart: Tensor, least: int) -> Tensor:
    """The `least` smallest distances of (B, M) in each group of columns, j % G: (B, least, G)."""
    rows = max(math.ceil(apart.shape[1] / GROUPS), least)
    padded = apart.new_full((len(apart), rows * GROUPS), torch.inf)
    padded[:, : apart.shape[1]] = apart
    return padded.view(len(apart), rows, GROUPS).topk(least, dim=1, largest=False).values


def _without_groups(points: Tensor, others: Tensor, k: int, same: bool) -> Tensor:
    """Distance of each point (N, D) to its k-th nearest of `others`: (1 + G, N), of all and without each group."""
    found = []
    start = 0
    for rows in blocks(points, width=len(others)):
        apart = distances(rows, others)
        if same:
            own = torch.arange(len(rows), device=rows.device)
            apart[own, start + own] = torch.inf
        start += len(rows)
        smallest = _by_group(apart, k)
        kept = [smallest] + [
            smallest.index_fill(2, torch.tensor([g], device=rows.device), torch.inf) for g in range(GROUPS)
        ]
        found.append(torch.stack([part.flatten(1).kthvalue(k, dim=1).values for part in kept]))
    return torch.cat(found, dim=1)


def _held(points: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """How many balls of radius (1 + G, M) hold each point: (1 + G, N); row 1 + g leaves out the balls of group g."""
    radius = radius.clone()
    for group in range(GROUPS):
        radius[1 + group, group::GROUPS] = -1
    found = []
    for rows in blocks(points, width=len(centres)):
        apart = distances(rows, centres)
        found.append(torch.stack([(apart <= row).sum(dim=1) for row in radius]))
    return torch.cat(found, dim=1).double()


def _left_out(rows: Tensor) -> Tensor:
    """Means of rows (G, N), each without its own group of columns: (G,)."""
    number = torch.arange(rows.shape[1], device=rows.device) % GROUPS
    return torch.stack([row[number != group].mean() for group, row in enumerate(rows)])


def _jackknifed(values: Tensor, own: Tensor, other: Tensor, count: int, most: float) -> Estimate:
    """The mean of values over a side's images (N,), from those without a group of that side (G,) and of the other (G,).

    For shares (`most` is 1) it is at least Wilson's interval, because groups without variation tell nothing.
    """
    value = float(values.mean())
    error = math.sqrt((GROUPS - 1) * float(own.var(correction=0) + other.var(correction=0)))
    reach = t_quantile(GROUPS - 1) * error
    low, high = max(value - reach, 0.0), min(value + reach, most)
    if most == 1:
        least_low, least_high = _wilson(value, value * (1 - value), len(values))
        low, high = min(low, least_low), max(high, least_high)
    return Estimate(value, value, error, low, high, count)


def precision_interval(samples: Tensor, reference: Tensor, k: int) -> Estimate:
    """Precision as `manifold` computes it, with its interval.

    The figure depends on N and M, and the interval is for its expectation at these N and M. Both sides vary: each of
    20 groups of images on either side is left out in turn, and balls and neighbours follow. Recall,
    density and coverage do the same.

    Raises:
        LdmError: a side has fewer than 40 images or 2·k, or the features differ in number.
    """
    _check_sides(samples, reference, k)
    inside = (_held(samples, reference, _without_groups(reference, reference, k, same=True)) > 0).double()
    return _jackknifed(inside[0], _each_left_out(inside[0]), inside[1:].mean(dim=1), len(samples), 1)


def recall_interval(samples: Tensor, reference: Tensor, k: int) -> Estimate:
    """Recall with its interval, as `precision_interval`."""
    _check_sides(samples, reference, k)
    recalled = (_held(reference, samples, _without_groups(samples, samples, k, same=True)) > 0).double()
    return _jackknifed(recalled[0], _each_left_out(recalled[0]), recalled[1:].mean(dim=1), len(samples), 1)


def density_interval(samples: Tensor, reference: Tensor, k: int) -> Estimate:
    """Density with its interval, as `precision_interval`."""
    _check_sides(samples, reference, k)
    held = _held(samples, reference, _without_groups(reference, reference, k, same=True))
    return _jackknifed(held[0] / k, _each_left_out(held[0] / k), held[1:].mean(dim=1) / k, len(samples), math.inf)


def coverage_interval(samples: Tensor, reference: Tensor, k: int) -> Estimate:
    """Coverage with its interval, as `precision_interval`."""
    _check_sides(samples, reference, k)
    balls = _without_groups(reference, reference, k, same=True)
    near = _without_groups(reference, samples, 1, same=False)
    covered = (near <= balls[0]).double()  # by row, without a group of samples
    regrown = (near[0] <= balls[1:]).double()  # by row, without a group of the reference
    return _jackknifed(covered[0], _left_out(regrown), covered[1:].mean(dim=1), len(samples), 1)


def _check_sides(samples: Tensor, reference: Tensor, k: int) -> None:
    least = max(2 * GROUPS, 2 * k)
    check_features("model", samples, least=least)
    check_features("reference", reference, least=least, like=samples)


def _each_left_out(row: Tensor) -> Tensor:
    """Means of a row (N,) without each group of columns: (G,)."""
    return _left_out(row.expand(GROUPS, -1))
