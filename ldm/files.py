"""Files: format detection, JSON, digests, and atomic writing.

A safetensors file can hold its own SHA-256 in its header: the digest is computed with zeros in that place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from ldm.errors import LdmError

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

DIGEST = "ldm.sha256"
HASHED = 64 * 2**20  # bytes that are mapped at a time when a file is hashed

Progress = Callable[[str, int, int], None]  # name of the work, bytes done, bytes in total


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


def sniff(path: Path) -> str:
    """The format of a file by its first bytes: "safetensors", "pickle", or a description for error messages."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "pickle"
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    if start.lstrip()[:1] in (b"{", b"["):
        return "a JSON file"
    if start.lstrip()[:1] == b"<":
        return "a web page"
    return "not a safetensors file" if start.count(0) else "a text file"


def walked(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and those within it, at any depth, each with the sorted names of its folders and of its files.

    Links to folders are followed, and every real folder is entered once. Folders that the caller takes out of their
    list are not entered.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: (Path(place, name).is_symlink(), name))  # links come last
        yield Path(place), folders, sorted(names)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MB.

    Raises:
        LdmError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > 64 * 2**20:
            raise LdmError(f"{path} has {path.stat().st_size} bytes; that is no configuration")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, LdmError):
            raise
        raise LdmError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise LdmError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as Hugging Face does, indented with sorted keys; bytes of names that are not UTF-8 become escapes."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


# --- digests ----------------------------------------------------------------------------------------------------------


DIGEST_AT = re.compile(rb'"' + re.escape(DIGEST).encode() + rb'":"([0-9a-f]{64})"')


def _split_header(path: Path) -> tuple[bytes, str]:
    """The start of a safetensors file, up to the tensors, with zeros in place of the digest; and the digest.

    The start is empty for other files; the digest is "" if the header has none.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(path.stat().st_size - 8, 2**30):
            return b"", ""
        header = start + file.read(length)
    found = DIGEST_AT.search(header)
    if not found:
        return header, ""
    return header[: found.start(1)] + b"0" * 64 + header[found.end(1) :], found[1].decode()


def file_digest(path: Path, progress: Progress = silent, plain: bool = False) -> str:
    """SHA-256 of a file, computed with zeros in place of a digest in its header unless it is wanted `plain`."""
    header = b"" if plain else _split_header(path)[0]
    digest = hashlib.sha256(header)
    total = path.stat().st_size
    with path.open("rb") as file:
        for start in range(0, total, HASHED):
            end = min(start + HASHED, total)
            with mmap(file.fileno(), end - start, access=ACCESS_READ, offset=start) as piece, memoryview(piece) as view:
                digest.update(view[max(len(header) - start, 0) :])
            progress(f"checking {path.name}", end, total)
    return digest.hexdigest()


def stated_digest(path: Path) -> str:
    """The digest in a file's own header, "" if it has none."""
    return _split_header(path)[1]


def check_digest(path: Path, expected: str | None = None, progress: Progress = silent) -> bool:
    """Compare a file with `expected` and with the digest in its header; returns False if neither is available.

    Raises:
        LdmError: the digests differ.
    """
    wanted = {value for value in (expected, stated_digest(path)) if value}
    if not wanted:
        return False
    digest = file_digest(path, progress)
    if wanted != {digest}:
        other = sorted(wanted - {digest})[0]
        raise LdmError(
            f"{path} has changed since it was written (SHA-256 {digest[:12]}…, expected {other[:12]}…); "
            "fetch or write it again"
        )
    return True


@contextmanager
def alongside(check: Callable[[], object]) -> Iterator[None]:
    """Run `check` in a thread while the body runs, since hashing uses one core; errors of the check take precedence."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(check)
        try:
            yield
        finally:
            result.result()


# --- writing ----------------------------------------------------------------------------------------------------------


def check_destination(path: Path, folder: bool, overwrite: bool) -> Path:
    """The real path to write to, with links resolved.

    Raises:
        LdmError: `path` exists and `overwrite` is not set; it is a file instead of a folder or the reverse; or its
            parent folder is missing.
    """
    try:
        parent = path.absolute().parent
        if not parent.is_dir():
            raise LdmError(f"the folder {parent} does not exist; create it first")
        if path.is_dir() if not folder else path.is_file():
            raise LdmError(f"{path} is a {'folder' if path.is_dir() else 'file'}; choose another name")
        empty = folder and path.is_dir() and not any(path.iterdir())
        if os.path.lexists(path) and not overwrite and not empty:
            raise LdmError(f"{path} exists; choose another name or ask for it to be replaced (overwrite=True, --force)")
        return Path(os.path.realpath(path))
    except LdmError:
        raise
    except (OSError, ValueError) as error:  # no permission, a name too long, a zero byte in it
        raise LdmError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def replacing(path: Path, folder: bool, overwrite: bool, need: int) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end it replaces `path`, on an error it is removed.

    If `path` is a link, its target is replaced. What killed writers of the same path left behind is removed.

    Raises:
        LdmError: see `check_destination`; or the disk is not writable, has less than `need` bytes free, or is full.
    """
    target = check_destination(path, folder, overwrite)
    temporary = target.parent / f".{_place(target)}-{secrets.token_hex(6)}.part"
    old = temporary.with_suffix(".old")
    held = None
    try:
        _sweep(target)
        free = shutil.disk_usage(target.parent).free
        if need > free:
            raise LdmError(f"{path} needs {need / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on its disk")
        if folder:
            temporary.mkdir()
        else:
            temporary.touch()
        held = _hold(temporary)
        yield temporary
        if folder and target.exists():
            target.rename(old)
        temporary.replace(target)
    except OSError as error:
        raise LdmError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if held is not None:
            os.close(held)
        if old.exists() and not target.exists():  # interrupted between the two renames
            old.rename(target)
        for rest in (temporary, old):
            _remove(rest)


# --- what killed writers left -----------------------------------------------------------------------------------------

YOUNG = 60  # seconds in which a temporary result is never removed: its writer may not have locked it yet


def _place(target: Path) -> str:
    """The part of a temporary name that is the same for all writers of a path."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]


def _hold(temporary: Path) -> int | None:
    """Lock a temporary file or folder as long as this process lives, as a descriptor; None if that cannot be.

    The lock belongs to the descriptor (flock), because the writer opens and closes the file by itself.
    """
    if fcntl is None:
        return None
    try:
        held = os.open(temporary, os.O_RDONLY)
    except OSError:
        return None
    if not lock(held):
        os.close(held)
        return None
    return held


def lock(handle: int) -> bool:
    """Lock an open file as long as it is open (flock); False if another process has it, or there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(target: Path) -> None:
    """Remove what killed writers of a path left.

    A result that was about to be replaced is removed only if a new one is there.
    """
    sweep(target.parent.glob(f".{_place(target)}-*.part"))
    for old in target.parent.glob(f".{_place(target)}-*.old"):
        with contextlib.suppress(OSError):  # the file is not ours
            if target.exists():
                _remove(old)


def sweep(found: Iterable[Path]) -> None:
    """Remove those of temporary results that killed writers left: not locked and not young; none, without locks."""
    for rest in found:
        with contextlib.suppress(OSError):  # another writer has just finished, or the file is not ours
            newest = max(path.stat().st_mtime for path in (rest, *rest.rglob("*")))
            held = _hold(rest) if time.time() - newest > YOUNG else None
            if held is not None:
                _remove(rest)
                os.close(held)


def _remove(rest: Path) -> None:
    if rest.is_dir() and not rest.is_symlink():
        shutil.rmtree(rest, ignore_errors=True)
    else:
        rest.unlink(missing_ok=True)
