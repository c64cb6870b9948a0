"""The interface of a stage for the training loop, and of a kind of stage for the run, the forecast and the selftest.

The table of the kinds is `ldm.training.stages.table`.
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

from ldm.data.keyed import generator
from ldm.data.loader import Batch
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning
from ldm.training.images import TrainingImages
from ldm.training.optimizers import Group, make_optimizer
from ldm.training.sections import EvaluationSection, ModelSection, OptimizerSection, PriorSection, StageSection
from ldm.training.stages.result import write_model
from ldm.weights.components import Components

MakeImages = Callable[  # model, prompts, width and height, a seed for each, settings such as steps -> images
    [LatentDiffusion, list[str], tuple[int, int], Sequence[int], Mapping[str, Any]], list[Image.Image]
]
EncodeTexts = Callable[[list[list[str]]], Conditioning]  # texts for each text encoder -> conditioning
Pass = Callable[[], Tensor]  # one forward pass of one image
S = TypeVar("S", bound=StageSection)


# --- a stage ----------------------------------------------------------------------------------------------------------


@dataclass
class Player:
    """A network in training, with its optimiser. Most stages have one; an autoencoder may have an adversary too."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float  # largest norm of the gradient; 0: no clipping
    averaged: bool = True  # whether averages of its weights are kept
    around: nn.Module | None = None  # the network that runs, if the module holds only the trained part of its weights

    @property
    def network(self) -> nn.Module:
        """The network that runs, with all of its weights."""
        return self.module if self.around is None else self.around


@dataclass(frozen=True)
class Learner:
    """A network to train, before it has an optimiser; a stage and, on the meta device, a forecast use the same.

    The parameters that are trained require gradients, and no others do.
    """

    module: nn.Module
    groups: Sequence[Group]
    undecayed: Sequence[Group] = ()  # groups without weight decay
    averaged: bool = True  # whether averages of its weights are kept
    around: nn.Module | None = None  # as in `Player`

    @property
    def network(self) -> nn.Module:
        """The network that runs, with all of its weights."""
        return self.module if self.around is None else self.around

    def player(self, section: OptimizerSection) -> Player:
        """The network with the optimiser that the section describes."""
        optimizer = make_optimizer(section, self.groups, self.undecayed)
        return Player(self.module, optimizer, section.clip, self.averaged, self.around)


@dataclass(frozen=True)
class Loss:
    """The loss of one player, to be propagated backwards."""

    player: str
    values: Tensor  # (B,) one for each sample, or () where samples depend on each other; the loss is the mean
    report: Mapping[str, Tensor] = field(default_factory=dict)  # () each, without gradient, for the log


class Stage(Protocol):
    """One stage of a run."""

    name: str  # of the kind of stage
    model: LatentDiffusion  # the model in training, with all of its components
    players: dict[str, Player]
    extra: dict[str, nn.Module]  # modules that no optimiser changes, but whose state belongs into a checkpoint
    fixed: Mapping[str, str]  # what must stay while a run goes on, by the keys of the configuration that it comes from
    divisible: bool  # whether the losses of a batch can be computed part by part

    @property
    def section(self) -> StageSection:
        """The stage's section of the configuration."""
        ...

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The losses of a micro-batch. Each is propagated backwards before the next is asked for."""
        ...

    def forget(self) -> None:
        """Drop the state that a step's micro-batches left, because the step is begun again."""
        ...

    def updated(self, step: int) -> dict[str, float]:
        """Called after update number `step` (from 1); returns figures for the log."""
        ...

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures over the held-out images, the same on every rank."""
        ...

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """Images to look at, on the main process."""
        ...

    def finish(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Called once at the end, with the averages in place; returns facts for the result's record."""
        ...


# --- a kind of stage --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageInputs(Generic[S]):
    """The arguments from which a run builds a stage."""

    name: str  # of the kind of stage
    section: S
    model: LatentDiffusion  # on the accelerator's device; weights in fp32, of a frozen kind in the run's precision
    accelerator: Accelerator
    seed: int  # of the run
    folder: Path  # of the stage
    data: TrainingImages
    sides: Sequence[tuple[int, int]]  # width and height of every size that the images may come in
    batches: Callable[[], Iterable[Batch]]  # batches of training images, this rank's, at the last resolution
    texts: EncodeTexts | None  # reads encoded captions from the cache, if there is one
    make_images: MakeImages | None


@dataclass(frozen=True)
class Cached:
    """The parts of the run's cache (`data.cache`) that a stage reads."""

    latents: bool = False  # whether latents are read in place of pixels
    texts: bool = False  # whether encoded captions are read in place of captions


@dataclass(frozen=True)
class ForwardPasses:
    """Forward passes of one image, to count activations and arithmetic."""

    learned: Pass  # the trained part, with a backward pass
    frozen: Sequence[Pass] = ()  # the frozen parts, without a backward pass


@dataclass(frozen=True)
class StageKind(Generic[S]):
    """A row of the table of stages: all facts about a kind of stage that other files need."""

    name: str  # of its section, too, in `ldm.training.stages.sections`
    # (section, model) -> the networks that are trained, by player; all others are frozen
    learners: Callable[[S, Components], dict[str, Learner]]
    # (section, model on the meta device, learners, size in pixels, whether there is a cache) -> the forward passes
    passes: Callable[[S, Components, Mapping[str, Learner], int, bool], ForwardPasses]
    build: Callable[[StageInputs[S]], Stage]
    trial: Mapping[str, Any]  # its section in the selftest, with small networks
    helpers: Callable[[S], Sequence[nn.Module]] = lambda section: ()  # frozen networks outside of the model
    captions: bool = True  # whether it reads captions
    cached: Callable[[S], Cached] = lambda section: Cached()
    spreads: bool = False  # whether its weights can be spread over processes (FSDP2), not only copied (DDP)
    evaluation: Callable[[S], EvaluationSection | None] = lambda section: None  # None: no evaluation in training
    # raises, before anything is made or trained, if the stage cannot learn from these images
    check: Callable[[S, TrainingImages], None] = lambda section, data: None
    prior: Callable[[S], PriorSection | None] = lambda section: None  # None: no class images beside the others
    makes_images: bool = True  # whether the model makes images alone, as evaluation needs
    own_model: Callable[[S], ModelSection] | None = None  # to start from; None: that of a stage before it, or `model`
    # (section, own model, model of the stage before it) -> own model with components of the other
    adopt: Callable[[S, LatentDiffusion, LatentDiffusion | None], LatentDiffusion] = lambda section, own, before: own
    frozen: bool = False  # whether U-Net and text encoders stay as they are, so that 16 bits can hold them
    shown: Callable[[Any], LatentDiffusion] = lambda stage: stage.model  # with the stage's weights, to make images
    # learners -> the numbers of the trained weights that previews copy; None: previews need less than a step
    copied: Callable[[Mapping[str, Learner]], int] | None = None
    result: str = "model"  # name of the result in the stage's folder
    write: Callable[[Any, Path, str], None] = write_model  # (stage, folder, lineage as JSON), on the main process

    @property
    def goes_on(self) -> bool:
        """Whether the next stage starts from its result: a whole model, and no branch as a refiner is."""
        return self.result == "model" and self.own_model is None


def freeze(parts: Components) -> None:
    """Turn the gradients of all weights of the model off."""
    for network in parts.modules().values():
        network.requires_grad_(False)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def seeded(
    learners: Callable[[S, Components], dict[str, Learner]], seed: int, name: str
) -> Callable[[S, Components], dict[str, Learner]]:
    """The function of a row with new networks drawn by the run's seed, and PyTorch's generator left as it was."""

    def choose(section: S, parts: Components) -> dict[str, Learner]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator(seed, name).initial_seed())
            return learners(section, parts)

    return choose
