"""The training loop: batches -> losses -> gradients -> an update of the weights and of their averages.

Everything that is random in a step is a function of the seed and of the samples' keys. So a run that is stopped and
started again, or laid out over another number of processes, is the same run.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from ldm.data.loader import Batch
from ldm.errors import LdmError, listing, out_of_memory
from ldm.training.evaluator import Best, Evaluator
from ldm.training.log import Report, StageLog, StepCost
from ldm.training.looks import Looks
from ldm.training.optimizers import learning_rate, set_learning_rate
from ldm.training.parallel.spread import whole
from ldm.training.resuming import Checkpoints
from ldm.training.signals import Signals
from ldm.training.stages.stage import Player, Stage
from ldm.training.weights import TrainedWeights

log = logging.getLogger(__name__)
NotFinite = list[tuple[list[str], Tensor]]  # of each micro-batch: keys, and a mask (B,) of losses that are not finite


class Stopped(Exception):  # noqa: N818  (no error)
    """A signal asked the run to stop, and its checkpoint is written."""

    def __init__(self, stage: str, step: int, signal: int) -> None:
        super().__init__(f"stage {stage} stopped after {step} updates, and saved them")
        self.signal = signal


class Training:
    """One stage of a run: the loop over its steps."""

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage,
        folder: Path,
        batches: Callable[[int], Iterator[list[Batch]]],
        held_out: Callable[[], Iterable[Batch]],
        report: Report,
        work: Callable[[int], StepCost | None] = lambda step: None,
        evaluator: Evaluator | None = None,
    ) -> None:
        """Args:
        accelerator: launches and shards; everything that checkpoints hold is registered with it here.
        stage: its players' networks and optimisers are prepared here.
        folder: of the stage's checkpoints, log and previews.
        batches: gives the micro-batches of each step, from a step on.
        held_out: this rank's validation batches.
        report: is called with every line of the log, on the main process.
        work: gives the cost of an image at a step, for the log.
        evaluator: evaluates the images that the stage's model makes, if evaluation is asked for.
        """
        self.accelerator = accelerator
        self.stage = stage
        self.folder = folder
        self.batches = batches
        self.held_out = held_out
        self.work = work
        self.evaluator = evaluator
        self.section = stage.section
        self.step = 0  # updates done
        self.weights = TrainedWeights(accelerator, stage)
        self.log = StageLog(accelerator, stage, folder, report, work)
        self.looks = Looks(accelerator, stage, self.weights, self.log, folder, held_out, evaluator)
        self.checkpoints = Checkpoints(accelerator, stage, self.weights, self.log, self.looks, folder)
        self.signals = Signals()
        self.pieces = 1  # number of pieces into which micro-batches are cut, so that they fit into memory
        self.committed = False  # whether the step can no longer be begun again

    def run(self) -> dict[str, Any]:
        """Train from the newest checkpoint, if there is one, to the last step, and return the result's record.

        Raises:
            LdmError: a loss is not finite, or the disk is full or too small. The last checkpoint is whole.
            Stopped: a signal asked for it; a checkpoint was written.
        """
        section, looks = self.section, self.looks
        self.step = self.checkpoints.restore()
        if self.step < section.steps:
            self.checkpoints.check_room()
        if self.evaluator and (looks.owed or self.step < section.steps):
            self.evaluator.prepare()
        with self.signals.heeded():
            self.look(None)
            batches = self.batches(self.step)
            while self.step < section.steps:
                with self.log.waiting():
                    micro_batches = next(batches)
                self.train_step(micro_batches)
                self.step += 1
                if self.due(section.log_every):
                    rate = learning_rate(section.optimizer, self.step, section.steps)
                    self.log.write_means(self.step, rate * section.optimizer.learning_rate)
                if self.due(section.ema.every):
                    self.weights.save_snapshots(self.folder, self.step)
                looks.owed = [look for look, every in looks.every.items() if self.due(every)]
                if self.due(section.save_every) or "evaluate" in looks.owed:
                    self.checkpoints.save(self.step)
                self.look(micro_batches[0])
        with self.result():
            return self.stage.finish(self.held_out())

    def due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last one."""
        return self.step % every == 0 or self.step == self.section.steps

    def look(self, batch: Batch | None) -> None:
        """Run the validation, previews and evaluation that are due; `batch` is the step's, if it is known.

        They come after the checkpoint, which lists them, so that a signal can stop the run meanwhile.
        """
        while self.looks.owed:
            self.leave()
            with self.signals.leaving_with(self.leave):
                self.looks.take_next(self.step, batch, self.pieces)

    def leave(self) -> None:
        """Stop if a signal asked for it and the last step is saved.

        Raises:
            Stopped: see `run`.
        """
        if self.signals.asked and self.checkpoints.saved == self.step:
            raise Stopped(self.stage.name, self.step, self.signals.asked)

    @property
    def best(self) -> Best | None:
        """The best of the evaluated weights, if the result is chosen from them."""
        return self.looks.best

    def result(self) -> ExitStack:
        """Put the weights of the result in place: the best ones that evaluation found, or else the averages.

        Raises:
            LdmError: the file of the best weights is missing or damaged.
        """
        if self.evaluator and self.best:
            return self.weights.best(self.evaluator, self.best)
        return self.weights.averaged()

    # --- a step -----------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch]) -> None:
        """Gradients of all micro-batches, then one update of every player.

        Where memory does not suffice, micro-batches are cut in half from then on: the same update, in smaller parts.

        Raises:
            LdmError: a loss or gradient is not finite, and nothing has been updated; or memory does not suffice.
            Stopped: see `run`.
        """
        while True:
            try:
                self.update([part for batch in micro_batches for part in batch.parts(self.pieces)])
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            else:
                break
            self.cut_smaller(micro_batches[0])  # outside of the handler, which keeps the tensors that did not fit alive
        self.log.add_images(sum(len(batch.keys) for batch in micro_batches) * self.accelerator.num_processes)

    def update(self, micro_batches: Sequence[Batch]) -> None:
        """One step: gradients are computed and clipped, then weights and their averages are updated."""
        step, players = self.step + 1, self.stage.players
        rate = learning_rate(self.section.optimizer, step, self.section.steps)
        figures, not_finite = self.gradients(micro_batches)
        for name, player in players.items():
            set_learning_rate(player.optimizer, rate)
            figures[f"gradient/{name}"] = self.clip(player)
        means = self.agree(figures, not_finite)
        for player in players.values():
            player.optimizer.step()
            player.optimizer.zero_grad(set_to_none=True)
        self.weights.update_averages(step)
        self.log.add({**means, **self.stage.updated(step)})

    def gradients(self, micro_batches: Sequence[Batch]) -> tuple[dict[str, Tensor], NotFinite]:
        """Run the backward passes of a step's micro-batches; the mean figures, () each, and the bad samples."""
        images = sum(len(batch.keys) for batch in micro_batches)
        self.committed = bool(self.weights.skeletons)  # sharded ranks exchange weights in the forward pass already
        figures: dict[str, Tensor] = {}
        not_finite: NotFinite = []
        for index, batch in enumerate(micro_batches):
            last, share = index == len(micro_batches) - 1, images / len(batch.keys)  # 1 / its part of the step's images
            with ExitStack() as stack:
                if not last:  # ranks exchange gradients with the last micro-batch alone
                    for player in self.stage.players.values():
                        stack.enter_context(self.accelerator.no_sync(player.module))
                for loss in self.stage.losses(batch, self.step):
                    self.committed |= last and self.accelerator.num_processes > 1
                    self.accelerator.backward(loss.values.mean() / share)
                    values = loss.values.detach()
                    not_finite.append((batch.keys, ~torch.isfinite(values).expand(len(batch.keys))))
                    for name, part in {f"loss/{loss.player}": values.mean(), **loss.report}.items():
                        figures[name] = figures.get(name, 0) + part.float() / share
        self.committed = True
        return figures, not_finite

    def clip(self, player: Player) -> Tensor:
        """Clip a player's gradient to its largest norm, and return the norm before, ()."""
        limit = player.clip or float("inf")
        norm = self.accelerator.clip_grad_norm_(player.module.parameters(), limit)
        return whole(torch.as_tensor(norm, device=self.accelerator.device)).detach().float()

    def agree(self, figures: dict[str, Tensor], not_finite: NotFinite) -> dict[str, float]:
        """The means of a step's figures over all ranks, in one exchange that also shares bad numbers and signals.

        Raises:
            LdmError: a number is not finite, on whatever rank.
            Stopped: some rank was asked to stop.
        """
        wrong = torch.stack([rows.any() for _, rows in not_finite]).any().float()
        stop = torch.full_like(wrong, 1.0 if self.signals.asked else 0.0)
        any_wrong, any_stop, *means = self.accelerator.reduce(
            torch.stack([wrong, stop, *figures.values()]), "mean"
        ).tolist()
        result = dict(zip(figures, means, strict=True))
        overflows = self.accelerator.scaler is not None  # in fp16 some gradients overflow, and that update is skipped
        lost = [n for n, value in result.items() if n.startswith("gradient/") and not math.isfinite(value)]
        if any_wrong or (lost and not overflows):
            raise LdmError(self.lost("the loss" if any_wrong else f"the {lost[0]}", not_finite))
        if any_stop:
            for player in self.stage.players.values():
                player.optimizer.zero_grad(set_to_none=True)
            if self.checkpoints.saved != self.step:
                self.checkpoints.save(self.step)
            raise Stopped(self.stage.name, self.step, self.signals.asked or signal.SIGTERM)
        return result

    def lost(self, what: str, not_finite: NotFinite) -> str:
        """The message about a number that is not finite, with the samples of its batch."""
        found = {key for keys, rows in not_finite for key, row in zip(keys, rows.tolist(), strict=True) if row}
        found = found or {key for keys, _ in not_finite for key in keys}  # a gradient is bad, or a loss on another rank
        return (
            f"{what} of step {self.step + 1} is not finite (samples here: {listing(sorted(found), 8)}); nothing was "
            f"updated, the last checkpoint is {self.checkpoints.newest()}. A lower learning rate, bf16 in place of "
            "fp16, or leaving these images out may help"
        )

    def cut_smaller(self, batch: Batch) -> None:
        """Give up the step so far, and halve the number of images computed at a time.

        Raises:
            LdmError: there is nothing to halve, or other ranks have some of the gradients already.
        """
        at_a_time = -(-len(batch.keys) // self.pieces)
        if at_a_time == 1 or self.committed or not self.stage.divisible:
            raise LdmError(_too_large(self.stage, batch, at_a_time))
        for player in self.stage.players.values():
            player.optimizer.zero_grad(set_to_none=True)
        self.stage.forget()
        clear_device_cache(garbage_collection=True)
        self.pieces *= 2
        log.warning(
            "out of memory with %d images at a time on process %d; from now on it takes %d, and the same updates",
            at_a_time, self.accelerator.process_index, -(-len(batch.keys) // self.pieces),
        )  # fmt: skip


def _too_large(stage: Stage, batch: Batch, at_a_time: int) -> str:
    height, width = batch.size[0, 4:6].int().tolist()
    fewer = f"{stage.name}.micro_batch={at_a_time // 2}, " if at_a_time > 1 else ""
    if not stage.divisible:
        fewer = f"a smaller {stage.name}.batch, "
    return (
        f"out of memory with {at_a_time} images of {width}×{height} at a time; set {fewer}"
        f"{stage.name}.checkpointing=true, or a smaller size"
    )
