"""Whatever happens while a run is saved, there is a whole checkpoint on the disk, and the run goes on from it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from images import BAD, encoded, odd_files, png
from launched import ROOT, Program
from PIL import Image
from runs import _fresh_accelerator, config, interrupted, lines, weights  # noqa: F401

from ldm.errors import LdmError
from ldm.training import checkpoint
from ldm.training.run import train

CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
)  # and files that are opened


class Killed(BaseException):
    """Nothing of the program runs after it."""


class Watch:
    """Counts what changes a folder, and ends one of these operations before it is done."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.end: Any = None
        self.at = self.seen = 0
        sys.addaudithook(self)  # which stays for good, and does nothing outside of `over`

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python calls it before each of its operations."""
        if self.folder is None or not (event in CHANGES or (event == "open" and _writes(arguments))):
            return
        if str(arguments[0]).startswith(str(self.folder)) or (event in ("os.remove", "os.rmdir")):
            self.seen += 1
            if self.seen == self.at:
                raise self.end

    @contextmanager
    def over(self, folder: Path, at: int = 0, end: BaseException | None = None) -> Iterator[None]:
        """Watch a folder; the operation number `at` ends with an error."""
        self.folder, self.at, self.end, self.seen = folder, at, end, 0
        try:
            yield
        finally:
            self.folder = None


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if mode is None else any(c in mode for c in "wax+")


watch = Watch()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Accelerator, Path]:
    """A network and an optimiser with state, and two checkpoints of them."""
    accelerator = Accelerator(cpu=True)
    network = torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(network.parameters())
    network, optimizer = accelerator.prepare(network, optimizer)
    network(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        save(accelerator, folder, step)
    return accelerator, folder


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    state = {"sums": {}, "kind": {}, "looks": [], "log": 0}
    checkpoint.save(accelerator, folder, step, state, keep=2)


def whole(folder: Path) -> str:
    found = checkpoint.newest(folder)
    assert found is not None
    return found[0].name


@pytest.mark.parametrize("kind", ["an error", "a kill"])
def test_no_operation_that_fails_loses_a_checkpoint(saved: tuple[Accelerator, Path], kind: str) -> None:
    """Every file that is opened, every rename and removal of a save: each in turn fails, or is the last thing done."""
    accelerator, folder = saved
    before = folder.parent / "before"
    shutil.copytree(folder, before)
    with watch.over(folder):
        save(accelerator, folder, 3)
    operations, names = watch.seen, set()
    assert operations >= 12
    for at in range(1, operations + 1):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        end = OSError(5, "Input/output error") if kind == "an error" else Killed()
        with watch.over(folder, at, end):
            try:
                save(accelerator, folder, 3)
            except LdmError as error:
                assert "cannot be written: Input/output error" in str(error)
            except Killed:
                pass
        names.add(whole(folder))
        save(accelerator, folder, 4)
        assert whole(folder) == "step-00000004"
        assert {path.name for path in folder.iterdir()} <= {"step-00000002", "step-00000003", "step-00000004"}, at
    assert names == {"step-00000002", "step-00000003"}


def test_no_file_that_breaks_off_loses_a_checkpoint(saved: tuple[Accelerator, Path]) -> None:
    """Libraries write in C++ and Rust; the system ends their files at a given size."""
    accelerator, folder = saved
    sizes = sorted({path.stat().st_size for path in (folder / "step-00000002").iterdir()})
    assert len(sizes) > 3
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [0, *(size - 1 for size in sizes)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(LdmError, match="cannot be written"):
                save(accelerator, folder, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert whole(folder) == "step-00000002"
        assert {path.name for path in folder.iterdir()} == {"step-00000001", "step-00000002"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 60 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("disks can be mounted by root alone")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_during_the_second_checkpoint(shapes: Path, tmp_path: Path, small_disk: Path) -> None:
    train(config(shapes, tmp_path / "whole"))
    settings = config(shapes, tmp_path / "r", f"output={small_disk / 'r'}")
    one = sum(path.stat().st_size for path in (tmp_path / "whole/base/checkpoints/step-00000006").iterdir())
    ballast = small_disk / "ballast"

    def fill(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 4 and "loss/unet" in figures:
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - one // 2))

    with pytest.raises(LdmError, match=r"step-00000006 cannot be written: .* GB are free; earlier checkpoints"):
        train(settings, report=fill)
    assert [path.name for path in (small_disk / "r/base/checkpoints").iterdir()] == ["step-00000003"]
    with pytest.raises(LdmError, match="checkpoints will need about"):
        train(settings)
    ballast.unlink()
    train(settings)
    assert lines(small_disk / "r") == lines(tmp_path / "whole")
    assert weights(small_disk / "r") == weights(tmp_path / "whole")


@pytest.mark.parametrize("cache", [False, True], ids=["", "c"])
def test_broken_and_odd_images(shapes: Path, tmp_path: Path, cache: bool) -> None:
    """Eight are broken, ten are odd: those that are left out are exactly the eight."""
    folder = tmp_path / "images"
    for copy in range(4):
        shutil.copytree(shapes, folder / str(copy))
    cut = (png(Image.open(shapes / "000.png")), encoded(Image.open(shapes / "000.png"), "JPEG"))
    broken = {name: content for name, (content, _) in BAD.items()}
    broken |= {f"cut{number}.png": content[: len(content) * 2 // 3] for number, content in enumerate(cut)}
    files = odd_files()
    assert (len(broken), len(files)) == (8, 10)
    files |= broken
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a thing")
    extra = ["base.steps=30", "base.save_every=30", "base.sizes=[{size: 16}]"]
    settings = config(folder, tmp_path / "r", f"data.cache={cache}", *extra)
    train(settings)
    assert len(lines(tmp_path / "r")) >= 30  # an epoch and more
    lists = (tmp_path / "r" / "data").rglob("*skipped*.txt")
    unreadable = (tmp_path / "r" / "data").rglob("unreadable*.txt")
    named = {line.split("\t")[0] for path in (*lists, *unreadable) for line in path.read_text().splitlines()}
    assert named == set(broken)


@pytest.mark.parametrize("what", ["cut short", "one bit", "gone", "no manifest", "half a manifest"])
def test_the_newest_checkpoint_is_damaged(
    shapes: Path,
    tmp_path: Path,
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = config(shapes, tmp_path / "r", "base.save_every=2")
    interrupted(settings, after=5)
    newest = tmp_path / "r/base/checkpoints/step-00000004"
    for file in sorted(path for path in newest.iterdir() if path.name != checkpoint.MANIFEST):
        content = file.read_bytes()
        if what == "cut short":
            file.write_bytes(content[:-1])
        elif what == "one bit":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif what == "gone":
            file.unlink()
        elif what == "no manifest":
            (newest / checkpoint.MANIFEST).unlink(missing_ok=True)
        else:
            (newest / checkpoint.MANIFEST).write_text('{"step": 4, "files": {')
        assert whole(newest.parent) == "step-00000002", file.name
        if "manifest" not in what:
            file.write_bytes(content)
            assert whole(newest.parent) == "step-00000004"
    assert "step-00000004 is damaged (" in caplog.text


def test_killed_and_asked_to_stop_at_random_moments() -> None:
    """Real processes, at random moments of runs of every stage; what comes of them is compared byte for byte."""
    check = Program(ROOT / "tools/check_resume.py", "--kills=4", "--stops=4", "--brief", "--steps=6")
    out, err = check.communicate()
    assert check.returncode == 0, out + err[-2000:]
    assert "4 kills, 4 stops" in out
