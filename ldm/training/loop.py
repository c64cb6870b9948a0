"""The training loop: batches -> losses -> gradients -> an update of the weights and of their averages.

Everything that is random in a step is a function of the seed and of the samples' keys. So a run that is stopped and
started again, or laid out over another number of processes, is the same run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from PIL import Image
from torch import Tensor

from ldm.data.loader import Batch
from ldm.errors import LdmError, listing, out_of_memory
from ldm.images import grid, save_png
from ldm.training import checkpoint
from ldm.training.ema import Averages
from ldm.training.evaluator import Best, Evaluator
from ldm.training.optimizers import STATE_BYTES, lay_out_state, learning_rate, set_learning_rate
from ldm.training.parallel import sharded
from ldm.training.parallel.sharded import Skeleton, is_sharded, whole
from ldm.training.stages.stage import Stage

log = logging.getLogger(__name__)
Report = Callable[[str, int, int, dict[str, float]], None]  # stage, step, steps, figures
OPTIONS = ("highest", "weight_decay", "betas", "eps")  # of an optimiser, which may change when a run goes on
AVERAGES = "averages"  # a folder of a checkpoint
AT_ONCE = 1.0  # seconds within which signals are one: a terminal and a launcher both send it


class Stopped(Exception):  # noqa: N818  (no error)
    """The run was asked to stop, and has saved where it is."""

    def __init__(self, stage: str, step: int, signal: int) -> None:
        super().__init__(f"stage {stage} stopped after {step} updates, and saved them")
        self.signal = signal


@dataclass(frozen=True)
class StepCost:
    """What training costs."""

    tflop: float  # of an image, forward and backward
    peak: float | None  # TFLOP/s of a device at the most, where that is known


@dataclass
class Throughput:
    """Where the time goes, since the last line of the log."""

    since: float = field(default_factory=time.monotonic)
    waiting: float = 0.0  # seconds for data
    images: int = 0

    def figures(self) -> dict[str, float]:
        """Images a second over all ranks, and the part of the time spent waiting for data."""
        seconds = time.monotonic() - self.since
        return {"images_per_s": self.images / seconds, "waiting": self.waiting / seconds}


class Training:
    """One stage's run: the state, and the verbs."""

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage,
        folder: Path,
        steps_per_batch: Callable[[int], Iterator[list[Batch]]],
        held_out: Callable[[], Iterable[Batch]],
        report: Report,
        work: Callable[[int], StepCost | None] = lambda step: None,
        evaluator: Evaluator | None = None,
    ) -> None:
        """Args:
        accelerator: launches and shards; what must be saved is registered with it here.
        stage: its players' networks and optimisers are prepared here.
        folder: of the stage's checkpoints, log and previews.
        steps_per_batch: from a step on, the micro-batches of each step.
        held_out: the batches to validate on, those of this rank.
        report: takes every line of the log, on the main process.
        work: what an image costs at a step, for the log.
        evaluator: of the images that the stage's model makes, if it is to be evaluated.
        """
        self.accelerator = accelerator
        self.stage = stage
        self.folder = folder
        self.batches = steps_per_batch
        self.held_out = held_out
        self.report = report
        self.work = work
        self.evaluator = evaluator
        self.best: Best | None = None  # of the weights that were evaluated, if they are chosen from
        self.section = stage.section
        self.step = 0  # updates done
        self.skeletons: dict[str, Skeleton] = {}  # where weights are spread over the ranks
        if is_sharded(accelerator, stage):
            self.skeletons = {name: Skeleton(one.module, stage.model) for name, one in stage.players.items()}
        for player in stage.players.values():
            player.module, player.optimizer = accelerator.prepare(player.module, player.optimizer)
        self.averages = {
            name: Averages(accelerator.unwrap_model(player.module), self.section.ema)
            for name, player in stage.players.items()
            if player.averaged
        }
        for kept in (*(() if self.skeletons else self.averages.values()), *stage.extra.values()):
            accelerator.register_for_checkpointing(kept)
        self.sums: dict[str, list[float]] = {}  # of the figures since the last line of the log, and how many there were
        self.clock = Throughput()
        self.pieces = 1  # into which micro-batches are cut, since memory did not suffice for more
        self.committed = False  # whether the step can no longer be begun again
        self.every = {"validate": self.section.validate_every, "preview": self.section.preview_every}
        if evaluator:
            self.every["evaluate"] = evaluator.section.every
        self.looks: list[str] = []  # of them, those that this step still owes
        self.looking = False
        self.saved = -1  # the step of the newest checkpoint
        self.asked = 0  # the signal that asked for the end
        self.asked_at = 0.0  # when it came

    def run(self) -> dict[str, Any]:
        """From the newest checkpoint, if there is one, to the last step; the result's record.

        Raises:
            LdmError: a loss is not finite, or the disk is full or too small. The last checkpoint is whole.
            Stopped: a signal asked for it; a checkpoint was written.
        """
        self.restore()
        if self.accelerator.is_main_process and self.step < self.section.steps:
            checkpoint.check_room(self.folder / "checkpoints", self.nbytes(), self.section.keep)
        section = self.section
        if self.evaluator and (self.looks or self.step < section.steps):
            self.evaluator.prepare()
        with self.signals():
            self.look(None)
            batches = self.batches(self.step)
            while self.step < section.steps:
                started = time.monotonic()
                micro_batches = next(batches)
                self.clock.waiting += time.monotonic() - started
                self.train_step(micro_batches)
                self.step += 1
                if self.due(section.log_every):
                    self.write_log()
                if self.due(section.ema.every):
                    self.save_snapshots()
                self.looks = [look for look, every in self.every.items() if self.due(every)]
                if self.due(section.save_every) or "evaluate" in self.looks:
                    self.save()
                self.look(micro_batches[0])
        with self.result():
            return self.stage.finish(self.held_out())

    # --- a step -----------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch]) -> None:
        """Gradients of all micro-batches, then one update of every player.

        Where memory does not suffice, they are cut in half from then on: the same update, in smaller parts.

        Raises:
            LdmError: a loss or gradient is not finite, so that nothing has been updated; or memory does not suffice.
            Stopped: see `run`.
        """
        while not self._fits(micro_batches):
            self.cut_smaller(micro_batches[0])
        self.clock.images += sum(len(batch.keys) for batch in micro_batches) * self.accelerator.num_processes

    def _fits(self, micro_batches: Sequence[Batch]) -> bool:
        """Do the step, unless memory does not suffice; what did not fit is gone with the error when this returns."""
        try:
            self._train_step([part for batch in micro_batches for part in batch.parts(self.pieces)])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def cut_smaller(self, batch: Batch) -> None:
        """Give up the step so far, and halve what is computed at a time.

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

    def _train_step(self, micro_batches: Sequence[Batch]) -> None:
        players, accelerator = self.stage.players, self.accelerator
        images = sum(len(batch.keys) for batch in micro_batches)
        self.committed = bool(self.skeletons)  # whose ranks exchange weights in the forward pass already
        rate = learning_rate(self.section.optimizer, self.step + 1, self.section.steps)
        sums: dict[str, Tensor] = {}
        bad: list[tuple[list[str], Tensor]] = []  # keys, and which of them have a loss that is not finite
        for index, batch in enumerate(micro_batches):
            last, share = index == len(micro_batches) - 1, images / len(batch.keys)
            with self.gradients_stay_here(not last):
                for loss in self.stage.losses(batch, self.step):
                    mean = loss.values.mean() / share
                    self.committed |= last and accelerator.num_processes > 1
                    accelerator.backward(mean)
                    bad.append((batch.keys, ~torch.isfinite(loss.values.detach()).expand(len(batch.keys))))
                    for name, part in {f"loss/{loss.player}": loss.values.detach().mean(), **loss.report}.items():
                        sums[name] = sums.get(name, 0) + part.float() / share
        self.committed = True
        for name, player in players.items():
            set_learning_rate(player.optimizer, rate)
            limit = player.clip or float("inf")
            norm = accelerator.clip_grad_norm_(player.module.parameters(), limit)
            sums[f"gradient/{name}"] = whole(torch.as_tensor(norm, device=accelerator.device)).detach().float()
        figures = self.agree(sums, bad)
        for player in players.values():
            player.optimizer.step()
            player.optimizer.zero_grad(set_to_none=True)
        for average in self.averages.values():
            average.update(self.step + 1)
        for name, value in {**figures, **self.stage.updated(self.step + 1)}.items():
            if not math.isfinite(value):  # an fp16 gradient that overflowed and was not used
                continue
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + value, count + 1]

    def agree(self, figures: dict[str, Tensor], bad: list[tuple[list[str], Tensor]]) -> dict[str, float]:
        """The means over all ranks of a step's figures, in one exchange that also tells of bad numbers and of signals.

        Raises:
            LdmError: a number is not finite, on whatever rank.
            Stopped: some rank was asked to stop.
        """
        wrong = torch.stack([rows.any() for _, rows in bad]).any().float()
        stop = torch.tensor(float(bool(self.asked)), device=wrong.device)
        any_wrong, any_stop, *means = self.accelerator.reduce(
            torch.stack([wrong, stop, *figures.values()]), "mean"
        ).tolist()
        result = dict(zip(figures, means, strict=True))
        overflows = self.accelerator.scaler is not None  # fp16's gradients do now and then, and are not used then
        lost = [n for n, value in result.items() if n.startswith("gradient/") and not math.isfinite(value)]
        if any_wrong or (lost and not overflows):
            raise LdmError(self.lost("the loss" if any_wrong else f"the {lost[0]}", bad))
        if any_stop:
            for player in self.stage.players.values():
                player.optimizer.zero_grad(set_to_none=True)
            if self.saved != self.step:
                self.save()
            raise Stopped(self.stage.name, self.step, self.asked or signal.SIGTERM)
        return result

    def lost(self, what: str, bad: list[tuple[list[str], Tensor]]) -> str:
        """Why the run ends here, and with which samples."""
        found = {key for keys, rows in bad for key, row in zip(keys, rows.tolist(), strict=True) if row}
        found = found or {key for keys, _ in bad for key in keys}  # a gradient's, or those of another rank
        saved = checkpoint.checkpoints(self.folder / "checkpoints")
        return (
            f"{what} of step {self.step + 1} is not finite (samples here: {listing(sorted(found), 8)}); nothing was "
            f"updated, the last checkpoint is {saved[-1].name if saved else 'none yet'}. A lower learning rate, bf16 "
            "in place of fp16, or leaving these images out may help"
        )

    @contextmanager
    def gradients_stay_here(self, more_to_come: bool) -> Iterator[None]:
        """Ranks exchange gradients with the last micro-batch of a step alone."""
        with ExitStack() as stack:
            if more_to_come:
                for player in self.stage.players.values():
                    stack.enter_context(self.accelerator.no_sync(player.module))
            yield

    # --- now and then -----------------------------------------------------------------------------------------------

    def write_log(self) -> None:
        """The means since the last line, each over the steps that had the figure."""
        figures = {name: total / count for name, (total, count) in self.sums.items()}
        rate = learning_rate(self.section.optimizer, self.step, self.section.steps)
        figures |= {"learning_rate": rate * self.section.optimizer.learning_rate, **self.clock.figures()}
        if work := self.work(self.step - 1):
            figures["tflops"] = figures["images_per_s"] / self.accelerator.num_processes * work.tflop
            figures |= {"model_flops_use": figures["tflops"] / work.peak} if work.peak else {}
        self.write(figures)
        self.sums = {}
        self.clock = Throughput()

    def write(self, figures: dict[str, float]) -> None:
        """One line of the log, on the main process: into metrics.jsonl, and to whoever listens."""
        if self.accelerator.is_main_process:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **figures}) + "\n")
            self.report(self.stage.name, self.step, self.section.steps, figures)

    def due(self, every: int) -> bool:
        """Whether it is time for what is done after so many steps, and after the last one."""
        return self.step % every == 0 or self.step == self.section.steps

    def look(self, batch: Batch | None) -> None:
        """Validation, previews and evaluation, where they are due; `batch` is the step's, if it is known.

        They come after the checkpoint: it knows of them, so a signal that comes meanwhile need not wait.
        """
        verbs: dict[str, Callable[[], None]] = {
            "validate": self.validate, "preview": partial(self.preview, batch), "evaluate": self.evaluate,
        }  # fmt: skip
        while self.looks:
            self.leave()
            self.looking = True
            try:
                verbs[self.looks[0]]()
            finally:
                self.looking = False
            self.looks = self.looks[1:]

    def leave(self) -> None:
        """End here if a signal asked for it and all that was done is saved.

        Raises:
            Stopped: see `run`.
        """
        if self.asked and self.saved == self.step:
            raise Stopped(self.stage.name, self.step, self.asked)

    def validate(self) -> None:
        """Figures over the held-out images, with the averages in place."""
        batches = (part for batch in self.held_out() for part in batch.parts(self.pieces))
        with self.averaged():
            figures = self.stage.validate(batches)
        if figures:
            self.write({f"validation/{name}": value for name, value in figures.items()})
        self.clock = Throughput()

    def preview(self, batch: Batch | None) -> None:
        """Images to look at, on the main process: of held-out samples, always the same, or else of this batch."""
        with self.averaged():
            if self.accelerator.is_main_process and (shown := next(iter(self.held_out()), batch)):
                try:
                    self.show(self.stage.preview(shown, self.step))
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    log.warning("no preview of step %d: out of memory", self.step)
        self.accelerator.wait_for_everyone()
        self.clock = Throughput()

    def show(self, images: list[Image.Image]) -> None:
        """Keep them as one file."""
        if images:
            (self.folder / "previews").mkdir(exist_ok=True)
            save_png(grid(images), self.folder / "previews" / f"step-{self.step:08d}.png")

    def evaluate(self) -> None:
        """Figures of the images that each average makes; if one chooses by them, the best weights so far are kept."""
        evaluator = self.evaluator
        if evaluator is None:  # the configuration no longer asks for what a checkpoint owes
            return
        names = next(iter(self.averages.values())).names
        line: dict[str, float] = {}
        for which, name in enumerate(names):
            with self.averaged(which):
                figures = evaluator.figures(self.step, name)
            prefix = f"evaluation/{name}" if len(names) > 1 else "evaluation"
            line |= {f"{prefix}/{metric}": value for metric, value in figures.items()}
            best = evaluator.best(self.step, name, figures, self.best)
            if best and best is not self.best and self.accelerator.is_main_process:
                for average, path in self.weights(evaluator, best):
                    average.save(path, which)
            self.best = best
        self.write(line)
        self.accelerator.wait_for_everyone()  # until the best weights are there
        self.clock = Throughput()

    def weights(self, evaluator: Evaluator, best: Best) -> list[tuple[Averages, Path]]:
        """The files of evaluated weights that were kept, with what they are averages of."""
        folder = evaluator.folder(best.step, best.average)
        return [(average, folder / f"{name}.safetensors") for name, average in self.averages.items()]

    def averaged(self, which: int = 0) -> ExitStack:
        """The networks with one of their averages in the place of their weights."""
        stack = ExitStack()
        for name, average in self.averages.items():
            if name in self.skeletons:
                copied = self.skeletons[name].in_place(self.stage.players[name], self.stage.model, average.named(which))
                stack.enter_context(copied)
            else:
                stack.enter_context(average.in_place(which))
        return stack

    def result(self) -> ExitStack:
        """The networks with the best weights in place, if evaluation chose some, or with their averages.

        Raises:
            LdmError: the file of the best weights is missing or damaged.
        """
        if not (self.evaluator and self.best):
            return self.averaged()
        stack = ExitStack()
        try:
            for average, path in self.weights(self.evaluator, self.best):
                stack.enter_context(average.read_in_place(path))
        except LdmError as error:
            raise LdmError(f"the best weights so far: {error}, or set {self.evaluator.place}.choose=null") from None
        return stack

    def save_snapshots(self) -> None:
        """The power-function averages as they are now."""
        if self.accelerator.is_main_process:
            for name, average in self.averages.items():
                average.save_snapshots(self.folder / "averages" / name, self.step)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of everything that the rest of the run depends on."""
        state = {
            "sums": self.sums, "kind": self.kind(), "best": self.best and asdict(self.best), "looks": self.looks,
            "log": _size(self.folder / "metrics.jsonl"),
        }  # fmt: skip
        checkpoint.save(
            self.accelerator, self.folder / "checkpoints", self.step, state, self.section.keep, self.save_spread
        )
        if self.evaluator and self.accelerator.is_main_process:
            self.remove_surpassed(self.evaluator)
        self.saved = self.step
        self.clock = Throughput()

    def save_spread(self, folder: Path) -> None:
        """The averages, where they are spread over the ranks."""
        if self.skeletons:
            sharded.save({name: one.named() for name, one in self.averages.items()}, folder / AVERAGES)

    def nbytes(self) -> int:
        """About what a checkpoint takes: weights, averages of them, and the optimisers' state."""
        state = STATE_BYTES[self.section.optimizer.name]
        weights = [weight for player in self.stage.players.values() for weight in player.module.parameters()]
        total = sum(weight.nbytes + weight.requires_grad * weight.numel() * state for weight in weights)
        return total + sum(tensor.nbytes for a in self.averages.values() for row in a.averages for tensor in row)

    def remove_surpassed(self, evaluator: Evaluator) -> None:
        """Of the evaluated weights, keep only those that a checkpoint calls the best."""
        bests = [Best(**state["best"]) for state in checkpoint.states(self.folder / "checkpoints") if state.get("best")]
        wanted = {path for best in bests for _, path in self.weights(evaluator, best)}
        for path in evaluator.kept() - wanted:
            path.unlink(missing_ok=True)

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole; the log is cut back to it.

        Raises:
            LdmError: the configuration describes other networks, averages or another optimiser.
        """
        found, size = checkpoint.newest(self.folder / "checkpoints"), 0
        if found:
            path, manifest = found
            kind, before = self.kind(), manifest["state"]["kind"]
            differ = [name for name in kind if kind[name] != before.get(name)]
            if differ:
                raise LdmError(
                    f"{path} does not fit the configuration: another {' and another '.join(differ)}; set back what was "
                    f"changed since the run began, or choose another output"
                )
            optimizers = [player.optimizer for player in self.stage.players.values()]
            wanted = [
                [{k: v for k, v in group.items() if k in OPTIONS} for group in o.param_groups] for o in optimizers
            ]
            self.accelerator.load_state(str(path))
            for optimizer in optimizers:
                lay_out_state(optimizer)
            if self.skeletons:
                sharded.load({name: one.named() for name, one in self.averages.items()}, path / AVERAGES)
            for optimizer, groups in zip(optimizers, wanted, strict=True):  # those of the configuration, if it changed
                for group, options in zip(optimizer.param_groups, groups, strict=True):
                    group.update(options)
            self.step = self.saved = int(path.name.removeprefix("step-"))
            self.sums, self.looks, size = (manifest["state"][name] for name in ("sums", "looks", "log"))
            if self.evaluator and manifest["state"].get("best"):
                self.best = self.evaluator.resumed(Best(**manifest["state"]["best"]))
                self.result().close()  # to find out now whether these weights are whole
            log.info("going on from %s", path)
        if self.accelerator.is_main_process:
            _cut(self.folder / "metrics.jsonl", size)

    def kind(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit."""
        shapes = [
            (player, name, tuple(parameter.shape))
            for player, one in self.stage.players.items()
            for name, parameter in self.accelerator.unwrap_model(one.module).named_parameters()
            if parameter.requires_grad
        ]
        return {
            "network": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
            "optimizer": self.section.optimizer.name,
            "ema": [bool(self.section.ema.decay), *self.section.ema.widths],
            "precision with a loss scale": self.accelerator.scaler is not None,
            "layout of weights (DDP or FSDP2)": bool(self.skeletons),
        }

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While training, SIGTERM and SIGINT ask for a checkpoint and the end; a second one ends at once.

        One that comes after the last step began is handed on to whoever handled signals before.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: object) -> None:
            if not self.asked:
                self.asked, self.asked_at = number, time.monotonic()
                if self.looking:
                    self.leave()
            elif time.monotonic() - self.asked_at > AT_ONCE:
                restore()
                signal.raise_signal(number)

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            restore()
        if self.asked:
            signal.raise_signal(self.asked)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cut(path: Path, size: int) -> None:
    """The lines of a log in its first bytes."""
    if path.exists():
        with path.open("rb") as file:
            kept = file.read(size)
        os.truncate(path, kept.rfind(b"\n") + 1)


def _too_large(stage: Stage, batch: Batch, at_a_time: int) -> str:
    height, width = batch.size[0, 4:6].int().tolist()
    fewer = f"{stage.name}.micro_batch={at_a_time // 2}, " if at_a_time > 1 else ""
    if not stage.divisible:
        fewer = f"a smaller {stage.name}.batch, "
    return (
        f"out of memory with {at_a_time} images of {width}×{height} at a time; set {fewer}"
        f"{stage.name}.checkpointing=true, or a smaller size"
    )
