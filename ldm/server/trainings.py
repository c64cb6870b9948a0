"""Adapters that are trained for visitors of a server: one at a time, each in a process and a run's folder of its own.

A training is `ldm train-adapter` on images that were uploaded: they are decoded, and written anew without their
metadata. What a visitor says becomes settings within bounds, never a path or an option. A server that ends ends its
training; that of one which was killed goes on, and belongs to the next server of the same folder.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import LdmError, check_whole
from ldm.files import replacing, sweep
from ldm.images import save_png
from ldm.server.engine import NotTakenError
from ldm.server.guard import KEY, RAY_TOKEN
from ldm.server.reading import uploaded
from ldm.server.runs import LOG, RUNNING, RunFolder, Runs, listed, size_of
from ldm.server.training_process import TrainingProcess, begun, claimed, left_behind
from ldm.server.uploads import MOST, RequestUploads

log = logging.getLogger(__name__)
IMAGES = "images"  # the folder of a training's images
STEPS, RANK = (1, 20_000), (1, 256)
TEXT = 200  # characters of a trigger, a class prompt, an adapter's name
CAPTION = 2000
FREE = 2**30  # bytes of the disk that must be free
FULL = 900  # entries of the folder, above which no more are begun
END_SECONDS = 30.0  # in which a training saves a checkpoint when the server ends
NAME = re.compile(r"\w[\w .-]{0,63}")
OPTIONS = ("images", "kind", "trigger", "class_prompt", "steps", "rank")


@dataclass(frozen=True)
class TrainingOrder:
    """What a visitor wants to be trained."""

    kind: str
    trigger: str
    class_prompt: str
    steps: int | None  # None: as many as suit the images
    rank: int | None


Command = Callable[[TrainingOrder, Path, Path], Sequence[str]]  # of an order, its images and its run's folder


class Trainer:
    """Trains one adapter at a time. All methods may be called from any thread."""

    def __init__(self, runs: Runs, command: Command, adapters: Path | None) -> None:
        """Args:
        runs: the folder in which runs are made.
        command: gives the program to run, or raises LdmError for an order that cannot be.
        adapters: the folder into which finished adapters can be copied, if there is one.
        """
        self.runs, self.command, self.adapters = runs, command, adapters
        self._beginning = threading.Lock()
        sweep(runs.folder.glob(".*.part"))  # images of a training that a server was killed before it began
        found = {run: left_behind(run) for run in runs.all() if run.path != runs.folder}
        self._processes = {run: process for run, process in found.items() if process is not None}
        for run in self._processes:
            log.info("training %s goes on, which a server that is gone has begun", run.name)

    def begin(self, given: Mapping[str, Any], share: RequestUploads) -> RunFolder:
        """Write the images of a request, which are counted in a share, and start to train.

        Raises:
            LdmError: the request is not as it must be.
            NotTakenError: another training goes on, or the disk is full.
        """
        order, images = read_order(given)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder = self.runs.folder / name
        argv = self.command(order, folder / IMAGES, folder)
        with self._alone(), self._made(folder) as made:
            write_images(images, made / IMAGES, share)
            run = RunFolder(self.runs.folder, folder)
            environment = {name: value for name, value in os.environ.items() if name not in (KEY, RAY_TOKEN)}
            for one in self._processes.values():
                one.release()  # all of them have ended
            file = claimed(made)
            with (made / LOG).open("wb") as output:
                made.rename(folder)
                self._processes[run] = begun(argv, environment, output, file)
        log.info("training %s begins", name)
        return run

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A context in which no other training is begun, or goes on."""
        if not self._beginning.acquire(blocking=False):
            raise NotTakenError("another training is being begun: one is trained at a time")
        try:
            if self._going_on():
                raise NotTakenError("another adapter is being trained: wait for its end, or stop it")
            if shutil.disk_usage(self.runs.folder).free < FREE:
                raise NotTakenError("the server's disk is full")
            if sum(1 for _ in listed(self.runs.folder)) > FULL:
                raise NotTakenError("the server's folder of runs is full")
            yield
        finally:
            self._beginning.release()

    @contextmanager
    def _made(self, folder: Path) -> Iterator[Path]:
        """A folder that is removed on errors, unless it was renamed."""
        made = folder.with_name(f".{folder.name}.part")
        made.mkdir(mode=0o700)
        try:
            (made / IMAGES).mkdir()
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _going_on(self) -> list[TrainingProcess]:
        """The processes that train."""
        return [one for one in tuple(self._processes.values()) if one.state() == RUNNING]

    def state(self, run: RunFolder) -> str | None:
        """Whether the training of a run goes on ("running"), or how it ended; None if it is none of this server's."""
        process = self._processes.get(run)
        return None if process is None else process.state()

    def stop(self, run: RunFolder) -> bool:
        """Ask the training of a run to save a checkpoint and end; asked again, it ends at once. Whether it was on."""
        if self.state(run) != RUNNING:
            return False
        self._processes[run].terminate()
        return True

    def keep(self, run: RunFolder, name: Any) -> str:
        """Copy the finished adapter of a run into the folder of adapters; its name there.

        Raises:
            LdmError: there is none, or no folder; the name is not allowed, or taken.
        """
        if self.adapters is None:
            raise LdmError("this server has no folder of adapters (--lora-dir)")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name.endswith((".", " ")):
            raise LdmError(
                "name: 1 to 64 letters, digits, spaces and signs _ . - are needed, the first a letter or digit"
            )
        file = run.adapter_file()
        if file is None:
            raise LdmError("the run has no finished adapter")
        target = self.adapters / f"{name}.safetensors"
        if os.path.lexists(target):
            raise LdmError(f"name: there is an adapter {name!r} already")
        with file, replacing(target, False, False, size_of(file)) as temporary, temporary.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        return name

    def close(self) -> None:
        """End the training that goes on; it saves a checkpoint first."""
        for process in self._going_on():
            process.end(END_SECONDS)


def read_order(given: Mapping[str, Any]) -> tuple[TrainingOrder, list[tuple[str, str]]]:
    """What a request wants to be trained, and its images in base64 with their captions.

    Raises:
        LdmError: the request is not as it must be.
    """
    if unknown := [name for name in given if name not in OPTIONS]:
        raise LdmError(f"{unknown[0][:TEXT]} is not known; there are {', '.join(OPTIONS)}")
    images = given.get("images")
    if not isinstance(images, list) or not 1 <= len(images) <= MOST:
        raise LdmError(f"images: a list of 1 to {MOST} is needed")
    pairs = [_captioned(one, number) for number, one in enumerate(images, 1)]
    order = TrainingOrder(
        kind=_text(given, "kind", "lora"),
        trigger=_text(given, "trigger"),
        class_prompt=_text(given, "class_prompt"),
        steps=_whole(given, "steps", *STEPS),
        rank=_whole(given, "rank", *RANK),
    )
    if not order.trigger and not all(caption for _, caption in pairs):
        raise LdmError("trigger: a word for what is learned is needed, or a caption for each image")
    return order, pairs


def _captioned(one: Any, number: int) -> tuple[str, str]:
    if not isinstance(one, Mapping) or not isinstance(one.get("image"), str):
        raise LdmError(f"image {number}: an object with image, in base64, is needed")
    return one["image"], _text(one, "caption", most=CAPTION)


def _text(given: Mapping[str, Any], name: str, usual: str = "", most: int = TEXT) -> str:
    found = given.get(name)
    found = usual if found is None else found
    if not isinstance(found, str) or len(found) > most or not found.isprintable():
        raise LdmError(f"{name}: a text of one line, of at most {most} characters, is needed")
    return found.strip()


def _whole(given: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    if given.get(name) is None:
        return None
    check_whole("training", name, given[name], low, high)
    return int(given[name])


def write_images(images: Sequence[tuple[str, str]], folder: Path, share: RequestUploads) -> None:
    """Decode images, and write them with their captions into a folder.

    Raises:
        LdmError: one cannot be read.
        NotTakenError: as `RequestUploads.take`.
    """
    for number, (text, caption) in enumerate(images, 1):
        save_png(uploaded(text, f"image {number}", share), folder / f"{number:03d}.png")
        if caption:
            (folder / f"{number:03d}.txt").write_text(caption, encoding="utf-8")
