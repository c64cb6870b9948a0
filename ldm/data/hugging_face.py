"""Datasets of Hugging Face's `datasets` with random access: saved folders, parquet files, names on the Hub.

Images come from the named column, or the first one of images; captions from the named column, or from `text`,
`caption`, `captions` or `prompt`; keys from `key` or `__key__`, or the row numbers; scores from `score` or
`aesthetic_score`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ldm.data.image_set import CAPTION_COLUMNS, Captions, Entry, SourcePart, to_captions
from ldm.errors import LdmError, first_line, listing


def load(name: str, split: str = "train", streaming: bool = False) -> Any:
    """A split of a dataset: `name` is a folder that `save_to_disk` wrote, a pattern of parquet files, or a Hub name.

    Raises:
        LdmError: the dataset cannot be loaded, or has no such split.
    """
    import datasets

    try:
        if Path(name).is_dir():
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[split]
            return dataset.to_iterable_dataset() if streaming else dataset
        if name.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=name, split="train", streaming=streaming)
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # the library passes on any error of its file systems
        raise LdmError(f"the dataset {name} (split {split}) cannot be loaded: {first_line(error)}") from None


class Columns:
    """The columns of a dataset that hold images, captions, keys and scores.

    Raises:
        LdmError: the dataset has no column of images, or not the named columns.
    """

    def __init__(
        self, name: str, dataset: Any, caption: str | None, image: str | None = None, apart: Sequence[str] = ()
    ) -> None:
        import datasets

        features = dataset.features or {}
        images = [
            column
            for column, feature in features.items()
            if isinstance(feature, datasets.Image)
            or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())
        ]
        if not images or (caption and caption not in features) or (image and image not in images):
            what = f"column {caption!r}" if images else "column of images"
            what = f"column {image!r} of images" if images and image and image not in images else what
            raise LdmError(f"the dataset {name} has no {what}; it has: {', '.join(features)}")
        self.images = images
        self.image = image or next((one for one in images if one not in apart), images[0])
        self.others = [one for one in images if one != self.image and one not in apart]
        self.named = image is not None
        self.caption = caption or _first(features, *CAPTION_COLUMNS)
        self.key = _first(features, "key", "__key__")
        self.names = list(features)

    def undecoded(self, dataset: Any) -> Any:
        """The dataset with its images as undecoded files."""
        import datasets

        return dataset.cast_column(self.image, datasets.Image(decode=False))

    def unread(self) -> str:
        """The columns, if none is known to hold captions."""
        columns = listing(self.names, 12)
        has = f"the dataset has the columns {columns}: name the one of captions with caption_column"
        return "" if self.caption else has

    def passed_over(self) -> list[str]:
        """The columns of images but the first."""
        others = f"of several columns of images {self.image} is used, not {listing(self.others)}"
        return [others] if self.others and not self.named else []

    def captions(self, row: Mapping[str, Any]) -> Captions:
        """The captions of a row."""
        return to_captions(row.get(self.caption or ""), row)


class Dataset:
    """Images in a dataset.

    Args:
        name: see `load`.
        split: the split.
        caption: the column of captions, if its name is unusual.
        image: the column of images; None: the first.
        apart: columns of images that lie beside these.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        caption: str | None = None,
        image: str | None = None,
        apart: Sequence[str] = (),
    ) -> None:
        self.name = name
        dataset = load(name, split)
        self.columns = Columns(name, dataset, caption, image, apart)
        others = [column for column in self.columns.images if column != self.columns.image]
        self.rows = self.columns.undecoded(dataset.remove_columns(others))
        self.images = self.rows.select_columns([self.columns.image])
        self.part = f"{name}\t{split}\t{self.columns.caption}" + (f"\t{self.columns.image}" if others else "")
        self.stamp = dataset._fingerprint  # the library's digest, which changes with the content

    def parts(self) -> list[SourcePart]:
        """One part, whose stamp is the library's fingerprint."""
        return [SourcePart(self.part, self.stamp, self._entries)]

    def open(self, where: str) -> BinaryIO:
        """The image file in a row."""
        return open_image(self.images[int(where)][self.columns.image])

    def unread(self) -> str:
        """The columns, if none is known to hold captions."""
        return self.columns.unread()

    def passed_over(self) -> list[str]:
        """The columns of images but the first."""
        return self.columns.passed_over()

    def _entries(self) -> Iterator[Entry]:
        for number in range(len(self.rows)):
            row = self.rows[number]
            cell = row.pop(self.columns.image)
            try:
                with open_image(cell) as file:
                    stamp = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
            except OSError:
                stamp = ""  # the file cannot be read, which the index reports
            key = f"{number:09}" if self.columns.key is None else str(row[self.columns.key])
            yield Entry(key, str(number), stamp, "", partial(self.columns.captions, row))


def open_image(cell: Mapping[str, Any] | None) -> BinaryIO:
    """The image file that a cell of an undecoded image column holds or names; an empty file if the cell is empty."""
    if cell and cell["bytes"] is None and cell["path"]:
        return Path(cell["path"]).open("rb")
    return io.BytesIO(cell["bytes"] if cell else b"")


def _first(features: Mapping[str, Any], *names: str) -> str | None:
    return next((name for name in names if name in features), None)
