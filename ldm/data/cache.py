"""Latents and encoded texts on disk, so that training needs neither the images nor the frozen networks.

A cache is a folder named by a digest of what all its contents depend on: the networks' fingerprint, and for latents the
buckets. Each row in it is named by a digest of what it alone depends on: for latents the image's key, size and time of
modification, the number of the crop and the flip; for texts the caption. So a changed image or network finds nothing
under its name, and is encoded again; what is there stays.

Rows come in shards, safetensors files that are written whole or not at all: a build that is stopped goes on where it
was, and several processes can build at once. Rows are read through the memory map, one by one.

B rows, C latent channels, H×W and h×w sides of pictures and latents, T tokens, D and P widths of text
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.framing import decoded_side, fixed_frame, render
from ldm.data.keyed import uniform
from ldm.data.plan import Plan
from ldm.data.skipped import Skipped
from ldm.errors import LdmError
from ldm.weights.files import Output, TensorInfo, read_header, read_json, replacing, write_json, write_safetensors

SHARD = 256 * 2**20  # bytes
_STALE = 3600  # seconds after which a temporary file belongs to no living process

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels (B, 3, H, W) in [-1, 1] -> mean, deviation (B, C, h, w)
EncodeTexts = Callable[[list[str]], dict[str, Tensor]]  # captions -> text (B, T, D), pooled (B, P), …
Report = Callable[[int, int], None]  # rows done, rows in all


def build_latents(
    folder: Path,
    plan: Plan,
    fingerprint: str,
    encode: Encode,
    *,
    batch: int = 8,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    report: Report = lambda done, total: None,
) -> int:
    """Encode every crop that the plan can show and the cache lacks, mirrored too if it flips; returns how many.

    An image that cannot be decoded is noted in the cache, where training finds it like a damaged one.

    Args:
        folder: of caches.
        plan: whose images and framing to use; its seed and batch do not matter.
        fingerprint: of the autoencoder.
        encode: the posterior's mean and standard deviation, in the dtype to be kept.
        batch: images encoded at once.
        workers: processes that read images.
        rank: of this process, which encodes its share of the images.
        world: number of processes.
        report: called with the number of rows done and in all.

    Raises:
        LdmError: the plan has a new crop at each visit, too many images are damaged, or latents are not finite.
    """
    path = _cache(folder, "latents", _latent_settings(plan, fingerprint), create=True)
    writer = _Writer(path)
    noted = path / f"unreadable-{rank}.json"
    unreadable = _unreadable(path)
    present = _Rows(path).places().keys() | unreadable.keys()
    todo = [
        (sides, some)
        for sides, members in plan.buckets.items()
        for some in _chunks(
            (shown for shown in _shown(plan, members, rank, world) if _name(plan, *shown) not in present), batch
        )
    ]
    skipped = Skipped(plan.name, path / f"unreadable-{rank}.txt")
    done, total = 0, sum(len(some) for _, some in todo)
    own = read_json(noted) if noted.exists() else {}
    loading = DataLoader(
        _Showing(plan), sampler=todo, batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    for rows, damaged in loading:
        done += len(rows) + len(damaged)
        for shown, reason in damaged:
            own[_name(plan, *shown).hex()] = reason
            skipped.add(plan.images.key(shown[0]), reason)
        if damaged:
            skipped.check(done)
            with replacing(noted, folder=False, overwrite=True, need=0) as temporary:
                write_json(temporary, own)
        if rows:
            keys = [plan.images.key(shown[0]) for shown, _, _ in rows]
            pixels = torch.from_numpy(np.stack([pixels for _, pixels, _ in rows])).permute(0, 3, 1, 2).contiguous()
            mean, deviation = encode(pixels.float().div_(127.5).sub_(1))
            moments = torch.cat([mean, deviation], dim=1).detach().cpu()
            finite = moments.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                raise LdmError(
                    f"the latents of {keys[finite.index(False)]} are not finite; encode in bf16 or fp32, not in fp16"
                )
            sizes = torch.tensor([numbers for _, _, numbers in rows], dtype=torch.int32)
            writer.add([_name(plan, *shown) for shown, _, _ in rows], {"moments": moments, "sizes": sizes})
        report(done, total)
    writer.flush()
    return total


class Latents:
    """The cached latents of a plan.

    Raises:
        LdmError: there are none of this autoencoder and these buckets, or some images are missing or have changed.
    """

    def __init__(self, folder: Path, plan: Plan, fingerprint: str) -> None:
        path = _cache(folder, "latents", _latent_settings(plan, fingerprint), create=False)
        self._rows = _Rows(path)
        places, unreadable = self._rows.places(), _unreadable(path)
        self._places = np.full((len(plan.images), plan.framing.fixed, 2, 2), -1, dtype=np.int32)
        self._reasons: dict[int, str] = {}
        missing: list[str] = []
        for members in plan.buckets.values():
            for index, number, flip in _shown(plan, members, 0, 1):
                name = _name(plan, index, number, flip)
                if name in places:
                    self._places[index, number, int(flip)] = places[name]
                elif name in unreadable:
                    self._reasons[index] = unreadable[name]
                else:
                    missing.append(plan.images.key(index))
        if missing:
            raise LdmError(
                f"{path} lacks {len(missing)} crops of new or changed images, such as {missing[0]}; build the cache "
                "again, which adds them"
            )

    def read(self, index: int, number: int, flip: bool) -> tuple[Tensor, tuple[int, ...]]:
        """Mean and deviation (2C, h, w), float32, of a fixed crop of an image, and the six numbers of `Frame`.

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
    """Encode the distinct captions that the cache lacks, and the empty one; returns how many.

    Arguments as for `build_latents`; `fingerprint` is that of the text encoders, `encode` gives tensors by name.
    """
    path = _cache(folder, "texts", {"text encoders": fingerprint}, create=True)
    writer = _Writer(path)
    present = _Rows(path).places().keys()
    names = {caption: _text_name(caption) for caption in {"", *captions}}
    todo = sorted(c for c, name in names.items() if name not in present and name[0] % world == rank)
    for some in _chunks(todo, batch):
        writer.add([names[caption] for caption in some], {k: t.detach().cpu() for k, t in encode(some).items()})
        report(min(len(todo), todo.index(some[-1]) + 1), len(todo))
    writer.flush()
    return len(todo)


class Texts:
    """Cached encoded texts.

    Raises:
        LdmError: there are none of these text encoders.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._rows = _Rows(_cache(folder, "texts", {"text encoders": fingerprint}, create=False))
        self._places = self._rows.places()

    def read(self, captions: Iterable[str]) -> dict[str, Tensor]:
        """What the encoders gave for these captions: text (B, T, D), pooled (B, P), … by name, as they were given.

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
                raise LdmError(f"{file} is no part of a cache; remove it")
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
        for file in folder.glob(".*.part"):  # of a build that was killed
            if time.time() - file.stat().st_mtime > _STALE:
                file.unlink(missing_ok=True)

    def add(self, names: list[bytes], tensors: dict[str, Tensor]) -> None:
        """Add rows (B, ...); writes a shard when there is enough for one, or the shape changes."""
        if self._pieces and _kinds(self._pieces[0]) != _kinds(tensors):
            self.flush()
        self._names += names
        self._pieces.append(tensors)
        if sum(tensor.nbytes for piece in self._pieces for tensor in piece.values()) >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
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
        why = f" (what is there differs in its {' and '.join(differ)})" if others and differ else ""
        raise LdmError(f"{folder} holds no {kind} of these settings{why}; build the cache first")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LdmError(f"the cache folder {path} cannot be made: {error.strerror}") from None
    with replacing(path / "settings.json", folder=False, overwrite=True, need=0) as temporary:
        write_json(temporary, settings)
    return path


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _text_name(caption: str) -> bytes:
    return _digest(caption.encode())


# --- latents ----------------------------------------------------------------------------------------------------------

Shown = tuple[int, int, bool]  # an image's index, the number of the crop, whether mirrored


def _latent_settings(plan: Plan, fingerprint: str) -> dict[str, object]:
    """All that decides the latents of a crop, besides the image: how many there are of each does not."""
    framing = plan.framing
    if not framing.fixed:
        raise LdmError("a new crop at each visit cannot be cached; set crops to 1 or more, or crop to center")
    names = ("size", "buckets", "step", "aspect", "crop")
    return {"autoencoder": fingerprint} | {name: getattr(framing, name) for name in names}


def _shown(plan: Plan, members: np.ndarray, rank: int, world: int) -> Iterator[Shown]:
    """Every crop of this process's share of the images."""
    for index in members.tolist():
        if world == 1 or int(uniform(0, "share of the cache", plan.images.key(index)) * world) == rank:
            for number in range(plan.framing.fixed):
                for flip in (False, True)[: 1 + plan.framing.flip]:
                    yield index, number, flip


def _name(plan: Plan, index: int, number: int, flip: bool) -> bytes:
    example = plan.images.example(index)
    return _digest(ascii((example.key, example.stamp, number, flip)).encode())


def _unreadable(path: Path) -> dict[bytes, str]:
    """Rows that cannot be made, with the reason."""
    noted = [read_json(file) for file in sorted(path.glob("unreadable-*.json"))]
    return {bytes.fromhex(name): reason for one in noted for name, reason in one.items()}


def _chunks(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while some := list(islice(iterator, size)):
        yield some


class _Showing(Dataset):
    """From crops of a bucket to their pixels (H, W, 3) uint8 and numbers; and those that cannot be read."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getitem__(
        self, item: tuple[tuple[int, int], list[Shown]]
    ) -> tuple[list[tuple[Shown, np.ndarray, tuple[int, ...]]], list[tuple[Shown, str]]]:
        sides, some = item
        rows: list[tuple[Shown, np.ndarray, tuple[int, ...]]] = []
        damaged: list[tuple[Shown, str]] = []
        for shown in some:
            index, number, flip = shown
            example = self.plan.images.example(index)
            frame = fixed_frame(self.plan.framing, example.key, number, flip, (example.width, example.height), sides)
            try:
                rows.append((shown, render(self.plan.read(index, decoded_side(frame)), frame), frame.numbers))
            except LdmError as error:
                damaged.append((shown, str(error)))
        return rows, damaged
