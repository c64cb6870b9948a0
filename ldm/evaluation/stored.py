"""Numbers of each image, made in chunks and kept in files: what is stopped goes on, and processes share the work.

A chunk is the same images in the same batches whichever process works on it, so that the result does not depend on
how many there are. At the end the chunks become one file, which is mapped: memory does not grow with the images.

N images
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.data.image_set import made
from ldm.errors import LdmError
from ldm.files import Progress, check_digest, replacing, silent
from ldm.weights.tensors import Output, Store, TensorInfo, write_safetensors

CHUNK = 256  # images
BATCH = 32  # images of them that a network looks at together
THREADS = 8  # that decode and resize images

WHOLE = "all.safetensors"
ROWS, DIGEST, SKIPPED = "rows", "ldm.images", "ldm.skipped"  # a tensor; two entries of the metadata
PIXELS = "pixels"  # a tensor: what tells images apart


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together, on one folder that all of them see."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None  # for all others

    @property
    def first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Workspace:
    """Where everything is kept, who works on it, and whom to tell."""

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)
    tell: Progress = silent  # what is going on, images done, images in all
    cache: Path | None = None  # of what was found in images that no model made; by default the folder

    @property
    def shared(self) -> Workspace:
        """The same work, kept in the cache."""
        return replace(self, folder=self.cache or self.folder)


@dataclass(frozen=True)
class Rows:
    """What was found of each image that could be read."""

    values: dict[str, Tensor]  # (N, …) each, mapped
    index: Tensor  # (N,): which images these are
    digest: str  # SHA-256 of their pixels, or of what stands for them
    skipped: dict[str, str]  # why the others could not be read, by number
    pixels: Tensor | None = None  # (N,): see `look`


@dataclass(frozen=True)
class Found:
    """What was found of some images."""

    values: dict[str, Tensor]
    index: list[int]
    digest: str
    skipped: dict[str, str]


def in_chunks(what: str, name: str, count: int, find: Callable[[range], Found], work: Workspace) -> Rows:
    """What `find` says of `count` images, from the folder `name` as far as it is there already.

    Args:
        what: is done, for people.
        name: changes with everything that changes the result.
        count: images.
        find: looks at the images of a range.
        work: where and with whom.

    Raises:
        LdmError: no image could be read, or the folder cannot be used; and what `find` raises.
    """
    folder, ranks = made(work.folder / "found" / name), work.ranks
    with alone(folder / ".lock") if ranks.first else contextlib.nullcontext():  # a cache may have several users
        ranks.wait()
        done = _valid(folder / WHOLE)
        ranks.wait()  # nobody has written anything before all have looked
        if not done:
            chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
            paths = [folder / f"{number:06d}.safetensors" for number in range(len(chunks))]
            mine = list(zip(chunks, paths, strict=True))[ranks.rank :: ranks.world]
            total = sum(len(chunk) for chunk, _ in mine)
            for number, (chunk, path) in enumerate(mine):
                work.tell(what, number * CHUNK, total)
                if not _valid(path):
                    part = find(chunk)
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
    return Rows(tensors, index, metadata[DIGEST], json.loads(metadata[SKIPPED]), pixels)


def look(
    numbers: Sequence[int],
    read: Callable[[int], tuple[str, Image.Image]],
    prepare: Callable[[Image.Image], Tensor],
    see: Callable[[Tensor], dict[str, Tensor]],
) -> Found:
    """Read some images, in threads, and look at them in batches.

    Args:
        numbers: which images.
        read: gives the name of an image and itself; raises LdmError if it cannot.
        prepare: makes the network's input of one image.
        see: what is found in a batch: (B, …) each.

    Returns:
        What was found, and as `PIXELS` a number of each image that is the same for the same pixels.
    """
    digest = hashlib.sha256()
    index: list[int] = []
    skipped: dict[str, str] = {}
    found: list[dict[str, Tensor]] = []

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
                found.append({**see(torch.stack(inputs)), PIXELS: torch.tensor(pixels)})
    values = {name: torch.cat([part[name] for part in found]) for name in (found[0] if found else ())}
    return Found(values, index, digest.hexdigest(), skipped)


@contextlib.contextmanager
def alone(path: Path, in_use: str = "") -> Iterator[None]:
    """Hold the lock of a file, if its file system has locks; wait for other processes, or, if `in_use` is said, do not.

    Raises:
        LdmError: `in_use`; or the file cannot be written.
    """
    try:
        lock = path.open("wb")
    except OSError as error:
        raise LdmError(f"{path} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if in_use else 0))
        except (BlockingIOError, PermissionError):
            raise LdmError(in_use) from None
        except OSError:
            pass  # no locks
        yield


# --- files ------------------------------------------------------------------------------------------------------------


def _valid(path: Path) -> bool:
    """Whether a file is there and whole."""
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
    """One file of all chunks, of which memory holds one at a time; they are removed."""
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
