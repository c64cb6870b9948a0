"""An evaluation from beginning to end: images, what networks find in them, figures, comparisons, the report.

A side is a folder of images, or a model handed in as functions; models make the same prompts with the same seeds.
Everything is kept in the evaluation's folder, so that the same call goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import LdmError, check_whole, listing
from ldm.evaluation.features import Looked, Networks, digest_of, in_pairs, neighbours
from ldm.evaluation.images import Images, images_of, write_images
from ldm.evaluation.metrics.table import DISTRACTORS, METRICS, comparison, copying, distractors, estimates, metric
from ldm.evaluation.pages import galleries
from ldm.evaluation.pages.words import p_said, verdict
from ldm.evaluation.report import Report, Row, Side, Sweep, Table, Value, shown
from ldm.evaluation.stored import Workspace

NAMES = ("A", "B")  # of the sides


@dataclass(frozen=True)
class Model:
    """A model as evaluation knows it."""

    source: str  # as it stands in the report
    digest: str  # of its weights
    size: int  # pixels of the sides of images that its autoencoder is tried with
    make: Callable[
        [list[str], list[int], Mapping[str, Value]], list[Image.Image]
    ]  # prompts, seeds, settings swept over
    reconstruct: Callable[[list[Image.Image]], list[Image.Image]] | None = None  # through its autoencoder and back
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `make`; other settings make other images


@dataclass(frozen=True)
class EvaluationPlan:
    """What to evaluate and how."""

    metrics: Sequence[str]  # names of `METRICS`
    data: str | Images | None = None  # images to compare with, and captions to make images of
    n: int | None = None  # images of each side; by default all of a folder, and of a model as many as `data` holds
    prompts: Sequence[str] | None = None  # instead of the captions
    training: str | Images | None = None  # images that the models were trained on, to look for copies of
    features: str = "inception"  # network for FID and the like
    clip: str | None = None  # network for what is about prompts
    copies: str = "sscd"  # network that knows an image again
    lpips: str = "alex"  # LPIPS's backbone, alex or vgg16, or its file
    sweeps: Mapping[str, Sequence[Value]] = field(default_factory=dict)  # values of settings, one setting at a time
    seed: int = 0  # of the first image, and of the choice of prompts
    batch: int = 8  # images that a model makes at a time
    device: str = "cpu"


def evaluate(sides: Sequence[Model | str | Path], plan: EvaluationPlan, work: Workspace) -> Report | None:
    """Evaluate one side, or two and whether they differ; the same call goes on where an earlier one stopped.

    Args:
        sides: models, or folders of images (or shards, or datasets).
        plan: what to do.
        work: where to keep images and what was found in them, and with whom to share it.

    Returns:
        The report, on the first rank. `save_report` and `write_page` write it.

    Raises:
        LdmError: in one line, what is missing or does not fit.
    """
    return begin(sides, plan, work).run()


def begin(sides: Sequence[Model | str | Path], plan: EvaluationPlan, work: Workspace) -> Evaluation:
    """What needs no side: the plan is checked, networks are opened, and the images to compare with are looked at.

    Arguments and errors are those of `evaluate`, which `run` of the result finishes.
    """
    metrics = {name: one for name, one in METRICS.items() if name in plan.metrics}
    check([isinstance(side, Model) for side in sides], plan)
    specs = {"features": plan.features, "clip": plan.clip, "copies": plan.copies, "lpips": plan.lpips}
    return Evaluation(sides, plan, work, Networks(metrics, specs, plan.device))


def check(models: Sequence[bool], plan: EvaluationPlan) -> None:
    """Raise LdmError for what cannot be done, before anything is opened; `models`: which of the sides are models."""
    if not plan.metrics:
        raise LdmError(f"no metric is asked for; known are {', '.join(METRICS)}")
    metrics = {name: metric(name) for name in plan.metrics}
    if not 1 <= len(models) <= len(NAMES):
        raise LdmError(f"{len(models)} models or folders; evaluate one, or two to compare them")
    if plan.n is not None:
        check_whole("evaluation", "n", plan.n, 2, 10**7)
    check_whole("evaluation", "batch", plan.batch, 1, 10**5)
    check_whole("evaluation", "seed", plan.seed, 0, 2**32)
    for name, one in metrics.items():
        if one.reference and plan.data is None:
            raise LdmError(f"{name} compares with other images: name them (data=, --data)")
        if one.network == "clip" and plan.clip is None:
            raise LdmError(f"{name} needs a network for images and texts: name one (clip=, --clip)")
        if one.reconstruction and not all(models):
            raise LdmError(f"{name} is about a model's autoencoder, which a folder of images does not have")
        if plan.n is not None and plan.n < one.least:
            raise LdmError(f"{name} needs at least {one.least} images, and n is {plan.n}")
    if "memorisation" in metrics and plan.training is None:
        raise LdmError("memorisation needs the images that the model was trained on: name them (training=, --training)")
    if plan.sweeps and not all(models):
        raise LdmError(
            "only a model's images can be made with other settings (sweeps=, --sweep), not those of a folder"
        )
    if any(models) and plan.data is None and not plan.prompts:
        raise LdmError("a model needs prompts: those of a reference set (data=, --data), or some (prompts=, --prompts)")


class Evaluation:
    """One evaluation: what is opened, and what has been noted for the report."""

    def __init__(
        self, sides: Sequence[Model | str | Path], plan: EvaluationPlan, work: Workspace, networks: Networks
    ) -> None:
        self.sides, self.plan, self.work, self.networks = sides, plan, work, networks
        self.metrics = networks.metrics
        self.notes: list[str] = []
        self.about_sides = [name for name, one in self.metrics.items() if not one.reconstruction]
        self.about_autoencoders = [name for name, one in self.metrics.items() if one.reconstruction]
        self.data = None if plan.data is None else self._opened(plan.data, work.shared)
        self.prompts = self._prompts() if any(isinstance(side, Model) for side in sides) else []
        self._check_counts()
        self.training = self._training()
        self.reference = self._reference()

    @property
    def facts(self) -> tuple[object, ...]:
        """All that the figures depend on, but for the sides and how their images are made."""
        sets = (self.data, None if self.training is None else self.training.images)
        stamps = [None if one is None else one.stamp for one in sets]
        networks = sorted((role, used.digest, used.preparation) for role, used in self.networks.used.items())
        return (*stamps, *networks, sorted(self.metrics), self.prompts, self.plan.seed)

    # --- images ---------------------------------------------------------------------------------------------------

    def _opened(self, source: str | Path | Images, work: Workspace, count: int | None = None) -> Images:
        if isinstance(source, Images):
            return source
        images = images_of(source, work, count)
        if reasons := images.source.skipped.reasons:
            first = listing([f"{key} ({reason})" for key, reason in reasons.items()], 3)
            self.note(f"{source}: {len(reasons)} of {len(reasons) + len(images.source)} images cannot be used: {first}")
        return images

    def _prompts(self) -> list[str]:
        """A prompt for each image; they begin again when there are not enough."""
        texts = list(self.plan.prompts or ())
        if not texts:
            assert self.data is not None
            mixed = self.data.shuffled(self.plan.seed)
            texts = [text for number in range(len(mixed)) if (text := mixed.caption(number))]
        if not texts:
            raise LdmError(f"{self.plan.data} has no captions to make images of; write some, or give prompts")
        count = self.plan.n or len(texts)
        if count > len(texts) and self.about_sides:
            self.note(
                f"{count} images of {len(texts)} prompts: images of one prompt are not independent, so that "
                "intervals are too narrow"
            )
        return [texts[number % len(texts)] for number in range(count)]

    def _check_counts(self) -> None:
        """Raise LdmError where there are too few images, before any are made."""
        for name, one in self.metrics.items():
            for what, count in (("prompts", len(self.prompts)), ("images in the reference", len(self.data or ()))):
                wanted = bool(self.prompts) if what == "prompts" else one.reference
                if wanted and count < one.least:
                    raise LdmError(f"{name} needs at least {one.least} images, and there are {count} {what}")
        if "r-precision" in self.metrics and self.prompts and distractors(self.prompts) < 1:
            raise LdmError("r-precision needs different prompts, and all are the same")

    def _roles(self, names: Iterable[str]) -> list[str]:
        """The networks that metrics need to look at single images."""
        wanted = {self.metrics[name].network for name in names}
        return [role for role in self.networks.opened if role in wanted]

    def _look(self, images: Images, what: str, names: Iterable[str], work: Workspace, captions: bool = False) -> Looked:
        looked, notes = self.networks.look(images, what, self._roles(names), work, captions)
        for text in notes:
            self.note(text)
        return looked

    def _training(self) -> Looked | None:
        if self.plan.training is None or "memorisation" not in self.metrics:
            return None
        images = self._opened(self.plan.training, self.work.shared)
        return self._look(images, "the training images", ["memorisation"], self.work.shared)

    def _reference(self) -> Looked | None:
        names = [name for name in self.about_sides if self.metrics[name].reference]
        if self.data is None or not names:
            return None
        looked = self._look(self.data, "the reference", names, self.work.shared)
        if self.training is None:
            return looked
        looked, _ = neighbours(looked, self.training)
        assert looked.seen.apart is not None
        if float(looked.seen.apart.kthvalue(max(1, len(looked.index) // 20)).values) < 1e-4:
            self.note("the reference holds images of the training set: it says nothing about how close new images are")
        return looked

    def made(self, side: Model | str | Path, name: str, changes: Mapping[str, Value]) -> Images:
        """The images of a side, made if it is a model."""
        plan = self.plan
        if not isinstance(side, Model):
            images = self._opened(side, self.work, plan.n)
            least = max((self.metrics[one].least for one in self.about_sides), default=2)
            if len(images) < least:
                raise LdmError(f"{side} holds {len(images)} images; at least {least} are needed")
            return images

        def make(numbers: range) -> list[Image.Image]:
            prompts = [self.prompts[number] for number in numbers]
            return side.make(prompts, [plan.seed + number for number in numbers], changes)

        what = " ".join(["making", name, *(f"{key} {shown(value)}" for key, value in changes.items())])
        facts = (side.digest, sorted(side.settings.items()), sorted(changes.items()), self.prompts, plan.seed)
        return write_images(what, digest_of(facts, plan.batch), self.prompts, make, plan.batch, self.work)

    def _seen(self, side: Model | str | Path, name: str, changes: Mapping[str, Value]) -> tuple[Looked, Tensor | None]:
        """A side's images, what was found in them, and the training images that are nearest."""
        captions = any(self.metrics[one].captions for one in self.about_sides)
        images = self.made(side, name, changes)
        looked = self._look(images, f"the images of {name}", self.about_sides, self.work, captions)
        return neighbours(looked, self.training) if self.training is not None else (looked, None)

    def _reconstructed(self, side: Model, name: str) -> tuple[Looked, Looked]:
        """A model's reconstructions of the reference, and the originals at its resolution."""
        plan, work = self.plan, self.work
        assert self.data is not None
        assert side.reconstruct is not None
        reconstruct, data = side.reconstruct, self.data.shuffled(plan.seed)
        count = min(plan.n or len(data), len(data))
        keys = [data.key(number) for number in range(count)]

        def cut(numbers: range) -> list[Image.Image]:
            try:
                read = [data.read(number)[1] for number in numbers]
            except LdmError as error:
                raise LdmError(f"{error}; mend or remove it") from None
            return [ImageOps.fit(image, (side.size, side.size), Image.Resampling.LANCZOS) for image in read]

        facts = data.stamp, side.size, keys
        originals = write_images("cutting", digest_of(facts), keys, cut, plan.batch, work)

        def there_and_back(numbers: range) -> list[Image.Image]:
            return reconstruct([originals.read(number)[1] for number in numbers])

        name_of = digest_of(facts, side.digest, sorted(side.settings.items()), plan.batch)
        rebuilt = write_images(f"reconstructing with {name}", name_of, keys, there_and_back, plan.batch, work)
        values = self.networks.compare(rebuilt, originals, f"{name} with the originals", work)
        names = self.about_autoencoders
        first = self._look(rebuilt, f"the reconstructions of {name}", names, work)
        second = self._look(originals, "the originals", names, work)
        return replace(first, seen=replace(first.seen, values=values)), second

    # --- figures ----------------------------------------------------------------------------------------------------

    def run(self) -> Report | None:
        """Make and look at everything, with all ranks; then, on the first one, what follows from it."""
        named = list(zip(self.sides, NAMES, strict=False))
        seen = [self._seen(side, name, {}) for side, name in named] if self.about_sides else []
        rebuilt = [
            self._reconstructed(side, name)
            for side, name in named
            if self.about_autoencoders and isinstance(side, Model)
        ]
        swept = {
            over: [[self._seen(side, name, {over: value})[0] for side, name in named] for value in values]
            for over, values in self.plan.sweeps.items()
        }
        if not self.work.ranks.first:
            return None
        looked, made_again = [one for one, _ in seen], [one for one, _ in rebuilt]
        pairs = self._paired(looked)
        together = list(pairs or looked)
        groups = [list(zip(NAMES, together, strict=False))]
        if len(looked) == 2 and not pairs:
            groups = [[pair] for pair in groups[0]]
        rows = self._rows(self.about_sides, together, [self.reference] * len(together), bool(pairs))
        one_size = len({side.size for side in self.sides if isinstance(side, Model)}) < 2
        if rebuilt and not one_size:
            self.note("A and B are for images of different sizes: their autoencoders are not compared")
        compare = one_size and len(rebuilt) == 2
        rows += self._rows(self.about_autoencoders, made_again, [one for _, one in rebuilt], compare)
        sweeps = [
            Sweep(over, tuple(self.plan.sweeps[over]), tuple(tuple(self._sweep_rows(one)) for one in points))
            for over, points in swept.items()
        ]
        sides = [self._side(*pair, one) for pair, one in zip(named, looked or made_again, strict=True)]
        show = galleries.Show(self.work.folder)
        shown = [
            *galleries.samples(groups, show),
            *galleries.prompts(groups, show),
            *galleries.copies(list(zip(NAMES, seen, strict=False)), self.training, show),
            *galleries.reconstructions(list(zip(NAMES, rebuilt, strict=False)), show),
        ]
        self._note_distractors(together)
        for name, one in zip(NAMES, together, strict=False):
            self._note_shared(name, one)
        self._note_copies(together)
        return Report(
            sides=tuple(sides),
            reference=self._reference_side(),
            tables=tuple(self._tables(rows)),
            galleries=tuple(shown),
            histograms=tuple(galleries.histograms(looked, made_again, self.reference, NAMES)),
            sweeps=tuple(sweeps),
            notes=tuple(self.notes),
        )

    def note(self, text: str) -> None:
        """Say it in the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _paired(self, looked: Sequence[Looked]) -> tuple[Looked, Looked] | None:
        """Two sides cut down to the images that both have, if they can be compared."""
        if len(looked) < 2:
            return None
        a, b = looked
        pairs = in_pairs(a, b)
        if pairs is None:
            self.note(
                "A and B are not compared: that needs the same names, or prompts and seeds, for the images of both"
            )
        elif len(pairs[0].index) < max(len(a.images), len(b.images)):
            self.note(f"figures are of the {len(pairs[0].index)} images that both A and B have")
        return pairs

    def _rows(
        self, names: Sequence[str], looked: Sequence[Looked], others: Sequence[Looked | None], compare: bool
    ) -> list[Row]:
        """Figures of each side, and, if the two are pairs, what their comparison says."""
        if not looked:
            return []
        found = [
            estimates(names, one.seen, None if other is None else other.seen)
            for one, other in zip(looked, others, strict=True)
        ]
        rows = []
        for name in names:
            one = self.metrics[name]
            figures = tuple(side[name] for side in found)
            row = Row(name, self._label(name), one.better, figures, difference=one.difference)
            if compare:
                reference = None if others[0] is None else others[0].seen
                difference = comparison(name, looked[0].seen, looked[1].seen, reference)
                row = replace(row, comparison=difference, verdict=verdict(difference, one.better))
            rows.append(row)
        return rows

    def _sweep_rows(self, looked: Sequence[Looked]) -> list[Row]:
        return self._rows(self.about_sides, looked, [self.reference] * len(looked), compare=False)

    def _label(self, name: str) -> str:
        """FID is a name for features of Inception alone."""
        one = self.metrics[name]
        network = self.networks.opened.get(one.network)
        foreign = one.network == "features" and network is not None and not network.name.startswith("Inception")
        return one.plain if foreign and one.plain else one.label

    def _tables(self, rows: Sequence[Row]) -> Iterator[Table]:
        """A table for each network, so that figures of different ones do not meet."""
        for role in ("features", "clip", "copies", "lpips", ""):
            mine = tuple(row for row in rows if self.metrics[row.metric].network == role)
            if mine:
                yield Table(self.networks.used.get(role), mine)

    def _side(self, side: Model | str | Path, name: str, looked: Looked) -> Side:
        if not isinstance(side, Model):
            return Side(name, str(side), looked.digest, len(looked.index))
        settings = {**side.settings, "seed": self.plan.seed, "batch": self.plan.batch}
        return Side(name, side.source, side.digest, len(looked.index), settings)

    def _reference_side(self) -> Side | None:
        if self.data is None or self.plan.data is None:
            return None
        count = len(self.data) if self.reference is None else len(self.reference.index)
        return Side("reference", str(self.plan.data), self.reference.digest if self.reference else "", count)

    def _note_distractors(self, looked: Sequence[Looked]) -> None:
        if "r-precision" in self.metrics and distractors(looked[0].seen.captions) < DISTRACTORS:
            count = distractors(looked[0].seen.captions)
            self.note(f"R-precision is among {count + 1} captions, as there are no more; usual are {DISTRACTORS + 1}")

    def _note_shared(self, name: str, looked: Looked) -> None:
        if self.reference is None or looked.pixels is None or self.reference.pixels is None:
            return
        if shared := int(torch.isin(looked.pixels, self.reference.pixels).sum()):
            self.note(
                f"{shared} of {len(looked.index)} images of {name} are in the reference too, so that distances from "
                "it are too small"
            )

    def _note_copies(self, looked: Sequence[Looked]) -> None:
        if self.reference is None or self.training is None:
            return
        found = [copying(one.seen, self.reference.seen) for one in looked]
        chances = ", ".join(f"{name} {p_said(one.p)}" for name, one in zip(NAMES, found, strict=False))
        self.note(
            "near copies are closer to the training set than nearly all of the reference: of new images, a share of "
            f"{found[0].expected:.3f} is to be expected; as many as there are, or more, have {chances}"
        )
