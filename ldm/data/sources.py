"""Sources of captioned images, opened by name."""

from __future__ import annotations

import glob
from pathlib import Path

from ldm.data.folder import Folder
from ldm.data.hugging_face import Dataset
from ldm.data.image_set import ImageSet, Source
from ldm.data.streams import DatasetStream, Stream, TarStream
from ldm.data.tar import Tar
from ldm.errors import LdmError
from ldm.weights.hub import HUB_ID


def open_images(
    source: str, folder: Path, *, captions: str = "required", split: str = "train", caption_column: str | None = None
) -> ImageSet:
    """The images of a folder, of tar shards, of a dataset saved on disk, of parquet files or of the Hub.

    Args:
        source: a folder; shards such as `data/*.tar` or `data/{0000..0012}.tar`; `data/*.parquet`; owner/name.
        folder: the folder for the index, see `ImageSet`.
        captions: "required" or "optional".
        split: the dataset's split.
        caption_column: column of captions in a dataset, metadata file or sample's `.json`, if its name is unusual.

    Raises:
        LdmError: the source does not exist, or its images cannot be used.
    """
    found: Source
    if _is_tar(source):
        if _is_remote(source):
            raise LdmError(f"{source} is remote: its images come in one order only; use it as a stream")
        found = Tar(source, _files(source), caption_column)
    elif _is_dataset(source):
        found = Dataset(source, split, caption_column)
    elif Path(source).is_dir():
        found = Folder(Path(source), caption_column)
    else:
        what = "is a file" if Path(source).is_file() else "does not exist"
        raise LdmError(f"{source} {what}; give a folder, tar shards, parquet files or a dataset (owner/name)")
    return ImageSet(found, folder, captions)


def open_stream(source: str, *, split: str = "train", caption_column: str | None = None) -> Stream:
    """Tar shards or a dataset as a stream; `source` as in `open_images`, or `pipe:` and a command.

    Raises:
        LdmError: the source does not exist.
    """
    if _is_tar(source):
        addresses = _expanded(source) if _is_remote(source) else [str(file) for file in _files(source)]
        return TarStream(source, addresses, caption_column)
    if _is_dataset(source):
        return DatasetStream(source, split, caption_column)
    raise LdmError(f"{source} cannot be streamed; give tar shards or a dataset, or use it without streaming")


def _is_remote(source: str) -> bool:
    return "://" in source or source.startswith("pipe:")


def _is_tar(source: str) -> bool:
    return source.startswith("pipe:") or source.endswith((".tar", ".tar.gz", ".tgz"))


def _is_dataset(source: str) -> bool:
    path = Path(source)
    if path.is_dir():
        return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    return source.endswith(".parquet") or bool(HUB_ID.fullmatch(source) and not path.exists())


def _expanded(source: str) -> list[str]:
    """Addresses with their braces expanded."""
    from webdataset.shardlists import expand_urls

    return list(expand_urls(source))


def _files(source: str) -> list[Path]:
    """The shards of a pattern."""
    names = _expanded(source) if "{" in source else [source]
    files = [Path(file) for name in names for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]  # noqa: PTH207
    if not files:
        raise LdmError(f"no shard matches {source}")
    return files
