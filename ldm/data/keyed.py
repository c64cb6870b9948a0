"""Random numbers as pure functions of a key (seed, sample, epoch …).

A crop, a caption, the noise of a sample depend on (seed, purpose, key) alone: never on the number of processes or
workers, the position in a batch, or a global generator. So a run can be resumed, or moved to another number of
processes, exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def _number(seed: int, purpose: str, key: tuple[int | str, ...]) -> int:
    """64 bits of a digest of the arguments; `ascii` keeps 1 and "1" distinct, and ("a", "b") and ("ab",)."""
    return int.from_bytes(hashlib.blake2b(ascii((seed, purpose, *key)).encode(), digest_size=8).digest(), "little")


def generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """A generator on the CPU that depends on the arguments alone."""
    return torch.Generator().manual_seed(_number(seed, purpose, key) >> 1)  # PyTorch's seeds have 63 bits


def uniform(seed: int, purpose: str, *key: int | str) -> float:
    """A number in [0, 1) with 53 bits that depends on the arguments alone."""
    return (_number(seed, purpose, key) >> 11) / 2**53


def normal(shape: Sequence[int], seed: int, purpose: str, keys: Sequence[str], epochs: Sequence[int]) -> Tensor:
    """Standard normal numbers (B, *shape), float32 on the CPU; each row depends on its own key and epoch alone."""
    rows = [
        torch.randn(tuple(shape), generator=generator(seed, purpose, key, epoch))
        for key, epoch in zip(keys, epochs, strict=True)
    ]
    return torch.stack(rows)
