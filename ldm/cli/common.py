"""Functions that commands share: parsing of options, and progress on stderr if it is a terminal."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import LdmError
from ldm.files import Progress as Report
from ldm.files import silent
from ldm.weights.builtin import builtin

if TYPE_CHECKING:
    from ldm.weights.components import Opened


@dataclass(frozen=True)
class SourceOptions:
    """The options of `info` and `convert` for reading their source."""

    family: str | None = None
    variant: str | None = None
    revision: str | None = None
    components: tuple[str, ...] = ()  # NAME=PATH, each
    allow_pickle: bool = False

    def open(self, source: str, verify: bool, report: Report) -> Opened:
        """Open the source and recognise its family; weights are not read yet."""
        from ldm.weights.sources import open_source  # PyTorch, only now that there is something to open

        return open_source(
            source,
            family=self.family,
            variant=self.variant,
            revision=self.revision,
            components=to_components(self.components),
            allow_pickle=self.allow_pickle,
            verify=verify,
            progress=report,
        )


def is_family(source: str) -> bool:
    """Whether a source is a family's name, and not a model that is there under the same name."""
    from ldm.families import FAMILIES

    return source in FAMILIES and not Path(source).exists() and not builtin(source)


class Once(logging.Filter):
    """A filter that lets each message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


def log_warnings() -> None:
    """Print warnings on stderr, each once however many images it belongs to."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Once())
    logging.basicConfig(format="ldm: %(message)s", level=logging.WARNING, handlers=[handler])


def to_png(out: str) -> Path:
    """The value of `--out`: a PNG file in an existing folder."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise LdmError(f"--out {out}: name a file that ends in .png")
    if not path.absolute().parent.is_dir():
        raise LdmError(f"--out {out}: the folder {path.absolute().parent} does not exist; create it first")
    return path


def to_components(options: Sequence[str]) -> dict[str, str]:
    """The paths of all `--component NAME=PATH`, by name."""
    pairs = [option.partition("=") for option in options]
    for name, equals, path in pairs:
        if not (name and equals and path):
            raise LdmError(f"--component {name + equals + path!r}: write NAME=PATH, such as vae=better-vae.safetensors")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise LdmError(f"--component {' '.join(options)!r}: each name once")
    return {name: path for name, _, path in pairs}


def to_bytes(text: str) -> int:
    """The bytes of `--shard-size`: a number, in KB, MB or GB if it ends so."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** "_KMG".index(match[2].upper() or "_")) if match else 0
    if size < 1:
        raise LdmError(f"--shard-size {text!r}: write a size such as 5GB or 500MB")
    return size


@contextmanager
def progress() -> Iterator[Report]:
    """A progress bar on stderr for each kind of work, removed when all is done."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield report


@contextmanager
def counter(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr that counts finished items, with their rate and the time left."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, rate="")
        start = time.monotonic()

        def advance() -> None:
            bar.advance(task)
            rate = bar.tasks[task].completed / (time.monotonic() - start)
            bar.update(task, rate=f"{rate:.2f}/s")

        yield advance
