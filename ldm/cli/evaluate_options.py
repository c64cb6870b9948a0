"""The options of `ldm eval`, and what can be said of them before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ldm.cli.generate import read_prompts
from ldm.data.places import check_place
from ldm.errors import LdmError, first_line
from ldm.evaluation.checks import check_numbers, check_published
from ldm.weights.builtin import builtin
from ldm.weights.names import HUB_ID
from pipelines.axes import values_of
from pipelines.settings import ADAPTERS, LOADING, Setting, at, every_row, find, parted, renamed
from pipelines.translation import TRANSLATED

if TYPE_CHECKING:
    from ldm.evaluation.report import Value

IMAGE_METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")
PROMPT_METRICS = ("cmmd", "clip-score", "r-precision")
IMAGES = (".tar", ".tgz", ".gz", ".parquet")  # endings of shards of images


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


def metrics_of(options: EvaluateOptions) -> tuple[str, ...]:
    """The metrics of `--metrics`, or all for which there are weights and images."""
    if options.metrics is not None:
        return tuple(name.strip().lower() for name in options.metrics.split(",") if name.strip())
    about_images = IMAGE_METRICS if options.data else ()
    about_prompts = PROMPT_METRICS if options.data else PROMPT_METRICS[1:]
    return (*about_images, *(about_prompts if options.clip else ()), *(("memorisation",) if options.training else ()))


def settings_of_sources(options: EvaluateOptions) -> list[dict[str, Any]]:
    """The settings of each source: those of both, and its own.

    Raises:
        LdmError: one is not written as KEY=VALUE or not known, or is of a source that is not there.
    """
    given = {side: settings_of(texts) for side, texts in options.settings.items()}
    if given.get("B") and len(options.sources) < 2:
        raise LdmError("--with-b is for a second model, and only one is given")
    return [given.get("both", {}) | given.get(name, {}) for _, name in zip(options.sources, "AB", strict=False)]


def settings_of(texts: Sequence[str]) -> dict[str, Any]:
    """The settings of several KEY=VALUE, by our names."""
    pairs = [setting_of(text) for text in texts]
    return renamed(pairs, "eval", every_row(), {name: f"--with {name}" for name, _ in pairs})


def setting_of(text: str) -> tuple[str, Any]:
    """The name and value of KEY=VALUE, with the value in YAML."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise LdmError(f"--with {text!r}: write KEY=VALUE, such as steps=20")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise LdmError(f"--with {text!r}: the value cannot be read: {first_line(error)}") from None


def sweeps_of(texts: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    found = [sweep_of(text) for text in texts]
    if len(dict(found)) < len(found):
        raise LdmError(f"--sweep {' '.join(texts)!r}: each setting once, with all its values")
    return dict(found)


def sweep_of(text: str) -> tuple[str, tuple[Value, ...]]:
    """The name and values of KEY=VALUE,VALUE,…, parsed by the setting; whole numbers stay whole."""
    name, _, values = text.partition("=")
    row = find(name, "eval", f"--sweep {name}")
    if name.replace("-", "_") in TRANSLATED:
        raise LdmError(f"--sweep {name}: its values mean something else here; give those of {row.name}")
    if row.name in ("size", "width", "height"):
        raise LdmError(f"--sweep {name}: all images of an evaluation have one size; use --with")
    try:
        found = tuple(_swept(row, value) for value in values_of(values))
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


def checked_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of loading a model, and those of making images with it, each within its bounds.

    Raises:
        LdmError: one of them is not.
    """
    loading, call = parted(settings, "eval")
    return {name: row.check(loading[name]) for name, row in at("eval", LOADING).items() if name in loading}, call


def check_options(options: EvaluateOptions) -> None:
    """Check paths, prompts, settings, sweeps and numbers, and whether published weights are there.

    Raises:
        LdmError: one of them is wrong.
    """
    for source in options.sources:
        is_model(source)
    for source, own in zip(options.sources, settings_of_sources(options), strict=False):
        if own and not is_model(source):
            raise LdmError(
                f"{source} is a folder of images, which are not made here; leave out --with {next(iter(own))}"
            )
        checked_settings(own)
    for name, place in (("data", options.data), ("training", options.training)):
        if place is not None:
            try:
                check_place(place, stream=False)
            except LdmError as error:
                raise LdmError(f"--{name}: {error}") from None
    if options.prompts is not None:
        list(read_prompts(options.prompts))
    sweeps_of(options.sweeps)
    check_numbers(len(options.sources), options.n, options.batch, options.seed)
    possible = [name for name in metrics_of(options) if options.data or name == "is"]  # others compare with images
    check_published(possible, options.features, options.copies)
