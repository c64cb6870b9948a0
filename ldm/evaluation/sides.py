"""The images of a side: those of a folder, those that a model makes of prompts, and its reconstructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from ldm.errors import LdmError, listing
from ldm.evaluation.features import digest_of
from ldm.evaluation.images import Images, images_of, write_images
from ldm.evaluation.plan import EvaluationPlan, Model
from ldm.evaluation.report import Value, value_text
from ldm.evaluation.workspace import Workspace


class Notes:
    """Notes for the readers of a report, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        if text and text not in self.texts:
            self.texts.append(text)


def opened(source: str | Path | Images, work: Workspace, notes: Notes, count: int | None = None) -> Images:
    """The images of a source, with a note about those that cannot be used; arguments and errors as for `images_of`."""
    if isinstance(source, Images):
        return source
    images = images_of(source, work, count)
    if reasons := images.source.skipped.reasons:
        first = listing([f"{key} ({reason})" for key, reason in reasons.items()], 3)
        notes.add(f"{source}: {len(reasons)} of {len(reasons) + len(images.source)} images cannot be used: {first}")
    return images


def prompts_of(plan: EvaluationPlan, data: Images | None) -> list[str]:
    """The distinct prompts of an evaluation: the given ones, or the captions of the reference images.

    Raises:
        LdmError: there are no prompts.
    """
    texts = list(plan.prompts or ())
    if not texts:
        assert data is not None
        shuffled = data.shuffled(plan.seed)
        texts = [text for number in range(len(shuffled)) if (text := shuffled.caption(number))]
    if not texts:
        raise LdmError(f"{plan.data} has no captions to make images of; write some, or give prompts")
    return texts


def made_images(
    model: Model, name: str, changes: Mapping[str, Value], prompts: Sequence[str], plan: EvaluationPlan, work: Workspace
) -> Images:
    """The images that a model makes of prompts.

    Args:
        model: the model that makes them.
        name: name of the side.
        changes: settings that differ from the model's.
        prompts: one for each image.
        plan: of the evaluation.
        work: its folder holds the images.

    Raises:
        LdmError: a prompt names an adapter that cannot be used.
    """

    def make(numbers: range) -> list[Image.Image]:
        seeds = [plan.seed + number for number in numbers]
        return model.make([prompts[number] for number in numbers], seeds, changes)

    what = " ".join(["making", name, *(f"{key} {value_text(value)}" for key, value in changes.items())])
    facts = (model.digest, sorted(model.settings.items()), sorted(changes.items()), list(prompts), plan.seed)
    adapters = model.adapters(prompts, changes) if model.adapters else ()
    folder = digest_of(facts, plan.batch, *([adapters] if adapters else []))
    return write_images(what, folder, prompts, make, plan.batch, work)


def reconstructed_images(
    model: Model, name: str, data: Images, plan: EvaluationPlan, work: Workspace
) -> tuple[Images, Images]:
    """A model's reconstructions of the reference images, and the originals at the model's resolution.

    Raises:
        LdmError: a reference image cannot be read.
    """
    assert model.reconstruct is not None
    reconstruct, size, data = model.reconstruct, (model.size, model.size), data.shuffled(plan.seed)
    keys = [data.key(number) for number in range(min(plan.n or len(data), len(data)))]

    def crop(numbers: range) -> list[Image.Image]:
        try:
            whole = [data.read(number)[1] for number in numbers]
        except LdmError as error:
            raise LdmError(f"{error}; mend or remove it") from None
        return [ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in whole]

    facts = data.stamp, model.size, keys
    originals = write_images("cropping", digest_of(facts), keys, crop, plan.batch, work)

    def rebuild(numbers: range) -> list[Image.Image]:
        return reconstruct([originals.read(number)[1] for number in numbers])

    folder = digest_of(facts, model.digest, sorted(model.settings.items()), plan.batch)
    rebuilt = write_images(f"reconstructing with {name}", folder, keys, rebuild, plan.batch, work)
    return rebuilt, originals
