"""Captioned images with random access, from any source, with an index that is kept in a file.

The first start reads every image's header and stores sizes and captions in the index; later starts read only the files
that have changed. A file counts as unchanged while its size and time of modification (in nanoseconds) are the same:
digests would mean reading all files at each start. The index is a memory-mapped Arrow file, so the processes that load
images share it without copies.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ldm.data.beside import Beside
from ldm.data.folder_rules import MOST_REPEATS, FolderRule, FolderRules
from ldm.data.skipped import Skipped
from ldm.data.tags import holds
from ldm.errors import LdmError, listing
from ldm.files import replacing
from ldm.images import TRANSPARENT, image_header, load_image, load_noted

log = logging.getLogger(__name__)

SHORTEST = 8  # least length of a side in pixels
LONGEST = 16  # greatest ratio of the longer to the shorter side
NO_RULES = FolderRules()
_AT_ONCE = 4096  # entries in memory while the index is made
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")  # the first that is there holds the captions
SCORE_COLUMNS = ("score", "aesthetic_score")
WEIGHT_COLUMN, REPEATS_COLUMN = "loss_weight", "repeats"
NUMBER_COLUMNS = (*SCORE_COLUMNS, WEIGHT_COLUMN, REPEATS_COLUMN)
MOST_WEIGHT = 1000
_READING = "5"  # counts the changes of how images and captions are read: an index of another number is made anew
_SAME = ("key", "where", "stamp", "caption_stamp")
_SCHEMA = pa.schema(
    [
        ("part", pa.binary(16)),  # digest of the part's name and stamp
        *((name, pa.binary()) for name in _SAME),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("score", pa.float32()),
        ("weight", pa.float32()),
        ("repeats", pa.int32()),
        ("profile", pa.binary()),  # digest of the colour profile from which pixels are converted; empty if they are not
        ("notes", pa.list_(pa.string())),  # what is left out or guessed when the image is read
        ("reason", pa.string()),  # why the image cannot be used; "" if it can
    ],
    metadata={"reading": _READING},
)


@dataclass(frozen=True)
class Captions:
    """The captions of an image, and its numbers."""

    texts: tuple[str, ...]
    score: float | None = None  # aesthetic
    weight: float = 1.0  # of its loss
    repeats: int = 1  # visits in an epoch


@dataclass(frozen=True)
class Example:
    """One image's entry in the index, known without decoding the image."""

    key: str  # the image's name: a path within the source, or a number
    captions: tuple[str, ...]  # empty if captions are optional and the image has none
    width: int  # after rotation to upright
    height: int
    score: float | None  # aesthetic
    weight: float = 1.0  # of its loss


@dataclass(frozen=True)
class Entry:
    """One image as a source lists it. The stamps change with the files."""

    key: str
    where: str  # the address of the image within its source
    stamp: str
    caption_stamp: str
    captions: Callable[[], Captions]  # called if the index does not hold the captions yet; may raise LdmError


@dataclass(frozen=True)
class SourcePart:
    """A part of a source that is indexed as a whole. A part with a stamp is listed again only if the stamp changes."""

    name: str
    stamp: str  # "" if the part has none
    entries: Callable[[], Iterator[Entry]]


class Source(Protocol):
    """A source of captioned images: a folder, shards, a dataset. It can be pickled and sent to other processes."""

    name: str

    def parts(self) -> Iterable[SourcePart]:
        """All parts of the source. Raises LdmError if it cannot be read."""

    def open(self, where: str) -> BinaryIO:
        """One image's file."""

    def unread(self) -> str:
        """What may hold captions in the source and is not read, and the remedy; "" if there is nothing."""

    def passed_over(self) -> list[str]:
        """What the source holds and is not used, a line for each kind; of parts that are not listed again, nothing."""


class ImageSet:
    """The usable images of a source, sorted by key, so that the order does not depend on the storage.

    `skipped` counts the unusable images. Repeated keys get a number: `a.png#2`.

    Args:
        source: the source of the images.
        folder: the folder for the index and the list of skipped images.
        captions: "required", or "optional": images without captions get the empty caption.
        trigger: words that begin each caption, and are the caption of images without one; "" for none.
        rules: of the folders that images lie in.
        mode: PIL's mode of the images: "RGB", or "L" for masks; "A" for the alpha channel as a mask.

    Raises:
        LdmError: no image is usable, too many are unusable, or captions are missing.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        captions: str = "required",
        trigger: str = "",
        rules: FolderRules = NO_RULES,
        mode: str = "RGB",
    ) -> None:
        check_captions(captions)
        self.source = source
        self.trigger = trigger
        self.mode = mode
        self.beside: dict[str, Beside] = {}  # by kind: images beside these
        self.folder = made(folder)
        self._index = _index(source, folder)
        self._table: pa.Table | None = None
        table = self.table
        order = pc.sort_indices(table, [("key", "ascending"), ("where", "ascending")]).to_numpy()
        self.skipped = Skipped(source.name, self._index.with_suffix(".skipped.txt"))
        bad = table.filter(pc.not_equal(table["reason"], ""))
        self.skipped.add_all(zip(map(_text, bad["where"]), bad["reason"].to_pylist(), strict=True))
        self.skipped.check(len(table))
        self._rows = order[pc.equal(table["reason"], "").to_numpy()[order]]
        if not len(self._rows):
            why = f": all {len(table)} are skipped, see {self.skipped.path}" if len(table) else ""
            raise LdmError(f"{source.name} holds no image that can be used{why}")
        self._twice = self._number_twins()
        self._rules, self._rule = rules.of(source.name, self._column("key"))
        if self.skipped.reasons:
            key, reason = next(iter(self.skipped.reasons.items()))
            log.warning(
                "%s: %d of %d images cannot be used and are left out (%s: %s); all are listed in %s",
                source.name, len(self.skipped.reasons), len(table), key, reason, self.skipped.path,
            )  # fmt: skip
        bare = self._bare()
        if bare.any() and not trigger:
            self._report_bare(bare, captions)
        for line in [*source.passed_over(), *self._notes()]:
            log.warning("%s: %s", source.name, line)

    def in_mode(self, mode: str) -> ImageSet:
        """The same images, read in another mode."""
        other = copy.copy(self)
        other.mode = mode
        return other

    def _notes(self) -> Iterator[str]:
        """A line for each kind of what is left out or guessed when images are read, with their number."""
        lists = self._column("notes")
        for note in pc.unique(pc.list_flatten(lists)).to_pylist():
            if note == TRANSPARENT and self.mode == "L":  # of a mask, they are black, as anyone would have it
                continue
            has = self.noted(note)
            names = [self.key(index) for index in has[:3]]
            yield f"{len(has)} images ({listing(names, 3, len(has))}): {note}"

    def noted(self, note: str) -> list[int]:
        """The images of which something is left out or guessed when they are read."""
        lists = self._column("notes")
        found: list[int] = pc.list_parent_indices(lists).filter(pc.equal(pc.list_flatten(lists), note)).to_pylist()
        return found

    def _report_bare(self, bare: np.ndarray, captions: str) -> None:
        """Raise an error if captions are required; if they are optional, tell what may hold them and is not read."""
        names = [self.key(index) for index in np.flatnonzero(bare)[:5]]
        unread = self.source.unread()
        what = (
            f"{self.source.name}: {bare.sum()} of {len(bare)} images have no caption "
            f"({listing(names, count=int(bare.sum()))}); "
        )
        if captions == "required":
            remedy = "write them, set trigger (words for all images), or set captions: optional"
            raise LdmError(f"{what}{unread}{'; or ' if unread else ''}{remedy}")
        if unread:
            log.warning("%s%s", what, unread)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_table": None}  # another process maps the files itself

    @property
    def table(self) -> pa.Table:
        """The index, memory-mapped."""
        if self._table is None:
            self._table = pa.ipc.open_file(pa.memory_map(str(self._index))).read_all()
        return self._table

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Widths and heights of all images (N,)."""
        return self.table["width"].to_numpy()[self._rows], self.table["height"].to_numpy()[self._rows]

    def key(self, index: int) -> str:
        """The name of an image."""
        return self._twice.get(index) or _text(self.table["key"][self._rows[index]])

    def all_keys(self) -> list[str]:
        """The names of all images."""
        return [self._twice.get(index) or _text(key) for index, key in enumerate(self._column("key"))]

    def all_stamps(self) -> list[str]:
        """The stamps of all images; it changes with the image's file, or if its colours are read otherwise."""
        stamps, profiles = self._column("stamp"), self._column("profile")
        return [_text(stamp) + _text(profile) for stamp, profile in zip(stamps, profiles, strict=True)]

    def example(self, index: int) -> Example:
        """An image's entry in the index."""
        row = self._rows[index]
        captions, width, height, score, weight = (
            self.table[name][row].as_py() for name in ("captions", "width", "height", "score", "weight")
        )
        rule = self._rule_of(index)
        said = tuple(self._begun(captions, rule))
        return Example(self.key(index), said, width, height, score, weight * rule.weight)

    def read(self, index: int, least: int = 0) -> Image.Image:
        """An image, upright; for `least` see `load_image`.

        Raises:
            LdmError: the image cannot be decoded, or its size differs from the index.
        """
        row = self._rows[index]
        size = self.table["width"][row].as_py(), self.table["height"][row].as_py()
        try:
            file = self.source.open(_text(self.table["where"][row]))
        except OSError as error:
            raise LdmError(f"it cannot be read: {error.strerror or error}") from None
        return read_image(file, size, least, self.mode)

    def all_captions(self) -> list[list[str]]:
        """The captions of all images."""
        rows = self._column("captions").to_pylist()
        return [self._begun(captions, self._rule_of(index)) for index, captions in enumerate(rows)]

    def repeats(self) -> np.ndarray:
        """The visits of each image in an epoch (N,)."""
        own = self._column("repeats").to_numpy()
        return own * np.array([rule.repeats for rule in self._rules])[self._rule]

    def weights(self) -> np.ndarray:
        """The weight of each image's loss (N,)."""
        return self._column("weight").to_numpy() * np.array([rule.weight for rule in self._rules])[self._rule]

    def captions(self) -> list[str]:
        """All distinct captions, sorted, with the empty caption if some images have none."""
        lists = self._column("captions")
        distinct = {self._begun([text], FolderRule())[0] for text in pc.unique(pc.list_flatten(lists)).to_pylist()}
        bare = np.flatnonzero(pc.equal(pc.list_value_length(lists), 0).to_numpy())
        rules = [self._rules[number] for number in np.unique(self._rule[bare])]
        own = {text for rule in rules for text in self._begun([], rule) or [""]}
        return sorted(distinct | own)

    def _rule_of(self, index: int) -> FolderRule:
        """The rule of the folder that an image lies in."""
        return self._rules[int(self._rule[index])]

    def _bare(self) -> np.ndarray:
        """Which images (N,) have no caption, and none by their folder."""
        said = np.array([bool(rule.caption) for rule in self._rules])[self._rule]
        return pc.equal(pc.list_value_length(self._column("captions")), 0).to_numpy() & ~said

    def _begun(self, captions: list[str], rule: FolderRule) -> list[str]:
        """An image's captions, or its folder's, begun with the trigger words where they lack them; or these alone."""
        captions = captions or ([rule.caption] if rule.caption else [])
        if not self.trigger:
            return captions
        whole = [one if holds(one, self.trigger) else f"{self.trigger}, {one}" for one in captions if one]
        return whole or [self.trigger]

    def _column(self, name: str) -> pa.ChunkedArray:
        """A column of the index, restricted to the usable images, in key order."""
        return self.table[name].take(pa.array(self._rows))

    def _number_twins(self) -> dict[int, str]:
        """Numbered keys, by index, of the images whose key repeats an earlier image's."""
        keys = self._column("key").combine_chunks()
        same = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
        found: dict[int, str] = {}
        count = 1
        for index in (np.flatnonzero(same) + 1).tolist():
            count = count + 1 if index - 1 in found else 2
            found[index] = f"{_text(keys[index])}#{count}"
        return found


def read_image(file: BinaryIO, size: tuple[int, int], least: int, mode: str = "RGB") -> Image.Image:
    """The image in a file, checked against its width and height, or their fraction if `least` reduces it."""
    with file:
        if mode == "A":
            image = load_noted(file, "the file", least)[0].convert("RGBA").getchannel("A")
        else:
            image = load_image(file, mode, "the file", least)
    if image.size not in [tuple(-(-side // n) for side in size) for n in (1, 2, 4, 8)]:
        raise LdmError(f"it has {image.width}×{image.height} pixels, not {size[0]}×{size[1]} as its header said")
    return image


def made(folder: Path) -> Path:
    """Create a folder if it does not exist, and return it.

    Raises:
        LdmError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LdmError(f"the folder {folder} cannot be made: {error.strerror}") from None
    return folder


def check_captions(captions: str) -> None:
    """Raise LdmError unless the setting is "required" or "optional"."""
    if captions not in ("required", "optional"):
        raise LdmError(f"captions: {captions!r} is not known; choose required or optional")


def check_size(width: int, height: int) -> None:
    """Raise LdmError for an image of absurd shape."""
    if min(width, height) < SHORTEST or max(width, height) > LONGEST * min(width, height):
        raise LdmError(
            f"{width}×{height} pixels: sides need at least {SHORTEST} pixels and at most {LONGEST} times the other side"
        )


def first_of(record: Mapping[str, Any], *names: str) -> Any:
    """The value in the first of these columns in which a record has one, or None."""
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), None)


def decode_caption(data: bytes) -> str:
    """The text of a caption file, which must be UTF-8.

    Raises:
        LdmError: the file is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LdmError(f"its caption is not UTF-8 (byte {data[error.start]:#x} at {error.start}); convert it") from None


def to_captions(texts: object, record: Mapping[str, Any]) -> Captions:
    """Captions and numbers from a metadata record: a text or a list of texts, without blank ones; score and the like.

    Raises:
        LdmError: a value has another type, or is out of bounds.
    """
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise LdmError(f"its caption is {texts!r:.80}; a text or a list of texts is needed")
    score = _number(record, "score", *SCORE_COLUMNS)
    weight = _number(record, WEIGHT_COLUMN, WEIGHT_COLUMN)
    repeats = _number(record, REPEATS_COLUMN, REPEATS_COLUMN)
    if weight is not None and not 0 <= weight <= MOST_WEIGHT:
        raise LdmError(f"its {WEIGHT_COLUMN} is {weight:g}; a number from 0 to {MOST_WEIGHT} is needed")
    if repeats is not None and not (1 <= repeats <= MOST_REPEATS and repeats.is_integer()):
        raise LdmError(f"its {REPEATS_COLUMN} is {repeats:g}; a whole number from 1 to {MOST_REPEATS} is needed")
    return Captions(
        tuple(text.strip().encode(errors="replace").decode() for text in texts if text.strip()),
        score,
        1.0 if weight is None else weight,
        int(repeats or 1),
    )


def _number(record: Mapping[str, Any], what: str, *columns: str) -> float | None:
    """The number in the first of these columns in which a record has one, or None."""
    value = first_of(record, *columns)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise LdmError(f"its {what} is {value!r:.80}; a number is needed") from None


def _index(source: Source, folder: Path) -> Path:
    """The index file of a source, brought up to date."""
    parts = [(part, _tag(f"{part.name}\t{part.stamp}")) for part in source.parts()]
    path = folder / f"index-{_tag(chr(10).join(part.name for part, _ in parts)).hex()}.arrow"
    old = _SCHEMA.empty_table()
    if path.exists():
        try:
            found = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            old = found if found.schema.equals(_SCHEMA, check_metadata=True) else old
        except (pa.ArrowInvalid, OSError):
            pass  # the index is damaged and is built again
    runs = pc.run_end_encode(old["part"].combine_chunks())
    tags, ends = runs.values.to_pylist(), runs.run_ends.to_pylist()
    if parts and [tag for _, tag in parts] == tags and all(part.stamp for part, _ in parts):
        return path
    rows_of = dict(zip(tags, zip([0, *ends], ends, strict=False), strict=True))
    row_of = {where: row for row, where in enumerate(old["where"].to_pylist())}
    with (
        replacing(path, folder=False, overwrite=True, need=0) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
        ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool,  # waiting for disks takes most of the time
    ):
        for part, tag in parts:
            if part.stamp and tag in rows_of:
                start, end = rows_of[tag]
                writer.write_table(old.slice(start, end - start))
                continue
            entries = iter(part.entries())
            while some := list(islice(entries, _AT_ONCE)):
                rows = [row_of[where] for entry in some if (where := _bytes(entry.where)) in row_of]
                before = old.take(pa.array(rows, pa.int64())).to_pylist()
                known = {tuple(row[name] for name in _SAME): row for row in before}
                found = [known.get(_identity(entry)) for entry in some]
                unknown = [entry for entry, row in zip(some, found, strict=True) if not row]
                looked = pool.map(lambda entry: _look(source, entry), unknown)
                now = [(row or next(looked)) | {"part": tag} for row in found]
                writer.write_batch(pa.RecordBatch.from_pylist(now, _SCHEMA))
    return path


def _identity(entry: Entry) -> tuple[bytes, ...]:
    """The entry's columns `_SAME`: while they are unchanged, the row of the existing index is reused."""
    return tuple(_bytes(text) for text in (entry.key, entry.where, entry.stamp, entry.caption_stamp))


def _look(source: Source, entry: Entry) -> dict[str, object]:
    """An index row with the image's size and captions, or the reason why the image cannot be used."""
    found: dict[str, object] = dict(zip(_SAME, _identity(entry), strict=True))
    found |= {
        "width": 0,
        "height": 0,
        "captions": [],
        "score": None,
        "weight": 1.0,
        "repeats": 1,
        "profile": b"",
        "notes": [],
        "reason": "",
    }
    try:
        with source.open(entry.where) as file:
            header = image_header(file, "the file")
        found["width"], found["height"] = header.size
        found["profile"], found["notes"] = header.profile.encode(), list(header.notes)
        check_size(*header.size)
        captions = entry.captions()
        numbers = {"score": captions.score, "weight": captions.weight, "repeats": captions.repeats}
        return found | {"captions": list(captions.texts)} | numbers
    except LdmError as error:
        return found | {"reason": str(error)}
    except OSError as error:
        return found | {"reason": f"it cannot be read: {error.strerror or error}"}


def _tag(text: str) -> bytes:
    return hashlib.blake2b(_bytes(text), digest_size=16).digest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # file names are bytes


def _text(value: pa.BinaryScalar) -> str:
    return value.as_py().decode("utf-8", "surrogateescape")
