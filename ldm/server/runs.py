"""The runs in a folder, as a server shows them: their stages, how far they are, whether they go on, and their files.

Runs and files are found by listing, and named to clients by what the list gives: nothing in a request becomes a path.
A link that leads out of the folder is not followed. A run that another version of this program wrote is shown as far as
it can be read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, BinaryIO, TypeVar

import yaml
from PIL import Image

from ldm.errors import LdmError
from ldm.evaluation.report import REPORT
from ldm.server.reading import DECODING
from ldm.server.run_log import Curves, LogLine, curves, last_lines
from ldm.training.layout import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    DONE,
    METRICS,
    PREVIEWS,
    SHEET,
    step_of,
    steps_done,
)
from ldm.training.phases import phases
from ldm.training.sections import StageSection

T = TypeVar("T")
LOG = "train.log"  # what the program of a training says, if a server started it
LOG_BYTES = 2**14  # of its end that are shown
LOG_LINES = 25
PLACE = re.compile(r"""(?<![\w.…-])/(?:[^\s/'"]+/)+""")  # of a file, up to its name
LISTED, LARGE = 1000, 100_000  # entries of a folder that are looked at; of one with something for each of many steps
SHOWN = 100  # runs of the list
PREVIEWED = 400  # previews of a stage
CONFIG_BYTES = 2**20
STAGE = re.compile("[a-z][a-z0-9-]{0,39}")  # name of a stage
STAGES = 32  # of a run; sizes of a stage
PACE = ("steps", "batch", "log_every")  # settings of a stage that tell how far it is
SIZE = ("size", "steps", "batch")  # the same of its resolutions
LARGER = 4  # times the pixels that are shown, an image may have
IMAGE_BYTES = 2**26  # of a preview's file
LOOKED = 300  # folders of a run whose times are read
DEPTH = 5
RECENT = 10  # lines of the log over which the speed is taken
QUIET_SECONDS = 180.0  # without a change, at least, until a run counts as stopped
QUIET_LINES = 5.0  # the same, in times between two lines of the log
DONE_STATE, RUNNING, QUIET = "done", "running", "stopped"  # states of runs and stages
WAITING = "waiting"  # of a stage that has not begun


@dataclass(frozen=True)
class Runs:
    """The runs in a folder, and the folder itself if it is one."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Runs:
        """The runs in a folder.

        Raises:
            LdmError: there is no such folder.
        """
        if not folder.is_dir():
            raise LdmError(f"--runs {folder} is no folder; name the one that holds the folders of runs")
        return cls(Path(os.path.realpath(folder)))

    def all(self) -> list[RunFolder]:
        """All runs, in no order."""
        return [entry for entry in self._entries() if entry.is_run()]

    def run(self, name: str) -> RunFolder | None:
        """The run of that name (`RunFolder.id`); None if there is none."""
        return next((entry for entry in self._entries() if entry.id == name and entry.is_run()), None)

    def _entries(self) -> Iterator[RunFolder]:
        """What may be runs."""
        yield RunFolder(self.folder, self.folder)
        for entry in listed(self.folder):
            if not entry.name.startswith("."):
                yield RunFolder(self.folder, Path(entry.path))


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, or one that may be."""

    root: Path  # real path of the folder of runs, out of which nothing is read
    path: Path

    @property
    def id(self) -> str:
        """The name that clients use, which says nothing of the place."""
        return hidden(self.path.relative_to(self.root))

    @property
    def name(self) -> str:
        """The folder's name, for readers."""
        return self.path.name.encode("utf-8", "replace").decode()

    def is_run(self) -> bool:
        """Whether it holds a run, or a report."""
        return any(opens(self.root, self.path / name) for name in (CONFIG, REPORT, LOG))

    def sections(self) -> dict[str, StageSection | None] | None:
        """What the configuration says of each stage, as `read_sections`; None if it cannot be read."""
        file = opened(self.root, self.path / CONFIG)
        if file is None:
            return None
        with file:
            data = file.read(CONFIG_BYTES + 1)
        return read_sections(data) if len(data) <= CONFIG_BYTES else None

    def stages(self) -> list[StageFolder]:
        """The stages: those of the configuration, or without one those that have a log."""
        sections = self.sections()
        if sections is None:
            names = sorted(entry.name for entry in listed(self.path) if opens(self.root, Path(entry.path) / METRICS))
            sections = dict.fromkeys(names)
        return [StageFolder(self.root, self.path / name, section) for name, section in sections.items()]

    def stage(self, name: str) -> StageFolder | None:
        """The stage of that name; None if there is none."""
        return next((stage for stage in self.stages() if stage.path.name == name), None)

    def written(self) -> float:
        """When something in the folder changed last, in seconds since 1970, by the times of its folders and logs.

        What grows inside of one file, other than a log, does not count.
        """
        times = [_changed(self.path / CONFIG)]
        level, left = [str(self.path)], LOOKED
        for _ in range(DEPTH):
            below: list[str] = []
            for folder in level[:left]:
                times += [_changed(folder), _changed(Path(folder, METRICS))]
                below += sorted((one.path for one in listed(folder) if one.is_dir(follow_symlinks=False)), reverse=True)
            left -= len(level)
            level = below
            if left <= 0:
                break
        return max(times)

    def said(self) -> list[str]:
        """The last lines that the program of a training said, without the place of the server's files."""
        file = opened(self.root, self.path / LOG)
        if file is None:
            return []
        with file:
            start = max(size_of(file) - LOG_BYTES, 0)
            file.seek(start)
            text = PLACE.sub("…/", file.read(LOG_BYTES).decode("utf-8", "replace"))
        lines = ["".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines()]
        return [line for line in lines[bool(start) :] if line][-LOG_LINES:]

    def adapter(self) -> Path | None:
        """The finished adapter; None if there is none."""
        places = (stage.path / ADAPTER for stage in self.stages() if stage.is_done())
        return next((place for place in places if opens(self.root, place)), None)

    def adapter_file(self) -> BinaryIO | None:
        """The finished adapter, open; None if there is none."""
        place = self.adapter()
        return None if place is None else opened(self.root, place)

    def described(self, written: float, state: str | None) -> dict[str, Any]:
        """The state of the run and of its stages as JSON.

        `written` is as of the method; `state` is that of the run's process, if it is known.
        """
        stages = self.stages()
        logs = [stage.last() for stage in stages]
        pairs = list(zip(stages, logs, strict=True))
        quiet = max(0.0, time.time() - written)
        patience = max([QUIET_SECONDS, *(QUIET_LINES * (stage.line_seconds(lines) or 0) for stage, lines in pairs)])
        alive = quiet < patience if state is None else state == RUNNING
        shown = [stage.described(lines, alive) for stage, lines in pairs]
        over = all(one["state"] == DONE_STATE for one in shown) if shown else opens(self.root, self.path / REPORT)
        for one in shown[next((n for n, one in enumerate(shown) if one["state"] != DONE_STATE), 0) + 1 :]:
            if one["state"] != DONE_STATE:
                one["state"] = WAITING
        return {
            "id": self.id,
            "name": self.name,
            "state": RUNNING if state == RUNNING else DONE_STATE if over else RUNNING if alive else state or QUIET,
            "written": written,
            "quiet": quiet,
            "patience": patience if state is None else None,  # the process tells
            "stages": shown,
        }


@dataclass(frozen=True)
class StageFolder:
    """The folder of a stage of a run, which may not exist yet."""

    root: Path
    path: Path
    section: StageSection | None  # what is known of its configuration

    def last(self) -> list[LogLine]:
        """The last lines of the log."""
        return self._of_log(last_lines) or []

    def curves(self) -> Curves:
        """The curves of the log."""
        return self._of_log(curves) or Curves()

    def _of_log(self, read: Callable[[BinaryIO], T]) -> T | None:
        """What a function reads of the log; None if there is none."""
        file = opened(self.root, self.path / METRICS)
        if file is None:
            return None
        with file:
            return read(file)

    def is_done(self) -> bool:
        """Whether the stage is done, with as many steps as its configuration asks for."""
        if inside(self.root, self.path / DONE) is None:
            return False
        try:
            done = steps_done(self.path)
        except LdmError:
            return False
        return done is not None and (self.section is None or done >= self.section.steps)

    def speed(self, lines: list[LogLine]) -> float | None:
        """Images a second, by the last lines of training."""
        speeds = [line.figures["images_per_s"] for line in lines if line.figures.get("images_per_s", 0) > 1e-6]
        return harmonic_mean(speeds[-RECENT:]) if speeds else None  # each is over equally many steps

    def line_seconds(self, lines: list[LogLine]) -> float | None:
        """Seconds between two lines of the log, by its last ones; None if that is not known."""
        speed = self.speed(lines)
        if speed is None or self.section is None:
            return None
        return self.images(lines[-1].step, lines[-1].step + self.section.log_every) / speed

    def images(self, first: int, end: int) -> int:
        """The number of images of some steps; those after the last one are like it."""
        if self.section is None:
            return 0
        try:
            parts = phases(self.section)
        except LdmError:
            return self.section.batch * (end - first)
        count = sum(part.batch * max(min(end, part.end) - max(first, part.first), 0) for part in parts)
        return count + parts[-1].batch * max(end - max(first, parts[-1].end), 0)

    def described(self, lines: list[LogLine], alive: bool) -> dict[str, Any]:
        """The state of the stage as JSON, by the last lines of its log; `alive` is whether its run goes on."""
        done = self.is_done()
        steps = None if self.section is None else self.section.steps
        step = lines[-1].step if lines else 0
        speed = self.speed(lines)
        left = self.images(step, steps) / speed if steps is not None and speed and step < steps else None
        training = [line.figures for line in lines if line.of_training]
        looks = {name: value for line in lines if not line.of_training for name, value in line.figures.items()}
        return {
            "name": self.path.name,
            "state": DONE_STATE if done else RUNNING if alive else QUIET,
            "step": step,
            "steps": steps,
            "images_per_second": speed,
            "seconds_left": None if done else left,
            "figures": {**(training[-1] if training else {}), **looks},
            "log": self._of_log(size_of) or 0,
            "previews": self.previews(),
            "sheet": opens(self.root, self.path / SHEET),
            "checkpoint": max(self.by_step(CHECKPOINTS), default=None),
        }

    def previews(self) -> list[int]:
        """The steps of the previews; of very many, some at even distances and the last."""
        steps = sorted(self.by_step(PREVIEWS, ".png"))
        stride = -(-len(steps) // PREVIEWED)
        return steps[::-stride][::-1] if stride else []

    def by_step(self, folder: str, end: str = "") -> dict[int, str]:
        """The names of what belongs to steps in one of its folders, and ends in `end`."""
        place = inside(self.root, self.path / folder)
        names = [] if place is None else [one.name for one in listed(place, LARGE) if one.name.endswith(end)]
        steps = ((step_of(name.removesuffix(end)), name) for name in names)
        return {step: name for step, name in steps if step is not None}

    def preview(self, step: int, pixels: int) -> Image.Image | None:
        """The preview of a step, of at most so many pixels; None if there is none.

        Raises:
            LdmError: the file is damaged or too large.
        """
        name = self.by_step(PREVIEWS, ".png").get(step)
        return None if name is None else read_image(self.root, self.path / PREVIEWS / name, pixels)

    def sheet(self, pixels: int) -> Image.Image | None:
        """The sheet of `ldm train-adapter`, as `preview`."""
        return read_image(self.root, self.path / SHEET, pixels)


def hidden(path: Path) -> str:
    """A name of a relative path, of which it says nothing."""
    return hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()


# --- files ------------------------------------------------------------------------------------------------------------


def inside(root: Path, path: Path) -> Path | None:
    """The real place of a path; None if it is outside of the root, a real path."""
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        return None
    return real if real.is_relative_to(root) else None


def opened(root: Path, path: Path) -> BinaryIO | None:
    """A regular file inside of the root, open; None if there is none."""
    real = inside(root, path)
    if real is None:
        return None
    try:
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)  # not a pipe's other end
    except OSError:
        return None
    file = os.fdopen(handle, "rb")
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return file
    file.close()
    return None


def size_of(file: BinaryIO) -> int:
    """The bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def opens(root: Path, path: Path) -> bool:
    """Whether `opened` gives a file."""
    file = opened(root, path)
    if file is None:
        return False
    file.close()
    return True


def listed(folder: str | Path, most: int = LISTED) -> Iterator[os.DirEntry[str]]:
    """The first entries of a folder; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(most), entries, strict=False):
                yield entry
    except OSError:
        return


def _changed(path: str | Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


@lru_cache(maxsize=2 * SHOWN)
def read_sections(data: bytes) -> dict[str, StageSection | None] | None:
    """The stages of a configuration in their order, with those of their settings that tell how far they are.

    Nothing else is looked at, so that configurations of other versions can be read. A stage whose settings are not as
    expected has None; a configuration without stages is None.
    """
    try:
        content = yaml.safe_load(data)
        names = [name for name in content["stages"] if STAGE.fullmatch(name)][:STAGES]
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, TypeError):
        return None
    return {name: _section(content.get(name)) for name in names}


def _section(content: Any) -> StageSection | None:
    try:
        given = {key: content[key] for key in PACE if key in content}
        sizes = [{key: one[key] for key in SIZE if key in one} for one in content.get("sizes", ())[:STAGES]]
        return StageSection.model_validate(given | ({"sizes": sizes} if sizes else {}))
    except (AttributeError, KeyError, TypeError, ValueError):  # pydantic's errors are the last
        return None


def read_image(root: Path, path: Path, pixels: int) -> Image.Image | None:
    """An image of a run, without its metadata, made smaller if it has more than so many pixels; None if there is none.

    Raises:
        LdmError: it is damaged, no PNG, or has far more pixels.
    """
    file = opened(root, path)
    if file is None:
        return None
    with file:
        if size_of(file) > IMAGE_BYTES:
            raise LdmError(f"{path.name} is too large to be shown")
        try:
            with DECODING, Image.open(file, formats=("PNG",)) as image:
                if image.width * image.height > LARGER * pixels:
                    raise LdmError(f"{path.name} has {image.width}×{image.height} pixels: too many to be shown")
                found = image.convert("RGB")
        except LdmError:
            raise
        except Exception:  # decoders of damaged files raise anything
            raise LdmError(f"{path.name} is damaged, or still being written") from None
    part = (pixels / (found.width * found.height)) ** 0.5
    if part < 1:
        found.thumbnail((max(int(part * found.width), 1), max(int(part * found.height), 1)))
    return found
