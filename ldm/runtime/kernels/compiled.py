"""The C++ sources of this folder, for processors with AVX-512 BF16: compiled at first use, kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.caches import cache_folder
from ldm.errors import LdmError, first_line
from ldm.runtime.kernels.processor import can

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
FLAGS = [f"-m{name}" for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma")]
FLAGS += ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]  # PyTorch's threads, if it is GCC's OpenMP
SMALL = 10**5  # numbers up to which a second thread does not pay; of multiplications, 10 times as many
INT, FLOAT, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_void_p
SIGNATURES = {
    "attend": [POINTER] * 5 + [INT] * 5 + [FLOAT, INT],
    "group_norm": [POINTER] * 5 + [INT] * 4 + [DOUBLE, INT, INT],
    "geglu": [POINTER] * 3 + [INT] * 3,
}


@cache
def usable() -> bool:
    """Whether this machine can compile and run the C++ kernels."""
    if not can("avx512_bf16") or _compiler() is None:
        return False
    try:
        library()
    except LdmError as error:
        log.warning("C++ kernels are not used: %s", error)
        return False
    return True


@cache
def library() -> Any:
    """The compiled sources, from the user's folder for caches if they are there.

    Raises:
        LdmError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    if compiler is None:
        raise LdmError("no C++ compiler is found: install g++ or clang++, or name one in CXX")
    content = b"".join(path.read_bytes() for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]))
    name = hashlib.sha256(content + repr((compiler, FLAGS)).encode()).hexdigest()[:16] + ".so"
    path = cache_folder("kernels") / name
    if not path.is_file():
        path = _compiled(compiler, path)
    found = ctypes.CDLL(str(path))
    for function, arguments in SIGNATURES.items():
        getattr(found, function).argtypes = arguments
    return found


def learns(*tensors: Tensor) -> bool:
    """Whether a result computed from these tensors needs gradients."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def fits(*tensors: Tensor) -> bool:
    """Whether these are plain bf16 tensors on the CPU, and no gradients are wanted.

    Other classes, such as quantised weights, report bf16 but hold other types in memory.
    """
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    right = all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
    return plain and right and not learns(*tensors)


def threads(numbers: int) -> int:
    """The number of threads for work on so many numbers."""
    return torch.get_num_threads() if numbers > SMALL else 1


def _compiled(compiler: str, path: Path) -> Path:
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
        done = subprocess.run(
            [compiler, *FLAGS, *sources, "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise LdmError(f"{compiler} cannot compile {FOLDER}: {first_line(RuntimeError(done.stderr))}")
        made.replace(path)
    finally:
        if path.parent != Path(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return path


@cache
def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)
