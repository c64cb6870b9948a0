"""Networks without numbers: built on the meta device for their names and shapes, or to be filled from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

_FILLING = frozenset(
    {init.kaiming_uniform_, init.uniform_, init.normal_, Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_}
)


class _Unfilled(TorchFunctionMode):
    """Tensors on the meta device are not filled: that takes most of the time in which a network is built there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def unfilled() -> Iterator[None]:
    """A context in which networks are built on the meta device, without initial weights."""
    with torch.device("meta"), _Unfilled():
        yield
