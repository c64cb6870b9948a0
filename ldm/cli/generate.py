"""`ldm generate`: makes PNG files of prompts, batch by batch, and shares many prompts among processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.cli.common import counter, log_warnings, to_png
from ldm.cli.info import describe
from ldm.conditions.table import check_kind
from ldm.errors import LdmError
from ldm.files import file_digest
from ldm.images import grid, load_image, save_png
from ldm.latent_diffusion import LatentDiffusion
from ldm.launch import processes, rank
from ldm.weights.components import build
from ldm.weights.control_models import open_control_model
from ldm.weights.sources import open_source
from pipelines import Pipeline
from pipelines.a1111 import to_parameters
from pipelines.control_images import control_images
from pipelines.pipeline import named
from pipelines.provenance import provenance
from pipelines.request import Request, records
from pipelines.settings import LOADING, at, checked
from pipelines.tuning import dtype_named

TABLES = (".json", ".csv", ".tsv", ".yaml", ".yml", ".parquet")  # files whose lines are no prompts
LARGEST_FILE = 256 * 2**20


@dataclass(frozen=True)
class Options:
    """The options of `ldm generate`, each value within its bounds."""

    prompts: list[str]
    settings: dict[str, Any]  # settings of the call that were given
    loading: dict[str, Any]  # settings of loading that were given
    prompts_file: str | None = None
    out: str = "outputs"
    sheet: bool = False
    as_json: bool = False
    dry_run: bool = False

    @property
    def common(self) -> dict[str, Any]:
        """The settings of all images for the pipeline, but the number of images and their seeds."""
        return {name: value for name, value in checked(self.settings, "shell").items() if name not in ("n", "seed")}


@dataclass(frozen=True)
class Job:
    """One image to make."""

    index: int
    prompt: str
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()  # of its line alone
    place: str = ""  # the place of that line, for errors

    def name(self, common: dict[str, Any]) -> str:
        """A file name that is different for every different image."""
        text = json.dumps([self.prompt, self.seed, self.settings, common], sort_keys=True, default=str)
        return f"{self.index:06d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.png"


@dataclass(frozen=True)
class Group:
    """Images with the same settings, which can be made together, and their checked request."""

    jobs: list[Job]
    settings: dict[str, Any]
    request: Request  # without its images' pixels, because a list may name thousands

    def whole(self) -> Request:
        """The request with its images, which are in memory as long as it is."""
        given = {name: load_image(self.settings[name], mode) for name, mode in IMAGES if name in self.settings}
        return replace(_closed(self.request), **given)  # type: ignore[arg-type]


IMAGES = (("image", "RGB"), ("mask", "L"))  # settings that are image files, and PIL's modes
# those that open what is beside a model
BESIDE = ("lora_dir", "partial_adapters", "embeddings", "ip_adapter", "image_encoder", "allow_pickle")
READING = ("family", "variant", "components", "allow_pickle")  # settings of loading that open a model


# --- the command ------------------------------------------------------------------------------------------------------


def generate_images(options: Options) -> None:
    """Make all images of the options; print a path (or JSON) for each on stdout."""
    log_warnings()
    for name, mode in IMAGES:
        if name in options.settings:
            load_image(options.settings[name], mode)  # errors come before a model is loaded
    for one in control_images(options.settings.get("control")):
        check_kind(one.kind)
    jobs = list(make_jobs(options))
    targets = _targets(options, jobs)
    left = {job.index for job in jobs if not (options.prompts_file and targets[job.index].exists())}
    if options.dry_run:
        print(json.dumps(_describe(options, jobs, len(left)), indent=2, default=str))
        return
    if not left:
        print(f"ldm: nothing to do: all {len(jobs)} images are there", file=sys.stderr)
        return
    number, world = rank(), processes()
    pipeline = _pipeline(options, world)
    groups = list(checked_groups(pipeline, options.common, jobs))
    about = provenance(options.loading, pipeline)
    made = []
    with counter("images", -(-len(left) // world)) as advance:
        for job, image, record in _images(pipeline, groups, left, number, world):
            full = {**record, **about}
            target = targets[job.index] if options.prompts_file else _free(targets[job.index], options.out)
            save_png(image, target, full, to_parameters(full))
            print(json.dumps({"path": str(target), **full}) if options.as_json else target, flush=True)
            advance()
            if options.sheet:
                made.append(image)
    if made:
        sheet = targets[jobs[0].index].with_name("grid.png")
        save_png(grid(made), sheet)
        print(sheet)


def _pipeline(options: Options, world: int) -> Pipeline:
    """The pipeline of the options; each of several processes has a GPU of its own."""
    loading = dict(options.loading)
    if world > 1 and torch.cuda.is_available():
        loading.setdefault("device", f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return Pipeline(**{**loading, "dtype": dtype_named(loading.get("dtype"))})


def _images(
    pipeline: Pipeline, groups: list[Group], left: set[int], rank: int, world: int
) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:
    """Make this process's missing images, each with its record."""
    before = 0  # batches of the groups before
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
        for result in pipeline.make(group.whole(), only=missing):
            for row, image, record in zip(result.rows, result.images, result.settings, strict=True):
                if numbers[row] in left:
                    yield group.jobs[row], image, {**record, **files}


# --- jobs and groups --------------------------------------------------------------------------------------------------


def checked_groups(pipeline: Pipeline, common: dict[str, Any], jobs: list[Job]) -> Iterator[Group]:
    """Groups of images with the same settings, all of them checked.

    Raises:
        LdmError: a setting does not fit; the message has its line.
    """
    for line, found in groupby(jobs, key=lambda job: job.settings):
        group, settings = list(found), common | dict(line)
        request = _checked(pipeline, settings, group)
        yield Group(group, settings, _closed(request))


def _closed(request: Request) -> Request:
    """A request without its images' pixels; condition images are read again when they are used."""
    return replace(request.changed(control=tuple(one.closed() for one in request.control)), image=None, mask=None)


def _checked(pipeline: Pipeline, settings: dict[str, Any], jobs: list[Job]) -> Request:
    """The checked request for images with the same settings; an error names the line of the faulty one."""
    try:
        return pipeline.request([job.prompt for job in jobs], seed=[job.seed for job in jobs], **settings)
    except LdmError:
        for job in jobs:
            try:
                pipeline.request(job.prompt, seed=job.seed, **settings)
            except LdmError as error:
                raise LdmError(f"{job.place}{error}") from None
        raise


def make_jobs(options: Options) -> Iterator[Job]:
    """A job for every image, from the command line or from a file of prompts."""
    lines = list(read_prompts(options.prompts_file)) if options.prompts_file else []
    lines += [(prompt, {}, "") for prompt in options.prompts]
    if not lines:
        raise LdmError("no prompt: give one, or a file of them (--prompts)")
    seed = options.settings.get("seed")
    first = secrets.randbelow(2**32) if seed is None and not options.prompts_file else seed or 0
    index = 0
    for prompt, line, place in lines:
        own, n = line.pop("seed", None), line.pop("n", options.settings.get("n", 1))
        for copy in range(n):
            yield Job(index, prompt, first + index if own is None else own + copy, tuple(sorted(line.items())), place)
            index += 1


def read_prompts(name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Prompts of a text file, one a line, or of a JSON-lines file with settings; each with its settings and place."""
    path = Path(name)
    if path.suffix.lower() in TABLES:
        raise LdmError(f"{path}: prompts are read from a text file, one a line, or from .jsonl, one JSON object a line")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise LdmError(f"{path} has {path.stat().st_size} bytes; that is too large for a file of prompts")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LdmError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from None
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):  # str.splitlines would split within JSON's strings
        place = f"{path}, line {number}: "
        if not line.strip():
            continue
        if path.suffix.lower() != ".jsonl":
            yield line.strip(), {}, place
            continue
        try:
            content = json.loads(line)
            prompt = content.pop("prompt")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise LdmError(f'{place}a JSON object with "prompt" is needed') from None
        yield _line(prompt, content, place)


def _line(prompt: Any, content: dict[str, Any], place: str) -> tuple[str, dict[str, Any], str]:
    """A line of a JSON-lines file, its settings within their bounds."""
    if prompt is None:
        raise LdmError(f'{place}a JSON object with "prompt" is needed')
    try:
        settings = checked({"prompt": prompt, **content}, "list")
    except LdmError as error:
        raise LdmError(f"{place}{error}") from None
    for name in ("prompt", "negative", "prompt_2", "negative_2", "seed"):
        if isinstance(settings.get(name), tuple):
            raise LdmError(f"{place}{name} {settings[name]!r}: a line holds one prompt; give one")
    return settings.pop("prompt"), settings, place


# --- output files -----------------------------------------------------------------------------------------------------


def _targets(options: Options, jobs: list[Job]) -> dict[int, Path]:
    """The path of each image. Prompts of a file give fixed names, so that a second run resumes a stopped one."""
    out = Path(options.out)
    if out.suffix.lower() == ".png":
        if len(jobs) > 1:
            raise LdmError(f"--out {out}: {len(jobs)} images need a folder, not one file")
        return {jobs[0].index: to_png(options.out)}
    if out.suffix.lower() in Image.registered_extensions() and not out.is_dir():
        raise LdmError(f"--out {out}: name a folder, or a file that ends in .png")
    if not options.dry_run:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LdmError(f"--out {out} cannot be made: {error.strerror}") from None
        if not os.access(out, os.W_OK):
            raise LdmError(f"--out {out} cannot be written to")
    if options.prompts_file:
        recorded = (*at("record", LOADING), "embeddings", "ip_adapter", "image_encoder", "lora_dir")
        common = options.common | {name: value for name, value in options.loading.items() if name in recorded}
        common.pop("batch", None)
        return {job.index: out / job.name(common) for job in jobs}
    numbers = [int(m[1]) for path in out.glob("*.png") if (m := re.match(r"(\d{5,9})-", path.name))]
    start = max(numbers, default=-1) + 1
    return {job.index: out / f"{start + job.index:05d}-{job.seed}.png" for job in jobs}


def _free(target: Path, out: str) -> Path:
    """The target, or the next free number if another run has written it; a file named by --out is replaced."""
    while target != Path(out) and target.exists():
        number, _, rest = target.name.partition("-")
        target = target.with_name(f"{int(number) + 1:05d}-{rest}")
    return target


def _describe(options: Options, jobs: list[Job], left: int) -> dict[str, Any]:
    """The plan that `--dry-run` prints. Everything is checked, but no weights are loaded."""
    loading = options.loading
    reading = {name: loading[name] for name in READING if name in loading}
    opened = open_source(named(loading.get("source")), **reading, verify=False)
    beside = {"allow_pickle": loading.get("allow_pickle", False), "verify": False}
    refiner = open_source(loading["refiner"], **beside) if "refiner" in loading else None
    controls = [open_control_model(one, opened.family, **beside) for one in loading.get("control_models", ())]
    with torch.device("meta"):
        pipeline = Pipeline(
            LatentDiffusion.of(build(opened.family)),
            refiner=refiner and LatentDiffusion.of(build(refiner.family)),
            control_models=[one.network for one in controls],
            **{name: loading[name] for name in BESIDE if name in loading},
        )
    group, *_ = checked_groups(pipeline, options.common, jobs)
    request, family = group.request, opened.family
    (record,) = records(request.part(slice(1)), family)
    files = {name: group.settings[name] for name, _ in IMAGES if name in group.settings}
    return {
        "model": describe(opened),
        "settings": {name: value for name, value in record.items() if name not in ("prompt", "seed")} | files,
        "timesteps": [round(float(t), 2) for t in request.plan(family.schedule, family.xl).timesteps],
        "images": len(jobs),
        "left_to_make": left,
        "first": {"prompt": jobs[0].prompt, "seed": jobs[0].seed},
    }


def _file(path: Any) -> dict[str, str]:
    """The record of a starting image: its path and its digest."""
    return {"path": str(path), "sha256": file_digest(Path(path), plain=True)}
