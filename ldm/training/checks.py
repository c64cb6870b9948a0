"""Checks of a configuration before PyTorch is imported: the bounds that its keys have together, and its paths."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from ldm.data.places import check_beside, check_place
from ldm.errors import LdmError
from ldm.training.config import Config
from ldm.training.layout import DONE
from ldm.training.phases import phases
from ldm.training.sections import DataSection, EvaluationSection, ModelSection, PriorSection, StageSection
from ldm.weights.builtin import builtin_adapter, check_named
from ldm.weights.names import HUB_ID


def check_bounds(config: Config) -> None:
    """Check the keys that bound each other.

    Raises:
        LdmError: two of them do not go together; the message names the key to change.
    """
    for name in config.stages:
        section: StageSection = getattr(config, name)
        try:
            sizes = [phase.size for phase in phases(section)]
        except LdmError as error:
            raise LdmError(f"{name}.{error}") from None
        _check_sizes(name, sizes, config.data.bucket_step)
        for kind in set(section.beside) - config.data.beside.named().keys():
            remedy = "name a folder, a column, or what makes it"
            if config.data.stream:
                remedy = "a stream has no images beside its own; copy it to a disk, and set data.stream=false"
            raise LdmError(f"data.beside.{kind}: the stage {name} reads it; {remedy}")
        for key in section.needed:
            if getattr(section, key) is None:
                raise LdmError(f"{name}.{key} is not set: {type(section).model_fields[key].description}")
        prior = getattr(section, "prior", None)
        if isinstance(prior, PriorSection) and prior.prompt:
            _check_prior(name, section, prior, config.data)
    _check_read(config)
    data = config.data
    if data.stream and data.cache:
        raise LdmError("data.cache: a stream cannot be cached; copy it to a disk, or set data.stream=false")
    if data.stream and data.trigger:
        raise LdmError("data.trigger: captions of a stream stay as they are; copy it to a disk, or leave it out")
    if data.stream and data.beside.named():
        kind = next(iter(data.beside.named()))
        raise LdmError(f"data.beside.{kind}: a stream has no images beside its own; copy it to a disk, or leave it out")
    if data.stream and (data.folders or data.numbered_folders):
        key = "folders" if data.folders else "numbered_folders"
        raise LdmError(f"data.{key}: a stream is not read by folders; copy it to a disk, or leave it out")
    if data.cache and data.crop == "center" and data.crops > 1:
        raise LdmError(f"data.crops is {data.crops}: an image has one crop at its center; set data.crops=1")


def _check_read(config: Config) -> None:
    """Check that some stage can read each kind of images beside an image, and that what is said of masks has some."""
    sections: list[StageSection] = [getattr(config, name) for name in config.stages]
    read = {kind for section in sections for kind in (*section.beside, *section.reads)}
    for kind in config.data.beside.named().keys() - read:
        raise LdmError(f"data.beside.{kind}: none of the stages ({', '.join(config.stages)}) reads it; leave it out")
    for name, section in zip(config.stages, sections, strict=True):
        if getattr(section, "outside_mask", 0) and config.data.beside.mask is None:
            raise LdmError(f"{name}.outside_mask: there are no masks; name some with data.beside.mask, or leave it out")


def _check_prior(name: str, section: StageSection, prior: PriorSection, data: DataSection) -> None:
    """Check that class images can share the batches, and are not the images themselves."""
    for part, phase in zip(section.sizes, phases(section), strict=True):
        if phase.batch % 2:
            key = f"the batch of {name}.sizes at {part.size}" if part.batch else f"{name}.batch"
            raise LdmError(f"{key} is {phase.batch}: half of it is class images ({name}.prior); choose an even number")
    if alike(prior.prompt, data.trigger):
        raise LdmError(
            f"{name}.prior.prompt and data.trigger are the same, {prior.prompt!r}: class images need another; name the "
            "class without the words for what is learned"
        )


def alike(first: str, second: str) -> bool:
    """Whether two prompts are the same but for case and spaces."""
    return first.casefold().split() == second.casefold().split()


def _check_sizes(name: str, sizes: list[int], step: int) -> None:
    """Check that the sizes of a stage are multiples of the step of its buckets."""
    odd = [size for size in sizes if size % step]
    if not odd:
        return
    fitting = [side for side in range(8, step, 8) if math.gcd(*sizes) % side == 0]
    remedy = f"set data.bucket_step={fitting[-1]}" if fitting else "choose a size that is a multiple of 8"
    raise LdmError(f"data.bucket_step is {step}: {name}.sizes has {odd[0]}, which is no multiple of it; {remedy}")


def check_paths(config: Config) -> None:
    """Check that everything is there which the configuration names by a path, and that the output can be written.

    Raises:
        LdmError: something is missing; the message names its key.
    """
    if not config.data.source:
        raise LdmError("data.source is not set: name a folder of images, shards, or a dataset")
    _check_images("data.source", config.data.source, config.data.stream)
    for kind, place in config.data.beside.named().items():
        _check_beside(kind, place)
    for place, model in _models(config):
        _check_model(place, model)
    for name in config.stages:
        for key in ("source", "encoder"):
            given = getattr(getattr(config, name), key, None)
            if given and builtin_adapter(given) is None and not _on_hub(given) and not Path(given).exists():
                raise LdmError(f"{name}.{key}: {given} does not exist; give a folder, a file or a name of the Hub")
        evaluation = getattr(getattr(config, name), "evaluation", None)
        if isinstance(evaluation, EvaluationSection) and evaluation.every and evaluation.data:
            _check_images(f"{name}.evaluation.data", evaluation.data, stream=False)
        prior = getattr(getattr(config, name), "prior", None)
        if isinstance(prior, PriorSection) and prior.source:
            _check_images(f"{name}.prior.source", prior.source, stream=False)
    output = Path(config.output).absolute()
    there = next(folder for folder in (output, *output.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise LdmError(f"output {config.output} cannot be used: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise LdmError(f"output {config.output} cannot be used: {there} cannot be written")


def _on_hub(source: str) -> bool:
    """Whether a source can be a name on the Hub, with a folder or a file after it."""
    return HUB_ID.fullmatch("/".join(source.split("/")[:2])) is not None


def _models(config: Config) -> Iterator[tuple[str, ModelSection]]:
    """The models that the run starts from, with their places; none that a finished stage has read."""
    for number, name in enumerate(config.stages):
        own = getattr(getattr(config, name), "model", None)
        if (Path(config.output) / name / DONE).exists():
            continue
        if isinstance(own, ModelSection):
            yield f"{name}.model", own
        elif number == 0:
            yield "model", config.model


def _check_images(key: str, source: str, stream: bool) -> None:
    try:
        check_place(source, stream)
    except LdmError as error:
        raise LdmError(f"{key}: {error}") from None


def _check_beside(kind: str, place: str) -> None:
    try:
        check_beside(kind, place)
    except LdmError as error:
        raise LdmError(f"data.beside.{kind}: {error}") from None


def _check_model(place: str, section: ModelSection) -> None:
    """Check the paths of a model and of components from elsewhere."""
    if section.source:
        try:
            check_named(section.source)
        except LdmError as error:
            raise LdmError(f"{place}.source: {error}") from None
    for name, path in section.components.items():
        if not HUB_ID.fullmatch(path) and not Path(path).exists():
            raise LdmError(f"{place}.components.{name}: {path} does not exist; give a folder or a file")
