"""The process of a training, which outlives a server that is killed: the next server of the same folder takes it up.

A file in the training's folder names the process, and its server holds the file's lock as long as the server lives. So
a process whose file is not locked has no server any more. That a number is still that of the same process is told by
its command line, which has the folder's name.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

from ldm.files import lock
from ldm.server.runs import DONE_STATE, QUIET, RUNNING, RunFolder, opened

FILE = "process.json"  # in the folder of a training
LOOK_SECONDS = 0.05  # between looks at a process that is to end
LONGEST = 1000  # bytes of the file


class TrainingProcess:
    """A process that trains, begun by this server or by one that is gone. Methods may be called from any thread."""

    def __init__(self, process: subprocess.Popen[bytes] | psutil.Process, file: BinaryIO) -> None:
        """`file` names the process and is locked."""
        self.process, self.file = process, file

    def state(self) -> str:
        """Whether it goes on ("running"), or how it ended; of one that another server began, that is not known."""
        if isinstance(self.process, psutil.Process):
            return RUNNING if lives(self.process) else QUIET
        code = self.process.poll()
        if code is None:
            return RUNNING
        return {0: DONE_STATE}.get(code, QUIET if code in (-15, 143) else "failed")

    def terminate(self) -> None:
        """Ask it to save a checkpoint and end; asked again, it ends at once."""
        with contextlib.suppress(psutil.Error):  # it has ended
            self.process.terminate()

    def end(self, seconds: float) -> None:
        """Let it save a checkpoint and end, for which it has some seconds."""
        self.terminate()
        if not self._ends_within(seconds):
            with contextlib.suppress(psutil.Error):
                self.process.kill()
            self._ends_within(seconds)

    def _ends_within(self, seconds: float) -> bool:
        last = time.monotonic() + seconds
        while self.state() == RUNNING and time.monotonic() < last:
            time.sleep(LOOK_SECONDS)
        return self.state() != RUNNING

    def release(self) -> None:
        """Let go of the file of a process that has ended."""
        self.file.close()


def claimed(folder: Path) -> BinaryIO:
    """The file of a new training, empty and locked, so that it is seen to have a server."""
    file = (folder / FILE).open("wb")
    lock(file.fileno())
    return file


def begun(argv: Sequence[str], environment: Mapping[str, str], output: BinaryIO, file: BinaryIO) -> TrainingProcess:
    """A process that was begun, in a session of its own, so that signals to the server are not for it.

    Args:
        argv: the program, which is told the training's folder.
        environment: of the process.
        output: what it says goes there.
        file: by `claimed`.
    """
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        env=environment,
    )  # fmt: skip
    file.write(json.dumps({"pid": process.pid}).encode())
    file.flush()
    return TrainingProcess(process, file)


def left_behind(run: RunFolder) -> TrainingProcess | None:
    """The process that trains in a run's folder, if its server is gone; then it belongs to this one. None otherwise."""
    file = opened(run.root, run.path / FILE)
    if file is None:
        return None
    process = _process_of(file, run.path) if lock(file.fileno()) else None
    if process is None:
        file.close()
        return None
    return TrainingProcess(process, file)


def _process_of(file: BinaryIO, folder: Path) -> psutil.Process | None:
    """The process that a file in a training's folder names; None if it has ended."""
    try:
        number = json.loads(file.read(LONGEST))["pid"]
        if not isinstance(number, int) or number < 1:
            return None
        process = psutil.Process(number)
        words = process.cmdline() if lives(process) else []
    except (psutil.Error, ValueError, TypeError, KeyError, OverflowError):
        return None
    return process if any(os.fspath(folder) in word for word in words) else None


def lives(process: psutil.Process) -> bool:
    """Whether a process has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
