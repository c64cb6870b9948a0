"""What the training loop knows of a stage: networks, their losses for a batch, and what to look at now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.data.loader import Batch
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.config import StageSection

MakeImages = Callable[  # model, prompts, width and height, a seed for each, settings such as steps -> images
    [LatentDiffusion, list[str], tuple[int, int], Sequence[int], Mapping[str, Any]], list[Image.Image]
]


@dataclass
class Player:
    """A network that is trained, with its optimiser. Most stages have one; an autoencoder has its adversary besides."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float  # largest norm of the gradient; 0: as it comes
    averaged: bool = True  # whether averages of its weights are kept


@dataclass(frozen=True)
class Loss:
    """What is propagated backwards for one player."""

    player: str
    values: Tensor  # (B,) of each sample, or () where they depend on each other; their mean is the loss
    report: Mapping[str, Tensor] = field(default_factory=dict)  # () each, without gradient, for the log


class Stage(Protocol):
    """One kind of training."""

    name: str
    model: LatentDiffusion  # what is trained, with everything that it needs
    players: dict[str, Player]
    extra: dict[str, nn.Module]  # whose state belongs into a checkpoint, though no optimiser changes them
    divisible: bool  # whether a batch may be seen in parts

    @property
    def section(self) -> StageSection:
        """Its part of the configuration."""
        ...

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The losses of a micro-batch. Each is propagated backwards before the next is asked for."""
        ...

    def forget(self) -> None:
        """Called where a step is given up and begun again: what its micro-batches left behind is dropped."""
        ...

    def updated(self, step: int) -> dict[str, float]:
        """Called after update number `step` (from 1); what it returns is logged."""
        ...

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures over the held-out images, the same on every rank."""
        ...

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """Images to look at, on the main process."""
        ...

    def finish(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Called once at the end, with the averages in place: what it returns is recorded with the result."""
        ...
