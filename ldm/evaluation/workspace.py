"""The folder of an evaluation, the processes that share it, and its locks."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldm.errors import LdmError
from ldm.files import Progress, silent


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together on one folder that all of them see."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None  # until all others have called it too

    @property
    def first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Workspace:
    """The folder of an evaluation, the processes that share it, and a function that hears of their progress."""

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)
    tell: Progress = silent  # takes the name of the work, the images that are done, and how many there are
    cache: Path | None = None  # of features of images that no model made; by default the folder

    @property
    def shared(self) -> Workspace:
        """The same workspace in the folder of the cache."""
        return replace(self, folder=self.cache or self.folder)


@contextlib.contextmanager
def file_lock(path: Path, in_use: str = "") -> Iterator[None]:
    """Hold the lock of a file, where its file system has locks.

    Args:
        path: of the file, which is made.
        in_use: the error if another process holds the lock; if empty, wait for that process.

    Raises:
        LdmError: `in_use`; or the file cannot be written.
    """
    try:
        lock = path.open("wb")
    except OSError as error:
        raise LdmError(f"{path} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if in_use else 0))
        except (BlockingIOError, PermissionError):
            raise LdmError(in_use) from None
        except OSError:
            pass  # the file system has no locks
        yield
