"""`ldm generate`: what it is asked for, one job for each image, and the files that it writes.

PyTorch is imported once the options, the list of prompts and the paths are found right.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.cli.common import to_png
from ldm.errors import LdmError
from ldm.launch import processes
from ldm.signing import ManifestSigner
from ldm.weights.builtin import GIVE_SAFETY_CHECKER, check_named
from pipelines.axes import SheetAxis, cells
from pipelines.jobs import IMAGES, TEXTS, Job
from pipelines.settings import LOADING, at, checked

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
    xy: tuple[SheetAxis, ...] = ()  # the settings of a comparison's columns and rows

    @property
    def common(self) -> dict[str, Any]:
        """The settings of all images for the pipeline, but the number of images and their seeds."""
        return {name: value for name, value in checked(self.settings, "shell").items() if name not in ("n", "seed")}


@dataclass(frozen=True)
class Work:
    """The images of the options: all of them, the path of each, and those that are not there yet, by number."""

    jobs: list[Job]
    targets: dict[int, Path]  # none for the cells of a comparison whose sheet alone is asked for
    left: set[int]
    sheet: Path | None = None  # the path of a comparison's sheet
    signer: ManifestSigner | None = None  # of all files


def work_of(options: Options) -> Work:
    """The images that are asked for.

    Raises:
        LdmError: a model, an image or the list of prompts is not there, a line of it is wrong, images cannot be signed,
            or the output cannot be written.
    """
    _check_paths(options.loading, options.settings)
    signer = ManifestSigner(*options.loading["c2pa"]) if "c2pa" in options.loading else None
    if options.xy:
        return _sheet_work(options, signer)
    jobs = list(make_jobs(options))
    targets = _targets(options, jobs)
    left = {job.index for job in jobs if not (options.prompts_file and targets[job.index].exists())}
    return Work(jobs, targets, left, signer=signer)


def _sheet_work(options: Options, signer: ManifestSigner | None) -> Work:
    """The cells of a comparison and its sheet; a file that --out names is the sheet, and cells have none."""
    jobs = make_cells(options)
    for job in jobs:
        _check_paths(dict(job.loading), dict(job.settings))
    left = {job.index for job in jobs}
    if Path(options.out).suffix.lower() == ".png":
        return Work(jobs, {}, left, to_png(options.out), signer)
    targets = _targets(options, jobs)
    last = targets[jobs[-1].index]
    return Work(jobs, targets, left, last.with_name(f"{int(last.name.partition('-')[0]) + 1:05d}-xy.png"), signer)


def _check_paths(loading: dict[str, Any], settings: dict[str, Any]) -> None:
    """Check that models and images are there, as far as their names tell.

    Raises:
        LdmError: one is not.
    """
    for name in ("source", "refiner"):
        if name in loading:
            check_named(loading[name])
    if "safety" in loading:
        check_named(loading["safety"], GIVE_SAFETY_CHECKER)
    for name, _ in IMAGES:
        if name in settings and not os.path.lexists(settings[name]):
            raise LdmError(f"{settings[name]} does not exist")


# --- jobs -------------------------------------------------------------------------------------------------------------


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


def make_cells(options: Options) -> list[Job]:
    """A job for every cell of a comparison.

    Raises:
        LdmError: there are other images beside them, or as `cells`.
    """
    if options.prompts_file or len(options.prompts) > 1:
        raise LdmError("--xy compares images of one prompt; give others as --xy prompt=…, not "
                       f"{'by --prompts' if options.prompts_file else 'as arguments'}")  # fmt: skip
    if options.settings.get("n", 1) > 1:
        raise LdmError(f"-n {options.settings['n']}: a cell of --xy has one image; compare seeds by --xy seed=1,2")
    if options.sheet:
        raise LdmError("--xy makes a sheet of its own; leave out --grid")
    if processes() > 1:
        raise LdmError("--xy makes its sheet in one process; start it without a launcher")
    prompt = options.prompts[0] if options.prompts else None
    return cells(options.xy, prompt, options.settings.get("seed"), {**options.common, **options.loading})


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
    for name in ("prompt", *TEXTS, "seed"):
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
    if out.suffix and not out.is_dir() and _is_image(out):
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


def _is_image(path: Path) -> bool:
    """Whether a name ends as that of an image does."""
    from PIL import Image  # with a module for each kind of images

    return path.suffix.lower() in Image.registered_extensions()
