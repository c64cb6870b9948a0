"""The weights that a stage trains, and their averages: updated, put in place, written and counted."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm.errors import LdmError
from ldm.training.ema import Averages
from ldm.training.evaluator import Best, Evaluator
from ldm.training.optimizers import STATE_BYTES
from ldm.training.parallel import sharded
from ldm.training.parallel.sharded import Skeleton, is_sharded
from ldm.training.stages.stage import Stage

AVERAGES = "averages"  # a folder within a checkpoint


class TrainedWeights:
    """Networks and optimisers of a stage's players, prepared for the launcher, and averages of the weights."""

    def __init__(self, accelerator: Accelerator, stage: Stage) -> None:
        """Prepare the players, and register everything else that a checkpoint must hold with the accelerator."""
        self.accelerator, self.stage, self.players = accelerator, stage, stage.players
        self.skeletons: dict[str, Skeleton] = {}  # by player, if weights are spread over the ranks
        if is_sharded(accelerator, stage):
            self.skeletons = {name: Skeleton(one.module, stage.model) for name, one in self.players.items()}
        for player in self.players.values():
            player.module, player.optimizer = accelerator.prepare(player.module, player.optimizer)
        self.averages = {
            name: Averages(accelerator.unwrap_model(player.module), stage.section.ema)
            for name, player in self.players.items()
            if player.averaged
        }
        if not self.skeletons:  # spread averages are written by `save_spread`
            for average in self.averages.values():
                accelerator.register_for_checkpointing(average)
        for module in stage.extra.values():
            accelerator.register_for_checkpointing(module)

    def update_averages(self, step: int) -> None:
        """Update the averages with the weights after update number `step` (from 1)."""
        for average in self.averages.values():
            average.update(step)

    def names(self) -> list[str]:
        """The names of the averages, which are the same for all players."""
        return next(iter(self.averages.values())).names

    def averaged(self, which: int = 0) -> ExitStack:
        """Put one of the averages in the place of the networks' weights."""
        stack = ExitStack()
        for name, average in self.averages.items():
            if name in self.skeletons:
                copied = self.skeletons[name].in_place(self.players[name], self.stage.model, average.named(which))
                stack.enter_context(copied)
            else:
                stack.enter_context(average.in_place(which))
        return stack

    def save_snapshots(self, folder: Path, step: int) -> None:
        """Write snapshots of the power-function averages, on the main process."""
        if self.accelerator.is_main_process:
            for name, average in self.averages.items():
                average.save_snapshots(folder / "averages" / name, step)

    # --- evaluated weights ------------------------------------------------------------------------------------------

    def files(self, evaluator: Evaluator, best: Best) -> dict[str, Path]:
        """The files of evaluated weights that were kept, by player."""
        folder = evaluator.folder(best.step, best.average)
        return {name: folder / f"{name}.safetensors" for name in self.averages}

    def keep(self, evaluator: Evaluator, best: Best, which: int) -> None:
        """Write the average that the evaluator found the best, on the main process."""
        if self.accelerator.is_main_process:
            for name, path in self.files(evaluator, best).items():
                self.averages[name].save(path, which)

    def best(self, evaluator: Evaluator, best: Best) -> ExitStack:
        """Put the best weights in place in the networks.

        Raises:
            LdmError: a file of them is missing or damaged.
        """
        stack = ExitStack()
        try:
            for name, path in self.files(evaluator, best).items():
                stack.enter_context(self.averages[name].read_in_place(path))
        except LdmError as error:
            raise LdmError(f"the best weights so far: {error}, or set {evaluator.place}.choose=null") from None
        return stack

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save_spread(self, folder: Path) -> None:
        """Write the averages into a checkpoint's folder, if they are spread over the ranks."""
        if self.skeletons:
            sharded.save({name: one.named() for name, one in self.averages.items()}, folder / AVERAGES)

    def load_spread(self, folder: Path) -> None:
        """Read the averages that `save_spread` wrote."""
        if self.skeletons:
            sharded.load({name: one.named() for name, one in self.averages.items()}, folder / AVERAGES)

    def nbytes(self) -> int:
        """The approximate size of a checkpoint: weights, their averages, and the optimisers' state."""
        weights = [weight for player in self.players.values() for weight in player.module.parameters()]
        learned = sum(weight.numel() for weight in weights if weight.requires_grad)
        state = learned * STATE_BYTES[self.stage.section.optimizer.name]
        averages = sum(tensor.nbytes for one in self.averages.values() for row in one.averages for tensor in row)
        return sum(weight.nbytes for weight in weights) + state + averages

    def kind(self) -> dict[str, Any]:
        """Facts that must be the same for a checkpoint to fit, the settings among them by their keys."""
        section = self.stage.section
        settings = section.model_dump(mode="json", include=set(section.fixed))
        shapes = [
            (player, name, tuple(parameter.shape))
            for player, one in self.players.items()
            for name, parameter in self.accelerator.unwrap_model(one.module).named_parameters()
            if parameter.requires_grad
        ]
        return {
            **{f"{self.stage.name}.{key}": settings[key] for key in section.fixed},
            **self.stage.fixed,
            "network": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
            "optimizer": section.optimizer.name,
            "ema": [bool(section.ema.decay), *section.ema.widths],
            "precision with a loss scale": self.accelerator.scaler is not None,
            "layout of weights (DDP or FSDP2)": bool(self.skeletons),
        }
