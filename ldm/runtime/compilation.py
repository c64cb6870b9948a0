"""Residual and transformer blocks compiled by `torch.compile`, each kind of block once for all its places.

These blocks do most of the work, and compile in a fraction of the time that the whole network would take. Compiled code
is kept on disk for the next process. Weights are inputs of the compiled code, so that they may change.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ldm.caches import cache_folder
from ldm.errors import LdmError, first_line
from ldm.models.layers import ResnetBlock, TransformerBlock
from ldm.models.surgery import reclassed
from ldm.runtime.fused import LAST
from ldm.runtime.precomputing import precomputed_outputs

log = logging.getLogger(__name__)
VARIANTS = 256  # of one kind of block, for widths and sizes of images; PyTorch's own limit is 8


def compile_blocks(model: nn.Module, device: torch.device | None = None) -> None:
    """Replace a network's blocks by compiled ones, in place; they are compiled at the first call.

    A block is compiled for its channels and the height and width of its images, and for any length of text; for one
    image and for several. Convolutions get their weights channels last, in place. `device` is where the network will
    compute, if not where its weights are.

    Raises:
        LdmError: nothing can be compiled for the device here.
    """
    check_compiling(device or next(model.parameters()).device)
    model.to(memory_format=LAST)
    reclassed(model, _blocks())


def check_compiling(device: torch.device) -> None:
    """Check that `torch.compile` works for a device, and let it keep compiled code in the user's cache folder.

    Raises:
        LdmError: it does not work.
    """
    if problem := failure(device):
        raise LdmError(
            f"compile: torch.compile does not work here ({problem}); a CPU needs a C++ compiler (g++, clang++), a GPU "
            "Triton; leave compile out otherwise"
        )


@cache
def failure(device: torch.device) -> str:
    """Why nothing can be compiled for a device, in a few words; "" if it can."""
    folder = cache_folder("compiled")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    except OSError as error:
        log.warning("compiled code cannot be kept for the next time: %s: %s", folder, error.strerror)
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # PyTorch's own kinds of errors, those of compilers, of missing packages
        return first_line(error)
    return ""


@cache
def _blocks() -> dict[type[nn.Module], type[nn.Module]]:
    """The compiled class for each kind of block."""
    import torch._dynamo  # the import takes a second

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * VARIANTS)
    return {kind: _compiled(kind) for kind in (ResnetBlock, TransformerBlock)}


def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block whose forward pass is compiled."""
    body = torch.compile(kind.forward, dynamic=False)
    mark = torch._dynamo.maybe_mark_dynamic

    def forward(self: nn.Module, *inputs: Tensor | None) -> Tensor:
        for tensor in inputs:
            if tensor is not None:
                mark(tensor, 0)
        for layer in precomputed_outputs(self):  # keys and values (B, M, C), time (B, C)
            mark(layer.output, tuple(range(layer.output.dim() - 1)))
        return body(self, *inputs)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": forward})


@contextmanager
def reported() -> Iterator[None]:
    """Log that code is being compiled, and how long that took, if it happens within this context."""
    from torch._dynamo.callback import callback_handler as handler

    seconds, began, count = 0.0, 0.0, 0

    def start(*_: Any) -> None:
        nonlocal began, count
        if not count:
            log.warning("compiling for images of this size, once")
        began, count = time.monotonic(), count + 1

    def end(*_: Any) -> None:
        nonlocal seconds
        seconds += time.monotonic() - began

    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)
    if count:
        log.warning(
            "compiled in %.0f s; kept in %s for the next time", seconds, os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        )
