"""`ldm generate`: prompts to PNG files, one batch after the other; and many prompts over several processes."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import ldm
from ldm.cli.common import counter, to_dtype, to_png
from ldm.cli.info import describe
from ldm.cli.record import to_parameters
from ldm.errors import LdmError, listing
from ldm.images import grid, load_image, save_png
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling.guidance import Guidance
from ldm.weights.builtin import DEFAULT, builtin
from ldm.weights.components import build
from ldm.weights.sources import open_source
from pipelines import Pipeline
from pipelines.pipeline import named
from pipelines.tuning import room_of

LINE_OPTIONS = {  # what a line of a .jsonl file may set, beside its prompt
    "negative", "prompt_2", "negative_2", "seed", "width", "height", "steps", "guidance", "scheduler", "spacing",
    "clip_skip", "image", "mask", "strength", "eta", "reuse", "merge",
}  # fmt: skip
IDENTITY = (  # what changes an image, of `Options`, beside its settings
    "model", "family", "variant", "refiner", "guidance", "guidance_rescale", "guidance_interval", "threshold",
    "perturbed", "image_guidance", "dtype", "attention", "compile", "quantize",
)  # fmt: skip
MOST = 100_000  # images of each prompt
LARGEST_FILE = 256 * 2**20


@dataclass(frozen=True)
class Options:
    """What the command line says, checked when it is used."""

    prompts: list[str]
    model: str | None
    refiner: str | None = None
    n: int = 1
    batch: int | None = None
    seed: int | None = None
    size: str | None = None
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: str = "0,1"
    threshold: float = 0.0
    perturbed: float = 0.0
    image_guidance: float = 1.5
    prompts_file: str | None = None
    out: str = "outputs"
    sheet: bool = False
    device: str | None = None
    dtype: str | None = None
    attention: str = "auto"
    compile: bool = False
    quantize: str | None = None
    offload: str = "auto"
    as_json: bool = False
    dry_run: bool = False
    family: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # of `Pipeline.stream`, those that were given


@dataclass(frozen=True)
class Job:
    """One image to make."""

    index: int
    prompt: str
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()  # of its line alone
    place: str = ""  # where that line is, for errors

    def name(self, common: dict[str, Any]) -> str:
        """A file name that changes with everything that changes the image."""
        text = json.dumps([self.prompt, self.seed, self.settings, common], sort_keys=True, default=str)
        return f"{self.index:06d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.png"


def run(options: Options) -> None:
    """Make what is asked for; print a path (or JSON) for each image on stdout."""
    logging.basicConfig(format="ldm: %(message)s", level=logging.WARNING, stream=sys.stderr)
    common = dict(options.settings)
    if options.size:
        common |= dict(zip(("width", "height"), parse_size(options.size), strict=True))
    for name in ("image", "mask"):
        if common.get(name):
            load_image(common[name])  # before a model is loaded
    jobs = list(make_jobs(options))
    targets = _targets(options, jobs, common | {name: getattr(options, name) for name in IDENTITY})
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    left = {job.index for job in jobs if not (options.prompts_file and targets[job.index].exists())}
    if options.dry_run:
        print(json.dumps(_describe(options, common, jobs, len(left)), indent=2, default=str))
        return
    if not left:
        print(f"ldm: nothing to do: all {len(jobs)} images are there", file=sys.stderr)
        return
    device = options.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if world > 1 and _cuda() else None)
    pipeline = Pipeline(
        options.model, refiner=options.refiner, device=device, dtype=to_dtype(options.dtype),
        attention=options.attention, compile=options.compile, quantize=options.quantize, offload=options.offload,
        family=options.family, variant=options.variant, allow_pickle=options.allow_pickle,
    )  # fmt: skip
    groups = list(_groups(options, pipeline, common, jobs))
    provenance: dict[str, Any] = {
        "version": f"ldm {ldm.__version__}",
        "model": Path(options.model or DEFAULT).stem,
        "source": _absolute(options.model or DEFAULT),
        "model_hash": pipeline.model.fingerprint(),
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
        "attention": options.attention,
        "compile": options.compile,
    }
    room = room_of(pipeline.model)
    given = {
        "source_family": options.family, "variant": options.variant, "quantize": options.quantize,
        "offload": "layers" if room and room.layers else None,  # which excludes quick layers, and so rounds otherwise
    }  # fmt: skip
    provenance |= {name: value for name, value in given.items() if value is not None}
    if options.refiner:
        provenance["refiner"] = _absolute(options.refiner)
    made = []
    batches = itertools.count()
    with counter("images", -(-len(left) // world)) as advance:
        for batchable, settings in groups:
            files = {name: _file(settings[name]) for name in ("image", "mask") if settings.get(name)}
            numbers = [job.index for job in batchable]

            def ours(rows: range, numbers: list[int] = numbers) -> bool:
                """Whether a batch is this process's, and not all there: batches are those of the whole list, so that
                images are the same to the bit whoever makes them, and whatever is there already."""
                return next(batches) % world == rank and not left.isdisjoint(numbers[rows.start : rows.stop])

            for result in pipeline.stream(**settings, batch=options.batch, needed=ours):
                for row, image, record in zip(result.rows, result.images, result.settings, strict=True):
                    if numbers[row] not in left:
                        continue
                    job, full = batchable[row], {**record, **provenance, **files}
                    target = targets[job.index] if options.prompts_file else _free(targets[job.index], options.out)
                    save_png(image, target, full, to_parameters(full))
                    print(json.dumps({"path": str(target), **full}) if options.as_json else target, flush=True)
                    advance()
                    if options.sheet:
                        made.append(image)
    if options.sheet and made:
        sheet = targets[jobs[0].index].with_name("grid.png")
        save_png(grid(made), sheet)
        print(sheet)


def _groups(
    options: Options, pipeline: Pipeline, common: dict[str, Any], jobs: list[Job]
) -> Iterator[tuple[list[Job], dict[str, Any]]]:
    """Images with the same settings, which can be made together, and the arguments of `Pipeline.stream`, checked."""
    for line, group in groupby(jobs, key=lambda job: job.settings):
        together = list(group)
        own = {name: value for name, value in line if value is not None}
        settings = common | own | {"prompt": [job.prompt for job in together], "seed": [job.seed for job in together]}
        try:
            settings["guidance"] = _guidance(options, pipeline, own.get("guidance"))
            pipeline.stream(**settings, batch=options.batch)
        except LdmError:
            for job in together:  # which of them is it?
                try:
                    settings["guidance"] = _guidance(options, pipeline, own.get("guidance"))
                    pipeline.request(**{**settings, "prompt": job.prompt, "seed": job.seed})
                except LdmError as error:
                    raise LdmError(f"{job.place}{error}") from None
            raise
        yield together, settings


def make_jobs(options: Options) -> Iterator[Job]:
    """Every image that is asked for, from the command line or from a file of prompts."""
    lines = list(read_prompts(options.prompts_file)) if options.prompts_file else []
    lines += [(prompt, {}, "") for prompt in options.prompts]
    if not lines:
        raise LdmError("no prompt: give one, or a file of them (--prompts)")
    if not 1 <= options.n <= MOST:
        raise LdmError(f"-n {options.n}: a whole number from 1 to {MOST} is needed")
    first = secrets.randbelow(2**32) if options.seed is None and not options.prompts_file else options.seed or 0
    index = 0
    for prompt, line, place in lines:
        own = line.pop("seed", None)
        for copy in range(options.n):
            seed = first + index if own is None else own + copy
            yield Job(index, prompt, seed, tuple(sorted(line.items())), place)
            index += 1


def read_prompts(name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Prompts of a text file, one a line, or of a JSON-lines file with settings of their own, and where each stands."""
    path = Path(name)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise LdmError(f"{path} has {path.stat().st_size} bytes; that is no file of prompts")
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
        unknown = sorted(content.keys() - LINE_OPTIONS)
        if unknown or not isinstance(prompt, str):
            raise LdmError(f"{place}{listing(unknown) or 'the prompt'} is not known or no text")
        seed = content.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise LdmError(f"{place}seed {seed!r} is no whole number")
        yield prompt, {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}, place


def _targets(options: Options, jobs: list[Job], common: dict[str, Any]) -> dict[int, Path]:
    """Where each image goes. Prompts from a file have fixed names, so that a second run goes on where one stopped."""
    out = Path(options.out)
    if out.suffix.lower() == ".png":
        if len(jobs) > 1:
            raise LdmError(f"--out {out}: {len(jobs)} images need a folder, not one file")
        return {jobs[0].index: to_png(options.out)}
    if out.suffix and not out.is_dir():
        raise LdmError(f"--out {out}: name a folder, or a file that ends in .png")
    if not options.dry_run:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LdmError(f"--out {out} cannot be made: {error.strerror}") from None
        if not os.access(out, os.W_OK):
            raise LdmError(f"--out {out} cannot be written to")
    if options.prompts_file:
        return {job.index: out / job.name(common) for job in jobs}
    numbers = [int(m[1]) for path in out.glob("*.png") if (m := re.match(r"(\d{5,9})-", path.name))]
    start = max(numbers, default=-1) + 1
    return {job.index: out / f"{start + job.index:05d}-{job.seed}.png" for job in jobs}


def _free(target: Path, out: str) -> Path:
    """The target, or the next number's if another run has put an image there; a file named by --out is replaced."""
    while target != Path(out) and target.exists():
        number, _, rest = target.name.partition("-")
        target = target.with_name(f"{int(number) + 1:05d}-{rest}")
    return target


def parse_size(text: str) -> tuple[int, int]:
    """`--size`: width x height in pixels, or one number for both."""
    match = re.fullmatch(r"(\d{1,9})(?:[x×](\d{1,9}))?", text.strip().lower())
    if not match:
        raise LdmError(f"--size {text!r}: write WIDTHxHEIGHT, such as 768x512")
    return int(match[1]), int(match[2] or match[1])


def parse_spacing(text: str) -> str | tuple[float, ...]:
    """`--spacing`: a name, or noise levels separated by commas."""
    if "," not in text:
        return text
    try:
        return tuple(float(level) for level in text.split(","))
    except ValueError:
        raise LdmError(f"--spacing {text!r}: write a name, or noise levels such as 14.6,7,3,1,0.1") from None


def _absolute(source: str) -> str:
    """A source as it can be named from elsewhere: a path in full, the name of a model as it is."""
    return source if builtin(source) or not Path(source).exists() else str(Path(source).absolute())


def _guidance(options: Options, pipeline: Pipeline, scale: float | None = None) -> Guidance:
    try:
        start, end = (float(part) for part in options.guidance_interval.split(","))
    except ValueError:
        raise LdmError(f"--guidance-interval {options.guidance_interval!r}: write START,END, such as 0.1,0.8") from None
    chosen = next(value for value in (scale, options.guidance, pipeline.model.family.guidance) if value is not None)
    return Guidance(
        chosen, options.guidance_rescale, (start, end), options.threshold, options.perturbed, options.image_guidance
    )


def _describe(options: Options, common: dict[str, Any], jobs: list[Job], left: int) -> dict[str, Any]:
    """What `--dry-run` prints: all is checked, but no weights are loaded for it."""
    opened = open_source(
        named(options.model),
        family=options.family,
        variant=options.variant,
        allow_pickle=options.allow_pickle,
        verify=False,
    )
    refiner = open_source(options.refiner, verify=False) if options.refiner else None
    with torch.device("meta"):
        pipeline = Pipeline(
            LatentDiffusion.of(build(opened.family)), refiner=refiner and LatentDiffusion.of(build(refiner.family))
        )
    (_, first), *_ = _groups(options, pipeline, common, jobs)
    request, _ = pipeline.request(**first)
    family = opened.family
    plan = request.plan(family.schedule, family.xl)
    return {
        "model": describe(opened),
        "settings": {
            **{name: value for name, value in first.items() if name not in ("prompt", "seed")},
            "width": request.width, "height": request.height, "steps": request.steps,
            "guidance": vars(request.guidance),
        },
        "timesteps": [round(float(t), 2) for t in plan.timesteps],
        "images": len(jobs),
        "left_to_make": left,
        "first": {"prompt": jobs[0].prompt, "seed": jobs[0].seed},
    }  # fmt: skip


def _file(path: Any) -> dict[str, str]:
    """An image that was started from: where it was, and its digest, so that it can be found again."""
    return {"path": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def _cuda() -> bool:
    return torch.cuda.is_available()
