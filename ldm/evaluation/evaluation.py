"""An evaluation from beginning to end: the sides' images, their features, and the report.

A side is a folder of images, or a model in the form of functions; models make images of the same prompts with the same
seeds. Images and features are kept in the evaluation's folder, so that the same call resumes a stopped evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ldm.errors import LdmError
from ldm.evaluation.checks import SIDES
from ldm.evaluation.features import MeasuredImages, Networks, with_nearest
from ldm.evaluation.images import Images
from ldm.evaluation.metrics.table import METRICS
from ldm.evaluation.plan import EvaluationPlan, Model, check_counts, check_plan
from ldm.evaluation.report import Report, Value
from ldm.evaluation.results import Reconstructions, Results, report_of
from ldm.evaluation.sides import Notes, made_images, opened, prompts_of, reconstructed_images
from ldm.evaluation.workspace import Workspace
from ldm.runtime.waiting import watch


def evaluate(sides: Sequence[Model | str | Path], plan: EvaluationPlan, work: Workspace) -> Report | None:
    """Evaluate one side, or compare two; the same call resumes an evaluation that was stopped.

    Args:
        sides: models, or folders of images (or shards, or datasets).
        plan: what to evaluate.
        work: the folder for images and features, and the processes that share the work.

    Returns:
        The report, on the first rank. `save_report` and `write_page` write it.

    Raises:
        LdmError: something is missing or does not fit; the message is one line.
    """
    return Evaluation(sides, plan, work).run()


class Evaluation:
    """An evaluation that is ready to run: its plan is checked, networks are open, the reference has its features."""

    def __init__(self, sides: Sequence[Model | str | Path], plan: EvaluationPlan, work: Workspace) -> None:
        """Check the plan and open the networks; arguments and errors are those of `evaluate`."""
        check_plan([isinstance(side, Model) for side in sides], plan)
        watch(plan.device, torch.get_num_threads())
        self.sides, self.plan, self.work = dict(zip(SIDES, sides, strict=False)), plan, work
        self.metrics = {name: one for name, one in METRICS.items() if name in plan.metrics}
        self.of_sets = [name for name, one in self.metrics.items() if not one.reconstruction]
        self.of_autoencoders = [name for name, one in self.metrics.items() if one.reconstruction]
        specs = {"features": plan.features, "clip": plan.clip, "copies": plan.copies, "lpips": plan.lpips}
        self.networks = Networks(self.metrics, specs, plan.device)
        self.notes = Notes()
        self.data = None if plan.data is None else opened(plan.data, work.shared, self.notes)
        self.prompts = self._prompts() if self._models() else []
        check_counts(plan, self.prompts, len(self.data or ()))
        self.training = self._training()
        self.reference = self._reference()

    @property
    def facts(self) -> tuple[object, ...]:
        """Everything that the figures depend on, but the sides and the settings of their images."""
        sets = (self.data, None if self.training is None else self.training.images)
        stamps = [None if one is None else one.stamp for one in sets]
        networks = sorted((role, used.digest, used.preparation) for role, used in self.networks.used.items())
        return (*stamps, *networks, sorted(self.metrics), self.prompts, self.plan.seed)

    def run(self) -> Report | None:
        """Make and measure all images, with all ranks, and return the report on the first one."""
        measured = {name: self._measured(name, {}) for name in self.sides} if self.of_sets else {}
        rebuilt = {name: self._rebuilt(name, model) for name, model in self._models().items() if self.of_autoencoders}
        swept = {
            over: [[self._measured(name, {over: value}) for name in self.sides] for value in values]
            for over, values in self.plan.sweeps.items()
        }
        if not self.work.ranks.first:
            return None
        results = Results(
            self.sides, self.plan, self.networks, self.data, self.reference, self.training, measured, rebuilt, swept
        )
        return report_of(results, self.work.folder, self.notes)

    # --- images and features ----------------------------------------------------------------------------------------

    def _models(self) -> dict[str, Model]:
        return {name: side for name, side in self.sides.items() if isinstance(side, Model)}

    def _prompts(self) -> list[str]:
        """A prompt for each image; the prompts are repeated when there are too few."""
        texts = prompts_of(self.plan, self.data)
        count = self.plan.n or len(texts)
        if count > len(texts) and self.of_sets:
            self.notes.add(
                f"{count} images of {len(texts)} prompts: images of one prompt are not independent, so that "
                "intervals are too narrow"
            )
        return [texts[number % len(texts)] for number in range(count)]

    def _features(
        self, images: Images, what: str, metrics: Iterable[str], work: Workspace, captions: bool = False
    ) -> MeasuredImages:
        measured, notes = self.networks.measure(images, what, metrics, work, captions)
        for text in notes:
            self.notes.add(text)
        return measured

    def _training(self) -> MeasuredImages | None:
        """The training images, if a metric needs them."""
        metrics = [name for name, one in self.metrics.items() if one.training]
        if self.plan.training is None or not metrics:
            return None
        images = opened(self.plan.training, self.work.shared, self.notes)
        return self._features(images, "the training images", metrics, self.work.shared)

    def _reference(self) -> MeasuredImages | None:
        """The reference images, if a metric of sets of images needs them."""
        metrics = [name for name in self.of_sets if self.metrics[name].reference]
        if self.data is None or not metrics:
            return None
        reference = self._features(self.data, "the reference", metrics, self.work.shared)
        if self.training is None:
            return reference
        reference = with_nearest(reference, self.training)
        assert reference.features.training_distances is not None
        if float(reference.features.training_distances.kthvalue(max(1, len(reference.index) // 20)).values) < 1e-4:
            self.notes.add("the reference holds images of the training set: it cannot show how close new images are")
        return reference

    def _measured(self, name: str, changes: Mapping[str, Value]) -> MeasuredImages:
        """A side's images with their features; a model makes its images, with some settings changed."""
        captions = any(self.metrics[metric].captions for metric in self.of_sets)
        images = self._images(name, changes)
        measured = self._features(images, f"the images of {name}", self.of_sets, self.work, captions)
        return measured if self.training is None else with_nearest(measured, self.training)

    def _images(self, name: str, changes: Mapping[str, Value]) -> Images:
        side = self.sides[name]
        if isinstance(side, Model):
            return made_images(side, name, changes, self.prompts, self.plan, self.work)
        images = opened(side, self.work, self.notes, self.plan.n)
        least = max((self.metrics[metric].least for metric in self.of_sets), default=2)
        if len(images) < least:
            raise LdmError(f"{side} holds {len(images)} images; at least {least} are needed")
        return images

    def _rebuilt(self, name: str, model: Model) -> Reconstructions:
        """A model's reconstructions of the reference images, and the originals at the model's resolution."""
        assert self.data is not None
        rebuilt, originals = reconstructed_images(model, name, self.data, self.plan, self.work)
        pairs = self.networks.pairs(rebuilt, originals, f"{name} with the originals", self.work)
        first = self._features(rebuilt, f"the reconstructions of {name}", self.of_autoencoders, self.work)
        second = self._features(originals, "the originals", self.of_autoencoders, self.work)
        return replace(first, features=replace(first.features, pairs=pairs)), second
