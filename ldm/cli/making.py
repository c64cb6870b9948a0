"""The images of `ldm generate`: made batch by batch, saved as PNG files, and shared among processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.cli.common import counter, log_warnings
from ldm.cli.generate import IMAGES, Job, Options, Work
from ldm.cli.saving import Saver
from ldm.conditions.table import check_kind
from ldm.errors import LdmError
from ldm.files import file_digest
from ldm.images import grid, load_image, save_file
from ldm.latent_diffusion import LatentDiffusion
from ldm.launch import processes, rank
from ldm.models.unfilled import unfilled
from ldm.weights.components import build
from ldm.weights.control_models import open_control_model
from ldm.weights.sources import open_source
from pipelines import Pipeline
from pipelines.control_images import control_images
from pipelines.finishing import FlaggedError
from pipelines.pipeline import named
from pipelines.provenance import provenance
from pipelines.request import TEXTS, Request, records
from pipelines.tuning import typed

# settings of loading that open what is beside a model
BESIDE = ("lora_dir", "partial_adapters", "embeddings", "ip_adapter", "image_encoder", "allow_pickle")
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
        return replace(_closed(self.request), **given)  # type: ignore[arg-type]


def make_images(options: Options, work: Work) -> None:
    """Make the images that are not there yet; print a path (or JSON) for each on stdout."""
    log_warnings()
    for name, mode in IMAGES:
        if name in options.settings:
            load_image(options.settings[name], mode)  # errors come before a model is loaded
    for one in control_images(options.settings.get("control")):
        check_kind(one.kind)
    if options.dry_run:
        print(json.dumps(_describe(options, work), indent=2, default=str))
        return
    number, world = rank(), processes()
    pipeline = _pipeline(options, world)
    groups = list(checked_groups(pipeline, options.common, work.jobs))
    about = provenance(options.loading, pipeline)
    made, finishing = [], pipeline.finishing

    def write(image: Image.Image, target: Path, record: dict[str, Any]) -> None:
        save_file(finishing.encoded(image, record), target)

    def tell(target: Path, record: dict[str, Any]) -> None:
        print(json.dumps({"path": str(target), **record}) if options.as_json else target, flush=True)
        advance()

    with counter("images", -(-len(work.left) // world)) as advance, Saver() as saver:
        for job, image, record in _images(pipeline, groups, work.left, number, world):
            target = work.targets[job.index] if options.prompts_file else _free(work.targets[job.index], options.out)
            full = {**record, **about}
            saver.save(image.width * image.height, partial(write, image, target, full), partial(tell, target, full))
            if options.sheet:
                made.append(image)
    if made:
        sheet = work.targets[work.jobs[0].index].with_name("grid.png")
        save_file(finishing.encoded(finishing.marked(grid(made))), sheet)
        print(sheet)


def _pipeline(options: Options, world: int) -> Pipeline:
    """The pipeline of the options; each of several processes has a GPU of its own."""
    loading = dict(options.loading)
    if world > 1 and torch.cuda.is_available():
        loading.setdefault("device", f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return Pipeline(**typed(loading))


def _images(
    pipeline: Pipeline, groups: list[Group], left: set[int], rank: int, world: int
) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:
    """Make this process's missing images, each with its record."""
    before = 0  # batches of the groups before
    refused: list[int] = []  # seeds
    for group in groups:
        files = {name: _file(group.settings[name]) for name, _ in IMAGES if name in group.settings}
        numbers = [job.index for job in group.jobs]
        # those of the whole list, so that images do not depend on the number of processes, nor on those that exist
        batches = list(enumerate(pipeline.batches(group.request), before))
        before += len(batches)
        ours = [rows for number, rows in batches if number % world == rank]
        missing = [rows for rows in ours if not left.isdisjoint(numbers[rows.start : rows.stop])]
        if not missing:
            continue
        try:
            for result in pipeline.make(group.whole(), only=missing):
                for row, image, record in zip(result.rows, result.images, result.settings, strict=True):
                    if numbers[row] in left:
                        yield group.jobs[row], image, {**record, **files}
        except FlaggedError as error:
            refused += error.seeds
    if refused:
        raise FlaggedError(refused)


# --- groups -----------------------------------------------------------------------------------------------------------


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


# --- output files -----------------------------------------------------------------------------------------------------


def _free(target: Path, out: str) -> Path:
    """The target, or the next free number if another run has written it; a file named by --out is replaced."""
    while target != Path(out) and target.exists():
        number, _, rest = target.name.partition("-")
        target = target.with_name(f"{int(number) + 1:05d}-{rest}")
    return target


def _describe(options: Options, work: Work) -> dict[str, Any]:
    """The plan that `--dry-run` prints. Everything is checked, but no weights are loaded."""
    from ldm.cli.info import describe

    loading = options.loading
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
    group, *_ = checked_groups(pipeline, options.common, work.jobs)
    request, family = group.request, opened.family
    (record,) = records(request.part(slice(1)), family)
    files = {name: group.settings[name] for name, _ in IMAGES if name in group.settings}
    return {
        "model": describe(opened),
        "settings": {name: value for name, value in record.items() if name not in ("prompt", "seed")} | files,
        "timesteps": [round(float(t), 2) for t in request.plan(family.schedule, family.xl).timesteps],
        "images": len(work.jobs),
        "left_to_make": len(work.left),
        "first": {"prompt": work.jobs[0].prompt, "seed": work.jobs[0].seed},
    }


def _file(path: Any) -> dict[str, str]:
    """The record of a starting image: its path and its digest."""
    return {"path": str(path), "sha256": file_digest(Path(path), plain=True)}
