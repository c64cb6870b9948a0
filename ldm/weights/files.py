"""Files of tensors: what is in them, reading them piece by piece, writing them whole or not at all.

A safetensors file is eight bytes of header length, a JSON header and the raw tensors; it has no checksum. What we write
carries one: the header's metadata holds, as `ldm.sha256`, the SHA-256 of the whole file with those 64 characters as
zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import LdmError, first_line, listing

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIGEST = "ldm.sha256"
LINEAGE = "ldm.lineage"  # JSON in a header: how the weights were made
PIECE = 512 * 2**20  # bytes: how much is mapped at a time when tensors change their dtype
HASHED = 64 * 2**20  # and when it is hashed

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all


def silent(what: str, done: int, total: int) -> None:
    """The progress report that reports nothing."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file that has not been read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


# --- what a file is ---------------------------------------------------------------------------------------------------


def sniff(path: Path) -> str:
    """What a file is by its first bytes: "safetensors", "pickle" or something that is no checkpoint, in words."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "pickle"
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    if start.lstrip()[:1] in (b"{", b"["):
        return "a JSON file"
    if start.lstrip()[:1] == b"<":
        return "a web page"
    return "not a safetensors file" if start.count(0) else "a text file"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MB.

    Raises:
        LdmError: it is missing, unreadable, no JSON, or no object.
    """
    try:
        if path.stat().st_size > 64 * 2**20:
            raise LdmError(f"{path} has {path.stat().st_size} bytes; that is no configuration")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, LdmError):
            raise
        raise LdmError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise LdmError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


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
            header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
        infos = {name: TensorInfo(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])) for name in names}
    except KeyError as error:
        raise LdmError(f"{path} holds tensors of type {error.args[0]}, which is not supported") from None
    except (SafetensorError, ValueError, TypeError, OSError, RecursionError) as error:
        raise LdmError(f"{path} is damaged or cut short ({first_line(error)}); fetch or write it again") from None
    return infos, metadata


# --- stores: tensors by name, read when asked for ---------------------------------------------------------------------


class Store:
    """The tensors of one or more safetensors files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
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
        """The named tensors, one after the other, memory-mapped; floating-point ones in `dtype` if that is given.

        Where the dtype changes, files are mapped anew every 512 MB: pages of the old dtype do not pile up in memory.
        """
        name_of_device = str(device).replace("cpu:0", "cpu")  # the only name that safetensors knows it by
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


class PickleStore(Store):
    """The tensors of a `.ckpt` or `.bin` pickle, read by PyTorch's restricted unpickler, which runs no code."""

    def __init__(self, file: Path) -> None:
        self.files = [file]
        self.metadata = {}
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
        except Exception as error:  # the unpickler meets whatever a damaged or hostile file holds
            raise LdmError(
                f"{file} cannot be read by the restricted unpickler ({first_line(error)}); it is damaged, or holds "
                "more than tensors"
            ) from None
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        content = content if isinstance(content, dict) else {}
        self._tensors = {
            name: tensor for name, tensor in content.items() if isinstance(name, str) and isinstance(tensor, Tensor)
        }
        strange = [name for name, t in self._tensors.items() if t.layout != torch.strided or t.is_meta]
        if strange:
            raise LdmError(f"{file} holds tensors without plain numbers: {listing(strange)}")
        if not self._tensors:
            raise LdmError(f"{file} holds no dictionary of tensors")
        self.infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None, device: torch.device | str
    ) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor = self._tensors[name]
            yield name, tensor.to(device, dtype if tensor.is_floating_point() else None).contiguous()


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def open_store(path: Path, allow_pickle: bool) -> Store:
    """The tensors of one file, whatever its name ends with.

    Raises:
        LdmError: it is no checkpoint, or a pickle and `allow_pickle` is not set.
    """
    if sniff(path) != "pickle":
        return Store([path])
    if not allow_pickle:
        raise LdmError(
            f"{path} is a pickle, which can run code when it is opened; use the .safetensors file of the same model, "
            "or allow_pickle=True (--allow-pickle) to read tensors, and nothing else, from it"
        )
    return PickleStore(path)


# --- digests ----------------------------------------------------------------------------------------------------------

_DIGEST_AT = re.compile(rb'"' + re.escape(DIGEST).encode() + rb'":"([0-9a-f]{64})"')


def _split_header(path: Path) -> tuple[bytes, str]:
    """The first bytes of a safetensors file, up to the tensors, with the digest in them as zeros; and that digest.

    Empty for other files, and without a digest "" in its place.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(path.stat().st_size - 8, 2**30):
            return b"", ""
        header = start + file.read(length)
    found = _DIGEST_AT.search(header)
    if not found:
        return header, ""
    return header[: found.start(1)] + b"0" * 64 + header[found.end(1) :], found[1].decode()


def file_digest(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file; a digest in its own header counts as zeros."""
    header, _ = _split_header(path)
    digest = hashlib.sha256(header)
    total = path.stat().st_size
    with path.open("rb") as file:
        for start in range(0, total, HASHED):
            end = min(start + HASHED, total)
            with mmap(file.fileno(), end - start, access=ACCESS_READ, offset=start) as piece, memoryview(piece) as view:
                digest.update(view[max(len(header) - start, 0) :])
            progress(f"checking {path.name}", end, total)
    return digest.hexdigest()


def stated_digest(path: Path) -> str:
    """The digest that a file's own header states, "" if it states none."""
    return _split_header(path)[1]


def check_digest(path: Path, expected: str | None = None, progress: Progress = silent) -> bool:
    """Compare a file with `expected` and with the digest in its own header; whether there was one to compare with.

    Raises:
        LdmError: they differ.
    """
    wanted = {value for value in (expected, stated_digest(path)) if value}
    if not wanted:
        return False
    digest = file_digest(path, progress)
    if wanted != {digest}:
        other = sorted(wanted - {digest})[0]
        raise LdmError(
            f"{path} has changed since it was written (SHA-256 {digest[:12]}…, expected {other[:12]}…); "
            "fetch or write it again"
        )
    return True


@contextmanager
def alongside(check: Callable[[], object]) -> Iterator[None]:
    """Check something while the body goes on, since hashing leaves a core to it; what the check raises comes first."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(check)
        try:
            yield
        finally:
            result.result()


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """One tensor to write: its name, what it will be, and how to get it when its turn comes."""

    name: str
    info: TensorInfo
    make: Callable[[], Tensor]


def write_safetensors(
    path: Path, outputs: Iterable[Output], metadata: Mapping[str, str], progress: Progress = silent
) -> str:
    """Write tensors one after the other, so that memory holds one at a time; returns the file's digest."""
    outputs = sorted(
        outputs, key=lambda output: (-output.info.dtype.itemsize, output.name)
    )  # keeps all of them aligned
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
        found = _DIGEST_AT.search(text)
        assert found
        file.seek(8 + found.start(1))
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON with sorted keys, as Hugging Face writes it; bytes of file names that are no UTF-8 as escapes."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def check_destination(path: Path, folder: bool, overwrite: bool) -> Path:
    """Where to write for `path`, behind all links.

    Raises:
        LdmError: `path` exists and `overwrite` is not set, or is of the other kind; or its folder is missing.
    """
    try:
        parent = path.absolute().parent
        if not parent.is_dir():
            raise LdmError(f"the folder {parent} does not exist; create it first")
        if path.is_dir() if not folder else path.is_file():
            raise LdmError(f"{path} is a {'folder' if path.is_dir() else 'file'}; choose another name")
        empty = folder and path.is_dir() and not any(path.iterdir())
        if os.path.lexists(path) and not overwrite and not empty:
            raise LdmError(f"{path} exists; choose another name or ask for it to be replaced (overwrite=True, --force)")
        return Path(os.path.realpath(path))
    except LdmError:
        raise
    except (OSError, ValueError) as error:  # no permission, a name too long, a zero byte in it
        raise LdmError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def replacing(path: Path, folder: bool, overwrite: bool, need: int) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to, which takes its place at the end, or vanishes on any error.

    A link is followed: what it leads to is replaced.

    Raises:
        LdmError: as `check_destination`; or the disk is not writable, or too small for `need` bytes or what is written.
    """
    target = check_destination(path, folder, overwrite)
    temporary = target.parent / f".{secrets.token_hex(6)}.part"
    old = temporary.with_suffix(".old")
    try:
        free = shutil.disk_usage(target.parent).free
        if need > free:
            raise LdmError(f"{path} needs {need / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on its disk")
        if folder:
            temporary.mkdir()
        yield temporary
        if folder and target.exists():
            target.rename(old)
        temporary.replace(target)
    except OSError as error:
        raise LdmError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if old.exists() and not target.exists():  # interrupted between the two renames
            old.rename(target)
        for rest in (temporary, old):
            if rest.is_dir():
                shutil.rmtree(rest, ignore_errors=True)
            else:
                rest.unlink(missing_ok=True)
