"""The history of a server: images that were asked to be kept, as files in a folder, with a table of them in SQLite.

An image is one file and one row, written in one transaction by a thread of the history's own, so that the engine does
not wait for disks. Names of files are random and never come from requests.
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
from ldm.files import replacing

log = logging.getLogger(__name__)
TABLE = "history.sqlite"
IMAGES = "images"  # the folder of the files
VERSION = 1  # of the table
WAIT_SECONDS = 10.0  # for another process that writes
MOST = 100  # images of a page
WORDS = 16  # of a search
CREATE = """
CREATE TABLE IF NOT EXISTS images (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL UNIQUE, made REAL NOT NULL, seed TEXT NOT NULL,
    text TEXT NOT NULL, record TEXT NOT NULL
)
"""  # text is what is searched: prompts and adapters, folded to lower case; a seed may exceed SQLite's numbers
Making = Callable[[], tuple[bytes, dict[str, Any]]]  # gives an image's file, and its record


@dataclass(frozen=True)
class Kept:
    """An image in a history."""

    id: int
    made: float  # seconds since 1970
    record: dict[str, Any]


class History:
    """A history in a folder. All methods may be called from any thread; several processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        """Open the history of a folder, which is created if need be, for its owner alone.

        Raises:
            LdmError: the folder cannot be written, or its table is damaged or of a later version.
        """
        self.folder = folder.absolute()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / IMAGES).mkdir(exist_ok=True)
        except OSError as error:
            raise LdmError(f"the history {folder} cannot be written: {error.strerror or error}") from None
        with self._table() as table:
            (version,) = table.execute("PRAGMA user_version").fetchone()
            (sound,) = table.execute("PRAGMA quick_check(1)").fetchone()
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
            if version > VERSION:
                raise LdmError(f"the history {folder} is of a later version of ldm; use that one, or another folder")
            if version == 0:
                table.execute(CREATE)
                table.execute(f"PRAGMA user_version = {VERSION}")
        self.coming: queue.SimpleQueue[Making | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="ldm-history", daemon=True)
        self._writer.start()

    # --- writing ------------------------------------------------------------------------------------------------------

    def keep(self, making: Making) -> None:
        """Keep an image, soon; one that cannot be kept is told in the log."""
        self.coming.put(making)

    def close(self) -> None:
        """Write what is to be kept, and end."""
        self.coming.put(None)
        self._writer.join()

    def _write(self) -> None:
        while (making := self.coming.get()) is not None:
            try:
                self.add(*making())
            except LdmError as error:
                log.error("%s", error)
            except Exception:
                log.exception("an image could not be kept in the history")

    def add(self, data: bytes, record: Mapping[str, Any]) -> int:
        """Add an image's file and record; its number.

        Raises:
            LdmError: the folder cannot be written, or the table is damaged.
        """
        name = secrets.token_hex(16)
        path = self._file(name)
        path.parent.mkdir(exist_ok=True)
        row = (name, time.time(), str(record.get("seed", "")), _searched(record), json.dumps(record))
        try:
            with self._table() as table:
                number = table.execute(
                    "INSERT INTO images (file, made, seed, text, record) VALUES (?, ?, ?, ?, ?)", row
                ).lastrowid
                with replacing(path, False, False, len(data)) as temporary:
                    temporary.write_bytes(data)
        except BaseException:
            path.unlink(missing_ok=True)  # it has no row
            raise
        assert number is not None
        return number

    def delete(self, number: int) -> bool:
        """Delete an image and its file; whether it was there.

        Raises:
            LdmError: as `add`.
        """
        with self._table() as table:
            found = table.execute("DELETE FROM images WHERE id = ? RETURNING file", (number,)).fetchone()
        if found is not None:
            self._file(found[0]).unlink(missing_ok=True)
        return found is not None

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, words: str = "", before: int | None = None, count: int = 24) -> tuple[list[Kept], int]:
        """The latest images whose prompts and adapters have all words, or have them as seed; and how many there are.

        Args:
            words: separated by spaces; upper and lower case are the same.
            before: only images with a smaller number: the next page.
            count: at most so many.

        Raises:
            LdmError: the table is damaged.
        """
        parts = words.casefold().split()[:WORDS]
        where = " AND ".join(["(instr(text, ?) OR seed = ?)"] * len(parts)) or "1"
        given: list[Any] = [part for part in parts for _ in range(2)]
        with self._table() as table:
            (total,) = table.execute(f"SELECT count(*) FROM images WHERE {where}", given).fetchone()
            rows = table.execute(
                f"SELECT id, made, record FROM images WHERE {where} AND id < ? ORDER BY id DESC LIMIT ?",
                [*given, 2**62 if before is None else before, min(max(count, 1), MOST)],
            ).fetchall()
        return [Kept(number, made, json.loads(record)) for number, made, record in rows], total

    def image(self, number: int) -> bytes | None:
        """The file of an image; None if there is no such image.

        Raises:
            LdmError: its file is gone, or the table is damaged.
        """
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
        if not re.fullmatch("[0-9a-f]{32}", name):
            raise LdmError("the history is damaged: a row names no file of its folder")
        return self.folder / IMAGES / name[:2] / f"{name}.png"

    @contextmanager
    def _table(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction, which an error undoes."""
        place = self.folder / TABLE
        try:
            with closing(sqlite3.connect(place, timeout=WAIT_SECONDS)) as table, table:
                yield table
        except sqlite3.OperationalError as error:
            raise LdmError(f"the history cannot be used: {error}; see {TABLE} in its folder") from None
        except sqlite3.DatabaseError as error:
            raise LdmError(
                f"the history is damaged: {error}; restore {TABLE} in its folder, or move it away to begin anew"
            ) from None


def _searched(record: Mapping[str, Any]) -> str:
    """The text in which an image is searched."""
    parts = [record.get("prompt"), record.get("negative"), *(record.get("adapters") or {})]
    return "\n".join(str(part) for part in parts if part).casefold()
