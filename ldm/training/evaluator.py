"""Evaluation while a stage trains: images made with the present weights, their figures, the best weights so far.

runs/x/base/evaluation/step-…/ema/     of each evaluation and average of the weights: report.html, report.json;
                                       figures.json, written last; unet.safetensors, weights that were the best
runs/x/data/evaluation/                features of the reference images
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.image_set import ImageSet, made
from ldm.errors import LdmError, out_of_memory
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.features import digest_of
from ldm.evaluation.images import Images
from ldm.evaluation.metrics.table import METRICS
from ldm.evaluation.pages.page import write_page
from ldm.evaluation.plan import EvaluationPlan, Model, check_plan
from ldm.evaluation.report import REPORT, Value, save_report
from ldm.evaluation.workspace import Workspace
from ldm.files import read_json, replacing, write_json
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.layout import step_name
from ldm.training.sections import EvaluationSection
from ldm.training.stages.stage import MakeImages, StageKind

log = logging.getLogger(__name__)
FIGURES = "figures.json"
SCRATCH = ("images", "found", "index")  # subfolders of an evaluation that are removed once there are figures


@dataclass(frozen=True)
class Best:
    """The weights with the best images so far."""

    step: int  # number of updates
    average: str  # name of the average
    metric: str
    value: float
    settings: Mapping[str, Any]  # of the evaluation; figures with other settings cannot be compared


def check_evaluation(kind: StageKind[Any], plan: EvaluationPlan) -> None:
    """Raise LdmError, before anything is opened, for an evaluation that cannot be made."""
    place = f"{kind.name}.evaluation"
    if not kind.makes_images:
        raise LdmError(
            f"{place}.every: the stage {kind.name} trains what makes no images alone; set it to 0, and try it with "
            "`ldm eval`"
        )
    with _at(place):
        if plan.data is None:
            raise LdmError("a stream holds no images out; name some to compare with (data)")
        if isinstance(plan.data, Images) and not len(plan.data):
            raise LdmError("no images are held out (data.holdout); hold some out, or name others (data)")
        check_plan([True], plan)
        about_autoencoders = [metric for metric in plan.metrics if METRICS[metric].reconstruction]
        if about_autoencoders:
            raise LdmError(f"{about_autoencoders[0]} is about the autoencoder, which is not trained here; leave it out")


def evaluation_plan(
    section: EvaluationSection, images: ImageSet | None, rows: Sequence[np.ndarray], device: str
) -> EvaluationPlan:
    """The evaluation that a section asks for.

    Args:
        section: of the configuration.
        images: the run's images; None for a stream.
        rows: indices of the training images and of the held-out ones.
        device: of the networks.
    """
    trained_on, held_out = (Images(images, tuple(some.tolist())) for some in rows) if images else (None, None)
    return EvaluationPlan(
        metrics=tuple(section.metrics),
        data=section.data or held_out,
        n=section.n,
        training=trained_on,
        features=section.features,
        clip=section.clip,
        batch=section.batch,
        device=device,
    )


class Evaluator:
    """Evaluates a stage's model with the weights that it has at the time."""

    def __init__(
        self,
        stage: str,
        section: EvaluationSection,
        size: int,
        plan: EvaluationPlan,
        shown: Callable[[], LatentDiffusion],
        make_images: MakeImages,
        precision: str,
        work: Workspace,
    ) -> None:
        """Args:
        stage: name of the stage.
        section: of the configuration.
        size: width and height of the images, in pixels.
        plan: the evaluation that the section asks for.
        shown: gives the model with its weights as they are at the time.
        make_images: makes images with the model.
        precision: of the computation.
        work: its folder holds the evaluations' folders, its cache the features of images that no model made.
        """
        self.section, self.plan, self.shown, self.work = section, plan, shown, work
        self.stage, self.place = stage, f"{stage}.evaluation"
        self.make_images, self.size = make_images, size
        self.sampling: dict[str, Any] = {"steps": self.section.steps}
        if self.section.guidance is not None:
            self.sampling["guidance"] = self.section.guidance
        self.settings = {**self.sampling, "size": self.size, "precision": precision}
        chosen_by = self.section.model_dump(mode="json", include={"n", "data", "features", "clip"})
        self.way = {**chosen_by, **self.settings}

    def folder(self, step: int, average: str) -> Path:
        """The folder of one evaluation."""
        return self.work.folder / step_name(step) / average

    def prepare(self) -> None:
        """Open networks and compute the features of the reference images, so that errors come before training.

        Raises:
            LdmError: weights or images are missing or damaged.
        """
        with _at(self.place):
            model = self.shown()
            if model.family.refiner:
                raise LdmError(f"a {model.family.name} model makes no images alone; set every to 0")
            self._begin("", "", model, self.work)

    def figures(self, step: int, average: str) -> dict[str, float]:
        """The figures by metric, the same on every rank; the reports go into the folder of `step` and `average`.

        The same call resumes an evaluation that was stopped.

        Raises:
            LdmError: images cannot be made or measured, or files not written.
        """
        with _at(f"evaluation after {step} updates (set {self.place}.every=0 to train without)"):
            try:
                return self._figures(step, average)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise LdmError(
                    f"out of memory with {self.section.batch} images at a time; set {self.place}.batch to "
                    f"{max(self.section.batch // 2, 1)}"
                ) from None

    def _figures(self, step: int, average: str) -> dict[str, float]:
        ranks, folder, model = self.work.ranks, made(self.folder(step, average)), self.shown()
        digest = weights_digest(model)
        evaluation = self._begin(
            f"{self.stage} after {step} updates, {average}", digest, model, replace(self.work, folder=folder)
        )
        key = digest_of(evaluation.facts, digest, sorted(self.settings.items()), self.section.batch)
        found = _finished(folder, key)
        ranks.wait()  # all ranks have looked for finished figures before any of them writes
        if found is not None:
            return found
        report = evaluation.run()
        ranks.wait()  # all ranks have read the files that are removed now
        if report is not None:
            save_report(report, folder / REPORT)
            write_page(report, folder)
            figures = {row.metric: row.estimates[0].value for table in report.tables for row in table.rows}
            with replacing(folder / FIGURES, folder=False, overwrite=True, need=0) as temporary:
                write_json(temporary, {"of": key, "figures": figures})
            for name in SCRATCH:
                shutil.rmtree(folder / name, ignore_errors=True)
        ranks.wait()
        return dict(read_json(folder / FIGURES)["figures"])

    def _begin(self, name: str, digest: str, model: LatentDiffusion, work: Workspace) -> Evaluation:
        """An evaluation of the model, under the given name in the report."""

        def make(prompts: list[str], seeds: list[int], changes: Mapping[str, Value]) -> list[Image.Image]:
            return self.make_images(model, prompts, (self.size, self.size), seeds, {**self.sampling, **changes})

        return Evaluation([Model(name, digest, self.size, make, settings=self.settings)], self.plan, work)

    # --- the best weights so far ------------------------------------------------------------------------------------

    def best(self, step: int, average: str, figures: Mapping[str, float], before: Best | None) -> Best | None:
        """The better of these weights and the best ones before; of equals, the earlier."""
        metric = self.section.choose
        if metric is None:
            return None
        now = Best(step, average, metric, figures[metric], self.way)
        sign = 1 if METRICS[metric].better == "higher" else -1
        return now if before is None or sign * now.value > sign * before.value else before

    def kept(self) -> set[Path]:
        """The files of weights that are kept beside the reports."""
        return set(self.work.folder.glob("step-*/*/*.safetensors"))

    def resumed(self, best: Best) -> Best | None:
        """The best weights that a checkpoint names, if later weights can be compared with them."""
        if (best.metric, best.settings) == (self.section.choose, self.way):
            return best
        if self.section.choose:
            log.warning("%s has changed: the best weights are chosen anew, from here on", self.place)
        return None


@torch.no_grad()
def weights_digest(model: LatentDiffusion) -> str:
    """A digest of all weights, those in buffers too, such as new words' vectors; `fingerprint` reads only some."""
    tensors = [one for module in model.modules().values() for one in (*module.parameters(), *module.buffers())]
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> integers of the same size
    sums = [one.view(whole[one.itemsize]).sum(dtype=torch.int64) for one in tensors]
    return digest_of(torch.stack(sums).tolist())


def _finished(folder: Path, key: str) -> dict[str, float] | None:
    """The figures of a finished evaluation with the same key, if there is one."""
    try:
        content = read_json(folder / FIGURES) if (folder / FIGURES).exists() else {}
        return dict(content["figures"]) if content.get("of") == key else None
    except (LdmError, KeyError, TypeError):  # damaged
        return None


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place in front of errors."""
    try:
        yield
    except LdmError as error:
        raise LdmError(f"{place}: {error}") from None
