"""The table of metrics: by name, the inputs that a metric needs, its figure for images, and its comparison of models.

N images, D features of an image, B batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ldm.errors import LdmError, suggestion
from ldm.evaluation.metrics.comparison import (
    Comparison,
    compare,
    compare_coverage,
    compare_recall,
    density_parts,
    frechet_parts,
    inception_parts,
    mmd_parts,
    p_text,
    precision_parts,
)
from ldm.evaluation.metrics.distances import (
    Kernel,
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
    coverage_interval,
    density_interval,
    frechet_interval,
    inception_interval,
    mean_interval,
    mmd_interval,
    precision_interval,
    recall_interval,
    share_interval,
)
from ldm.evaluation.metrics.moments import measure
from ldm.evaluation.metrics.reconstruction import psnr, ssim

DISTRACTORS = 99  # captions beside the true one in R-precision (Xu et al. 2018), if there are so many
PRECISION_K, DENSITY_K = 3, 5  # neighbours, as published
QUANTILE = 0.05  # share of held-out images that are as close to the training set as a near copy
MOST_DB = 100.0  # PSNR of equal images, for which it is infinite


@dataclass(frozen=True)
class Features:
    """The features of a set of images that the chosen metrics need."""

    outputs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # by network and output: (N, D) each
    captions: Sequence[str] = ()
    texts: Tensor | None = None  # (N, D): CLIP's features of the captions
    training_distances: Tensor | None = None  # (N,): to the nearest training images
    pairs: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) by metric: a value for each image and its original

    def take(self, places: Tensor) -> Features:
        """The features of the images at these places (K,), in this order."""
        return Features(
            {network: _taken(outputs, places) for network, outputs in self.outputs.items()},
            [self.captions[place] for place in places.tolist()] if self.captions else (),
            None if self.texts is None else self.texts[places],
            None if self.training_distances is None else self.training_distances[places],
            _taken(self.pairs, places),
        )


def _taken(values: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    return {name: tensor[places] for name, tensor in values.items()}


Figure = Callable[[Features, Features], Estimate]  # of images and of the reference, which may be empty
Difference = Callable[[Features, Features, Features], Comparison]  # of two models' images and of the reference


@dataclass(frozen=True)
class Metric:
    """A metric: its two functions, and what they need."""

    label: str  # its usual name
    better: str  # "lower" or "higher"
    network: str  # features, clip, copies or lpips (the options that name networks); "" if it needs none
    estimate: Figure  # with its interval; for reconstructions, the reference is the originals
    compare: Difference  # of two models' images for the same prompts and seeds
    output: str = "features"  # the network's output: features, spatial or logits; "pairs": `Features.pairs`
    pair: Callable[[Tensor, Tensor], Tensor] | None = None  # (B, 3, H, W) twice -> (B,); None: by the network
    reference: bool = True  # needs reference images
    captions: bool = False  # needs the prompts
    training: bool = False  # needs the models' training images
    reconstruction: bool = False  # measures an autoencoder's reconstructions
    least: int = 2  # images
    difference: str = "A − B"  # the difference in a comparison
    plain: str = ""  # label where the network is not Inception
    tradeoff: bool = False  # plotted against the CLIP score along a sweep
    check_prompts: Callable[[Sequence[str]], None] | None = None  # raises LdmError for unfit prompts
    note: Callable[[Mapping[str, Features], Features], str] | None = None  # from the sides by name and the reference


# --- values that metrics are computed from ----------------------------------------------------------------------------

Values = Callable[[Features], Tensor]  # (N, D), or (N,) where each image has one number


def given(network: str, output: str = "features") -> Values:
    """An output of a network: (N, D)."""
    return lambda features: features.outputs[network][output]


def pairs(name: str) -> Values:
    """The numbers of images and their originals: (N,)."""
    return lambda features: features.pairs[name]


def clip_score(features: Features) -> Tensor:
    """The CLIP score of each image: (N,)."""
    assert features.texts is not None
    return clip_scores(CLIP(features), features.texts)


def _chance(features: Features) -> Tensor:
    """The chance of each image that its caption is the closest among distractors: (N,)."""
    assert features.texts is not None
    return r_precision(CLIP(features), features.texts, features.captions, _distractors(features.captions))


def _training_distances(features: Features) -> Tensor:
    assert features.training_distances is not None
    return features.training_distances


INCEPTION, SPATIAL, LOGITS = given("features"), given("features", "spatial"), given("features", "logits")
CLIP = given("clip")

# --- functions of metrics ---------------------------------------------------------------------------------------------

Formula = tuple[Callable[[Tensor, Tensor], Estimate], Callable[[Tensor, Tensor, Tensor], Comparison]]


def on_sets(values: Values, formula: Formula) -> tuple[Figure, Difference]:
    """The functions of a metric of images and reference images.

    Args:
        values: gives the values that the metric is computed from.
        formula: the figure of values (N, D) against the reference's (M, D), with its interval; and the comparison of
            two models' values, (N, D) and (N, D), against the reference's.
    """
    interval, test = formula
    return (
        lambda images, reference: interval(values(images), values(reference)),
        lambda a, b, reference: test(values(a), values(b), values(reference)),
    )


def on_images(
    values: Values,
    interval: Callable[[Tensor], Estimate],
    test: Callable[[Tensor, Tensor], Comparison] = compare,
) -> tuple[Figure, Difference]:
    """The functions of a metric that needs no reference: `interval` of its values, `test` of two models' values."""
    return lambda images, _: interval(values(images)), lambda a, b, _: test(values(a), values(b))


def _distractors(captions: Sequence[str]) -> int:
    """The number of distractors of R-precision, with these captions."""
    return min(DISTRACTORS, len(set(captions)) - 1)


def _check_different(prompts: Sequence[str]) -> None:
    if _distractors(prompts) < 1:
        raise LdmError("r-precision needs different prompts, and all are the same")


def _note_distractors(sides: Mapping[str, Features], _: Features) -> str:
    count = _distractors(next(iter(sides.values())).captions)
    if count == DISTRACTORS:
        return ""
    return f"R-precision is among {count + 1} captions, as there are no more; {DISTRACTORS + 1} are usual"


def _near_copies(distances: Tensor, held_out: Tensor) -> Memorisation:
    """The near copies: images closer to the training set than all but 5 % of the held-out images."""
    return memorisation(distances, held_out, QUANTILE)


def _note_copies(sides: Mapping[str, Features], reference: Features) -> str:
    found = {
        name: _near_copies(_training_distances(side), _training_distances(reference)) for name, side in sides.items()
    }
    chances = ", ".join(f"{name} {p_text(one.p)}" for name, one in found.items())
    return (
        "near copies are closer to the training set than nearly all of the reference: of new images, a share of "
        f"{next(iter(found.values())).expected:.3f} is to be expected; as many as there are, or more, have {chances}"
    )


# --- the table --------------------------------------------------------------------------------------------------------


def _kernel(kernel: Kernel) -> Formula:
    return partial(mmd_interval, kernel), lambda a, b, reference: compare(*mmd_parts(kernel, a, b, reference))


FRECHET: Formula = frechet_interval, lambda a, b, reference: compare(*frechet_parts(a, b, measure(reference)))
PRECISION: Formula = (
    partial(precision_interval, k=PRECISION_K),
    lambda a, b, reference: compare(*precision_parts(a, b, reference, PRECISION_K)),
)
RECALL: Formula = partial(recall_interval, k=PRECISION_K), partial(compare_recall, k=PRECISION_K)
DENSITY: Formula = (
    partial(density_interval, k=DENSITY_K),
    lambda a, b, reference: compare(*density_parts(a, b, reference, DENSITY_K)),
)
COVERAGE: Formula = partial(coverage_interval, k=DENSITY_K), partial(compare_coverage, k=DENSITY_K)
NEAR_COPIES: Formula = (
    lambda distances, held_out: share_interval(_near_copies(distances, held_out).close),
    lambda a, b, held_out: compare(_near_copies(a, held_out).close, _near_copies(b, held_out).close),
)

METRICS = {
    "fid": Metric("FID", "lower", "features", *on_sets(INCEPTION, FRECHET), plain="FD", tradeoff=True),
    "sfid": Metric("sFID", "lower", "features", *on_sets(SPATIAL, FRECHET), "spatial"),
    "kid": Metric("KID", "lower", "features", *on_sets(INCEPTION, _kernel(polynomial)), plain="KD", tradeoff=True),
    "is": Metric(
        "Inception score", "higher", "features",
        *on_images(LOGITS, inception_interval, lambda a, b: compare(*inception_parts(a, b))), "logits",
        reference=False, least=10, difference="ln A − ln B",
    ),
    "precision": Metric("precision", "higher", "features", *on_sets(INCEPTION, PRECISION), least=2 * GROUPS),
    "recall": Metric("recall", "higher", "features", *on_sets(INCEPTION, RECALL), least=2 * GROUPS),
    "density": Metric("density", "higher", "features", *on_sets(INCEPTION, DENSITY), least=2 * GROUPS),
    "coverage": Metric("coverage", "higher", "features", *on_sets(INCEPTION, COVERAGE), least=2 * GROUPS),
    "fd-clip": Metric("FD of CLIP", "lower", "clip", *on_sets(CLIP, FRECHET), tradeoff=True),
    "cmmd": Metric("CMMD", "lower", "clip", *on_sets(lambda images: unit(CLIP(images)), _kernel(gaussian))),
    "clip-score": Metric(
        "CLIP score", "higher", "clip", *on_images(clip_score, partial(mean_interval, least=0, most=100)),
        reference=False, captions=True,
    ),
    "r-precision": Metric(
        "R-precision", "higher", "clip", *on_images(_chance, chance_interval),
        reference=False, captions=True, check_prompts=_check_different, note=_note_distractors,
    ),
    "memorisation": Metric(
        "near copies", "lower", "copies", *on_sets(_training_distances, NEAR_COPIES),
        training=True, least=round(1 / QUANTILE), note=_note_copies,
    ),
    "rfid": Metric("rFID", "lower", "features", *on_sets(INCEPTION, FRECHET), reconstruction=True, plain="rFD"),
    "psnr": Metric(
        "PSNR (dB)", "higher", "", *on_images(pairs("psnr"), mean_interval), "pairs",
        lambda image, original: psnr(image, original).clamp(max=MOST_DB), reconstruction=True,
    ),
    "ssim": Metric(
        "SSIM", "higher", "", *on_images(pairs("ssim"), partial(mean_interval, least=-1, most=1)), "pairs", ssim,
        reconstruction=True,
    ),
    "lpips": Metric(
        "LPIPS", "lower", "lpips", *on_images(pairs("lpips"), partial(mean_interval, least=0)), "pairs",
        reconstruction=True,
    ),
}  # fmt: skip


def metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        LdmError: no metric has this name.
    """
    if name not in METRICS:
        raise LdmError(f"metric {name!r} is not known; {suggestion(name, list(METRICS))}")
    return METRICS[name]
