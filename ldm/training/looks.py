"""Validation, previews and evaluation while a stage trains, with the averages of its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from accelerate import Accelerator

from ldm.data.loader import Batch
from ldm.errors import LdmError, out_of_memory
from ldm.images import save_png
from ldm.sheets import grid
from ldm.training.evaluator import Best, Evaluator
from ldm.training.layout import PREVIEWS, step_name
from ldm.training.log import StageLog
from ldm.training.stages.stage import Stage
from ldm.training.weights import TrainedWeights

log = logging.getLogger(__name__)


class Looks:
    """Runs the validation, previews and evaluation that are due, and remembers the best weights found."""

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage,
        weights: TrainedWeights,
        stage_log: StageLog,
        folder: Path,
        held_out: Callable[[], Iterable[Batch]],
        evaluator: Evaluator | None,
    ) -> None:
        """Args:
        accelerator: of the stage.
        stage: the stage in training.
        weights: its weights and their averages.
        stage_log: the log for the figures.
        folder: of the stage; previews go into it.
        held_out: this rank's validation batches.
        evaluator: evaluates the images that the stage's model makes, if evaluation is asked for.
        """
        self.accelerator, self.stage, self.weights, self.log = accelerator, stage, weights, stage_log
        self.folder, self.held_out, self.evaluator = folder / PREVIEWS, held_out, evaluator
        self.every = {"validate": stage.section.validate_every, "preview": stage.section.preview_every}
        if evaluator:
            self.every["evaluate"] = evaluator.section.every
        self.owed: list[str] = []  # names of those that are still to be run after the last step
        self.best: Best | None = None  # best of the evaluated weights, if the result is chosen from them

    def take_next(self, step: int, batch: Batch | None, pieces: int) -> None:
        """Run the first of those that are due; it stays due until it is finished.

        Args:
            step: updates done.
            batch: the last step's batch, if it is known: for previews where no images are held out.
            pieces: number of pieces into which batches are cut, so that they fit into memory.
        """
        match self.owed[0]:
            case "validate":
                self.validate(step, pieces)
            case "preview":
                self.preview(step, batch)
            case "evaluate" if self.evaluator:  # the configuration may no longer ask for what a checkpoint owes
                self.evaluate(step, self.evaluator)
        self.owed = self.owed[1:]

    def validate(self, step: int, pieces: int) -> None:
        """Log figures over the held-out images."""
        batches = (part for batch in self.held_out() for part in batch.parts(pieces))
        with self.weights.averaged():
            figures = self.stage.validate(batches)
        if figures:
            self.log.write(step, {f"validation/{name}": value for name, value in figures.items()})
        self.log.restart_clock()

    def preview(self, step: int, batch: Batch | None) -> None:
        """Write preview images, on the main process: always of the same held-out samples, or else of this batch."""
        with self.weights.averaged():
            if self.accelerator.is_main_process and (shown := next(iter(self.held_out()), batch)):
                try:
                    images = self.stage.preview(shown, step)
                    if images:
                        self.folder.mkdir(exist_ok=True)
                        save_png(grid(images), self.folder / f"{step_name(step)}.png")
                except (LdmError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    log.warning("no preview of step %d: out of memory", step)
        self.accelerator.wait_for_everyone()
        self.log.restart_clock()

    def evaluate(self, step: int, evaluator: Evaluator) -> None:
        """Log figures of the images that each average makes, and keep the best weights if the result is chosen."""
        names = self.weights.names()
        line: dict[str, float] = {}
        for which, name in enumerate(names):
            with self.weights.averaged(which):
                figures = evaluator.figures(step, name)
            prefix = f"evaluation/{name}" if len(names) > 1 else "evaluation"
            line |= {f"{prefix}/{metric}": value for metric, value in figures.items()}
            best = evaluator.best(step, name, figures, self.best)
            if best and best is not self.best:
                self.weights.keep(evaluator, best, which)
            self.best = best
        self.log.write(step, line)
        self.accelerator.wait_for_everyone()  # until the best weights are written
        self.log.restart_clock()
