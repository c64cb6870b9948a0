"""Files written whole: what killed writers left is removed by the next writer of the same path, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launched import aged

from ldm import files
from ldm.files import replacing

WRITER = """
import os, signal, sys
from pathlib import Path
from ldm.files import replacing

with replacing(Path(sys.argv[1]), folder=sys.argv[2] == "folder", overwrite=True, need=0) as temporary:
    (temporary / "weights" if temporary.is_dir() else temporary).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(target: Path, kind: str) -> Path:
    """What a writer leaves that is killed while it writes; older than any writer that has not locked it yet."""
    before = set(target.parent.iterdir())
    child = subprocess.run([sys.executable, "-c", WRITER, str(target), kind], cwd=Path(__file__).parents[1])
    assert child.returncode == -signal.SIGKILL
    (left,) = set(target.parent.iterdir()) - before
    return left


def write(target: Path, kind: str, text: str = "new") -> None:
    with replacing(target, folder=kind == "folder", overwrite=True, need=0) as temporary:
        (temporary / "weights" if kind == "folder" else temporary).write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, kind: str) -> None:
    target, other = tmp_path / "model", tmp_path / "other"
    left, young, foreign = aged(killed(target, kind)), killed(target, kind), aged(killed(other, kind))
    write(target, kind)
    assert not left.exists()
    assert young.exists()  # its writer may live
    assert foreign.exists()  # for the next writer of that path
    aged(young)
    write(target, kind, "newer")
    assert not young.exists()
    assert (target / "weights" if kind == "folder" else target).read_text() == "newer"
    assert {path.name for path in tmp_path.iterdir()} == {"model", foreign.name}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_writer_writes_stays(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    with replacing(target, folder=kind == "folder", overwrite=True, need=0) as temporary:
        inner = temporary / "weights" if kind == "folder" else temporary
        inner.write_text("first")
        aged(temporary)
        write(target, kind, "second")
        assert inner.read_text() == "first"
    assert (target / "weights" if kind == "folder" else target).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = aged(killed(tmp_path / "model", "folder"))
    monkeypatch.setattr(files, "fcntl", None)
    write(tmp_path / "model", "folder")
    assert left.exists()


def test_a_result_that_was_being_replaced_stays_until_there_is_another(tmp_path: Path) -> None:
    """A writer that is killed between its two renames leaves the former result under another name."""
    target = tmp_path / "model"
    write(target, "folder", "former")
    old = killed(target, "folder").with_suffix(".old")
    target.rename(old)
    with pytest.raises(KeyError), replacing(target, folder=True, overwrite=True, need=0):
        raise KeyError
    assert (old / "weights").read_text() == "former"
    write(target, "folder")
    write(target, "folder")
    assert not old.exists()
