"""Checkpoints: written under a temporary name, flushed, renamed; a run resumes from the newest whole one.

A checkpoint is a folder `step-…`: what accelerate saves, and a manifest, written last, with the digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from ldm.errors import LdmError, first_line
from ldm.training.layout import step_name, step_of

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
STATE = {
    "sums": dict,
    "kind": dict,
    "looks": list,
    "log": int,
}  # entries of the state, and their types


def save(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    keep: int,
    more: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Write a checkpoint, called by all ranks; then remove all but the newest `keep`.

    Args:
        accelerator: saves the networks, optimisers and everything else that is registered with it.
        folder: of the checkpoints.
        step: updates done.
        state: everything else that the run depends on, as JSON.
        keep: number of checkpoints that stay.
        more: called by all ranks with the folder, to write files that accelerate does not.

    Raises:
        LdmError: the checkpoint cannot be written; earlier ones are still there.
    """
    path = folder / step_name(step)
    temporary = folder / f".{path.name}.part"
    try:
        if accelerator.is_main_process:
            for left in folder.glob(".step-*.part"):  # left by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        more(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _seal(temporary, step, state)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            _flush(folder)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two from libraries, on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 1e9
        why = getattr(error, "strerror", None) or first_line(error)
        raise LdmError(
            f"checkpoint {path} cannot be written: {why}; {free:.2f} GB are free; "
            "earlier checkpoints are whole: mend this and run the same command again"
        ) from None
    accelerator.wait_for_everyone()
    return path


def check_room(folder: Path, nbytes: int, keep: int) -> None:
    """Raise where the disk has no room for the checkpoints that are kept and one more while it is written.

    Args:
        folder: of the checkpoints, which may not exist yet.
        nbytes: size of a checkpoint, about.
        keep: number of checkpoints that stay.

    Raises:
        LdmError: there is not enough room.
    """
    free = shutil.disk_usage(folder.parent).free
    need = (keep + 1 - min(len(checkpoints(folder)), keep)) * nbytes
    if free < need:
        raise LdmError(
            f"{folder}: {free / 1e9:.2f} GB are free, and checkpoints will need about {need / 1e9:.2f} GB more "
            f"({nbytes / 1e9:.2f} GB each, {keep} kept and one written); make room, or keep fewer"
        )


def _seal(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Flush every file to the disk, and write the manifest last."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _flush(path)
            files[str(path.relative_to(folder))] = _digest(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "state": dict(state), "files": files}, indent=1), encoding="utf-8")
    _flush(manifest)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    found = [(step, path) for path in folder.glob("step-*") if (step := step_of(path.name)) is not None]
    return [path for _, path in sorted(found)]


def states(folder: Path) -> Iterator[dict[str, Any]]:
    """The `state` that `save` was given, of each checkpoint that can be read."""
    for path in checkpoints(folder):
        try:
            yield dict(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["state"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one, which resuming skips too


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its manifest. Damaged ones are named in a warning and skipped."""
    for path in reversed(checkpoints(folder)):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            wrong = [name for name, digest in manifest["files"].items() if _digest(path / name) != digest]
            state = manifest["state"]
            if not (manifest["files"] and all(isinstance(state[name], kind) for name, kind in STATE.items())):
                wrong = [MANIFEST]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            wrong = [MANIFEST]
        if not wrong:
            return path, manifest
        log.warning("checkpoint %s is damaged (%s); the one before is taken", path, wrong[0])
    return None
