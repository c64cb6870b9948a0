"""The plan of an evaluation (metrics, reference, prompts, networks), a model to evaluate, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ldm.errors import LdmError
from ldm.evaluation.checks import check_numbers
from ldm.evaluation.images import Images
from ldm.evaluation.metrics.table import METRICS, metric
from ldm.evaluation.report import Value


@dataclass(frozen=True)
class Model:
    """A model, as functions that make and reconstruct images."""

    source: str  # its source, shown in the report
    digest: str  # of its weights
    size: int  # height and width in pixels of the images that its autoencoder reconstructs
    make: Callable[[list[str], list[int], Mapping[str, Value]], list[Image.Image]]  # of prompts, seeds, swept settings
    reconstruct: Callable[[list[Image.Image]], list[Image.Image]] | None = None  # encode and decode images
    settings: Mapping[str, Any] = field(default_factory=dict)  # the settings of `make`
    adapters: Callable[[Sequence[str], Mapping[str, Value]], Sequence[tuple[str, str]]] | None = None
    # name and SHA-256 of the adapters that `make` uses for prompts and swept settings


@dataclass(frozen=True)
class EvaluationPlan:
    """The arguments of an evaluation."""

    metrics: Sequence[str]  # names of `METRICS`
    data: str | Images | None = None  # reference images, whose captions are the models' prompts
    n: int | None = None  # images of each side; by default all of a folder, and of a model one for each of `data`
    prompts: Sequence[str] | None = None  # in place of the captions
    training: str | Images | None = None  # the models' training images, for metrics of copying
    features: str = "inception"  # network of FID and other distances between sets of images
    clip: str | None = None  # network of the metrics that compare images with prompts
    copies: str = "sscd"  # network of the search for copies
    lpips: str = "alex"  # backbone of LPIPS, alex or vgg16, or its file
    sweeps: Mapping[str, Sequence[Value]] = field(default_factory=dict)  # values of settings, one setting at a time
    seed: int = 0  # of the first image, and of the choice of prompts
    batch: int = 8  # images that a model makes at a time
    device: str = "cpu"


def check_plan(models: Sequence[bool], plan: EvaluationPlan) -> None:
    """Check a plan before anything is opened.

    Args:
        models: for each side, whether it is a model.
        plan: of the evaluation.

    Raises:
        LdmError: the plan cannot be carried out.
    """
    if not plan.metrics:
        raise LdmError(f"no metric is asked for; known are {', '.join(METRICS)}")
    check_numbers(len(models), plan.n, plan.batch, plan.seed)
    for name in plan.metrics:
        _check_metric(name, models, plan)
    if plan.sweeps and not all(models):
        raise LdmError(
            "only a model's images can be made with other settings (sweeps=, --sweep), not those of a folder"
        )
    if any(models) and plan.data is None and not plan.prompts:
        raise LdmError("a model needs prompts: those of a reference set (data=, --data), or some (prompts=, --prompts)")


def _check_metric(name: str, models: Sequence[bool], plan: EvaluationPlan) -> None:
    one = metric(name)
    if one.reference and plan.data is None:
        raise LdmError(f"{name} compares with other images: name them (data=, --data)")
    if one.network == "clip" and plan.clip is None:
        raise LdmError(f"{name} needs a network for images and texts: name one (clip=, --clip)")
    if one.reconstruction and not all(models):
        raise LdmError(f"{name} is about a model's autoencoder, which a folder of images does not have")
    if plan.n is not None and plan.n < one.least:
        raise LdmError(f"{name} needs at least {one.least} images, and n is {plan.n}")
    if one.training and plan.training is None:
        raise LdmError(f"{name} needs the images that the model was trained on: name them (training=, --training)")


def check_counts(plan: EvaluationPlan, prompts: Sequence[str], reference: int) -> None:
    """Check, before images are made, that every metric gets enough of them.

    Args:
        plan: of the evaluation.
        prompts: of the images that models will make; none if no side is a model.
        reference: number of reference images.

    Raises:
        LdmError: a metric gets too few.
    """
    for name in plan.metrics:
        one = METRICS[name]
        if prompts and len(prompts) < one.least:
            raise LdmError(f"{name} needs at least {one.least} images, and there are {len(prompts)} prompts")
        if one.reference and reference < one.least:
            raise LdmError(
                f"{name} needs at least {one.least} images, and there are {reference} images in the reference"
            )
        if prompts and one.check_prompts:
            one.check_prompts(prompts)
