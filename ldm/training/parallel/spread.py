"""Tensors that are spread over the ranks by FSDP2."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over the ranks."""
    if "torch.distributed.tensor" not in sys.modules:  # the import takes half a second, and before it there are none
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the ranks, whole on each of them; all ranks call it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that is the same on all ranks, spread over them as another one is, or whole as that is."""
    if not is_spread(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
