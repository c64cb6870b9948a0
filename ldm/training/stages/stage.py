"""A stage, as the training loop sees it; and a kind of stage, as the run, the forecast and the selftest see it.

The kinds stand in one table, `ldm.training.stages.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ldm.data.loader import Batch
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning
from ldm.training.images import TrainingImages
from ldm.training.optimizers import Group, make_optimizer
from ldm.training.sections import EvaluationSection, ModelSection, OptimizerSection, StageSection
from ldm.training.stages.result import read_model, write_model
from ldm.weights.components import Components

MakeImages = Callable[  # model, prompts, width and height, a seed for each, settings such as steps -> images
    [LatentDiffusion, list[str], tuple[int, int], Sequence[int], Mapping[str, Any]], list[Image.Image]
]
EncodeTexts = Callable[[list[list[str]]], Conditioning]  # texts of each text encoder to the conditioning
Pass = Callable[[], Tensor]  # one forward pass of one image
S = TypeVar("S", bound=StageSection)


# --- a stage ----------------------------------------------------------------------------------------------------------


@dataclass
class Player:
    """A network that is trained, with its optimiser. Most stages have one; an autoencoder has its adversary besides."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float  # largest norm of the gradient; 0: as it comes
    averaged: bool = True  # whether averages of its weights are kept


@dataclass(frozen=True)
class Learner:
    """A network that is trained, before it has an optimiser: the same for a stage and, on the meta device, a forecast.

    The parameters that are trained require gradients, and no others do.
    """

    module: nn.Module
    groups: Sequence[Group]
    undecayed: Sequence[Group] = ()  # groups without weight decay
    averaged: bool = True  # whether averages of its weights are kept

    def player(self, section: OptimizerSection) -> Player:
        """The network with the optimiser that the section describes."""
        optimizer = make_optimizer(section, self.groups, self.undecayed)
        return Player(self.module, optimizer, section.clip, self.averaged)


@dataclass(frozen=True)
class Loss:
    """The loss of one player, to be propagated backwards."""

    player: str
    values: Tensor  # (B,) of each sample, or () where they depend on each other; their mean is the loss
    report: Mapping[str, Tensor] = field(default_factory=dict)  # () each, without gradient, for the log


class Stage(Protocol):
    """One stage of a run."""

    name: str  # of its kind
    model: LatentDiffusion  # what is trained, with everything that it needs
    players: dict[str, Player]
    extra: dict[str, nn.Module]  # whose state belongs into a checkpoint, though no optimiser changes them
    divisible: bool  # whether the losses of a batch are those of its parts

    @property
    def section(self) -> StageSection:
        """Its part of the configuration."""
        ...

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The losses of a micro-batch. Each is propagated backwards before the next is asked for."""
        ...

    def forget(self) -> None:
        """Drop what the micro-batches of a step left behind: the step is given up and begun again."""
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


# --- a kind of stage --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageInputs(Generic[S]):
    """The arguments from which a run builds a stage."""

    name: str  # of the kind of stage
    section: S
    model: LatentDiffusion  # on the accelerator's device, weights in fp32
    accelerator: Accelerator
    seed: int  # of the run
    folder: Path  # of the stage
    data: TrainingImages
    sides: Sequence[tuple[int, int]]  # width and height of every size that the images may come in
    batches: Callable[[], Iterable[Batch]]  # batches of training images, this rank's, at the last resolution
    texts: EncodeTexts | None  # reads captions from the cache, where they are in one
    make_images: MakeImages | None


@dataclass(frozen=True)
class Cached:
    """The parts of the run's cache (`data.cache`) that a stage reads."""

    latents: bool = False  # in place of pixels
    texts: bool = False  # encoded captions in place of captions


@dataclass(frozen=True)
class ForwardPasses:
    """Forward passes of one image, to count activations and arithmetic."""

    learned: Pass  # which gradients go back through
    frozen: Sequence[Pass] = ()  # which no gradients go back through


@dataclass(frozen=True)
class StageKind(Generic[S]):
    """A kind of stage: everything that is known of it outside its own file."""

    name: str
    section: type[S]  # its part of the configuration, found there under its name
    # section and model to the networks that are trained, by player; all others are frozen
    learners: Callable[[S, Components], dict[str, Learner]]
    # section, model on the meta device, learners, size in pixels, whether there is a cache, to the passes
    passes: Callable[[S, Components, Mapping[str, Learner], int, bool], ForwardPasses]
    build: Callable[[StageInputs[S]], Stage]
    trial: Mapping[str, Any]  # its section in the selftest, whose networks are small
    helpers: Callable[[S], Sequence[nn.Module]] = lambda section: ()  # frozen networks that are not the model's
    captions: bool = True  # whether it reads them
    cached: Callable[[S], Cached] = lambda section: Cached()
    spreads: bool = False  # whether its weights can be spread over processes (FSDP2); all kinds run on one, and on DDP
    evaluation: Callable[[S], EvaluationSection | None] = lambda section: None  # None: no evaluation while it trains
    makes_images: bool = True  # whether the model makes images alone, as evaluation needs
    own_model: Callable[[S], ModelSection] | None = None  # to start from; None: the stage before it, or `model`
    # section, its own model and that of the stage before it, to its own model with what it takes over
    adopt: Callable[[S, LatentDiffusion, LatentDiffusion | None], LatentDiffusion] = lambda section, own, before: own
    result: str = "model"  # the name of its result in its folder
    write: Callable[[Stage, Path, str], None] = write_model  # stage, folder, lineage as JSON; on the main process
    # folder and the model that it started from, if that is at hand, to the model that the next stage starts from
    read: Callable[[Path, LatentDiffusion | None], LatentDiffusion | None] = read_model


def freeze(parts: Components) -> None:
    """No weight of the model requires a gradient."""
    for network in parts.modules().values():
        network.requires_grad_(False)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
