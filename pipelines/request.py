"""What a user asks of a pipeline: every setting of a call, checked, with the family's defaults filled in."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from ldm.errors import LdmError
from ldm.families import Family
from ldm.models.prompts import read
from ldm.patches.token_merging import MOST as MOST_MERGED
from ldm.process import NoiseSchedule
from ldm.sampling.guidance import Guidance
from ldm.sampling.noise import LARGEST_SEED
from ldm.sampling.schedulers import MOST_STEPS, SamplingPlan, Scheduler, make

LARGEST_SIDE = 16_384  # pixels


@dataclass(frozen=True)
class Request:
    """One call of a pipeline, for one batch or many."""

    prompts: tuple[str, ...]  # one for each image
    negative: tuple[str | None, ...]  # likewise; None: nothing was said
    prompts_2: tuple[str, ...] | None = None  # for the second text encoder, where they differ
    negative_2: tuple[str | None, ...] | None = None
    seeds: tuple[int, ...] = ()  # one for each image
    width: int = 0  # pixels
    height: int = 0
    steps: int = 30
    guidance: Guidance = field(default_factory=Guidance)
    scheduler: str | Scheduler | None = None  # a short name, an object with diffusers' interface, or the model's own
    spacing: str | tuple[float, ...] = "default"
    eta: float = 0.0  # noise of DDIM's and TCD's steps
    rng: str = "ldm"  # or "diffusers", for its numbers
    reuse: int = 1  # the U-Net's inner levels run in one call of so many
    merge: float = 0.0  # part of the tokens that are merged for self-attention, in the U-Net's level with the most
    clip_skip: int = 0
    chunks: bool = True  # long prompts are split, not cut
    weights: bool = True  # brackets are weights
    image: Image.Image | None = None  # to start from
    strength: float = 0.8  # how much of it is made anew: 0 nothing, 1 all
    mask: Image.Image | None = None  # white: to be made anew
    original_size: tuple[int, int] | None = None  # height, width: what SDXL is told of the image before its cropping
    crop: tuple[int, int] = (0, 0)  # top, left
    target_size: tuple[int, int] | None = None  # height, width
    negative_original_size: tuple[int, int] | None = None  # the same for the negative prompt; None: like the others
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0  # of the refiner, 1 to 10
    negative_aesthetic_score: float = 2.5
    begin: float = 0.0  # part of the run that another model did before
    end: float = 1.0  # and from where on another will

    @property
    def task(self) -> str:
        """What is asked for, by what is given."""
        return "inpaint" if self.mask else "image-to-image" if self.image else "text-to-image"

    def texts(self, encoders: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Prompts, and negative prompts where guidance looks at them, as each of so many text encoders reads them."""
        negative, negative_2 = (tuple(text or "" for text in texts) for texts in self.spoken)
        if not self.guidance.classifier_free:
            negative = negative_2 = ()
        return [self.prompts, self.prompts_2 or self.prompts][-encoders:], [negative, negative_2][-encoders:]

    @property
    def spoken(self) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        """The negative prompts for the first text encoder and for the second."""
        return self.negative, self.negative_2 or self.negative

    def part(self, rows: slice) -> Request:
        """The same request for some of its images."""
        names = ("prompts", "negative", "prompts_2", "negative_2", "seeds")
        return replace(self, **{name: value[rows] for name in names if (value := getattr(self, name)) is not None})

    def plan(self, schedule: NoiseSchedule, xl: bool) -> SamplingPlan:
        """The scheduler of a run with all of its timesteps; `schedule` and `xl` are as for `make`."""
        if self.scheduler is None or isinstance(self.scheduler, str):
            return make(schedule, self.steps, self.scheduler, self.spacing, xl)
        self.scheduler.set_timesteps(self.steps, device="cpu")
        return SamplingPlan(self.scheduler, list(self.scheduler.timesteps))

    def check(self, family: Family) -> None:
        """Raise unless everything is within bounds and fits the model.

        Raises:
            LdmError: what is not, and what would be.
        """
        factor = family.autoencoder.factor
        for name in ("width", "height"):
            side = getattr(self, name)
            if not _whole(side) or not factor <= side <= LARGEST_SIDE or side % factor:
                near = (
                    min(max(round(side / factor), 1) * factor, LARGEST_SIDE) if isinstance(side, (int, float)) else 512
                )
                raise LdmError(
                    f"{name} {side!r}: a multiple of {factor} from {factor} to {LARGEST_SIDE} is needed, such as {near}"
                )
        if not _whole(self.steps) or not 1 <= self.steps <= MOST_STEPS:
            raise LdmError(f"{self.steps!r} steps; choose a whole number from 1 to {MOST_STEPS}")
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            if not hasattr(self.scheduler, "set_timesteps"):
                raise LdmError(
                    f"scheduler {self.scheduler!r}: a name, or an object with diffusers' interface, is needed"
                )
        else:
            self.plan(family.schedule, family.xl)
        if not _whole(self.reuse) or not 1 <= self.reuse <= MOST_STEPS:
            raise LdmError(f"reuse {self.reuse!r}: a whole number from 1 (never) to {MOST_STEPS} is needed")
        if self.reuse > 1 and len(family.unet.channels) < 2:
            raise LdmError("reuse: this model's U-Net has one level, of which nothing can be reused; leave it out")
        self.check_merge(family)
        for name in ("chunks", "weights"):
            if not isinstance(getattr(self, name), bool):
                raise LdmError(f"{name} {getattr(self, name)!r}: true or false is needed")
        spoken = (self.prompts, self.negative, self.prompts_2 or (), self.negative_2 or ())
        for text in {text for texts in spoken for text in texts if text is not None}:
            read(text, self.weights)
        for name, low, high in (("strength", 0, 1), ("eta", 0, 1), ("begin", 0, 1), ("end", 0, 1)):
            _within(name, getattr(self, name), low, high)
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            _within(name, getattr(self, name), 0, 10)
        if self.begin >= self.end:
            raise LdmError(f"the part from {self.begin} to {self.end} of a run is empty")
        if self.image:
            whole_steps(self.steps, "strength", self.strength)
        if self.mask and not self.image:
            raise LdmError("a mask without an image: give the image that it belongs to (image=, --image)")
        if family.task == "inpaint" and not self.mask:
            raise LdmError(f"a {family.name} model fills in images: give an image and a mask (--image, --mask)")
        if family.task == "edit" and (self.mask or not self.image):
            raise LdmError(f"a {family.name} model edits an image by instruction: give one, and no mask (--image)")
        if family.task == "edit" and (self.guidance.perturbed or self.guidance.interval != (0, 1)):
            raise LdmError(f"a {family.name} model has guidance of its own; leave perturbed and interval out")
        if self.mask and self.image and self.mask.size != self.image.size:
            raise LdmError(f"the mask has {_size(self.mask)} pixels, its image {_size(self.image)}; they must be alike")
        for name in (
            "original_size",
            "crop",
            "target_size",
            "negative_original_size",
            "negative_crop",
            "negative_target_size",
        ):
            value = getattr(self, name)
            pair = isinstance(value, (tuple, list)) and len(value) == 2
            if value is not None and not (pair and all(_whole(v) and 0 <= v <= 2**20 for v in value)):
                raise LdmError(f"{name} {value!r}: two whole numbers of pixels, height (top) first, are needed")
        both = (self.prompts_2, self.negative_2) != (None, None)
        if both and len(family.text) == 1:
            raise LdmError(f"a {family.name} model has one text encoder, and so one prompt")

    def check_merge(self, family: Family) -> None:
        """Raise unless tokens can be merged as is asked for, in this model or in the refiner after it.

        Raises:
            LdmError: so many cannot, or the model has no level where they could.
        """
        _within("merge", self.merge, 0, MOST_MERGED)
        if self.merge and not any(family.unet.depth):
            raise LdmError(
                f"merge: no level of a {family.name} model has a transformer to merge tokens in; leave it out"
            )


def whole_steps(steps: int, name: str, strength: float) -> int:
    """Steps that a part `strength` of the run has, rounded down.

    Raises:
        LdmError: it has none.
    """
    count = min(int(steps * strength), steps)
    if not count:
        raise LdmError(f"{name} {strength} of {steps} steps is less than one step; raise one of them")
    return count


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _within(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise LdmError(f"{name} {value!r}: a number from {low} to {high} is needed")


def _size(image: Image.Image) -> str:
    return f"{image.width}×{image.height}"


def texts(value: str | Sequence[str | None] | None, count: int, each: int, what: str) -> tuple[Any, ...]:
    """A prompt, or one for each of `count` different ones, repeated for `each` image of the same.

    Raises:
        LdmError: there are neither one nor `count` of them, or one is no text.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count or not all(text is None or isinstance(text, str) for text in values):
        raise LdmError(f"{what} {value!r}: one text, or one for each of the {count} prompts, is needed")
    return tuple(text for text in values for _ in range(each))


def seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Seeds of `count` images: `seed` and the numbers after it, or those given; without any, a random one first.

    Raises:
        LdmError: a seed is no whole number, or out of range, or there are too many or too few.
    """
    first = secrets.randbelow(2**32) if seed is None else seed
    values = tuple(range(first, first + count)) if isinstance(first, int) else first
    if (
        not isinstance(values, (list, tuple))
        or len(values) != count
        or not all(_whole(value) and 0 <= value <= LARGEST_SEED for value in values)
    ):
        raise LdmError(
            f"seed {seed!r}: a whole number from 0 to {LARGEST_SEED - count + 1} (or {count} of them) is needed"
        )
    return tuple(values)


def fitted(image: Image.Image, factor: int) -> tuple[int, int]:
    """Width and height of an image, each rounded down to a multiple of `factor`, at least one."""
    return tuple(max(factor, math.floor(side / factor) * factor) for side in image.size)  # type: ignore[return-value]
