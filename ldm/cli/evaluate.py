"""`ldm eval`: evaluates one or two models or folders of images; writes a table, a JSON file and a page."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ldm.caches import cache_folder
from ldm.cli.generate import read_prompts
from ldm.data.image_set import made
from ldm.errors import LdmError, first_line
from ldm.evaluation.evaluation import evaluate
from ldm.evaluation.pages.page import write_page
from ldm.evaluation.pages.tables import tables
from ldm.evaluation.plan import EvaluationPlan, Model, check_plan
from ldm.evaluation.report import Value, save_report
from ldm.evaluation.workspace import Ranks, Workspace, file_lock
from ldm.files import Progress as Tell
from ldm.files import silent
from ldm.weights.builtin import builtin
from ldm.weights.hub import HUB_ID
from pipelines import Pipeline
from pipelines.run import reconstruct
from pipelines.settings import ADAPTERS, LOADING, Setting, at, checked, every_row, find, renamed
from pipelines.translation import TRANSLATED
from pipelines.tuning import default_device, dtype_named

IMAGE_METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")
IMAGES = (".tar", ".tgz", ".gz", ".parquet")  # endings of shards of images
PROMPT_METRICS = ("cmmd", "clip-score", "r-precision")


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `ldm eval`."""

    sources: Sequence[str]
    data: str | None = None
    metrics: str | None = None
    n: int | None = None
    prompts: str | None = None
    training: str | None = None
    features: str = "inception"
    clip: str | None = None
    copies: str = "sscd"
    lpips: str = "alex"
    sweeps: Sequence[str] = ()
    settings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # for "both", "A" and "B": KEY=VALUE, …
    seed: int = 0
    batch: int = 8
    out: str = "evaluation"
    cache: str | None = None
    device: str | None = None
    as_json: bool = False


def evaluate_sources(options: EvaluateOptions) -> None:
    """Evaluate, print the tables, and print where the report is."""
    logging.basicConfig(format="ldm: %(message)s", level=logging.WARNING, stream=sys.stderr)
    ranks, device = _ranks(options.device)
    plan = EvaluationPlan(
        metrics=_metrics(options), data=options.data, n=options.n, prompts=_prompts(options.prompts),
        training=options.training, features=options.features, clip=options.clip, copies=options.copies,
        lpips=options.lpips, sweeps=_sweeps(options.sweeps), seed=options.seed, batch=options.batch,
        device=device,
    )  # fmt: skip
    given = {side: _settings(texts) for side, texts in options.settings.items()}
    if given.get("B") and len(options.sources) < 2:
        raise LdmError("--with-b is for a second model, and only one is given")
    check_plan([is_model(source) for source in options.sources], plan)
    sides: list[Model | str] = []
    for source, name in zip(options.sources, "AB", strict=False):
        own = given.get("both", {}) | given.get(name, {})
        if own and not is_model(source):
            raise LdmError(
                f"{source} is a folder of images, which are not made here; leave out --with {next(iter(own))}"
            )
        sides.append(_model(source, own, device, plan) if is_model(source) else source)
    folder, cache = Path(options.out), Path(options.cache) if options.cache else _cache()
    in_use = f"{folder} is in use by another evaluation; wait for its end, or choose another folder (--out)"
    with file_lock(made(folder) / ".lock", in_use) if ranks.first else nullcontext():
        with _telling(ranks.first) as tell:
            report = evaluate(sides, plan, Workspace(folder, ranks, tell, cache))
        if report is None:
            return
        save_report(report, folder / "report.json")
        page = write_page(report, folder)
    if options.as_json:
        print((folder / "report.json").read_text(encoding="utf-8"), end="")
        return
    console = Console()
    for part in tables(report):
        console.print(part)
    print(page)


# --- values of the options --------------------------------------------------------------------------------------------


def _metrics(options: EvaluateOptions) -> tuple[str, ...]:
    """The metrics of `--metrics`, or all for which there are weights and images."""
    if options.metrics is not None:
        return tuple(name.strip().lower() for name in options.metrics.split(",") if name.strip())
    about_images = IMAGE_METRICS if options.data else ()
    about_prompts = PROMPT_METRICS if options.data else PROMPT_METRICS[1:]
    return (*about_images, *(about_prompts if options.clip else ()), *(("memorisation",) if options.training else ()))


def _prompts(file: str | None) -> list[str] | None:
    return None if file is None else [prompt for prompt, _, _ in read_prompts(file)]


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """The settings of several KEY=VALUE, by our names."""
    pairs = [_setting(text) for text in texts]
    return renamed(pairs, "eval", every_row(), {name: f"--with {name}" for name, _ in pairs})


def _setting(text: str) -> tuple[str, Any]:
    """The name and value of KEY=VALUE, with the value in YAML."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise LdmError(f"--with {text!r}: write KEY=VALUE, such as steps=20")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise LdmError(f"--with {text!r}: the value cannot be read: {first_line(error)}") from None


def _sweeps(texts: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    found = [_sweep(text) for text in texts]
    if len(dict(found)) < len(found):
        raise LdmError(f"--sweep {' '.join(texts)!r}: each setting once, with all its values")
    return dict(found)


def _sweep(text: str) -> tuple[str, tuple[Value, ...]]:
    """The name and values of KEY=VALUE,VALUE,…, parsed by the setting; whole numbers stay whole."""
    name, _, values = text.partition("=")
    row = find(name, "eval", f"--sweep {name}")
    if name.replace("-", "_") in TRANSLATED:
        raise LdmError(f"--sweep {name}: its values mean something else here; give those of {row.name}")
    if row.name in ("size", "width", "height"):
        raise LdmError(f"--sweep {name}: all images of an evaluation have one size; use --with")
    try:
        found = tuple(_swept(row, value.strip()) for value in values.split(","))
    except LdmError:
        found = ()
    if len(set(found)) < len(found) or not found:
        raise LdmError(
            f"--sweep {text!r}: write KEY=VALUE,VALUE, such as guidance=1,3,5 or scheduler=euler,ddim, each value once"
        )
    return row.name, found


def _swept(row: Setting, text: str) -> Value:
    value = row.parse(text)
    if row.kind is ADAPTERS:  # a text stays one, for the report
        return text
    return int(value) if isinstance(value, float) and not set(text) & set(".eEn") else value


def is_model(source: str) -> bool:
    """Whether a source is a model; if not, it is images.

    Raises:
        LdmError: the source does not exist.
    """
    path = builtin(source) or Path(source)
    if path.is_dir():
        return (path / "model_index.json").exists()
    if path.suffix.lower() in IMAGES or "*" in source or "{" in source:
        return False
    if not path.exists() and not HUB_ID.fullmatch(source):
        raise LdmError(f"{source} does not exist; name a model (folder, file, Hub name) or images (folder, shards)")
    return True


def _model(source: str, settings: dict[str, Any], device: str, plan: EvaluationPlan) -> Model:
    """A model with its checked settings, as the functions that evaluation calls."""
    rows = at("eval", LOADING)
    loading = {name: row.check(settings[name]) for name, row in rows.items() if settings.get(name) is not None}
    making = checked({name: value for name, value in settings.items() if name not in rows}, "eval")
    pipeline = Pipeline(source, device=device, **{**loading, "dtype": dtype_named(loading.get("dtype"))})
    family = pipeline.model.family
    if family.refiner or family.unet.in_channels != family.autoencoder.latent_channels:
        raise LdmError(f"{source} is a model of {family.name}, which makes no images of prompts alone")
    swept = ({}, *({name: value} for name, values in plan.sweeps.items() for value in values))
    mixes = [pipeline.request("", **{**making, **changes}).mixes[0] for changes in swept]
    files = {share.name: share.sha256 for mix in mixes for share in mix}
    size = min(making.get("height", family.size), making.get("width", family.size))

    def make(prompts: list[str], seeds: list[int], changes: Mapping[str, Value]) -> list[Image.Image]:
        return pipeline(prompts, seed=seeds, batch=len(prompts), **{**making, **changes}).images

    def rebuilt(images: list[Image.Image]) -> list[Image.Image]:
        return reconstruct(pipeline.model, images)

    dtype = str(pipeline.model.dtype).removeprefix("torch.")
    refiner = {} if pipeline.refiner is None else {"refiner_digest": pipeline.refiner.fingerprint()}
    facts = {**settings, "dtype": dtype, **refiner, **({"adapter_sha256": files} if files else {})}
    return Model(source, pipeline.model.fingerprint(), size, make, rebuilt, facts)


# --- surroundings -----------------------------------------------------------------------------------------------------


def _cache() -> Path:
    """The folder of cached results on reference sets."""
    return cache_folder("evaluation")


def _ranks(device: str | None) -> tuple[Ranks, str]:
    """This process among those that a launcher started, and the device that it uses."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks(), device or default_device()
    from accelerate import PartialState

    state = PartialState(cpu=(device or default_device()) == "cpu")
    return Ranks(state.process_index, state.num_processes, state.wait_for_everyone), device or str(state.device)


@contextmanager
def _telling(wanted: bool) -> Iterator[Tell]:
    """A progress bar on stderr for each kind of work, if stderr is a terminal."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield tell
