"""The history of a server: images that were asked to be kept, as files in a folder, with a table of them in SQLite.

An image is one file and one row, written in one transaction by a thread of the history's own, so that the engine does
not wait for disks unless many images do. Names of files are random and never come from requests. An image that leaves
loses its row first, in a transaction that notes its file: one that a crash leaves behind is known, and removed later.

A damaged table is not used and not touched. Where there is none, the images that are there are listed anew.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.files import replacing, sweep
from ldm.images import read_settings

log = logging.getLogger(__name__)
TABLE = "history.sqlite"
IMAGES = "images"  # the folder of the files
VERSION = 1  # of the table
WAIT_SECONDS = 10.0  # for another process that writes
BEHIND = 32  # images that wait to be written, of which the next one makes its engine wait
SHOWN = 100  # images of a page
WORDS = 16  # of a search
LARGEST = 2**63 - 1  # number that SQLite holds
NAME = re.compile("[0-9a-f]{32}")  # of a file, without its ending
CREATE = """
CREATE TABLE IF NOT EXISTS images (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL UNIQUE, made REAL NOT NULL, seed TEXT NOT NULL,
    text TEXT NOT NULL, record TEXT NOT NULL
)
"""  # text is what is searched: prompts and adapters, folded to lower case; a seed may exceed SQLite's numbers
INSERT = "INSERT INTO images (file, made, seed, text, record) VALUES (?, ?, ?, ?, ?)"
LEAVING = "CREATE TABLE IF NOT EXISTS leaving (file TEXT PRIMARY KEY)"  # files of images that have no row any more


@dataclass(frozen=True)
class HistoryImage:
    """An image in a history."""

    id: int
    made: float  # seconds since 1970
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ComingImage:
    """An image that is to be kept."""

    encode: Callable[[], bytes]  # its file
    record: dict[str, Any]
    failed: Callable[[], None]


class HistoryError(LdmError):
    """Raised if the table of a history cannot be used: it is damaged, or another process has it for too long."""


class History:
    """A history in a folder. All methods may be called from any thread; several processes may share the folder."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        """Open the history of a folder, which is created if need be, for its owner alone.

        Args:
            folder: of the files and the table.
            most: images that are kept, of more the latest; None: all.

        Raises:
            LdmError: the folder cannot be written, or its table cannot be used, or is of a later version.
        """
        self.folder, self.most = folder.absolute(), most
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / IMAGES).mkdir(exist_ok=True)
        except OSError as error:
            raise LdmError(f"the history {folder} cannot be written: {error.strerror or error}") from None
        with self._table() as table:
            (sound,) = table.execute("PRAGMA quick_check(1)").fetchone()
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
            table.execute("BEGIN IMMEDIATE")  # another process that begins with this folder waits
            (version,) = table.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise LdmError(f"the history {folder} is of a later version of ldm; use that one, or another folder")
            table.execute(CREATE)
            table.execute(LEAVING)
            if version == 0:
                self._list_anew(table)
                table.execute(f"PRAGMA user_version = {VERSION}")
            left = self._shorten(table)
        if left:
            log.info("%d of the oldest images leave the history, which keeps %d", left, self.most)
        self._remove()
        sweep((self.folder / IMAGES).glob("*/.*.part"))
        self.coming: queue.Queue[ComingImage | None] = queue.Queue(BEHIND)
        self._writer = threading.Thread(target=self._write, name="ldm-history", daemon=True)
        self._writer.start()

    # --- writing ------------------------------------------------------------------------------------------------------

    def keep(self, encode: Callable[[], bytes], record: dict[str, Any], failed: Callable[[], None]) -> None:
        """Keep an image, whose file `encode` gives, soon; if it cannot be, the log says why, and `failed` is called."""
        self.coming.put(ComingImage(encode, record, failed))

    def close(self) -> None:
        """Write what is to be kept, and end."""
        self.coming.put(None)
        self._writer.join()

    def _write(self) -> None:
        while (coming := self.coming.get()) is not None:
            try:
                self.add(coming.encode(), coming.record)
            except Exception as error:
                if isinstance(error, LdmError):
                    log.error("%s", error)
                else:
                    log.exception("an image could not be kept in the history")
                coming.failed()

    def add(self, data: bytes, record: Mapping[str, Any]) -> int:
        """Add an image's file and record; its number.

        Raises:
            LdmError: the folder cannot be written, or the table cannot be used (`HistoryError`).
        """
        name = secrets.token_hex(16)
        path = self._file(name)
        path.parent.mkdir(exist_ok=True)
        row = _row(name, time.time(), record)
        try:
            with self._table() as table:
                number = table.execute(INSERT, row).lastrowid
                self._shorten(table)
                with replacing(path, False, False, len(data)) as temporary:
                    temporary.write_bytes(data)
        except BaseException:
            path.unlink(missing_ok=True)  # it has no row
            raise
        self._remove()
        assert number is not None
        return number

    def delete(self, number: int) -> bool:
        """Delete an image and its file; whether it was there.

        Raises:
            LdmError: as `add`.
        """
        if not 0 < number <= LARGEST:
            return False
        with self._table() as table:
            left = _leave(table, "id = ?", number)
        self._remove()
        return left > 0

    def _shorten(self, table: sqlite3.Connection) -> int:
        """Let the oldest images leave that are too many; how many these are."""
        if self.most is None:
            return 0
        (count,) = table.execute("SELECT count(*) FROM images").fetchone()
        if count <= self.most:
            return 0
        return _leave(table, "id IN (SELECT id FROM images ORDER BY id LIMIT ?)", count - self.most)

    def _remove(self) -> None:
        """Remove the files of images that have left; those that cannot be removed now are removed another time."""
        try:
            with self._table() as table:
                for (name,) in table.execute("SELECT file FROM leaving").fetchall():
                    try:
                        if NAME.fullmatch(name):
                            self._file(name).unlink(missing_ok=True)
                    except OSError as error:
                        log.warning("the file of an image that has left cannot be removed: %s", error.strerror)
                    else:
                        table.execute("DELETE FROM leaving WHERE file = ?", (name,))
        except LdmError as error:
            log.warning("files of images that have left are not removed yet: %s", error)

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, words: str = "", before: int | None = None, count: int = 24) -> tuple[list[HistoryImage], int]:
        """The latest images whose prompts and adapters have all words, or have them as seed; and how many there are.

        Args:
            words: separated by spaces; upper and lower case are the same.
            before: only images with a smaller number: the next page.
            count: at most so many.

        Raises:
            HistoryError: the table cannot be used.
        """
        parts = words.casefold().split()[:WORDS]
        where = " AND ".join(["(instr(text, ?) OR seed = ?)"] * len(parts)) or "1"
        given: list[Any] = [part for part in parts for _ in range(2)]
        with self._table() as table:
            (total,) = table.execute(f"SELECT count(*) FROM images WHERE {where}", given).fetchone()
            rows = table.execute(
                f"SELECT id, made, record FROM images WHERE {where} AND id < ? ORDER BY id DESC LIMIT ?",
                [*given, LARGEST if before is None else min(max(before, 0), LARGEST), min(max(count, 1), SHOWN)],
            ).fetchall()
        return [HistoryImage(number, made, _parsed(record)) for number, made, record in rows], total

    def image(self, number: int) -> bytes | None:
        """The file of an image; None if there is no such image.

        Raises:
            LdmError: its file is gone, or the table cannot be used (`HistoryError`).
        """
        if not 0 < number <= LARGEST:
            return None
        with self._table() as table:
            found = table.execute("SELECT file FROM images WHERE id = ?", (number,)).fetchone()
        if found is None:
            return None
        try:
            return self._file(found[0]).read_bytes()
        except OSError as error:
            raise LdmError(f"the file of image {number} of the history cannot be read: {error.strerror}") from None

    # --- folder and table ---------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        """The place of an image's file."""
        if not NAME.fullmatch(name):
            raise HistoryError("the history is damaged: a row names no file of its folder")
        return self.folder / IMAGES / name[:2] / f"{name}.png"

    @contextmanager
    def _table(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction, which an error undoes."""
        place = self.folder / TABLE
        try:
            with closing(sqlite3.connect(place, timeout=WAIT_SECONDS)) as table, table:
                yield table
        except sqlite3.OperationalError as error:
            raise HistoryError(f"the history cannot be used: {error}; see {TABLE} in its folder") from None
        except sqlite3.DatabaseError as error:
            raise HistoryError(
                f"the history is damaged: {error}; restore {TABLE} in its folder, or move it away and start again: "
                "then the images are listed by their own records"
            ) from None

    def _list_anew(self, table: sqlite3.Connection) -> None:
        """List the images whose files are there, by their own records, in the order in which they were made."""
        places = [path for path in (self.folder / IMAGES).glob("??/*.png") if NAME.fullmatch(path.stem)]
        found = sorted((path.stat().st_mtime, path) for path in places)
        table.executemany(INSERT, (_row(path.stem, made, _read(path)) for made, path in found))
        if found:
            log.warning("the history had no table; its %d images are listed anew", len(found))


def _leave(table: sqlite3.Connection, which: str, value: int) -> int:
    """Delete rows of images, with a note of their files; how many there were."""
    files = table.execute(f"DELETE FROM images WHERE {which} RETURNING file", (value,)).fetchall()
    table.executemany("INSERT OR IGNORE INTO leaving (file) VALUES (?)", files)
    return len(files)


def _row(name: str, made: float, record: Mapping[str, Any]) -> tuple[str, float, str, str, str]:
    """The row of an image, as `INSERT` takes it."""
    return name, made, str(record.get("seed", "")), _searched(record), json.dumps(record)


def _parsed(text: str) -> dict[str, Any]:
    """A record in the table; an empty one if it is damaged."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """The record in an image's file; an empty one if the file is damaged."""
    try:
        return read_settings(path)[0] or {}
    except LdmError:
        return {}


def _searched(record: Mapping[str, Any]) -> str:
    """The text in which an image is searched."""
    parts = [record.get("prompt"), record.get("negative"), *(record.get("adapters") or {})]
    text = "\n".join(str(part) for part in parts if part).casefold()
    return text.encode("utf-8", "backslashreplace").decode()  # bytes of file names that are not UTF-8
