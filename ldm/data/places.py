"""What a source of captioned images is, told from its name and from what lies there; nothing is read."""

from __future__ import annotations

import glob
from pathlib import Path

from ldm.errors import LdmError
from ldm.weights.names import HUB_ID

IMAGE_SUFFIXES = frozenset({
    "apng", "avif", "bmp", "gif", "heic", "heif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "jpx", "jxl", "pbm",
    "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp",
})  # fmt: skip
# Formats that PIL cannot read without a plugin are included: their files are listed as unreadable, not ignored.
MADE = {  # images beside others that are made when they are loaded
    "condition": ("canny", "lineart", "gray", "blur", "tile"),
    "mask": ("alpha", "boxes", "strokes", "random"),
}


def is_remote(source: str) -> bool:
    """Whether a source is an address or a command."""
    return "://" in source or source.startswith("pipe:")


def is_tar(source: str) -> bool:
    """Whether a source is tar shards."""
    return source.startswith("pipe:") or source.endswith((".tar", ".tar.gz", ".tgz"))


def is_dataset(source: str) -> bool:
    """Whether a source is a dataset of Hugging Face's: saved on disk, parquet files, or a name on the Hub."""
    path = Path(source)
    if path.is_dir():
        return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    return source.endswith(".parquet") or bool(HUB_ID.fullmatch(source) and not path.exists())


def expanded(source: str) -> list[str]:
    """Addresses with their braces expanded."""
    from webdataset.shardlists import expand_urls

    return list(expand_urls(source))


def shards(source: str) -> list[Path]:
    """The local shards of a pattern.

    Raises:
        LdmError: there are none.
    """
    names = expanded(source) if "{" in source else [source]
    files = [Path(file) for name in names for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]  # noqa: PTH207
    if not files:
        raise LdmError(f"no shard matches {source}")
    return files


def check_place(source: str, stream: bool) -> None:
    """Check that there is something to open, with random access or as a stream.

    Raises:
        LdmError: there is not, or it cannot be opened in this way.
    """
    if is_tar(source):
        if is_remote(source) and not stream:
            raise LdmError(f"{source} is remote: its images come in one order only; use it as a stream")
        if not is_remote(source) and "{" not in source:  # braces are expanded by a heavy package, when they are opened
            missing = [path for path in shards(source) if not path.exists()]
            if missing:
                raise LdmError(f"{missing[0]} cannot be read: No such file or directory")
    elif not is_dataset(source):
        if stream:
            raise LdmError(f"{source} cannot be streamed; give tar shards or a dataset, or use it without streaming")
        if not Path(source).is_dir():
            what = "is a file" if Path(source).is_file() else "does not exist"
            raise LdmError(f"{source} {what}; give a folder, tar shards, parquet files or a dataset (owner/name)")


def is_made(kind: str, place: str) -> bool:
    """Whether images beside others of a kind are made of them, not read."""
    return place in MADE.get(kind, ())


def check_beside(kind: str, place: str) -> None:
    """Check that images beside others are made, or in a folder, or may be in a column, which the data will tell.

    Raises:
        LdmError: they are neither.
    """
    if not is_made(kind, place) and not Path(place).is_dir() and ("/" in place or Path(place).exists()):
        what = "is a file" if Path(place).exists() else "does not exist"
        made = f", or one of {', '.join(MADE[kind])}" if kind in MADE else ""
        raise LdmError(f"{place} {what}; give a folder, a column of the data{made}")
