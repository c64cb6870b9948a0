"""Features of images, computed in chunks that are kept in files, so that a stopped evaluation can resume.

Processes share the chunks. A chunk is the same images in the same batches whichever process computes it, so that the
result does not depend on the number of processes. At the end the chunks become one file, which is mapped: memory does
not grow with the number of images.

N images, B images of a batch
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.data.image_set import made
from ldm.errors import LdmError
from ldm.evaluation.workspace import Workspace, file_lock
from ldm.files import check_digest, replacing
from ldm.weights.tensors import Output, Store, TensorInfo, write_safetensors

CHUNK = 256  # images
BATCH = 32  # images of a chunk in one call of a network
THREADS = 8  # threads that decode and resize images

WHOLE = "all.safetensors"
ROWS, DIGEST, SKIPPED = "rows", "ldm.images", "ldm.skipped"  # a tensor; two entries of the metadata
PIXELS = "pixels"  # a tensor: a hash of each image's pixels


@dataclass(frozen=True)
class ImageValues:
    """Tensors with one row for each image that can be read."""

    values: dict[str, Tensor]  # (N, …) each, mapped
    index: Tensor  # (N,): the numbers of these images
    digest: str  # SHA-256 of the images' pixels or values
    skipped: dict[str, str]  # by number: reasons why the other images cannot be read
    pixels: Tensor | None = None  # (N,): hashes of the images' pixels


@dataclass(frozen=True)
class ChunkValues:
    """The values of the images of one chunk, with `PIXELS` among them."""

    values: dict[str, Tensor]
    index: list[int]
    digest: str
    skipped: dict[str, str]


def in_chunks(
    what: str, name: str, count: int, compute: Callable[[range], ChunkValues], work: Workspace
) -> ImageValues:
    """The values of `count` images; chunks that are in the folder `name` are not computed again.

    Args:
        what: the name of the work, for its progress.
        name: name of the folder; it differs for different values.
        count: number of images.
        compute: gives the values of the images of a range.
        work: the folder, and the processes that share the chunks.

    Raises:
        LdmError: no image can be read, the folder cannot be used, or `compute` raises it.
    """
    folder, ranks = made(work.folder / "found" / name), work.ranks
    with file_lock(folder / ".lock") if ranks.first else contextlib.nullcontext():  # a cache may be shared by runs
        ranks.wait()
        done = _valid(folder / WHOLE)
        ranks.wait()  # all see the same files before one of them writes
        if not done:
            chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
            paths = [folder / f"{number:06d}.safetensors" for number in range(len(chunks))]
            mine = list(zip(chunks, paths, strict=True))[ranks.rank :: ranks.world]
            total = sum(len(chunk) for chunk, _ in mine)
            for number, (chunk, path) in enumerate(mine):
                work.tell(what, number * CHUNK, total)
                if not _valid(path):
                    part = compute(chunk)
                    tensors = {**part.values, ROWS: torch.tensor(part.index, dtype=torch.int64)}
                    _save(path, tensors, part.digest, part.skipped)
            work.tell(what, total, total)
            ranks.wait()
            if ranks.first:
                _join(paths, folder / WHOLE)
            ranks.wait()
        tensors, metadata = _read(folder / WHOLE)
    index = tensors.pop(ROWS)
    pixels = tensors.pop(PIXELS, None)
    return ImageValues(tensors, index, metadata[DIGEST], json.loads(metadata[SKIPPED]), pixels)


def extract(
    numbers: Sequence[int],
    read: Callable[[int], tuple[str, Image.Image]],
    prepare: Callable[[Image.Image], Tensor],
    network: Callable[[Tensor], dict[str, Tensor]],
) -> ChunkValues:
    """Read some images, in threads, and compute their features in batches.

    Args:
        numbers: numbers of the images.
        read: gives an image's name and the image; raises LdmError if it cannot be read.
        prepare: turns an image into the network's input.
        network: gives the features of a batch: (B, …) each.

    Returns:
        The features, and under `PIXELS` a hash of the pixels of each image.
    """
    digest = hashlib.sha256()
    index: list[int] = []
    skipped: dict[str, str] = {}
    outputs: list[dict[str, Tensor]] = []

    def opened(number: int) -> tuple[Tensor, str, bytes] | str:
        try:
            name, image = read(number)
        except LdmError as error:
            return str(error)
        pixels = hashlib.sha256(ascii(image.size).encode() + image.tobytes())
        return prepare(image), name, pixels.digest()

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            inputs, pixels = [], []
            for number, result in zip(batch, pool.map(opened, batch), strict=True):
                if isinstance(result, str):
                    skipped[str(number)] = result
                    continue
                image, name, same = result
                inputs.append(image)
                pixels.append(int.from_bytes(same[:8], signed=True))
                digest.update(ascii(name).encode() + same)
                index.append(number)
            if inputs:
                outputs.append({**network(torch.stack(inputs)), PIXELS: torch.tensor(pixels)})
    values = {name: torch.cat([part[name] for part in outputs]) for name in (outputs[0] if outputs else ())}
    return ChunkValues(values, index, digest.hexdigest(), skipped)


# --- files ------------------------------------------------------------------------------------------------------------


def _valid(path: Path) -> bool:
    """Whether a file exists and its digest matches."""
    try:
        return path.exists() and check_digest(path)
    except LdmError:
        return False


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    store = Store([path])
    return dict(store.read(sorted(store.infos), None, "cpu")), store.metadata


def _save(path: Path, tensors: dict[str, Tensor], digest: str, skipped: dict[str, str]) -> None:
    outputs = [
        Output(name, TensorInfo(tensor.dtype, tuple(tensor.shape)), partial(tensors.__getitem__, name))
        for name, tensor in tensors.items()
    ]
    metadata = {DIGEST: digest, SKIPPED: json.dumps(skipped)}
    with replacing(path, folder=False, overwrite=True, need=sum(o.info.nbytes for o in outputs)) as temporary:
        write_safetensors(temporary, outputs, metadata)


def _join(paths: list[Path], whole: Path) -> None:
    """Write the chunks as one file and remove them; memory holds one chunk at a time."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    total = 0
    digest = hashlib.sha256()
    skipped: dict[str, str] = {}
    for path in paths:
        store = Store([path])
        for name, info in store.infos.items():
            shapes.setdefault(name, (info.dtype, info.shape[1:]))
        total += store.infos[ROWS].shape[0]
        digest.update(store.metadata[DIGEST].encode())
        skipped |= json.loads(store.metadata[SKIPPED])
    if not total:
        raise LdmError(f"no image can be read: {next(iter(skipped.values()), 'there is none')}")
    with tempfile.TemporaryDirectory(dir=whole.parent) as folder, contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(Path(folder, name).open("wb")) for name in shapes}
        for path in paths:
            for name, tensor in _read(path)[0].items():
                tensor.numpy().tofile(files[name])
        stack.close()
        tensors = {}
        for name, (dtype, shape) in shapes.items():
            size = total * torch.Size(shape).numel()
            tensors[name] = torch.from_file(str(Path(folder, name)), False, size, dtype=dtype).view(total, *shape)
        _save(whole, tensors, digest.hexdigest(), skipped)
    for path in paths:
        path.unlink()
