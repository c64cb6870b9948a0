"""`ldm eval`: evaluates one or two models or folders of images; writes a table, a JSON file and a page."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ldm.caches import cache_folder
from ldm.cli.evaluate_options import EvaluateOptions, checked_settings, is_model, settings_of, sweeps_of
from ldm.cli.generate import read_prompts
from ldm.data.image_set import made
from ldm.errors import LdmError
from ldm.evaluation.evaluation import evaluate
from ldm.evaluation.pages.page import write_page
from ldm.evaluation.pages.tables import tables
from ldm.evaluation.plan import EvaluationPlan, Model, check_plan
from ldm.evaluation.report import Value, save_report
from ldm.evaluation.workspace import Ranks, Workspace, file_lock
from ldm.files import Progress as Tell
from ldm.files import silent
from ldm.launch import processes
from pipelines import Pipeline
from pipelines.run import reconstruct
from pipelines.tuning import default_device, typed

IMAGE_METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")
PROMPT_METRICS = ("cmmd", "clip-score", "r-precision")


def evaluate_sources(options: EvaluateOptions) -> None:
    """Evaluate, print the tables, and print where the report is."""
    logging.basicConfig(format="ldm: %(message)s", level=logging.WARNING, stream=sys.stderr)
    ranks, device = _ranks(options.device)
    plan = EvaluationPlan(
        metrics=_metrics(options), data=options.data, n=options.n, prompts=_prompts(options.prompts),
        training=options.training, features=options.features, clip=options.clip, copies=options.copies,
        lpips=options.lpips, sweeps=sweeps_of(options.sweeps), seed=options.seed, batch=options.batch,
        device=device,
    )  # fmt: skip
    given = {side: settings_of(texts) for side, texts in options.settings.items()}
    check_plan([is_model(source) for source in options.sources], plan)
    sides: list[Model | str] = []
    for source, name in zip(options.sources, "AB", strict=False):
        own = given.get("both", {}) | given.get(name, {})
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


def _model(source: str, settings: dict[str, Any], device: str, plan: EvaluationPlan) -> Model:
    """A model with its checked settings, as the functions that evaluation calls."""
    loading, making = checked_settings(settings)
    pipeline = Pipeline(source, device=device, **typed(loading))
    family = pipeline.model.family
    if family.refiner or family.unet.in_channels != family.autoencoder.latent_channels:
        raise LdmError(f"{source} is a model of {family.name}, which makes no images of prompts alone")

    def adapters(prompts: Sequence[str], changes: Mapping[str, Value]) -> list[tuple[str, str]]:
        mixes = pipeline.request(list(prompts), **{**making, **changes}).mixes
        return sorted({(share.name, share.sha256) for mix in mixes for share in mix})

    swept = ({}, *({name: value} for name, values in plan.sweeps.items() for value in values))
    files = dict(pair for changes in swept for pair in adapters([""], changes))
    learned = {one.names[0]: one.digest for one in pipeline.embeddings}
    size = min(making.get("height", family.size), making.get("width", family.size))

    def make(prompts: list[str], seeds: list[int], changes: Mapping[str, Value]) -> list[Image.Image]:
        return pipeline(prompts, seed=seeds, batch=len(prompts), **{**making, **changes}).images

    def rebuilt(images: list[Image.Image]) -> list[Image.Image]:
        return reconstruct(pipeline.model, images)

    dtype = str(pipeline.model.dtype).removeprefix("torch.")
    refiner = {} if pipeline.refiner is None else {"refiner_digest": pipeline.refiner.fingerprint()}
    digests = {"adapter_sha256": files, "embedding_sha256": learned}
    facts = {**settings, "dtype": dtype, **refiner, **{name: found for name, found in digests.items() if found}}
    return Model(source, pipeline.model.fingerprint(), size, make, rebuilt, facts, adapters)


# --- surroundings -----------------------------------------------------------------------------------------------------


def _cache() -> Path:
    """The folder of cached results on reference sets."""
    return cache_folder("evaluation")


def _ranks(device: str | None) -> tuple[Ranks, str]:
    """This process among those that a launcher started, and the device that it uses."""
    if processes() == 1:
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
