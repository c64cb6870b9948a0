"""Metrics of features: distances from a reference set, from prompts, and from the training set.

Everything is computed in float64 on the device of the features, in blocks: beside the features, memory holds a few
times D² numbers and a few temporaries of 128 MB. Kernels and neighbours take all pairs of images: N²·D operations.

N images of the model, M images of the reference, D features of an image, C classes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.metrics.moments import Moments, blocks, check_features

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> (N, M)

CMMD_SIGMA = 10.0  # width of the Gaussian (Jayasumana et al. 2024)
CMMD_SCALE = 1000.0  # factor of the figure, from the same paper


# --- Fréchet distances ------------------------------------------------------------------------------------------------


def root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance (D, D); eigenvalues below 0 are rounding, and become 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def check_moments(a: Moments, b: Moments) -> None:
    """Raise unless a Fréchet distance between the two is defined.

    Raises:
        LdmError: the moments are of fewer than two images or of different features.
    """
    if a.mean.shape != b.mean.shape:
        raise LdmError(
            f"Fréchet distance: {len(a.mean)} features of an image, compared with {len(b.mean)}; use one extractor for "
            "both"
        )
    if min(float(a.count), float(b.count)) < 2:
        raise LdmError("Fréchet distance: a single image has no covariance; at least 2 images are needed on both sides")


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½): FID (Heusel et al. 2017) on Inception features, FD on others.

    tr (Σ₁Σ₂)^½ is the sum of the singular values of Σ₁^½ Σ₂^½, so that no eigenvalue is negative or complex, and none
    is lost where a covariance is singular: with N ≤ D, the value is defined, but its bias can be larger than itself.

    Raises:
        LdmError: as `check_moments`.
    """
    check_moments(a, b)
    cross = torch.linalg.svdvals(root(a.covariance) @ root(b.covariance)).sum()
    means = (a.mean - b.mean).square().sum()
    return float((means + a.covariance.trace() + b.covariance.trace() - 2 * cross).clamp(min=0))


def spatial_features(maps: Tensor) -> Tensor:
    """The features of sFID (Nash et al. 2021), as ADM's evaluator defines them: (N, 2023) of (N, C ≥ 7, 17, 17).

    It takes the first 7 channels of `mixed_6/conv`, after its ReLU, in the Inception graph of 2015, rows and columns
    first. In the names of torchvision and torch-fidelity that is `Mixed_6d`, whose first 192 channels are that branch.
    sFID is `frechet_distance` on them.
    """
    return maps[:, :7].permute(0, 2, 3, 1).flatten(1)


# --- kernel distances -------------------------------------------------------------------------------------------------


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / D + 1)³, the kernel of KID (Bińkowski et al. 2018): (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """1000 · exp(-|x - y|² / 2σ²), σ = 10, the kernel of CMMD on embeddings of length 1: (N, M)."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    return CMMD_SCALE * torch.exp(-squares.clamp(min=0) / (2 * CMMD_SIGMA**2))


def kernel_sums(kernel: Kernel, x: Tensor, y: Tensor, same: bool = False) -> Tensor:
    """Σ_j k(x_i, y_j) for each i: (N,). With `same`, x is y, and j = i is left out."""
    found = []
    for rows in blocks(x, width=len(y)):
        total = rows.new_zeros(len(rows))
        for other in blocks(y):
            total += kernel(rows, other).sum(dim=1)
        if same:
            total -= torch.cat([kernel(part, part).diagonal() for part in rows.split(256)])
        found.append(total)
    return torch.cat(found)


def mmd(kernel: Kernel, samples: Tensor, reference: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy (Gretton et al. 2012, equation 3) of (N, D) and (M, D).

    It is computed over all pairs, in blocks: the limit of the mean over many random subsets of 1000.

    Raises:
        LdmError: a side has fewer than two images, or the features differ in number.
    """
    check_features("model", samples)
    check_features("reference", reference, like=samples)
    n, m = len(samples), len(reference)
    within = kernel_sums(kernel, samples, samples, same=True).sum() / (n * (n - 1))
    other = kernel_sums(kernel, reference, reference, same=True).sum() / (m * (m - 1))
    return float(within + other - 2 * kernel_sums(kernel, samples, reference).sum() / (n * m))


def kid(samples: Tensor, reference: Tensor) -> float:
    """Kernel Inception distance (Bińkowski et al. 2018), unbiased, so it can be below 0. See `mmd`."""
    return mmd(polynomial, samples, reference)


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings (N, D) with length 1, float64.

    Raises:
        LdmError: one has length 0.
    """
    lengths = torch.linalg.vector_norm(embeddings.double(), dim=1, keepdim=True)
    if bool((lengths == 0).any()):
        raise LdmError(f"embedding {int((lengths[:, 0] == 0).nonzero()[0])} is 0 and has no direction; leave it out")
    return embeddings.double() / lengths


def cmmd(samples: Tensor, reference: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024) of CLIP embeddings (N, D) and (M, D), of any length; times 1000.

    Unbiased, as its formula says; the authors' program keeps the pairs (i, i), which adds about 1000 · (1 - mean k) / N
    for each side.
    """
    return mmd(gaussian, unit(samples), unit(reference))


# --- Inception score --------------------------------------------------------------------------------------------------


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 2016) of logits (N, C), the mean over `splits` parts in their order.

    The parts are as long as torch-fidelity's. The images should be in random order, or the parts differ in kind.

    Raises:
        LdmError: fewer images than parts.
    """
    check_features("Inception score", logits, least=splits)
    n = len(logits)
    parts = [logits[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    return sum(float(information(part).mean().exp()) for part in parts) / splits


def mean_log(logits: Tensor) -> Tensor:
    """log of the mean of softmax(logits): (C,), finite even for classes with no probability."""
    total = torch.stack([rows.log_softmax(dim=1).logsumexp(dim=0) for rows in blocks(logits)]).logsumexp(dim=0)
    return total - torch.tensor(float(len(logits)), dtype=torch.float64).log()


def information(logits: Tensor, marginal: Tensor | None = None) -> Tensor:
    """KL(p(y|x) ‖ p(y)) of each image, in nats: (N,); log p(y) (C,) is `marginal`, or the mean over the images."""
    marginal = mean_log(logits) if marginal is None else marginal
    found = []
    for rows in blocks(logits):
        log_p = rows.log_softmax(dim=1)
        found.append((log_p.exp() * (log_p - marginal)).sum(dim=1))
    return torch.cat(found)


# --- neighbours -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifold:
    """The overlap of two sets of features; all but `density` are shares."""

    precision: float  # share of the model's images inside a ball of the reference (Kynkäänniemi et al. 2019)
    recall: float  # share of the reference's images inside a ball of the model
    density: float  # mean number of the reference's balls around an image of the model / k (Naeem et al. 2020)
    coverage: float  # share of the reference's balls with an image of the model inside


def distances(rows: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances of (B, D) in float64 to (M, D) in any dtype: (B, M)."""
    return torch.cat([torch.cdist(rows, part) for part in blocks(others)], dim=1)


def radii(features: Tensor, k: int) -> Tensor:
    """Distance from each row to its k-th nearest other row: (N,).

    Raises:
        LdmError: there are fewer than k other rows.
    """
    check_features(f"balls of {k} neighbours", features, least=k + 1)
    found = []
    start = 0
    for rows in blocks(features, width=len(features)):
        apart = distances(rows, features)
        own = torch.arange(len(rows), device=rows.device)
        apart[own, start + own] = torch.inf
        found.append(apart.kthvalue(k, dim=1).values)
        start += len(rows)
    return torch.cat(found)


def balls_around(points: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """How many balls around `centres` (M, D) of `radius` (M,) hold each of `points` (N, D): (N,)."""
    found = [(distances(rows, centres) <= radius).sum(dim=1) for rows in blocks(points, width=len(centres))]
    return torch.cat(found)


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from each of `points` (N, D) to the nearest of `others` (M, D), and its number: (N,), (N,).

    Raises:
        LdmError: a side is empty, or the features differ in number.
    """
    check_features("nearest neighbours", points, least=1)
    check_features("nearest neighbours", others, least=1, like=points)
    found = [distances(rows, others).min(dim=1) for rows in blocks(points, width=len(others))]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def manifold(samples: Tensor, reference: Tensor, k: int) -> Manifold:
    """Precision and recall (published with k = 3), density and coverage (k = 5) of (N, D) against (M, D).

    A ball includes its border. All four depend on N and M: compare figures of equal numbers of images only.

    Raises:
        LdmError: a side has not more than k images, or the features differ in number.
    """
    check_features("model", samples, least=k + 1)
    check_features("reference", reference, least=k + 1, like=samples)
    own = radii(reference, k)
    held = balls_around(samples, reference, own)
    return Manifold(
        precision=float((held > 0).double().mean()),
        recall=float((balls_around(reference, samples, radii(samples, k)) > 0).double().mean()),
        density=float(held.double().mean() / k),
        coverage=float((nearest(reference, samples)[0] <= own).double().mean()),
    )


# --- prompts ----------------------------------------------------------------------------------------------------------


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """max(100 · cos, 0) of each image with its text, embeddings (N, D) each (Hessel et al. 2021): (N,).

    Raises:
        LdmError: the shapes differ.
    """
    check_features("images", images, least=1)
    check_features("texts", texts, least=1, like=images)
    if len(images) != len(texts):
        raise LdmError(f"CLIP score: {len(images)} images and {len(texts)} texts; each image needs its own")
    return 100 * (unit(images) * unit(texts)).sum(dim=1).clamp(min=0)


def r_precision(images: Tensor, texts: Tensor, captions: Sequence[str], distractors: int = 99) -> Tensor:
    """The probability that the true caption is the closest among `distractors` random others: (N,).

    The mean is R-precision (Xu et al. 2018, with 99), without random draws: the probability follows from how many of
    all other captions are at least as close. Equal captions count once, and are no distractors of each other.

    Args:
        images, texts: embeddings (N, D) of each image and its caption.

    Raises:
        LdmError: the numbers differ, or there are not `distractors` other captions.
    """
    check_features("images", images, least=1)
    check_features("texts", texts, least=1, like=images)
    if not len(images) == len(texts) == len(captions):
        raise LdmError(
            f"R-precision: {len(images)} images, {len(texts)} texts and {len(captions)} captions; each image needs its "
            "own"
        )
    place: dict[str, int] = {}
    own = torch.tensor([place.setdefault(caption, len(place)) for caption in captions], device=images.device)
    others = len(place) - 1
    if not others:
        raise LdmError("R-precision needs different captions, and all are the same")
    if others < distractors:
        raise LdmError(
            f"R-precision: {others} other captions, but {distractors} distractors; take more prompts or fewer "
            "distractors"
        )
    at = {caption: i for i, caption in enumerate(captions)}  # in the order of `place`
    pool = unit(texts[torch.tensor(list(at.values()), device=texts.device)])
    closer = []
    start = 0
    for rows in blocks(unit(images), width=len(pool)):
        scores = rows @ pool.T
        true = own[start : start + len(rows), None]
        closer.append((scores >= scores.gather(1, true)).sum(dim=1) - 1)  # the true one is as close as itself
        start += len(rows)
    from scipy.stats import hypergeom  # takes a second

    return torch.from_numpy(hypergeom.pmf(0, others, torch.cat(closer).cpu().numpy(), distractors))


# --- memorisation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memorisation:
    """Samples that are near copies of training images, compared with held-out images."""

    share: float  # of samples closer to the training set than `threshold`
    expected: float  # the share among new images: the given quantile, or the next one that M allows
    threshold: float  # the distance that is this quantile of the held-out images' distances
    p: float  # chance of so many close samples, or more, if samples were like held-out images
    close: Tensor  # (N,), bool: which samples are closer


def memorisation(samples: Tensor, held_out: Tensor, quantile: float = 0.05) -> Memorisation:
    """Compare the distances of samples (N,) to the nearest training image with those of held-out images (M,).

    The threshold is an order statistic, so p is exact (hypergeometric) if both are drawn from one distribution.

    Raises:
        LdmError: a side is empty, or too few images are held out for the quantile.
    """
    rank = int(quantile * (len(held_out) + 1) + 1e-9)
    if len(samples) == 0 or rank < 1:
        raise LdmError(
            f"memorisation: {len(samples)} samples, {len(held_out)} held-out images; the {quantile:g} quantile needs "
            f"a sample and {round(1 / quantile) - 1} held-out images"
        )
    threshold = held_out.double().kthvalue(rank).values
    close = samples.double() < threshold
    n, m, found = len(samples), len(held_out), int(close.sum())
    from scipy.stats import hypergeom

    # found samples precede the rank-th held-out image if fewer than rank of the closest found + rank - 1 are held out
    p = float(hypergeom.cdf(rank - 1, n + m, m, found + rank - 1))
    return Memorisation(found / n, rank / (m + 1), float(threshold), p, close)
