"""Files of tensors: headers, reading tensor by tensor, and writing.

A safetensors file is eight bytes of header length, a JSON header and the raw tensors; it has no checksum. We add a
checksum to the files that we write: the header's metadata holds, as `ldm.sha256`, the SHA-256 of the whole file,
computed with zeros in place of these 64 characters.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import LdmError, first_line, listing
from ldm.files import DIGEST, DIGEST_AT, Progress, silent, sniff

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by the names that users give
LINEAGE = "ldm.lineage"  # JSON in a header: how the weights were made
PIECE = 512 * 2**20  # bytes that are mapped at a time when tensors are converted to another dtype


@dataclass(frozen=True)
class TensorInfo:
    """Type, shape and place of one tensor in a file, from the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = field(default=0, compare=False)  # of its data in the file, bytes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


# --- headers ----------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, from its header alone.

    Raises:
        LdmError: the file is not safetensors, is cut short or longer than its header says, or the header is damaged.
    """
    kind = sniff(path)
    if kind != "safetensors":
        raise LdmError(f"{path} is {kind}; a safetensors file is needed")
    try:
        with safe_open(path, framework="pt") as file:  # checks lengths, offsets, overlaps
            metadata = file.metadata() or {}
            names = file.keys()
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        infos = {}
        for name in names:
            dtype, shape, (start, _) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
            infos[name] = TensorInfo(DTYPES[dtype], tuple(shape), 8 + length + start)
    except KeyError as error:
        raise LdmError(f"{path} holds tensors of type {error.args[0]}, which is not supported") from None
    except (SafetensorError, ValueError, TypeError, OSError, RecursionError) as error:
        raise LdmError(f"{path} is damaged or cut short ({first_line(error)}); fetch or write it again") from None
    return infos, metadata


# --- stores: tensors by name, read on demand --------------------------------------------------------------------------


class Store:
    """The tensors of one or more safetensors files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self.passed_over: list[str] = []  # entries of the file that are no tensors of the model
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            infos, metadata = read_header(file)
            twice = sorted(self.infos.keys() & infos.keys())
            if twice:
                raise LdmError(f"{file} holds tensors that another shard holds too: {listing(twice)}")
            self.infos |= infos
            self.metadata |= metadata
            self._file_of |= dict.fromkeys(infos, file)

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None, device: torch.device | str
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors, memory-mapped; floating-point tensors are converted to `dtype` if it is given.

        When the dtype changes, files are mapped anew every 512 MB, to free the memory of pages already converted.
        """
        name_of_device = str(device).replace("cpu:0", "cpu")  # safetensors only accepts "cpu"
        todo: dict[Path, list[str]] = {}
        for name in names:
            todo.setdefault(self._file_of[name], []).append(name)
        for file, wanted in todo.items():
            while wanted:
                mapped = 0
                with safe_open(file, framework="pt", device=name_of_device) as tensors:
                    while wanted and mapped < PIECE:
                        name = wanted.pop(0)
                        tensor = tensors.get_tensor(name)
                        if dtype not in (None, tensor.dtype) and tensor.is_floating_point():
                            mapped += tensor.nbytes
                            tensor = tensor.to(dtype)
                        yield name, tensor
                    del tensor

    def sample(self, names: Iterable[str], size: int) -> Iterator[Excerpt]:
        """The first, middle and last `size` numbers of the named tensors, for each file and type; nothing else is read.

        The tensors of a sample are in the order of the file.
        """
        groups: dict[tuple[Path, torch.dtype], list[str]] = {}
        for name in sorted(names, key=lambda name: self.infos[name].start):
            groups.setdefault((self._file_of[name], self.infos[name].dtype), []).append(name)
        for (file, dtype), found in groups.items():
            with file.open("rb", buffering=0) as raw:
                places = [(self.infos[name].start, self.infos[name].nbytes) for name in found]
                yield _sampled(found, ((partial(_read_at, raw, start), n) for start, n in places), dtype, size)


@dataclass(frozen=True)
class Excerpt:
    """Numbers from several places of each of many tensors of one type."""

    names: list[str]
    ends: np.ndarray  # where each tensor's numbers end in `numbers`: (len(names),)
    numbers: Tensor  # (N,)


ReadAt = Callable[[int, int], bytes]  # place and number of bytes within a tensor -> these bytes


def _read_at(raw: FileIO, start: int, at: int, count: int) -> bytes:
    raw.seek(start + at)
    return raw.read(count)


def _part_of(tensor: np.ndarray, at: int, count: int) -> bytes:
    return tensor[at : at + count].tobytes()


def _sampled(names: list[str], data: Iterable[tuple[ReadAt, int]], dtype: torch.dtype, size: int) -> Excerpt:
    """The sample of tensors, each given as a function that reads its bytes, and their number."""
    step = size * dtype.itemsize
    pieces, ends, end = [], [], 0
    for read, length in data:
        middle = length // 2 // dtype.itemsize * dtype.itemsize
        places = [(0, length)] if length <= 3 * step else [(at, step) for at in (0, middle, length - step)]
        pieces += [read(at, count) for at, count in places]
        end += sum(count for _, count in places) // dtype.itemsize
        ends.append(end)
    return Excerpt(names, np.array(ends), torch.frombuffer(bytearray(b"".join(pieces)), dtype=dtype))


class PickleStore(Store):
    """The tensors of a `.ckpt` or `.bin` pickle, read by PyTorch's restricted unpickler, which runs no code.

    They are the pickle itself, or its entry state_dict, model, module or (of embeddings) string_to_param, or the two
    groups of an IP-Adapter. Its entries that are texts are the metadata.
    """

    def __init__(self, file: Path) -> None:
        self.files = [file]
        try:
            content = _unpickled(file)
        except Exception as error:  # damaged or hostile files can raise anything
            raise LdmError(
                f"{file} cannot be read by the restricted unpickler ({_reason(error)}); it is damaged, or holds more "
                "than tensors: use the .safetensors file of the same model"
            ) from None
        content = content if isinstance(content, dict) else {}
        self.metadata = {name: value for name, value in content.items() if isinstance(value, str)}
        inner = next((name for name in _ENTRIES if _tensors(content.get(name))), None)
        groups = {name: found for name in _GROUPS if (found := _tensors(content.get(name)))}
        if inner is None and groups:
            content = {f"{name}.{own}": tensor for name, found in groups.items() for own, tensor in found.items()}
        self._tensors = _tensors(content if inner is None else content[inner])
        self.passed_over = sorted(str(name) for name in content if name != inner and name not in self._tensors)
        strange = [name for name, t in self._tensors.items() if t.layout != torch.strided or t.is_meta]
        if strange:
            raise LdmError(f"{file} holds sparse or meta tensors, which are not supported: {listing(strange)}")
        if not self._tensors:
            places = [str(name) for name, value in content.items() if _tensors(value)]
            where = f"; {listing(places)} in it are such: save one of them alone" if places else ""
            raise LdmError(f"{file} holds no dictionary of tensors{where}")
        self.infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None, device: torch.device | str
    ) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor = self._tensors[name]
            yield name, tensor.to(device, dtype if tensor.is_floating_point() else None).contiguous()

    def sample(self, names: Iterable[str], size: int) -> Iterator[Excerpt]:
        groups: dict[torch.dtype, list[str]] = {}
        for name in names:
            groups.setdefault(self.infos[name].dtype, []).append(name)
        for dtype, found in groups.items():
            flat = (self._tensors[name].detach().reshape(-1).view(torch.uint8).numpy() for name in found)
            yield _sampled(found, ((partial(_part_of, one), len(one)) for one in flat), dtype, size)


# --- pickles: objects of other classes are passed over ----------------------------------------------------------------

_ENTRIES = ("state_dict", "model", "module", "string_to_param")  # where training programs put the tensors
_GROUPS = ("image_proj", "ip_adapter")  # entries of an IP-Adapter's pickle, both of which are read
_FOREIGN = re.compile(r"GLOBAL (\S+) was not an allowed global by default")
_NEEDS = re.compile(rf"Can only (SETITEM|append|extend).*but got <class '{re.escape(__name__)}\.(.+)'>")
_MOST_CLASSES = 200  # that a file may name
_UNPICKLING = threading.Lock()  # because PyTorch's table of known classes is global


class _PassedOver:
    """An object of a class that is not imported; it takes any arguments and state, and keeps nothing."""

    made: Callable[[], object] | None = None  # makes what takes its place, if the file puts items into it

    def __new__(cls, *_: object, **__: object) -> Self:
        return cls.made() if cls.made else super().__new__(cls)  # type: ignore[return-value]

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Parameters(dict[str, Tensor]):
    """The parameters of a `torch.nn.ParameterDict`, by name."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.update(state["_parameters"])


def _unpickled(file: Path) -> Any:
    """The content of a pickle, with `_PassedOver` in place of objects of classes that PyTorch does not know."""
    classes: dict[str, type] = {"torch.nn.modules.container.ParameterDict": _Parameters}
    while True:
        known: list[Any] = [(stand_in, name) for name, stand_in in classes.items()]
        try:
            with _UNPICKLING, torch.serialization.safe_globals(known):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
        except UnpicklingError as error:
            foreign, needs = _FOREIGN.search(str(error)), _NEEDS.search(str(error))
            if foreign and len(classes) < _MOST_CLASSES:
                name = foreign[1] if "." in foreign[1] else f"builtins.{foreign[1]}"
                made: type | None = None
            elif needs:
                name, made = needs[2], OrderedDict if needs[1] == "SETITEM" else list
            else:
                raise
            if name in classes and (made is None or classes[name].made):  # type: ignore[attr-defined]
                raise
            classes[name] = type(name, (_PassedOver,), {"made": made})


def _reason(error: Exception) -> str:
    """PyTorch's reason for not reading a pickle, without its advice."""
    text = str(error)
    told = re.search(r"WeightsUnpickler error:\s*([^\n]+)|([^\n]*unsupported GLOBAL[^\n]*)", text)
    return (told[1] or told[2]).strip() if told else first_line(error)


def _tensors(content: object) -> dict[str, Tensor]:
    """The tensors of a dictionary, by name; empty for anything else."""
    items = content.items() if isinstance(content, dict) else ()
    return {name: tensor for name, tensor in items if isinstance(name, str) and isinstance(tensor, Tensor)}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def open_store(path: Path, allow_pickle: bool) -> Store:
    """The tensors of one file, whose format is detected from its content.

    Raises:
        LdmError: the file is not a checkpoint, or it is a pickle and `allow_pickle` is not set.
    """
    if sniff(path) != "pickle":
        return Store([path])
    if not allow_pickle:
        raise LdmError(
            f"{path} is a pickle, which can run code when it is opened; use the .safetensors file of the same model, "
            "or allow_pickle=True (--allow-pickle) to read tensors, and nothing else, from it"
        )
    return PickleStore(path)


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """One tensor to write: its name, its type and shape, and a function that returns it."""

    name: str
    info: TensorInfo
    make: Callable[[], Tensor]


def write_safetensors(
    path: Path, outputs: Iterable[Output], metadata: Mapping[str, str], progress: Progress = silent
) -> str:
    """Write tensors one after the other, so that only one is in memory at a time; returns the file's digest."""
    outputs = sorted(
        outputs, key=lambda output: (-output.info.dtype.itemsize, output.name)
    )  # keeps all tensors aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, DIGEST: "0" * 64}}
    end = 0
    for output in outputs:
        start, end = end, end + output.info.nbytes
        header[output.name] = {
            "dtype": NAMES[output.info.dtype],
            "shape": list(output.info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    done = 0
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for output in outputs:
            made = output.make().detach()
            tensor = made.to("cpu", output.info.dtype).contiguous()
            if made.dtype != tensor.dtype and bool(tensor.isinf().any()) and not bool(made.isinf().any()):
                raise LdmError(f"{output.name} has numbers too large for {tensor.dtype}; choose bf16 or fp32")
            if tuple(tensor.shape) != output.info.shape:
                raise RuntimeError(f"{output.name}: announced {output.info.shape}, made {tuple(tensor.shape)}")
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            file.write(data)
            digest.update(data)
            done += output.info.nbytes
            progress(f"writing {path.name}", done, end)
        found = DIGEST_AT.search(text)
        assert found
        file.seek(8 + found.start(1))
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
