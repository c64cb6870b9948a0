"""Sources of captioned images, opened by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ldm.data.beside import KINDS, Beside, Drawn, Made
from ldm.data.folder import Column, Folder
from ldm.data.folder_rules import FolderRules
from ldm.data.given import Given, given
from ldm.data.hugging_face import Dataset
from ldm.data.image_set import NO_RULES, ImageSet, Source
from ldm.data.places import check_beside, check_place, expanded, is_dataset, is_made, is_remote, is_tar, shards
from ldm.data.streams import DatasetStream, Stream, TarStream
from ldm.data.tar import Tar
from ldm.errors import LdmError
from ldm.images import TRANSPARENT

log = logging.getLogger(__name__)
NO_BESIDE: Mapping[str, str] = {}


def open_images(
    source: str,
    folder: Path,
    *,
    captions: str = "required",
    split: str = "train",
    caption_column: str | None = None,
    image_column: str | None = None,
    trigger: str = "",
    rules: FolderRules = NO_RULES,
    beside: Mapping[str, str] = NO_BESIDE,
) -> ImageSet:
    """The images of a folder, of tar shards, of a dataset saved on disk, of parquet files or of the Hub.

    Args:
        source: a folder; shards such as `data/*.tar` or `data/{0000..0012}.tar`; `data/*.parquet`; owner/name.
        folder: the folder for the index, see `ImageSet`.
        captions: "required" or "optional".
        split: the dataset's split.
        caption_column: column of captions in a dataset, metadata file or sample's `.json`, if its name is unusual.
        image_column: column of images in a dataset; None: the first.
        trigger: see `ImageSet`.
        rules: of the folders within the source.
        beside: images beside the images, by kind (`ldm.data.beside.KINDS`): a folder with the same names, a column of
            the metadata or the dataset, "mask" for the members NAME.mask.png of shards, or a filter that makes them.

    Raises:
        LdmError: the source does not exist, its images cannot be used, or some have no image beside them.
    """
    check_place(source, stream=False)
    for kind, place in beside.items():
        check_beside(kind, place)
    read = {kind: place for kind, place in beside.items() if not is_made(kind, place)}
    found = _source(source, split, caption_column, image_column, list(read.values()))
    images = ImageSet(found, folder, captions, trigger, rules)
    made = {kind: _made(kind, place, images) for kind, place in beside.items() if kind not in read}
    images.beside = made | {kind: _read(kind, place, source, split, images) for kind, place in read.items()}
    return images


def _source(source: str, split: str, caption: str | None, image: str | None, apart: list[str]) -> Source:
    """A source of images; those at the places `apart` lie beside others."""
    if is_dataset(source):
        return Dataset(source, split, caption, image, apart)
    _check_no_column(source, image)
    if is_tar(source):
        return Tar(source, shards(source), caption, apart=apart)
    return Folder(Path(source), caption, apart)


def _check_no_column(source: str, image: str | None) -> None:
    """Raise LdmError if a column of images is named for a source that has none."""
    if image:
        raise LdmError(f"image_column {image}: {source} is no dataset with columns of images; leave it out")


def _made(kind: str, place: str, images: ImageSet) -> Beside:
    """Images beside others that are made of them."""
    if place == "alpha":
        _check_alpha(images)
        return Given(kind, images.in_mode("A"), np.arange(len(images)))
    return Drawn(place) if kind == "mask" else Made(place)


def _check_alpha(images: ImageSet) -> None:
    """Tell how many images have no alpha channel, so that their masks are white; raise LdmError if none has one."""
    opaque = len(images) - len(images.noted(TRANSPARENT))
    if opaque == len(images):
        raise LdmError(f"{images.source.name}: no image has an alpha channel for its mask (data.beside.mask: alpha)")
    if opaque:
        log.warning(
            "%s: %d of %d images have no alpha channel: their masks are white everywhere",
            images.source.name, opaque, len(images),
        )  # fmt: skip


def _read(kind: str, place: str, source: str, split: str, images: ImageSet) -> Beside:
    """Images beside others that are read from a folder, or from a column of the images' own source."""
    found: Source
    if Path(place).is_dir():
        found = Folder(Path(place))
    elif is_tar(source):
        found = Tar(source, shards(source), image=place)
    elif is_dataset(source):
        found = Dataset(source, split, image=place)
    else:
        found = Column(Path(source), place)
    return given(kind, images, ImageSet(found, images.folder, "optional", mode=KINDS[kind].mode))


def open_stream(
    source: str, *, split: str = "train", caption_column: str | None = None, image_column: str | None = None
) -> Stream:
    """Tar shards or a dataset as a stream; `source` as in `open_images`, or `pipe:` and a command.

    Raises:
        LdmError: the source does not exist.
    """
    check_place(source, stream=True)
    if is_tar(source):
        _check_no_column(source, image_column)
        addresses = expanded(source) if is_remote(source) else [str(file) for file in shards(source)]
        return TarStream(source, addresses, caption_column)
    return DatasetStream(source, split, caption_column, image_column)
