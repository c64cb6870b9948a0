"""Saving the state of a stage in a checkpoint, and restoring it from the newest one."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm.errors import LdmError
from ldm.training import checkpoint
from ldm.training.evaluator import Best, Evaluator
from ldm.training.layout import CHECKPOINTS
from ldm.training.log import StageLog
from ldm.training.looks import Looks
from ldm.training.optimizers import lay_out_state
from ldm.training.stages.stage import Stage
from ldm.training.weights import TrainedWeights

log = logging.getLogger(__name__)
OPTIONS = ("highest", "weight_decay", "betas", "eps")  # of an optimiser, which may change when a run resumes


class Checkpoints:
    """The checkpoints of a stage."""

    def __init__(
        self, accelerator: Accelerator, stage: Stage, weights: TrainedWeights, stage_log: StageLog, looks: Looks,
        folder: Path,
    ) -> None:  # fmt: skip
        """Args:
        accelerator: saves the networks and optimisers.
        stage: the stage in training.
        weights: its weights and their averages.
        stage_log: its log, whose sums and length belong to a checkpoint.
        looks: its validation, previews and evaluation that are due, and the best weights so far.
        folder: of the stage.
        """
        self.accelerator, self.stage, self.weights, self.log, self.looks = (
            accelerator, stage, weights, stage_log, looks,
        )  # fmt: skip
        self.folder, self.keep = folder / CHECKPOINTS, stage.section.keep
        self.saved = -1  # the step of the newest checkpoint

    def check_room(self) -> None:
        """Raise, on the main process, where the disk has no room for the checkpoints."""
        if self.accelerator.is_main_process:
            checkpoint.check_room(self.folder, self.weights.nbytes(), self.keep)

    def newest(self) -> str:
        """The name of the newest checkpoint, for messages."""
        saved = checkpoint.checkpoints(self.folder)
        return saved[-1].name if saved else "none yet"

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` updates."""
        best = self.looks.best
        state = {
            "sums": self.log.sums, "kind": self.weights.kind(), "best": asdict(best) if best else None,
            "looks": self.looks.owed, "log": self.log.size(),
        }  # fmt: skip
        checkpoint.save(self.accelerator, self.folder, step, state, self.keep, self.weights.save_spread)
        if self.looks.evaluator and self.accelerator.is_main_process:
            self._remove_surpassed(self.looks.evaluator)
        self.saved = step
        self.log.restart_clock()

    def _remove_surpassed(self, evaluator: Evaluator) -> None:
        """Remove the evaluated weights that no checkpoint names as the best."""
        bests = [Best(**state["best"]) for state in checkpoint.states(self.folder) if state.get("best")]
        wanted = {path for best in bests for path in self.weights.files(evaluator, best).values()}
        for path in evaluator.kept() - wanted:
            path.unlink(missing_ok=True)

    def restore(self) -> int:
        """Restore the newest whole checkpoint, cut the log back to it, and return its number of updates.

        Raises:
            LdmError: the configuration describes other networks, averages or another optimiser.
        """
        found = checkpoint.newest(self.folder)
        if found is None:
            self.log.cut(0)
            return 0
        path, manifest = found
        state: dict[str, Any] = manifest["state"]
        kind, before = self.weights.kind(), state["kind"]
        if differ := [name for name in kind if kind[name] != before.get(name, kind[name])]:
            settings = [f"{name} is {kind[name]}, not {before[name]}" for name in differ if "." in name]
            what = "; ".join(settings[:3] or [f"another {name}" for name in differ])
            raise LdmError(
                f"{path} does not fit the configuration: {what}; set back what was changed since the run began, or "
                "choose another output"
            )
        self._load(path)
        self.saved = int(path.name.removeprefix("step-"))
        self.log.sums, self.looks.owed = state["sums"], state["looks"]
        if self.looks.evaluator and state.get("best"):
            self.looks.best = self.looks.evaluator.resumed(Best(**state["best"]))
            if self.looks.best:  # a damaged file of these weights is an error now, not at the end
                self.weights.best(self.looks.evaluator, self.looks.best).close()
        log.info("going on from %s", path)
        self.log.cut(state["log"])
        return self.saved

    def _load(self, path: Path) -> None:
        """Load networks, optimisers and averages; the optimisers' options stay those of the configuration."""
        optimizers = [player.optimizer for player in self.stage.players.values()]
        wanted = [
            [{name: value for name, value in group.items() if name in OPTIONS} for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        self.accelerator.load_state(str(path))
        self.weights.load_spread(path)
        for optimizer, groups in zip(optimizers, wanted, strict=True):
            lay_out_state(optimizer)
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                group.update(options)
