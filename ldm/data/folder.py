"""A folder of images, searched with all its sub-folders, with captions beside the images.

`a.txt` holds the captions of `a.png`, one on each line. Instead, a `metadata.jsonl` or `metadata.csv` in the image's
folder or above it may list the captions, as Hugging Face's imagefolder does: `file_name` (relative to the metadata
file), `text` (a text, or in JSON a list) and optionally `score` or `aesthetic_score`. Several rows with the same
`file_name` are several captions. Files whose names start with a dot are ignored.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ldm.data.image_set import IMAGE_SUFFIXES, Captions, Entry, SourcePart, decode_caption, to_captions
from ldm.errors import LdmError

Record = dict[str, Any]  # a row of a metadata file


class Folder:
    """Images in a folder. Keys are paths within it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def parts(self) -> list[SourcePart]:
        """One part, listed at every start."""
        return [SourcePart(str(self.root.resolve()), "", self._entries)]

    def open(self, where: str) -> BinaryIO:
        """The file at a path within the folder."""
        return (self.root / where).open("rb")

    def _entries(self) -> Iterator[Entry]:
        stamps = dict(_files(str(self.root)))
        records: dict[str, list[Record]] = {}
        for path in sorted(stamps):
            if posixpath.basename(path) in ("metadata.jsonl", "metadata.csv"):
                for record in _records(self.root / path):
                    name = posixpath.normpath(posixpath.join(posixpath.dirname(path), str(record["file_name"])))
                    if name not in stamps:
                        raise LdmError(f"{self.root / path} lists {name}, which is not there; remove it from the list")
                    records.setdefault(name, []).append(record)
        for path in sorted(stamps):
            stem, dot, suffix = path.rpartition(".")
            if suffix.lower() in IMAGE_SUFFIXES and dot:
                yield self._entry(path, f"{stem}.txt", stamps, records.get(path, []))

    def _entry(self, path: str, beside: str, stamps: dict[str, str], records: list[Record]) -> Entry:
        def captions() -> Captions:
            found = [to_captions(record.get("text"), _score(record)) for record in records]
            texts = tuple(text for one in found for text in one.texts)
            if not texts and beside in stamps:
                texts = to_captions(decode_caption((self.root / beside).read_bytes()).split("\n")).texts
            return Captions(texts, found[0].score if found else None)

        listed = hashlib.blake2b(repr(records).encode(errors="replace"), digest_size=8).hexdigest() if records else ""
        return Entry(path, path, stamps[path], f"{listed}{stamps.get(beside, '')}", captions)


def _files(folder: str, within: str = "") -> Iterator[tuple[str, str]]:
    """The files in a folder and its sub-folders: path, and a stamp of size and time of modification."""
    try:
        with os.scandir(os.path.join(folder, within)) as entries:  # noqa: PTH118  a Path for each of a million files is slow
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(folder, f"{within}{entry.name}/")
                elif entry.is_file():
                    status = entry.stat()
                    yield f"{within}{entry.name}", f"{status.st_size}:{status.st_mtime_ns}"
    except OSError as error:
        raise LdmError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def _score(record: Record) -> object:
    return record.get("score", record.get("aesthetic_score"))


def _records(path: Path) -> Iterator[Record]:
    """The rows of a metadata file."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = (line for line in file if line.strip())
            rows = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, lines)
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or not row.get("file_name"):
                    raise LdmError(f"{path}, row {number} has no file_name")
                yield row
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, LdmError):
            raise
        raise LdmError(f"{path} cannot be read after row {number}: {error}") from None
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
