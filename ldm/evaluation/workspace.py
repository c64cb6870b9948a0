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
    """This process among the processes that share one evaluation and its folder."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None  # returns when all processes have called it

    @property
    def first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Workspace:
    """The folder of an evaluation, the processes that share it, and a function that reports progress."""

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)
    tell: Progress = silent  # (name of the work, number of images done, number of images)
    cache: Path | None = None  # folder of features of images that no model made; by default `folder`

    @property
    def shared(self) -> Workspace:
        """The same workspace in the folder of the cache."""
        return replace(self, folder=self.cache or self.folder)


@contextlib.contextmanager
def file_lock(path: Path, in_use: str = "") -> Iterator[None]:
    """Hold a lock on a file within this context, where its file system has locks.

    Args:
        path: of the file, which is created.
        in_use: message of the error if another process holds the lock; if empty, wait for that process.

    Raises:
        LdmError: another process holds the lock, or the file cannot be written.
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
