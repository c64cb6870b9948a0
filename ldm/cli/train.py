"""`ldm train` and `train_ldm.py`: train the stages of a configuration, and show figures on stderr.

PyTorch is imported once the configuration and its paths are found right.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm.cli.importing import importing
from ldm.launch import rank
from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import describe, load

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.progress import TaskID

    from ldm.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)


def train_models(config: str | None, overrides: Sequence[str]) -> None:
    """Train the stages of a configuration."""
    first = rank() == 0
    logging.basicConfig(format="ldm: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("ldm").setLevel(logging.INFO if first else logging.WARNING)
    settings = load(config, overrides)
    check_bounds(settings)
    check_paths(settings)
    stages = ", ".join(f"{name} ({getattr(settings, name).steps} steps)" for name in settings.stages)
    log.info("%s: the configuration is right; training %s", settings.output, stages)
    with importing():
        from rich.console import Console

        from ldm.training.loop import Stopped  # PyTorch, only now that there is something to train
        from ldm.training.run import train
        from ldm.training.stages.table import kind_named

    display = Display(Console(stderr=True))
    try:
        with display.bar:
            train(settings, make_images, display.report)
    except Stopped as stopped:
        if first:
            print(f"ldm: {stopped}; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    if first:
        for stage in settings.stages:
            print(f"{settings.output}/{stage}/{kind_named(stage).result}")


class Display:
    """Shows the lines of the log: as a progress bar on a terminal, as lines elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        self.console = console
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, tuple[int, float]] = {}

    def report(self, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        """Show one line of the log."""
        text = "  ".join(f"{name.removeprefix('loss/')} {_short(name, value)}" for name, value in figures.items())
        line = f"{stage} {step}/{steps}  {text}"
        if all(name.startswith(("validation/", "evaluation/")) for name in figures):
            self.console.print(line, highlight=False, soft_wrap=True)
        elif self.console.is_terminal:
            if stage not in self.tasks:
                self.tasks[stage] = self.bar.add_task(stage, total=steps, figures="")
            self.bar.update(self.tasks[stage], completed=step, figures=text)
        else:
            first, start = self.began.setdefault(stage, (step, time.monotonic()))
            left = (time.monotonic() - start) / max(step - first, 1) * (steps - step) / 60
            ends = f"  {left:.0f} min left" if step > first else ""
            print(f"{line}{ends}", file=sys.stderr, flush=True)


def _short(name: str, value: float) -> str:
    return f"{100 * value:.0f} %" if name in ("waiting", "model_flops_use") else f"{value:.4g}"


def make_images(
    model: LatentDiffusion, prompts: list[str], size: tuple[int, int], seeds: Sequence[int], settings: Mapping[str, Any]
) -> list[Image.Image]:
    """An image of each prompt, all in one call; the settings are those of `Pipeline` and `Pipeline.request`."""
    from pipelines import Pipeline
    from pipelines.settings import LOADING

    loading = {row.name: settings[row.name] for row in LOADING if row.name in settings}
    own = {name: value for name, value in settings.items() if name not in loading}
    width, height = size
    pipeline = Pipeline(model, **loading)
    return pipeline(prompts, width=width, height=height, seed=seeds, **{"batch": len(prompts), **own}).images


def fields() -> str:
    """Every key of a configuration, with its default and its meaning."""
    rows = [f"  {f'{name}: {default}' if default else name:55} {text}" for name, default, text in describe()]
    return "\n".join(rows)
