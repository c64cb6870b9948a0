"""Latents and encoded texts on disk, so that training needs neither the images nor the frozen networks.

A cache is a folder whose name is a digest of the settings shared by all rows: the networks' fingerprint, and for
latents the buckets. The name of a row is a digest of its own inputs: for latents the image's key, size and time of
modification, the number of the crop and the flip; for texts the caption. So a changed image or network gets a new name
and is encoded again; the old rows stay.

Rows are stored in shards, safetensors files that are written whole or not at all: an interrupted build continues where
it stopped, and several processes can build at once. Rows are read one by one from memory-mapped files.

B rows, C latent channels, H×W and h×w sides of images and latents, T tokens, D and P widths of text
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.framing import decoded_side, fixed_frame, render, to_pixels
from ldm.data.image_set import made
from ldm.data.plan import BatchPlan
from ldm.data.skipped import Skipped
from ldm.errors import LdmError
from ldm.files import read_json, replacing, write_json
from ldm.weights.tensors import Output, TensorInfo, read_header, write_safetensors

SHARD = 256 * 2**20  # bytes
_STALE = 3600  # seconds after which a temporary file belongs to no living process

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels (B, 3, H, W) in [-1, 1] -> mean, deviation (B, C, h, w)
EncodeTexts = Callable[[list[str]], dict[str, Tensor]]  # captions -> text (B, T, D), pooled (B, P), …
Report = Callable[[int, int], None]  # rows encoded so far, rows in total


def build_latents(
    folder: Path,
    plan: BatchPlan,
    fingerprint: str,
    encode: Encode,
    *,
    batch: int = 8,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    report: Report = lambda done, total: None,
) -> int:
    """Encode every crop of the plan that the cache lacks, also mirrored if `framing.flip`; returns the number encoded.

    An image that cannot be decoded is recorded in the cache, and training then skips it as damaged; the next build
    tries it again.

    Args:
        folder: the folder of caches.
        plan: gives the images and the framing; its seed and batch do not matter.
        fingerprint: the autoencoder's fingerprint.
        encode: gives the posterior's mean and standard deviation, in the dtype to store.
        batch: the number of images encoded at once.
        workers: the number of processes that read images.
        rank: the rank of this process, which encodes its share of the images.
        world: the number of processes.
        report: called with the number of rows encoded so far and in total.

    Raises:
        LdmError: the plan has a new crop at each visit, too many images are damaged, or latents are not finite.
    """
    path = _cache(folder, "latents", _latent_settings(plan, fingerprint), create=True)
    writer, present = _Writer(path), _Rows(path).places()
    missing = (one for one in _crops(plan) if one[1].name not in present and one[1].index % world == rank)
    todo = [
        (sides, some)
        for sides, group in groupby(missing, itemgetter(0))
        for some in _chunks((crop for _, crop in group), batch)
    ]
    done, encoded, total = 0, 0, sum(len(some) for _, some in todo)
    unreadable = _Unreadable(path, plan, rank)
    loading = DataLoader(
        _Rendering(plan), sampler=todo, batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    for rows, damaged in loading:
        done += len(rows) + len(damaged)
        encoded += len(rows)
        if damaged:
            unreadable.add(damaged, done)
        if rows:
            writer.add([crop.name for crop, _, _ in rows], _encoded(rows, plan, encode))
        report(done, total)
    writer.flush()
    return encoded


def _encoded(rows: list[_Row], plan: BatchPlan, encode: Encode) -> dict[str, Tensor]:
    """Moments (B, 2C, h, w) and time ids (B, 6, see `Frame.numbers`) of these crops."""
    pixels = to_pixels(torch.from_numpy(np.stack([pixels for _, pixels, _ in rows])))
    moments = torch.cat(encode(pixels), dim=1).detach().cpu()
    for (crop, _, _), finite in zip(rows, moments.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            key = plan.images.key(crop.index)
            raise LdmError(f"the latents of {key} are not finite; encode in bf16 or fp32, not in fp16")
    return {"moments": moments, "sizes": torch.tensor([numbers for _, _, numbers in rows], dtype=torch.int32)}


class _Unreadable:
    """The record in the cache of the images that a process could not decode; too many such images end the build."""

    def __init__(self, folder: Path, plan: BatchPlan, rank: int) -> None:
        self._file = folder / f"unreadable-{rank}.json"
        self._plan = plan
        self._skipped = Skipped(plan.name, folder / f"unreadable-{rank}.txt", fresh=True)
        self._reasons: dict[str, str] = {}

    def add(self, damaged: list[tuple[_Crop, str]], done: int) -> None:
        """Record these crops and the reasons; `done` is the number of crops read so far."""
        for crop, reason in damaged:
            self._reasons[crop.name.hex()] = reason
            self._skipped.add(self._plan.images.key(crop.index), reason)
        self._skipped.check(done // _per_image(self._plan))
        with replacing(self._file, folder=False, overwrite=True, need=0) as temporary:
            write_json(temporary, self._reasons)


class Latents:
    """The cached latents of a plan.

    Raises:
        LdmError: the folder has no cache of this autoencoder and these buckets, or images are missing or have changed.
    """

    def __init__(self, folder: Path, plan: BatchPlan, fingerprint: str) -> None:
        path = _cache(folder, "latents", _latent_settings(plan, fingerprint), create=False)
        self._rows = _Rows(path)
        places = self._rows.places()
        noted = [read_json(file) for file in sorted(path.glob("unreadable-*.json"))]
        unreadable = {name: reason for one in noted for name, reason in one.items()}
        self._places = np.full((len(plan.images), plan.framing.fixed, 2, 2), -1, dtype=np.int32)
        self._reasons: dict[int, str] = {}
        missing = set()
        for _, crop in _crops(plan):
            if crop.name in places:
                self._places[crop.index, crop.number, int(crop.flip)] = places[crop.name]
            elif crop.name.hex() in unreadable:
                self._reasons[crop.index] = unreadable[crop.name.hex()]
            else:
                missing.add(crop.index)
        if missing:
            raise LdmError(
                f"{path} lacks {len(missing)} images, such as {plan.images.key(min(missing))}: they are new, have "
                "changed, or the build did not end; build the cache again, which adds them"
            )

    def read(self, index: int, number: int, flip: bool) -> tuple[Tensor, tuple[int, ...]]:
        """Mean and deviation (2C, h, w), float32, of a fixed crop of an image, and its time ids (`Frame.numbers`).

        Raises:
            LdmError: the image could not be decoded.
        """
        if index in self._reasons:
            raise LdmError(self._reasons[index])
        shard, row = self._places[index, number, int(flip)].tolist()
        found = self._rows.read(shard, row)
        return found["moments"].float(), tuple(found["sizes"].tolist())


def build_texts(
    folder: Path,
    captions: Iterable[str],
    fingerprint: str,
    encode: EncodeTexts,
    *,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    report: Report = lambda done, total: None,
) -> int:
    """Encode the distinct captions that the cache lacks, and the empty caption; returns the number encoded.

    The arguments are those of `build_latents`, but `fingerprint` is the text encoders', and `encode` returns a dict.
    """
    path = _cache(folder, "texts", {"text encoders": fingerprint}, create=True)
    writer = _Writer(path)
    present = _Rows(path).places()
    names = {caption: _text_name(caption) for caption in {"", *captions}}
    missing = {caption: name for caption, name in names.items() if name not in present}
    todo = sorted(caption for caption, name in missing.items() if int.from_bytes(name, "little") % world == rank)
    done = 0
    for some in _chunks(todo, batch):
        tensors = encode(some)
        writer.add(
            [names[caption] for caption in some], {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        )
        done += len(some)
        report(done, len(todo))
    writer.flush()
    return len(todo)


class Texts:
    """Cached encoded texts.

    Raises:
        LdmError: the folder has no cache of these text encoders.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._rows = _Rows(_cache(folder, "texts", {"text encoders": fingerprint}, create=False))
        self._places = self._rows.places()

    def read(self, captions: Iterable[str]) -> dict[str, Tensor]:
        """The text encoders' outputs for these captions by name: text (B, T, D), pooled (B, P), …

        Raises:
            LdmError: a caption is not in the cache, or the texts have different lengths.
        """
        rows = []
        for caption in captions:
            place = self._places.get(_text_name(caption))
            if place is None:
                raise LdmError(f"{self._rows.folder} lacks the caption {caption!r:.80}; build the cache again")
            rows.append(self._rows.read(*place))
        if len({tuple((name, tensor.shape) for name, tensor in sorted(row.items())) for row in rows}) > 1:
            raise LdmError(f"{self._rows.folder} holds texts of different lengths; encode all of them at one length")
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# --- rows in shards ---------------------------------------------------------------------------------------------------


class _Rows:
    """Named rows in a cache's shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # another process maps the files itself

    def places(self) -> dict[bytes, tuple[int, int]]:
        """Shard and row of every name."""
        found: dict[bytes, tuple[int, int]] = {}
        for shard, file in enumerate(self.files):
            if "names" not in read_header(file)[0]:
                raise LdmError(f"{file} is not a shard of a cache; remove it")
            names = self._file(shard).get_tensor("names").numpy()
            found |= {name.tobytes(): (shard, row) for row, name in enumerate(names)}
        return found

    def read(self, shard: int, row: int) -> dict[str, Tensor]:
        """The tensors of a row."""
        file = self._file(shard)
        return {name: file.get_slice(name)[row] for name in file.keys() if name != "names"}  # noqa: SIM118

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self.files[shard], framework="pt")
        return self._open[shard]


class _Writer:
    """Gathers rows of one shape into shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: list[bytes] = []
        self._pieces: list[dict[str, Tensor]] = []
        for file in folder.glob(".*.part"):  # left by a build that was killed
            with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()

    def add(self, names: list[bytes], tensors: dict[str, Tensor]) -> None:
        """Add rows (B, ...); writes a shard when enough rows have gathered, or the shape changes."""
        if self._pieces and _kinds(self._pieces[0]) != _kinds(tensors):
            self.flush()
        self._names += names
        self._pieces.append(tensors)
        if sum(tensor.nbytes for piece in self._pieces for tensor in piece.values()) >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Write the gathered rows as a shard."""
        if not self._names:
            return
        joined = {name: torch.cat([piece[name] for piece in self._pieces]) for name in self._pieces[0]}
        joined["names"] = torch.frombuffer(bytearray(b"".join(self._names)), dtype=torch.uint8).view(-1, 16)
        path = self.folder / f"{_digest(b''.join(self._names)).hex()}.safetensors"
        outputs = [
            Output(name, TensorInfo(tensor.dtype, tuple(tensor.shape)), partial(joined.__getitem__, name))
            for name, tensor in joined.items()
        ]
        with replacing(path, folder=False, overwrite=True, need=sum(output.info.nbytes for output in outputs)) as file:
            write_safetensors(file, outputs, {})
        self._names, self._pieces = [], []


def _kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items()}


def _cache(folder: Path, kind: str, settings: dict[str, object], create: bool) -> Path:
    """The folder of the cache with these settings."""
    path = folder / f"{kind}-{_digest(ascii(sorted(settings.items())).encode()).hex()[:16]}"
    if path.is_dir():
        return path
    if not create:
        others = [read_json(other) for other in sorted(folder.glob(f"{kind}-*/settings.json"))]
        differ = [name for name in settings if all(other.get(name) != settings[name] for other in others)]
        why = f" (the existing cache differs in its {' and '.join(differ)})" if others and differ else ""
        raise LdmError(f"{folder} holds no {kind} with these settings{why}; build the cache first")
    with replacing(made(path) / "settings.json", folder=False, overwrite=True, need=0) as temporary:
        write_json(temporary, settings)
    return path


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _text_name(caption: str) -> bytes:
    return _digest(caption.encode())


# --- latents ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Crop:
    """One row of the cache."""

    index: int  # the image's index
    number: int  # the fixed crop's number
    flip: bool
    name: bytes


_Row = tuple[_Crop, np.ndarray, tuple[int, ...]]  # crop, pixels (H, W, 3) uint8, time ids (`Frame.numbers`)


def _latent_settings(plan: BatchPlan, fingerprint: str) -> dict[str, object]:
    """The settings that the latents of a crop depend on; they do not include the number of crops."""
    framing = plan.framing
    if not framing.fixed:
        raise LdmError("a new crop at each visit cannot be cached; set crops to 1 or more, or crop to center")
    names = ("size", "buckets", "step", "aspect", "crop")
    return {"autoencoder": fingerprint} | {name: getattr(framing, name) for name in names}


def _per_image(plan: BatchPlan) -> int:
    return plan.framing.fixed * (2 if plan.framing.flip else 1)


def _crops(plan: BatchPlan) -> Iterator[tuple[tuple[int, int], _Crop]]:
    """Every crop that the plan can show, with its bucket, bucket by bucket."""
    keys, stamps = plan.images.all_keys(), plan.images.all_stamps()
    for sides, members in plan.buckets.items():
        for index in members.tolist():
            for number in range(plan.framing.fixed):
                for flip in (False, True) if plan.framing.flip else (False,):
                    name = _digest(ascii((keys[index], stamps[index], number, flip)).encode())
                    yield sides, _Crop(index, number, flip, name)


def _chunks(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while some := list(islice(iterator, size)):
        yield some


class _Rendering(Dataset):
    """The dataset of crops: pixels (H, W, 3) uint8 and time ids of each, and the crops that cannot be read."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan

    def __getitem__(self, item: tuple[tuple[int, int], list[_Crop]]) -> tuple[list[_Row], list[tuple[_Crop, str]]]:
        sides, some = item
        rows: list[_Row] = []
        damaged: list[tuple[_Crop, str]] = []
        for crop in some:
            example = self.plan.example(crop.index)
            original = example.width, example.height
            frame = fixed_frame(self.plan.framing, example.key, crop.number, crop.flip, original, sides)
            try:
                rows.append((crop, render(self.plan.read(crop.index, decoded_side(frame)), frame), frame.numbers))
            except LdmError as error:
                damaged.append((crop, str(error)))
        return rows, damaged
