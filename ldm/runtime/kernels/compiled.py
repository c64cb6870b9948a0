"""The C++ sources of this folder: compiled at first use for this processor, kept in the user's cache.

A kernel is called with one pointer to its arguments, 8 bytes each: calls can be kept and made again (`Calls`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.caches import cache_folder
from ldm.errors import LdmError, first_line
from ldm.runtime.kernels.processor import can, vectors

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-std=gnu++17", "-shared", "-fPIC", "-fopenmp"]  # PyTorch's threads, if it is GCC's OpenMP
SMALL = 10**5  # numbers up to which a second thread does not pay; of multiplications, 10 times as many
DTYPES = (torch.float32, torch.bfloat16)
ARGUMENTS = {  # kernel -> its arguments: q whole numbers and pointers, d fractions
    name: struct.Struct(f"@{fields}")
    for name, fields in {
        "attend": "21qdq", "group_norm": "9qd2q", "geglu": "6q", "layer_norm": "6qdq", "add": "5q", "join": "6q",
        "silu": "4q",
        "product": "21q", "filter": "13q", "filter_many": "12q",
    }.items()
}  # fmt: skip


class Calls:
    """Calls of kernels in a row, which can be made again with the same places in memory."""

    def __init__(self) -> None:
        self.made: list[tuple[int, bytes]] = []  # the place of a kernel, its arguments
        self.kept: list[Tensor] = []  # whose memory the kernels read and write
        self.table: Any = None

    def again(self) -> None:
        """Make all calls."""
        if self.table is None:
            self.table = (ctypes.c_void_p * (2 * len(self.made)))()
            for number, (kernel, arguments) in enumerate(self.made):
                place = ctypes.cast(ctypes.c_char_p(arguments), ctypes.c_void_p).value
                self.table[2 * number : 2 * number + 2] = [kernel, place]
        library().replay(self.table, len(self.made))


class _Recording(threading.local):
    calls: Calls | None = None  # where this thread's calls are noted
    weights: list[Callable[[], bool]] | None = None  # where it notes what says whether weights are as they were


recording = _Recording()


def call(kernel: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Call a kernel for tensors of a type; of the arguments, tensors are places in memory and None is no place."""
    packed = ARGUMENTS[kernel].pack(*(_place(one) for one in arguments))
    function = getattr(library(), f"{kernel}_{str(dtype).removeprefix('torch.')}")
    function(packed)
    if recording.calls is not None:
        place = ctypes.cast(function, ctypes.c_void_p).value
        assert place is not None
        recording.calls.made.append((place, packed))
        recording.calls.kept += [one for one in arguments if isinstance(one, Tensor)]


def _place(argument: Tensor | float | None) -> float:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument or 0


@cache
def usable() -> bool:
    """Whether this machine can compile and run the C++ kernels."""
    # Apple's compiler has no OpenMP; on Windows, GCC does not align the stack to vectors (its bug 54412)
    if sys.platform in ("darwin", "win32") or vectors() is None or _compiler() is None:
        return False
    try:
        library()
    except LdmError as error:
        log.warning("C++ kernels are not used: %s", error)
        return False
    return True


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the kernels of products can be used here for this type."""
    return (dtype == torch.float32 or (dtype == torch.bfloat16 and can("avx512_bf16"))) and usable()


@cache
def library() -> Any:
    """The compiled sources, from the user's folder for caches if they are there.

    Raises:
        LdmError: there is no compiler, or it fails, or what it made cannot be loaded here.
    """
    compiler = _compiler()
    if compiler is None:
        raise LdmError("no C++ compiler is found: install g++ or clang++, or name one in CXX")
    content = b"".join(path.read_bytes() for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]))
    flags = [*(vectors() or []), *FLAGS]
    name = hashlib.sha256(content + repr((compiler, flags)).encode()).hexdigest()[:16] + ".so"
    path = cache_folder("kernels") / name
    if not path.is_file():
        path = _compiled([compiler, *flags], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # such as one that another machine made in a folder that both share
        raise LdmError(
            f"{path} cannot be loaded ({first_line(error)}); delete it, or name another folder in XDG_CACHE_HOME"
        ) from None


def learns(*tensors: Tensor) -> bool:
    """Whether a result computed from these tensors needs gradients."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def fits(*tensors: Tensor) -> bool:
    """Whether these are plain tensors on the CPU, all in fp32 or all in bf16, and no gradients are wanted.

    Other classes, such as quantised weights, report a type but hold other types in memory.
    """
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    dtype = tensors[0].dtype
    right = dtype in DTYPES and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)
    return plain and right and not learns(*tensors)


def threads(numbers: int) -> int:
    """The number of threads for work on so many numbers."""
    return torch.get_num_threads() if numbers > SMALL else 1


def empty_images(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Images (B, C, H, W) to be filled that lie channels last, as many and of the same dtype as `x` has."""
    size = (len(x), channels, height, width)
    return torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)


def _compiled(command: list[str], path: Path) -> Path:
    """Compile the kernels to `path`, or to a temporary folder if the cache cannot be written."""
    log.info("compiling %s once, for this machine: %s", FOLDER, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=path.parent)
    except OSError:
        folder = tempfile.mkdtemp()
        path = Path(folder) / path.name
    made = Path(folder) / "made.so"
    sources = map(str, sorted(FOLDER.glob("*.cpp")))
    try:
        done = subprocess.run([*command, *sources, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LdmError(f"{command[0]} cannot compile {FOLDER}: {first_line(RuntimeError(done.stderr))}")
        made.replace(path)
    finally:
        if path.parent != Path(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return path


@cache
def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)
