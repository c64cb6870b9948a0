"""Weights that no gradient changes, in the numbers that a run computes in.

Autocast rounds the weights of linear layers and convolutions to 16 bits in each pass. Where they stay as they are, they
are rounded once: the results are the same, with half the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from ldm.models.surgery import rebuilt

M = TypeVar("M", bound=nn.Module)
ROUNDED = (nn.Linear, nn.Conv2d)


def numbers(precision: str) -> torch.dtype:
    """The dtype that autocast rounds to, by the name of a precision."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def matrices(network: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of linear layers and convolutions."""
    for layer in network.modules():
        if isinstance(layer, ROUNDED):
            yield from layer.parameters(recurse=False)


def uniform(network: M) -> M:
    """A copy of a network whose norms and embeddings have the dtype of its matrices, so that it runs without autocast;
    all else is shared."""
    dtype = next(matrices(network)).dtype

    def cast(module: nn.Module) -> dict[str, nn.Module]:
        others = {name: part for name, part in module.named_children() if not isinstance(part, ROUNDED)}
        return {
            name: copy.deepcopy(part).to(dtype)
            for name, part in others.items()
            if any(parameter.dtype != dtype for parameter in part.parameters(recurse=False))
        }

    return rebuilt(network, cast)
