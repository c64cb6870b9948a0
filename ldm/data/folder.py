"""A folder of images, searched with all its sub-folders, with captions beside the images.

`a.txt` holds the captions of `a.png`, one on each line. Instead, a `metadata.jsonl` or `metadata.csv` in the image's
folder or above it may list the captions, as Hugging Face's imagefolder does: `file_name` (relative to the metadata
file), the captions (a text, or in JSON a list) in the named column, or in `text`, `caption`, `captions` or `prompt`,
and optionally `score` or `aesthetic_score`, `loss_weight` and `repeats` (visits in an epoch). Several rows with the
same `file_name` are several captions; their numbers stand in one row, or are the same in all. Links are followed, but
not to a folder that they lie in. Files whose names start with a dot are ignored.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ldm.data.image_set import (
    CAPTION_COLUMNS,
    NUMBER_COLUMNS,
    Captions,
    Entry,
    SourcePart,
    decode_caption,
    first_of,
    to_captions,
)  # fmt: skip
from ldm.data.places import IMAGE_SUFFIXES
from ldm.errors import LdmError, listing

log = logging.getLogger(__name__)

Record = dict[str, Any]  # a row of a metadata file
Listed = tuple[object, Record]  # captions in a row, and its columns of numbers

_METADATA = ("metadata.jsonl", "metadata.csv")
_TABLES = frozenset({"csv", "json", "jsonl", "parquet", "tsv"})  # suffixes of files that may hold captions
_DRIVE = re.compile(r"[A-Za-z]:/")


class Folder:
    """Images in a folder. Keys are paths within it.

    Args:
        root: the folder.
        caption_column: the column of captions in the metadata files, if it does not have one of the usual names.
        apart: columns of the metadata, and folders, whose images lie beside these.
    """

    def __init__(self, root: Path, caption_column: str | None = None, apart: Sequence[str] = ()) -> None:
        self.root = root
        self.name = str(root)
        self.caption_column = caption_column
        self.apart = apart
        self._columns: list[str] = []  # of the metadata files
        self._others = ""  # files that may hold captions and are not read
        self._passed_over: list[str] = []

    def parts(self) -> list[SourcePart]:
        """One part, listed at every start."""
        return [SourcePart(str(self.root.resolve()), "", self._entries)]

    def open(self, where: str) -> BinaryIO:
        """The file at a path within the folder."""
        return (self.root / where).open("rb")

    def unread(self) -> str:
        """Columns and files that may hold captions and are not read; "" if there are none."""
        found = []
        if self._columns and not self.caption_column and not set(self._columns) & set(CAPTION_COLUMNS):
            columns = listing(self._columns, 12)
            found.append(f"the metadata has the columns {columns}: name the one of captions with caption_column")
        if self._others:
            found.append(f"captions are read from .txt, {' and '.join(_METADATA)}, but not from {self._others}")
        return "; ".join(found)

    def passed_over(self) -> list[str]:
        """Files that are neither images nor captions of one, and captions that others take precedence over."""
        return self._passed_over

    def _entries(self) -> Iterator[Entry]:
        stamps = self.files()
        listed, others = self._listed(stamps)
        images = [
            path
            for path in sorted(stamps)
            if path in listed or (path not in others and _suffix(path) in IMAGE_SUFFIXES)
        ]
        used = {path: stamp for path, stamp in stamps.items() if path not in others}
        beside = {_stem(path): path for path in sorted(stamps) if _suffix(path) == "txt"}  # .TXT sorts before .txt
        self._others = listing(_others(used, images))
        self._passed_over = list(_unused(used, images, beside, listed))
        if stamps and not images:
            endings = [f".{suffix}" for suffix, _ in Counter(map(_suffix, sorted(stamps))).most_common()]
            raise LdmError(f"{self.root} holds no image that can be used: its files end in {listing(endings, 8)}")
        for path in images:
            yield self._entry(path, beside.get(_stem(path), ""), stamps, listed.get(path, []))

    def _entry(self, path: str, beside: str, stamps: dict[str, str], listed: list[Listed]) -> Entry:
        def captions() -> Captions:
            texts = tuple(text for said, _ in listed for text in to_captions(said, {}).texts)
            if not texts and beside:
                texts = to_captions(decode_caption((self.root / beside).read_bytes()).split("\n"), {}).texts
            return replace(to_captions(None, _agreed(numbers for _, numbers in listed)), texts=texts)

        digest = hashlib.blake2b(repr(listed).encode(errors="replace"), digest_size=8).hexdigest() if listed else ""
        return Entry(path, path, stamps[path], f"{digest}{stamps.get(beside, '')}", captions)

    def files(self) -> dict[str, str]:
        """The stamps of the files by their paths, without the folders that lie apart."""
        root = self.root.resolve()
        inside = [Path(one).resolve() for one in self.apart if Path(one).is_dir()]
        apart = tuple(f"{one.relative_to(root).as_posix()}/" for one in inside if root in one.parents)
        return {path: stamp for path, stamp in _files(str(self.root)) if not path.startswith(apart)}

    def rows(self, names: _Names) -> Iterator[tuple[str, str, Record]]:
        """The rows of all metadata files, each with its image and the metadata file."""
        for path in sorted(names.stamps):
            if posixpath.basename(path).lower() in _METADATA:
                for record in _records(self.root / path):
                    yield names.find(path, str(record["file_name"])), path, record

    def _listed(self, stamps: dict[str, str]) -> tuple[dict[str, list[Listed]], set[str]]:
        """The rows of all metadata files, by image; and the images that their columns `apart` name."""
        names, columns = _Names(self.root, stamps), dict[str, None]()
        found, others = dict[str, list[Listed]](), set[str]()
        wanted = (self.caption_column,) if self.caption_column else CAPTION_COLUMNS
        for image, path, record in self.rows(names):
            columns |= dict.fromkeys(record)
            numbers = {name: record[name] for name in NUMBER_COLUMNS if record.get(name) is not None}
            found.setdefault(image, []).append((first_of(record, *wanted), numbers))
            others |= {names.find(path, str(record[one])) for one in self.apart if record.get(one)}
        self._columns = list(columns)
        if self.caption_column and self.caption_column not in columns:
            raise _no_column(self.root, f"{self.caption_column!r} for captions", self._columns)
        return found, others


class Column:
    """The images that a column of a folder's metadata names. Keys are those of the rows' own images.

    Args:
        root: the folder.
        column: the column; its values are paths relative to the metadata file.
    """

    def __init__(self, root: Path, column: str) -> None:
        self.folder = Folder(root)
        self.column = column
        self.name = f"the column {column} of {root}"

    def parts(self) -> list[SourcePart]:
        """One part, listed at every start."""
        return [SourcePart(f"{self.folder.root.resolve()}\t{self.column}", "", self._entries)]

    def open(self, where: str) -> BinaryIO:
        """The file at a path within the folder."""
        return self.folder.open(where)

    def unread(self) -> str:
        """Nothing: these images need no captions."""
        return ""

    def passed_over(self) -> list[str]:
        """Nothing: the folder tells it."""
        return []

    def _entries(self) -> Iterator[Entry]:
        root, stamps = self.folder.root, self.folder.files()
        names, columns, found = _Names(root, stamps), dict[str, None](), dict[str, str]()
        for image, path, record in self.folder.rows(names):
            columns |= dict.fromkeys(record)
            if not record.get(self.column):
                continue
            file = names.find(path, str(record[self.column]))
            if found.setdefault(image, file) != file:
                raise LdmError(f"{root / path}: {image} has {found[image]} and {file} as {self.column}; keep one")
        if self.column not in columns:
            raise _no_column(root, repr(self.column), list(columns))
        for image, file in sorted(found.items()):
            yield Entry(image, file, stamps[file], "", lambda: Captions(()))


def _no_column(root: Path, what: str, columns: list[str]) -> LdmError:
    has = f"its metadata has {listing(columns, 12)}" if columns else f"it has no {' or '.join(_METADATA)}"
    return LdmError(f"{root} has no column {what}: {has}")


class _Names:
    """Names in metadata files, found among the files of a folder."""

    def __init__(self, root: Path, stamps: dict[str, str]) -> None:
        self.root, self.stamps = root, stamps
        self.bases = [f"{base}/" for base in (root.absolute().as_posix(), root.resolve().as_posix())]

    @cached_property
    def composed(self) -> dict[str, str]:
        """The files by name in Unicode's composed form: macOS stores others than most programs write."""
        return {unicodedata.normalize("NFC", path): path for path in self.stamps}

    @cached_property
    def alike(self) -> dict[str, str]:
        """The files by name without case."""
        return {name.casefold(): path for name, path in self.composed.items()}

    def find(self, metadata: str, name: str) -> str:
        """The file that a metadata file lists; `\\` also separates folders, and a path may be absolute.

        Raises:
            LdmError: there is none.
        """
        for one in (name, name.replace("\\", "/")):
            base = next((base for base in self.bases if one.startswith(base)), None)
            path = one.removeprefix(base) if base else posixpath.join(posixpath.dirname(metadata), one)
            path = posixpath.normpath(path)
            if path in self.stamps:
                return path
        if found := self.composed.get(unicodedata.normalize("NFC", path)):
            return found
        if any(part.startswith(".") and part != ".." for part in path.split("/")):
            why = "whose name starts with a dot, so that it is ignored; rename it, or remove it from the list"
        elif posixpath.isabs(path) or path.startswith("../") or _DRIVE.match(one):
            why = f"which is not in {self.root}; give names relative to the metadata file"
        elif near := self.alike.get(unicodedata.normalize("NFC", path).casefold()):
            why = f"which is not there, but {near} is; change the name in the list"
        else:
            why = "which is not there; remove it from the list"
        raise LdmError(f"{self.root / metadata} lists {path if why.startswith('which is not there') else name}, {why}")


def _files(folder: str, within: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, str]]:
    """The files in a folder and its sub-folders: path, and a stamp of size and time of modification.

    `above` holds the device and number of the folders around it: a link to one of these would go round in circles.
    """
    path = os.path.join(folder, within)  # noqa: PTH118  a Path for each of a million files is slow
    try:
        here = os.stat(path)  # noqa: PTH116
        if (here.st_dev, here.st_ino) in above:
            return
        above = (*above, (here.st_dev, here.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from _files(folder, f"{within}{entry.name}/", above)
                elif entry.is_file():
                    status = entry.stat()
                    yield f"{within}{entry.name}", f"{status.st_size}:{status.st_mtime_ns}"
                elif entry.is_symlink():  # to nothing
                    if _suffix(entry.name) in IMAGE_SUFFIXES | {"txt"}:
                        yield f"{within}{entry.name}", "absent"  # reading it will tell
                    else:
                        log.warning("the link %s leads to nothing: what it stood for is not used", entry.path)
    except OSError as error:
        raise LdmError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def _suffix(path: str) -> str:
    """What follows the last dot of a file's name, in lower case."""
    return posixpath.splitext(path)[1][1:].lower()


def _stem(path: str) -> str:
    """A path without its suffix."""
    return posixpath.splitext(path)[0]


def _others(stamps: dict[str, str], images: list[str]) -> list[str]:
    """Files that may hold captions and are not read: they have an image's name, or a table's suffix."""
    stems, known = {_stem(path) for path in images}, set(images)
    return [
        path
        for path in sorted(stamps)
        if path not in known
        and posixpath.basename(path).lower() not in _METADATA
        and _suffix(path) != "txt"
        and (_suffix(path) in _TABLES or _stem(path) in stems)
    ]


def _unused(
    stamps: dict[str, str], images: list[str], beside: dict[str, str], listed: dict[str, list[Listed]]
) -> Iterator[str]:
    """A line for each kind of files in a folder that are not used."""
    stems = Counter(_stem(path) for path in images)
    orphans = [path for stem, path in beside.items() if stem not in stems]
    if orphans:
        yield f"{len(orphans)} .txt files have no image of their name: {listing(orphans, 3)}"
    said = [path for path in images if any(text for text, _ in listed.get(path, ()))]
    double = [beside[stem] for path in said if (stem := _stem(path)) in beside]
    if double:
        yield f"{len(double)} .txt files are not read, because the metadata lists captions: {listing(double, 3)}"
    shared = [beside[stem] for stem, count in stems.items() if count > 1 and stem in beside]
    if shared:
        yield f"{len(shared)} .txt files are captions of several images of the same name: {listing(shared, 3)}"
    known = {*images, *beside.values()}
    others = Counter(
        _suffix(path) for path in stamps if path not in known and posixpath.basename(path).lower() not in _METADATA
    )
    if others:
        most = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
        kinds = [f"{count} {f'.{suffix}' if suffix else 'without'}" for suffix, count in most]
        yield f"{others.total()} other files are not read, by ending: {listing(kinds, 8)}"


def _agreed(rows: Iterable[Record]) -> Record:
    """The numbers of an image in all rows that list it.

    Raises:
        LdmError: two rows differ.
    """
    found: Record = {}
    for row in rows:
        for name, value in row.items():
            if value != "" and found.setdefault(name, value) != value:
                raise LdmError(f"its {name} is {found[name]!r:.80} in one row and {value!r:.80} in another; keep one")
    return found


def _records(path: Path) -> Iterator[Record]:
    """The rows of a metadata file."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = (line for line in file if line.strip())
            rows = _csv_rows(path, file) if path.suffix.lower() == ".csv" else map(json.loads, lines)
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or not row.get("file_name"):
                    has = f"; it has {listing(list(row), 12)}" if isinstance(row, dict) and row else ""
                    raise LdmError(f"{path}, row {number} has no file_name{has}")
                yield row
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, LdmError):
            raise
        raise LdmError(f"{path} cannot be read after row {number}: {error}") from None
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None


def _csv_rows(path: Path, file: TextIO) -> Iterator[Record]:
    """The rows of a CSV file, each with as many fields as there are columns."""
    rows = csv.reader(file, strict=True)  # a quotation mark without its partner would swallow the following rows
    columns = next(rows, [])
    if columns and "file_name" not in columns:
        raise LdmError(f"{path} has no column file_name; its columns, separated by commas, are {listing(columns, 12)}")
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise LdmError(f"{path} has several columns {listing(twice)}; rename or remove all but one")
    for number, row in enumerate((row for row in rows if any(map(str.strip, row))), 1):
        if len(row) != len(columns):
            raise LdmError(
                f"{path}, row {number} has {len(row)} fields, but there are {len(columns)} columns "
                f"({listing(columns, 12)}): put texts with commas in quotation marks"
            )
        yield dict(zip(columns, row, strict=True))
