"""Attention on processors with AVX-512 BF16: see `attention.cpp`, which is compiled at first use.

B batch, N query tokens, M key tokens, D channels of one head
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.caches import cache_folder
from ldm.errors import LdmError, first_line
from ldm.kernels.processor import can

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = [f"-m{name}" for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma")]
FLAGS += ["-O3", "-std=c++17", "-shared", "-fPIC"]
UNIT = 96  # queries, as in the source
SMALL = 10**6  # multiplications that are not worth a second thread


def usable() -> bool:
    """Whether this machine can compile and run it."""
    return can("avx512_bf16") and _compiler() is not None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, as PyTorch's own: (B, heads, N, D), with k and v (B, heads, M, D).

    In bf16, on the CPU. Where gradients are wanted, PyTorch's own kernel is taken.

    Raises:
        LdmError: other numbers or another device, or it cannot be compiled.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return F.scaled_dot_product_attention(q, k, v)
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        raise LdmError(f"it is for bf16 on the CPU, not for {q.dtype} on {q.device.type}")
    batch, heads, queries, channels = q.shape
    keys = k.shape[2]
    if channels % 2 or not keys:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    out = torch.empty(batch, queries, heads, channels, dtype=q.dtype).transpose(1, 2)  # as the next layer reads it
    strides = (ctypes.c_int64 * 12)(*(step for tensor in (q, k, v, out) for step in tensor.stride()[:3]))
    run = library().attend
    pointers = [tensor.data_ptr() for tensor in (q, k, v, out)]

    def units(begin: int, end: int) -> None:
        run(*pointers, strides, heads, queries, keys, channels, channels**-0.5, begin, end)

    count = batch * heads * -(-queries // UNIT)
    parts = min(torch.get_num_threads() if batch * heads * queries * keys * channels > SMALL else 1, count)
    first, *rest = pairwise(count * part // parts for part in range(parts + 1))
    others = [_threads(os.getpid()).submit(units, *cut) for cut in rest]
    units(*first)
    for other in others:
        other.result()
    return out


@cache
def library() -> Any:
    """The compiled source, from the user's folder for caches if it is there.

    Raises:
        LdmError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    if compiler is None:
        raise LdmError("no C++ compiler is found: install g++ or clang++, or name one in CXX")
    content = SOURCE.read_bytes()
    name = hashlib.sha256(content + repr((compiler, FLAGS)).encode()).hexdigest()[:16] + ".so"
    path = cache_folder("kernels") / name
    if not path.is_file():
        path = _compiled(compiler, path)
    found = ctypes.CDLL(str(path))
    found.attend.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 4 + [ctypes.c_float] + [ctypes.c_int64] * 2
    return found


def _compiled(compiler: str, path: Path) -> Path:
    """Compile; into a folder of the process's own if the cache cannot be written."""
    log.info("compiling %s once, for this machine: %s", SOURCE.name, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=path.parent)
    except OSError:
        folder = tempfile.mkdtemp()
        path = Path(folder) / path.name
    made = Path(folder) / "made.so"
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LdmError(f"{compiler} cannot compile {SOURCE}: {first_line(RuntimeError(done.stderr))}")
        made.replace(path)
    finally:
        if path.parent != Path(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return path


@cache
def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Of a process: threads do not live on in one that is forked off."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="attention")
