"""WebDataset shards on disk: tar files in which the files of a sample are adjacent and share a name.

A shard is read once from end to end to find the offsets of its images; then images are read in any order. Captions are
the lines of `NAME.txt`, or `caption`, `text`, `captions` or `prompt` in `NAME.json` (a text or a list; also `score` or
`aesthetic_score`). If the caption column is named, it is read from `NAME.json` alone.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ldm.data.image_set import (
    CAPTION_COLUMNS,
    Captions,
    Entry,
    SourcePart,
    decode_caption,
    first_of,
    to_captions,
)  # fmt: skip
from ldm.data.places import IMAGE_SUFFIXES
from ldm.errors import LdmError, listing

_BLOCK = 512
_BARE, _HIDDEN = " bare", " hidden"  # beside suffixes in the count of what is passed over
_FIRST = 64  # members that are looked at to tell what a shard holds


class Tar:
    """Images in tar files. Keys are the members' names.

    Args:
        name: the name of the source.
        files: the shards.
        caption_column: the key of the captions in the samples' `.json`, if it is not one of the usual names.
        image: with "mask", the images are the members NAME.mask.png, whose keys are NAME.png; by default NAME.png.
        apart: such words of members whose images lie beside these.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        caption_column: str | None = None,
        image: str = "",
        apart: Sequence[str] = (),
    ) -> None:
        self.name = f"the members .{image} of {name}" if image else name
        self.files = files
        self.caption_column = caption_column
        self.image = image
        self.apart = apart
        self._others: Counter[str] = Counter()  # what was passed over when shards were listed

    def parts(self) -> Iterator[SourcePart]:
        """A part for each shard."""
        for file in self.files:
            try:
                status = file.stat()
            except OSError as error:
                raise LdmError(f"the shard {file} cannot be read: {error.strerror}") from None
            stamp, column = f"{status.st_size}:{status.st_mtime_ns}", self.caption_column or ""
            part = f"{stamp}:{column}" if column else stamp
            name = f"{file.resolve()}\t{self.image}" if self.image else str(file.resolve())
            yield SourcePart(name, part, partial(_entries, file, stamp, column, self._others, self.image, self.apart))

    def passed_over(self) -> list[str]:
        """Files in the shards that are neither images nor captions, and samples without an image."""
        others = Counter[str]() if self.image else self._others
        kinds = [f"{count} .{suffix}" for suffix, count in others.most_common() if suffix not in (_BARE, _HIDDEN)]
        lines = [f"files in the shards are not read: {listing(kinds, 8)}"] if kinds else []
        lines += [f"{others[_BARE]} samples of the shards have captions and no image"] if others[_BARE] else []
        lines += [f"{others[_HIDDEN]} files in the shards start with a dot and are ignored"] if others[_HIDDEN] else []
        return lines

    def unread(self) -> str:
        """The suffixes in the first samples that may hold captions, and what is read of them."""
        try:
            with tarfile.open(self.files[0], "r:", encoding="utf-8", errors="surrogateescape") as tar:
                found = {split_name(member.name)[1] for member in islice(tar, _FIRST) if member.isreg()}
        except (tarfile.TarError, EOFError, OSError):
            return ""
        suffixes = [f".{suffix}" for suffix in sorted(found - IMAGE_SUFFIXES - {"txt", ""})]
        keys = self.caption_column or ", ".join(CAPTION_COLUMNS)
        read = f"captions are read from .txt, and in .json from {keys} (caption_column names another)"
        return f"the samples hold {listing(suffixes)}; {read}" if suffixes else ""

    def open(self, where: str) -> BinaryIO:
        """The bytes of a member."""
        path, offset, size = where.rsplit(":", 2)
        with Path(path).open("rb") as file:
            file.seek(int(offset))
            return io.BytesIO(file.read(int(size)))


def captions_of(texts: Mapping[str, bytes], column: str = "") -> Captions:
    """Captions of a sample from its files, given by extension; `column` is their key in its `.json`, if it is unusual.

    Raises:
        LdmError: a caption file cannot be read.
    """
    record = {}
    if "json" in texts:
        try:
            record = json.loads(decode_caption(texts["json"]))
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, LdmError) else LdmError("its .json is not valid JSON") from None
        if not isinstance(record, dict):
            raise LdmError("its .json holds no object")
    if column:
        if column not in record:
            raise LdmError(f"its .json has no {column!r}; it has: {listing(list(record), 12) or 'nothing'}")
        return to_captions(record[column], record)
    if "txt" in texts:
        return to_captions(decode_caption(texts["txt"]).split("\n"), record)
    return to_captions(first_of(record, "caption", *CAPTION_COLUMNS), record)


def split_name(name: str) -> tuple[str, str]:
    """A member's name split as in WebDataset: the sample's name, up to the first dot of the file name, and the rest."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _entries(
    path: Path, stamp: str, column: str, others: Counter[str], wanted: str, apart: Sequence[str]
) -> Iterator[Entry]:
    """The images of a shard, by the word before their suffixes; what is passed over is counted in `others`."""
    current, images, texts = "", list[tarfile.TarInfo](), dict[str, bytes]()

    def sample() -> Iterator[Entry]:
        others[_BARE] += bool(texts and not images)
        for image in images:
            where = f"{path}:{image.offset_data}:{image.size}"
            name, own = image.name.removeprefix("./"), f"{stamp}:{image.offset_data}"
            key = f"{current}.{split_name(name)[1].rpartition('.')[2]}" if wanted else name
            yield Entry(key, where, own, column, partial(captions_of, {} if wanted else texts, column))

    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # the list would grow with the shard
                name, suffix = split_name(member.name)
                if not member.isreg() or name.rpartition("/")[2] == "":  # not a file, or a hidden one
                    others[_HIDDEN] += member.isreg()
                    continue
                if name != current:
                    yield from sample()
                    current, images, texts = name, [], {}
                word, _, last = suffix.rpartition(".")
                if word == wanted and last in IMAGE_SUFFIXES:
                    images.append(member)
                elif word and word in apart:
                    continue
                elif suffix in ("txt", "json"):
                    texts[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
                else:
                    others[suffix] += 1
            yield from sample()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(_BLOCK) != bytes(_BLOCK):
                raise LdmError(f"the shard {path} is cut short or damaged; fetch or write it again")
    except (tarfile.TarError, EOFError) as error:
        raise LdmError(
            f"the shard {path} is damaged, or compressed, which forbids reading in any order ({error}); write it again"
        ) from None
    except OSError as error:
        raise LdmError(f"the shard {path} cannot be read: {error.strerror or error}") from None
