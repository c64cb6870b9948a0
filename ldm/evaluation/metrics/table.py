"""Every metric by its name: what it needs, its figure for one set of images, and its comparison of two.

N images, D features of an image
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ldm.errors import LdmError, suggestion
from ldm.evaluation.metrics.comparison import (
    Comparison,
    compare,
    compare_coverage,
    compare_recall,
    frechet_parts,
    inception_parts,
    manifold_parts,
    mmd_parts,
)
from ldm.evaluation.metrics.distances import (
    Memorisation,
    clip_scores,
    gaussian,
    memorisation,
    polynomial,
    r_precision,
    unit,
)
from ldm.evaluation.metrics.intervals import (
    GROUPS,
    Estimate,
    chance_interval,
    frechet_interval,
    inception_interval,
    manifold_intervals,
    mean_interval,
    mmd_interval,
    share_interval,
)
from ldm.evaluation.metrics.moments import measure

DISTRACTORS = 99  # of R-precision (Xu et al. 2018), or as many as there are
PRECISION_K, DENSITY_K = 3, 5  # neighbours, as published
QUANTILE = 0.05  # of held-out images are as close to the training set as counts as memorised


@dataclass(frozen=True)
class Metric:
    """What there is to know of a metric before it is computed."""

    label: str  # as people write it
    better: str  # "lower" or "higher"
    network: str  # that looks at the images: features, clip, copies or lpips; "" if none does
    gives: str = "features"  # what of it is needed
    reference: bool = True  # whether it compares with the reference set
    captions: bool = False  # whether it needs prompts
    least: int = 2  # images that it takes
    reconstruction: bool = False  # whether it is about the autoencoder alone
    difference: str = "A − B"  # what a comparison is of
    bounds: tuple[float, float] = (-math.inf, math.inf)  # of a mean over images
    plain: str = ""  # its label on features that are not Inception's


METRICS = {
    "fid": Metric("FID", "lower", "features", plain="FD"),
    "sfid": Metric("sFID", "lower", "features", gives="spatial"),
    "kid": Metric("KID", "lower", "features", plain="KD"),
    "is": Metric("Inception score", "higher", "features", "logits", False, least=10, difference="ln A − ln B"),
    "precision": Metric("precision", "higher", "features", least=2 * GROUPS),
    "recall": Metric("recall", "higher", "features", least=2 * GROUPS),
    "density": Metric("density", "higher", "features", least=2 * GROUPS),
    "coverage": Metric("coverage", "higher", "features", least=2 * GROUPS),
    "fd-clip": Metric("FD of CLIP", "lower", "clip"),
    "cmmd": Metric("CMMD", "lower", "clip"),
    "clip-score": Metric("CLIP score", "higher", "clip", reference=False, captions=True, bounds=(0, 100)),
    "r-precision": Metric("R-precision", "higher", "clip", reference=False, captions=True),
    "memorisation": Metric("near copies", "lower", "copies", least=round(1 / QUANTILE)),
    "rfid": Metric("rFID", "lower", "features", reconstruction=True, plain="rFD"),
    "psnr": Metric("PSNR (dB)", "higher", "", reconstruction=True),
    "ssim": Metric("SSIM", "higher", "", reconstruction=True, bounds=(-1, 1)),
    "lpips": Metric("LPIPS", "lower", "lpips", reconstruction=True, bounds=(0, math.inf)),
}  # fmt: skip


def metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        LdmError: there is none.
    """
    if name not in METRICS:
        raise LdmError(f"metric {name!r} is not known; {suggestion(name, list(METRICS))}")
    return METRICS[name]


@dataclass(frozen=True)
class Seen:
    """What the networks found in a set of images; what nobody asked for is missing."""

    features: Mapping[str, Tensor] = field(default_factory=dict)  # (N, D) each: features, spatial, logits
    clip: Tensor | None = None  # (N, D)
    texts: Tensor | None = None  # (N, D): of the captions
    captions: Sequence[str] = ()
    copies: Tensor | None = None  # (N, D), of length 1: by a network that knows images again
    apart: Tensor | None = None  # (N,): distances to the nearest training image
    values: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each: psnr, ssim, lpips

    def take(self, places: Tensor) -> Seen:
        """The same, of the images at these places (K,) alone, in this order."""

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[places]

        return Seen(
            {name: values[places] for name, values in self.features.items()},
            part(self.clip),
            part(self.texts),
            [self.captions[place] for place in places.tolist()] if self.captions else (),
            part(self.copies),
            part(self.apart),
            {name: values[places] for name, values in self.values.items()},
        )


def scores(name: str, seen: Seen) -> Tensor:
    """A metric of single images: (N,), whose mean is its figure."""
    if name in seen.values:
        return seen.values[name]
    assert seen.clip is not None
    assert seen.texts is not None
    if name == "clip-score":
        return clip_scores(seen.clip, seen.texts)
    return r_precision(seen.clip, seen.texts, seen.captions, distractors(seen.captions))


def distractors(captions: Sequence[str]) -> int:
    """How many other captions R-precision takes."""
    return min(DISTRACTORS, len(set(captions)) - 1)


def copying(seen: Seen, held_out: Seen) -> Memorisation:
    """Which images are closer to the training set than all but 5 % of the held-out ones."""
    assert seen.apart is not None
    assert held_out.apart is not None
    return memorisation(seen.apart, held_out.apart, QUANTILE)


def estimates(names: Sequence[str], seen: Seen, reference: Seen | None) -> dict[str, Estimate]:
    """The figure of each metric, with its interval, by name.

    Args:
        reference: the images to compare with; for metrics of reconstructions, the originals.

    Raises:
        LdmError: there are too few images, or their features do not fit.
    """
    manifolds: dict[int, dict[str, Estimate]] = {}

    def near(name: str, other: Seen) -> Estimate:
        k = PRECISION_K if name in ("precision", "recall") else DENSITY_K
        if k not in manifolds:
            manifolds[k] = manifold_intervals(seen.features["features"], other.features["features"], k)
        return manifolds[k][name]

    def figure(name: str) -> Estimate:
        if name == "is":
            return inception_interval(seen.features["logits"])
        if name == "r-precision":
            return chance_interval(scores(name, seen))
        if name in ("clip-score", "psnr", "ssim", "lpips"):
            return mean_interval(scores(name, seen), *METRICS[name].bounds)
        assert reference is not None
        if name == "memorisation":
            return share_interval(copying(seen, reference).close)
        if name in ("precision", "recall", "density", "coverage"):
            return near(name, reference)
        own, other = _features(name, seen), _features(name, reference)
        if name == "kid":
            return mmd_interval(polynomial, own, other)
        return mmd_interval(gaussian, unit(own), unit(other)) if name == "cmmd" else frechet_interval(own, other)

    return {name: figure(name) for name in names}


def _features(name: str, seen: Seen) -> Tensor:
    if METRICS[name].network == "clip":
        assert seen.clip is not None
        return seen.clip
    return seen.features[METRICS[name].gives]


def comparison(name: str, a: Seen, b: Seen, reference: Seen | None) -> Comparison:
    """The difference of a metric between two models' images for the same prompts and seeds.

    Raises:
        LdmError: as `ldm.evaluation.metrics.comparison` has it.
    """
    if name == "is":
        return compare(*inception_parts(a.features["logits"], b.features["logits"]))
    if name in ("clip-score", "r-precision", "psnr", "ssim", "lpips"):
        return compare(scores(name, a), scores(name, b))
    assert reference is not None
    if name == "memorisation":
        return compare(copying(a, reference).close, copying(b, reference).close)
    first, second, other = (_features(name, seen) for seen in (a, b, reference))
    if name in ("precision", "density"):
        k = PRECISION_K if name == "precision" else DENSITY_K
        return compare(*manifold_parts(first, second, other, k)[name])
    if name == "recall":
        return compare_recall(first, second, other, PRECISION_K)
    if name == "coverage":
        return compare_coverage(first, second, other, DENSITY_K)
    if name == "kid":
        return compare(*mmd_parts(polynomial, first, second, other))
    if name == "cmmd":
        return compare(*mmd_parts(gaussian, unit(first), unit(second), unit(other)))
    return compare(*frechet_parts(first, second, measure(other)))
