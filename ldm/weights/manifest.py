"""The manifest of a model folder that we wrote: the digest of every file, so that damaged files are not loaded."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ldm.errors import LdmError, listing
from ldm.files import Progress, check_digest, file_digest, read_json, silent, write_json

NAME = "ldm_manifest.json"


def write_manifest(folder: Path, known: dict[str, str]) -> None:
    """Write the manifest of a folder; `known` holds the digests that are already computed, by path in the folder."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    digests = {name: known.get(name) or file_digest(folder / name) for name in files}
    write_json(folder / NAME, {"format": 1, "sha256": digests})


def check_manifest(folder: Path, files: Iterable[Path], progress: Progress = silent) -> bool:
    """Check files against the folder's manifest; returns False if the folder has none.

    Raises:
        LdmError: a file differs from the manifest, is missing, or is not in it.
    """
    path = folder / NAME
    if not path.exists():
        return False
    content = read_json(path)
    digests = content.get("sha256")
    if content.get("format") != 1 or not isinstance(digests, dict) or not all(map(_plain, digests, digests.values())):
        raise LdmError(f"{path} is damaged, or of another format; fetch or write it again, or delete it")
    missing = sorted(name for name in digests if not (folder / name).is_file())
    if missing:
        raise LdmError(f"{folder} is incomplete: {listing(missing)} missing; fetch or write it again")
    names = {file: file.relative_to(folder).as_posix() for file in files}
    foreign = sorted(name for name in names.values() if name not in digests)
    if foreign:
        raise LdmError(
            f"{folder}: {listing(foreign)} did not come with this model; take it away, or delete {path.name}"
        )
    configs = [folder / name for name in digests if name.endswith((".json", ".txt"))]
    try:
        with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter's lock
            list(
                pool.map(
                    lambda f: check_digest(f, digests[f.relative_to(folder).as_posix()], progress), {*names, *configs}
                )
            )
    except LdmError as error:
        raise LdmError(f"{error}; or, if the change is wanted, delete {path}") from None
    return True


def _plain(name: str, digest: object) -> bool:
    """Whether an entry is a normalised path within the folder and a digest."""
    parts = PurePosixPath(name).parts
    inside = bool(parts) and ".." not in parts and not PurePosixPath(name).is_absolute()
    return inside and PurePosixPath(name).as_posix() == name and isinstance(digest, str)
