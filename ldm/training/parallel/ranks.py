"""Sums over the ranks of a run, as functions that callers hand in, so that losses do not depend on a launcher."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # a tensor of this rank to the sum over all ranks, the same on each


def alone(tensor: Tensor) -> Tensor:
    """The sum over a single rank: the tensor itself."""
    return tensor
