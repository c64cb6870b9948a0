"""Groups of jobs that can share batches: images with the same settings but for their texts and seeds.

Requests can be checked before a model is loaded, by a pipeline without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import LdmError
from ldm.files import file_digest
from ldm.images import load_image
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unfilled import unfilled
from ldm.weights.components import Opened, build
from ldm.weights.control_models import open_control_model
from ldm.weights.sources import open_source
from pipelines.finishing import in_turn
from pipelines.jobs import IMAGES, TEXTS, Job
from pipelines.margins import extended
from pipelines.pipeline import Pipeline, named
from pipelines.provenance import provenance
from pipelines.request import Request

# settings of loading that open what is beside a model, or by which a request is checked
BESIDE = ("lora_dir", "partial_adapters", "embeddings", "ip_adapter", "image_encoder", "watermark", "allow_pickle")
READING = ("family", "variant", "components", "allow_pickle")  # those that open a model


@dataclass(frozen=True)
class Group:
    """Images with the same settings but for their texts, which can be made together, and their checked request."""

    jobs: list[Job]
    settings: dict[str, Any]
    request: Request  # without its images' pixels, because a list may name thousands

    def whole(self) -> Request:
        """The request with its images, which are in memory as long as it is."""
        given = {name: load_image(self.settings[name], mode) for name, mode in IMAGES if name in self.settings}
        if self.request.margins:
            given["image"], given["mask"] = extended(given["image"], given.get("mask"), self.request.margins)
        return replace(_closed(self.request), **given)  # type: ignore[arg-type]


def checked_groups(pipeline: Pipeline, common: dict[str, Any], jobs: list[Job]) -> Iterator[Group]:
    """Groups of images with the same settings but for their texts, wherever they stand in the list; all checked.

    Raises:
        LdmError: a setting does not fit; the message has its line.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        alike = [(name, None if name in TEXTS else value) for name, value in job.settings]
        groups.setdefault(repr(alike), []).append(job)
    for group in groups.values():
        yield Group(group, _settings(common, group), _closed(_checked(pipeline, common, group)))


def _settings(common: dict[str, Any], group: list[Job]) -> dict[str, Any]:
    """The settings of a group, with a list of each kind of texts."""
    lines = [dict(job.settings) for job in group]
    return common | lines[0] | {name: [line[name] for line in lines] for name in TEXTS if name in lines[0]}


def _closed(request: Request) -> Request:
    """A request without its images' pixels; condition images are read again when they are used."""
    return replace(request.changed(control=tuple(one.closed() for one in request.control)), image=None, mask=None)


def _checked(pipeline: Pipeline, common: dict[str, Any], group: list[Job]) -> Request:
    """The checked request for a group; an error names the line of the faulty one."""
    prompts, seeds = [job.prompt for job in group], [job.seed for job in group]
    try:
        return pipeline.request(prompts, seed=seeds, **_settings(common, group))
    except LdmError:
        for job in group:
            try:
                pipeline.request(job.prompt, seed=job.seed, **_settings(common, [job]))
            except LdmError as error:
                raise LdmError(f"{job.place}{error}") from None
        raise


# --- models -----------------------------------------------------------------------------------------------------------


def by_model(jobs: list[Job], loading: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[Job]]]:
    """The jobs of each model with the settings that load it, in the order in which the models come first."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(repr(job.loading), []).append(job)
    return [({**loading, **dict(part[0].loading)}, part) for part in found.values()]


def planned_groups(
    jobs: list[Job], common: dict[str, Any], loading: Mapping[str, Any]
) -> list[tuple[Opened, list[Group]]]:
    """Each model with the groups of its jobs, all checked; no weights are loaded.

    Raises:
        LdmError: a source cannot be opened, or as `checked_groups`.
    """
    found = []
    for own, part in by_model(jobs, loading):
        opened, pipeline = _planned(own)
        found.append((opened, list(checked_groups(pipeline, common, part))))
    return found


def _planned(loading: Mapping[str, Any]) -> tuple[Opened, Pipeline]:
    """An opened model, and a pipeline of its family without weights."""
    reading = {name: loading[name] for name in READING if name in loading}
    opened = open_source(named(loading.get("source")), **reading, verify=False)
    beside = {"allow_pickle": loading.get("allow_pickle", False), "verify": False}
    refiner = open_source(loading["refiner"], **beside) if "refiner" in loading else None
    controls = [open_control_model(one, opened.family, **beside) for one in loading.get("control_models", ())]
    with unfilled():
        pipeline = Pipeline(
            LatentDiffusion.of(build(opened.family)),
            refiner=refiner and LatentDiffusion.of(build(refiner.family)),
            control_models=[one.network for one in controls],
            **{name: loading[name] for name in BESIDE if name in loading},
        )
    return opened, pipeline


# --- images -----------------------------------------------------------------------------------------------------------


def images_by_model(
    load: Callable[[dict[str, Any]], Pipeline], common: dict[str, Any], loading: Mapping[str, Any], jobs: list[Job],
    left: set[int], rank: int = 0, world: int = 1,
) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:  # fmt: skip
    """This process's missing images, one model after the other, each with its whole record.

    Args:
        load: the pipeline of settings of loading.
        common: the settings of all calls.
        loading: the settings of loading that all models share.
        jobs: all images.
        left: the numbers of those that are missing.
        rank, world: which process it is, and of how many.

    Raises:
        LdmError, FlaggedError: as `images_of`.
    """

    def of_model(own: dict[str, Any], part: list[Job]) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:
        pipeline = load(own)
        about = provenance(own, pipeline)
        for job, image, record in images_of(pipeline, common, part, left, rank, world):
            yield job, image, {**record, **about}

    return in_turn(of_model(*one) for one in by_model(jobs, loading))


def images_of(
    pipeline: Pipeline, common: dict[str, Any], jobs: list[Job], left: set[int], rank: int = 0, world: int = 1
) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:
    """Make this process's missing images, each with its record; all are checked before.

    Raises:
        LdmError: as `checked_groups`.
        FlaggedError: images were refused, after all others are made.
    """
    groups = list(checked_groups(pipeline, common, jobs))
    made = []
    before = 0  # batches of the groups before
    for group in groups:
        numbers = [job.index for job in group.jobs]
        # those of the whole list, so that images do not depend on the number of processes, nor on those that exist
        batches = list(enumerate(pipeline.batches(group.request), before))
        before += len(batches)
        ours = [rows for number, rows in batches if number % world == rank]
        missing = [rows for rows in ours if not left.isdisjoint(numbers[rows.start : rows.stop])]
        if missing:
            made.append(_images(pipeline, group, missing, left))
    yield from in_turn(made)


def _images(
    pipeline: Pipeline, group: Group, batches: list[range], left: set[int]
) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:
    """The images of a group's batches that are left to make, each with its record."""
    given = {name: group.settings[name] for name, _ in IMAGES if name in group.settings}
    files = {name: _file(path) for name, path in given.items() if isinstance(path, (str, PathLike))}
    for result in pipeline.make(group.whole(), only=batches):
        for row, image, record in zip(result.rows, result.images, result.settings, strict=True):
            if group.jobs[row].index in left:
                yield group.jobs[row], image, {**record, **files}


def _file(path: Any) -> dict[str, str]:
    """The record of a starting image: its path and its digest."""
    return {"path": str(path), "sha256": file_digest(Path(path), plain=True)}
