"""Captioned images with random access, from any source, behind an index that is kept in a file.

The first start opens every image's header; the index remembers sizes and captions, so that a later start opens what has
changed: a file is the same while its size and its time of modification (in nanoseconds) are. Digests of the content
would need to read everything at each start. The index is an Arrow file, mapped into memory: nothing of it is copied to
the processes that load images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ldm.data.skipped import Skipped
from ldm.errors import LdmError, listing
from ldm.files import replacing
from ldm.images import image_size, load_image

IMAGE_SUFFIXES = frozenset({
    "apng", "avif", "bmp", "gif", "heic", "heif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "jpx", "jxl", "pbm",
    "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp",
})  # fmt: skip
# Those that PIL cannot read without a plugin are listed as unreadable, not passed over.
SHORTEST = 8  # pixels of a side
LONGEST = 16  # times the other side
_AT_ONCE = 4096  # entries in memory while the index is made
_SAME = ("key", "where", "stamp", "caption_stamp")
_SCHEMA = pa.schema(
    [
        ("part", pa.binary(16)),  # a digest of its name and stamp
        *((name, pa.binary()) for name in _SAME),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("score", pa.float32()),
        ("reason", pa.string()),  # why it cannot be used; "" if it can
    ]
)


@dataclass(frozen=True)
class Captions:
    """The captions of an image, and its score."""

    texts: tuple[str, ...]
    score: float | None = None  # aesthetic


@dataclass(frozen=True)
class Example:
    """One image and what is known about it without decoding it."""

    key: str  # names it: a path within the source, or a number
    captions: tuple[str, ...]  # none if it has none and none is needed
    width: int  # upright
    height: int
    score: float | None  # aesthetic


@dataclass(frozen=True)
class Entry:
    """One image as a source lists it. The stamps change with the files."""

    key: str
    where: str  # how its source finds it
    stamp: str
    caption_stamp: str
    captions: Callable[[], Captions]  # called when it is not known from an earlier start; may raise LdmError


@dataclass(frozen=True)
class SourcePart:
    """A part of a source that is indexed as a whole; one with a stamp is listed again only if the stamp changes."""

    name: str
    stamp: str  # "" if there is none
    entries: Callable[[], Iterator[Entry]]


class Source(Protocol):
    """A place with captioned images: a folder, shards, a dataset. It can be sent to other processes."""

    name: str

    def parts(self) -> Iterable[SourcePart]:
        """All parts of the source. Raises LdmError if it cannot be read."""

    def open(self, where: str) -> BinaryIO:
        """One image's file."""


class ImageSet:
    """The usable images of a source in the order of their keys, which does not depend on how they are stored.

    `skipped` counts the others. An image whose key another one has gets a number after it: `a.png#2`.

    Args:
        source: where the images are.
        folder: of this project's files about it: indexes and lists of what was skipped.
        captions: "required", or "optional": images without captions have the empty one.

    Raises:
        LdmError: there is no usable image, too many cannot be used, or captions are missing.
    """

    def __init__(self, source: Source, folder: Path, captions: str = "required") -> None:
        check_captions(captions)
        self.source = source
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
        bare = pc.equal(pc.list_value_length(table["captions"]), 0).to_numpy()[self._rows]
        if bare.any() and captions == "required":
            names = [self.key(index) for index in np.flatnonzero(bare)[:5]]
            raise LdmError(
                f"{source.name}: {bare.sum()} of {len(bare)} images have no caption "
                f"({listing([*names, *[''] * (int(bare.sum()) - len(names))])}); write them, or set captions: optional"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_table": None}  # another process maps the files itself

    @property
    def table(self) -> pa.Table:
        """The index, mapped."""
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
        """The stamps of all images, which change with their files."""
        return [_text(stamp) for stamp in self._column("stamp")]

    def example(self, index: int) -> Example:
        """What is known about an image."""
        row = self._rows[index]
        captions, *others = (self.table[name][row].as_py() for name in ("captions", "width", "height", "score"))
        return Example(self.key(index), tuple(captions), *others)

    def read(self, index: int, least: int = 0) -> Image.Image:
        """An image, upright, in RGB; `least` as in `load_image`.

        Raises:
            LdmError: it cannot be decoded, or is not what it was when it was indexed.
        """
        row = self._rows[index]
        size = self.table["width"][row].as_py(), self.table["height"][row].as_py()
        try:
            file = self.source.open(_text(self.table["where"][row]))
        except OSError as error:
            raise LdmError(f"it cannot be read: {error.strerror or error}") from None
        return read_image(file, size, least)

    def all_captions(self) -> list[list[str]]:
        """The captions of all images."""
        return self._column("captions").to_pylist()

    def captions(self) -> list[str]:
        """All distinct captions, sorted; the empty one too if there are images without any."""
        lists = self._column("captions")
        bare = pc.any(pc.equal(pc.list_value_length(lists), 0)).as_py()
        return sorted({*pc.unique(pc.list_flatten(lists)).to_pylist(), *([""] if bare else [])})

    def _column(self, name: str) -> pa.ChunkedArray:
        """A column of the index for the usable images in their order."""
        return self.table[name].take(pa.array(self._rows))

    def _number_twins(self) -> dict[int, str]:
        """Keys with a number, by index, of images whose key an earlier one has."""
        keys = self._column("key").combine_chunks()
        same = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
        found: dict[int, str] = {}
        count = 1
        for index in (np.flatnonzero(same) + 1).tolist():
            count = count + 1 if index - 1 in found else 2
            found[index] = f"{_text(keys[index])}#{count}"
        return found


def read_image(file: BinaryIO, size: tuple[int, int], least: int) -> Image.Image:
    """The image in a file that should have this width and height, or a fraction if `least` allows, as `load_image`."""
    with file:
        image = load_image(file, name="the file", least=least)
    if image.size not in [tuple(-(-side // n) for side in size) for n in (1, 2, 4, 8)]:
        raise LdmError(f"it has {image.width}×{image.height} pixels, not {size[0]}×{size[1]} as its header said")
    return image


def made(folder: Path) -> Path:
    """Create a folder where there is none, and return it.

    Raises:
        LdmError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LdmError(f"the folder {folder} cannot be made: {error.strerror}") from None
    return folder


def check_captions(captions: str) -> None:
    """Raise LdmError for a setting that is not known."""
    if captions not in ("required", "optional"):
        raise LdmError(f"captions: {captions!r} is not known; choose required or optional")


def check_size(width: int, height: int) -> None:
    """Raise LdmError for an image of absurd shape."""
    if min(width, height) < SHORTEST or max(width, height) > LONGEST * min(width, height):
        raise LdmError(
            f"{width}×{height} pixels: sides from {SHORTEST} pixels and up to {LONGEST} times the other are used"
        )


def decode_caption(data: bytes) -> str:
    """Text of a caption file, which must be UTF-8.

    Raises:
        LdmError: it is not.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LdmError(f"its caption is not UTF-8 (byte {data[error.start]:#x} at {error.start}); convert it") from None


def to_captions(texts: object, score: object = None) -> Captions:
    """Captions from what a record holds: a text, or a list of texts; blank ones are none.

    Raises:
        LdmError: it is something else.
    """
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise LdmError(f"its caption is {texts!r:.80}; a text or a list of texts is needed")
    try:
        number = None if score in (None, "") else float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise LdmError(f"its score is {score!r:.80}; a number is needed") from None
    return Captions(tuple(text.strip().encode(errors="replace").decode() for text in texts if text.strip()), number)


def _index(source: Source, folder: Path) -> Path:
    """The index file of a source, brought up to date."""
    parts = [(part, _tag(f"{part.name}\t{part.stamp}")) for part in source.parts()]
    path = folder / f"index-{_tag(chr(10).join(part.name for part, _ in parts)).hex()}.arrow"
    old = _SCHEMA.empty_table()
    if path.exists():
        try:
            found = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            old = found if found.schema.equals(_SCHEMA) else old
        except (pa.ArrowInvalid, OSError):
            pass  # damaged: made anew
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
    """The columns `_SAME` of an entry: while they are unchanged, the entry of an earlier start is used."""
    return tuple(_bytes(text) for text in (entry.key, entry.where, entry.stamp, entry.caption_stamp))


def _look(source: Source, entry: Entry) -> dict[str, object]:
    """Size and captions of an image, or the reason why it cannot be used."""
    found: dict[str, object] = dict(zip(_SAME, _identity(entry), strict=True))
    found |= {"width": 0, "height": 0, "captions": [], "score": None, "reason": ""}
    try:
        with source.open(entry.where) as file:
            found["width"], found["height"] = size = image_size(file, "the file")
        check_size(*size)
        captions = entry.captions()
        return found | {"captions": list(captions.texts), "score": captions.score}
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
