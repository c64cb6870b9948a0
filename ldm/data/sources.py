"""Sources of captioned images, opened by name."""

from __future__ import annotations

from pathlib import Path

from ldm.data.folder import Folder
from ldm.data.hugging_face import Dataset
from ldm.data.image_set import ImageSet, Source
from ldm.data.places import check_place, expanded, is_dataset, is_remote, is_tar, shards
from ldm.data.streams import DatasetStream, Stream, TarStream
from ldm.data.tar import Tar


def open_images(
    source: str,
    folder: Path,
    *,
    captions: str = "required",
    split: str = "train",
    caption_column: str | None = None,
    trigger: str = "",
) -> ImageSet:
    """The images of a folder, of tar shards, of a dataset saved on disk, of parquet files or of the Hub.

    Args:
        source: a folder; shards such as `data/*.tar` or `data/{0000..0012}.tar`; `data/*.parquet`; owner/name.
        folder: the folder for the index, see `ImageSet`.
        captions: "required" or "optional".
        split: the dataset's split.
        caption_column: column of captions in a dataset, metadata file or sample's `.json`, if its name is unusual.
        trigger: see `ImageSet`.

    Raises:
        LdmError: the source does not exist, or its images cannot be used.
    """
    check_place(source, stream=False)
    found: Source
    if is_tar(source):
        found = Tar(source, shards(source), caption_column)
    elif is_dataset(source):
        found = Dataset(source, split, caption_column)
    else:
        found = Folder(Path(source), caption_column)
    return ImageSet(found, folder, captions, trigger)


def open_stream(source: str, *, split: str = "train", caption_column: str | None = None) -> Stream:
    """Tar shards or a dataset as a stream; `source` as in `open_images`, or `pipe:` and a command.

    Raises:
        LdmError: the source does not exist.
    """
    check_place(source, stream=True)
    if is_tar(source):
        addresses = expanded(source) if is_remote(source) else [str(file) for file in shards(source)]
        return TarStream(source, addresses, caption_column)
    return DatasetStream(source, split, caption_column)
