"""A call of a pipeline: settings checked and filled up with the family's defaults, a prompt and a seed for each image.

The bounds of a single setting are in its row of `pipelines.settings`. The checks here are about several settings, or a
setting and the model's family; those of a task are in the task's file.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

import pipelines.settings as settings
from ldm.errors import LdmError, listing
from ldm.families import Family, FewStep
from ldm.images import ANIMATED, TRANSPARENT, WHITE, flattened, load_noted
from ldm.models.prompts import PromptReader
from ldm.process import NoiseSchedule
from ldm.sampling.guidance import EmbeddedGuidance, Guidance
from ldm.sampling.schedulers import SamplingPlan, make, own_name
from pipelines.control_images import EACH, control_images
from pipelines.jobs import TEXTS
from pipelines.margins import Margins, extended, rounded_margins
from pipelines.mixes import Mix, few_step, recorded
from pipelines.settings import LARGEST_SEED, LARGEST_SIDE

log = logging.getLogger(__name__)
SAME_SHAPE = 1.03  # largest change of an image's ratio of width to height that is not told


@dataclass(frozen=True)
class Request:
    """One call of a pipeline, for one batch or many. A setting is an attribute: `request.steps`."""

    prompts: tuple[str, ...]  # one for each image
    negative: tuple[str | None, ...]  # one for each image; None: not given
    prompts_2: tuple[str, ...] | None = None  # for the second text encoder, if they differ
    negative_2: tuple[str | None, ...] | None = None
    seeds: tuple[int, ...] = ()  # one for each image
    mixes: tuple[Mix, ...] = ()  # one for each image: the adapters
    values: Mapping[str, Any] = field(default_factory=dict)  # all other settings, by name
    guidance: Guidance = field(default_factory=Guidance)
    image: Image.Image | None = None  # to start from
    mask: Image.Image | None = None  # white: changed
    task: str = "text-to-image"
    masked: bool = False  # whether a mask was given; margins make one too
    refined: bool = False  # whether a refiner follows
    begin: float = 0.0  # part of the run at which this model begins
    end: float = 1.0  # part of the run at which this model ends
    reader: PromptReader = field(default_factory=PromptReader)  # of the prompts

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(f"a request has no setting {name!r}")
        return values[name]

    def changed(self, **values: Any) -> Request:
        """The same request with other values of some settings."""
        return replace(self, values={**self.values, **values})

    def texts(self, encoders: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Prompts and, with classifier-free guidance, negative prompts: a list for each text encoder."""
        negative, negative_2 = (tuple(text or "" for text in texts) for texts in self.negatives)
        if not self.guidance.classifier_free:
            negative = negative_2 = ()
        return [self.prompts, self.prompts_2 or self.prompts][-encoders:], [negative, negative_2][-encoders:]

    @property
    def negatives(self) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        """The negative prompts for the first text encoder and for the second."""
        return self.negative, self.negative_2 or self.negative

    def part(self, rows: slice) -> Request:
        """The same request for some of its images."""
        names = ("prompts", "negative", "prompts_2", "negative_2", "seeds", "mixes")
        return replace(self, **{name: value[rows] for name in names if (value := getattr(self, name)) is not None})

    def plan(self, schedule: NoiseSchedule, xl: bool) -> SamplingPlan:
        """The scheduler of a run with all of its timesteps; `schedule` and `xl` are as for `make`."""
        if self.scheduler is None or isinstance(self.scheduler, str):
            return make(schedule, self.steps, self.scheduler, self.spacing, xl)
        self.scheduler.set_timesteps(self.steps, device="cpu")
        return SamplingPlan(self.scheduler, list(self.scheduler.timesteps))


# --- from settings to a request ---------------------------------------------------------------------------------------


Mixed = Callable[[Sequence[str], Any, bool], tuple[list[str], list[Mix]]]


def request_for(values: dict[str, Any], family: Family, refined: bool, mixed: Mixed) -> Request:
    """The request for the `settings.checked` settings of a call; `mixed` is `pipelines.adapters.Adapters.mixes`.

    Raises:
        LdmError: settings do not go together, or a file that they name is not there or cannot be used.
    """
    controls = control_images(values.get("control"))
    image, mask, margins = _start(values, family)
    prompts = values.get("prompt", ())
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts or None in prompts:
        raise LdmError("no prompt: at least one text is needed")
    prompts, mixes = mixed(prompts, values.get("adapters"), values.get("weights", True))
    rows = settings.SETTINGS
    filled = {row.name: row.usual for row in rows}
    like = image or (controls[0].given if controls else None)
    filled |= defaults(family, like, mask is not None, values, few_step(mixes)) | values
    filled |= {"image_prompt": settings.image_prompts(values), "control": controls, "margins": margins}
    count, n = len(prompts), filled["n"]
    _note_stretch(image, filled["width"], filled["height"])
    given_texts = {name: _for_each(name, values[name], count, n) for name in TEXTS if name in values}
    guidance = settings.nested({row.key: filled.pop(row.name) for row in rows if "." in row.key})
    return Request(
        prompts=_for_each("prompt", prompts, count, n),
        negative=given_texts.get("negative", (None,) * (count * n)),
        prompts_2=given_texts.get("prompt_2"),
        negative_2=given_texts.get("negative_2"),
        seeds=seeds(values.get("seed"), count * n),
        mixes=tuple(mix for mix in mixes for _ in range(n)),
        values={name: value for name, value in filled.items() if name not in OWN},
        guidance=(EmbeddedGuidance if family.unet.guidance_dim else Guidance)(**guidance["guidance"]),
        image=image,
        mask=mask,
        task=task_of(family, image, mask),
        masked="mask" in values,
        refined=refined,
        end=1.0 if filled["refiner_at"] is None else filled["refiner_at"],
        reader=PromptReader(filled["weights"]),
    )


def _note_stretch(image: Image.Image | None, width: int, height: int) -> None:
    """Log that an image to start from changes its shape, if the size of the result asks for that."""
    if image is None or not isinstance(width, int) or not isinstance(height, int):
        return
    change = (width / height) / (image.width / image.height)
    if max(change, 1 / change) > SAME_SHAPE and min(image.size) >= 64:
        log.warning(
            "the image to start from has %d×%d pixels and is stretched to %d×%d; crop it, or leave the size out",
            *image.size, width, height,
        )  # fmt: skip


def note_idle(given: Mapping[str, Any], request: Request, family: Family) -> None:
    """Log, in one line, the settings that were given, differ from their defaults, and have no effect in this call."""
    usual = {row.name: row.usual for row in settings.SETTINGS}
    told = {name for name, value in given.items() if value and value != usual[name]}
    guided = request.guidance.classifier_free or request.guidance.embedded is not None  # which has a warning of its own
    xl = ("original_size", "crop", "target_size", "negative_original_size", "negative_crop", "negative_target_size")
    needs = {
        "an image": (request.image is not None, ("strength",)),
        "a condition image": (bool(request.control), CONTROLLING),
        "hires": (bool(request.hires), ("hires_strength", "hires_latents")),
        "a refiner": (request.refined, ("refiner_strength",)),
        "a guidance scale above 1": (guided, ("negative", "negative_2")),
        "an InstructPix2Pix model": (family.task == "edit", ("image_guidance",)),
        "SDXL": (family.xl, xl),
        "SDXL's refiner": (family.refiner or request.refined, ("aesthetic_score", "negative_aesthetic_score")),
    }
    lacks = {name: need for need, (there, names) in needs.items() if not there for name in names}
    idle = [f"{name} (it needs {lacks[name]})" for name in sorted(lacks.keys() & told)]
    if idle:
        log.warning("settings without effect here: %s", listing(idle, 8))


def _start(values: Mapping[str, Any], family: Family) -> tuple[Image.Image | None, Image.Image | None, Margins | None]:
    """The image to start from and the mask; with margins both are those of the canvas, and the margins are fitting.

    Raises:
        LdmError: there are margins without an image or for a model that edits, or as `extended`.
    """
    image = _image(values["image"]) if "image" in values else None
    mask = _mask(values["mask"]) if "mask" in values else None
    if "margins" not in values:
        return image, mask, None
    if image is None:
        raise LdmError("margins without an image: give the image that they extend (image=, --image)")
    if family.task == "edit":
        raise LdmError(f"a {family.name} model edits an image by instruction, and cannot extend it; leave margins out")
    margins = rounded_margins(values["margins"], image.size, family.autoencoder.factor)
    return *extended(image, mask, margins), margins


def _image(given: Any) -> Image.Image:
    """An image to start from, in RGB; a warning says what of its file is left out or guessed."""
    image, notes = load_noted(given)
    opaque = not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    for note in notes:
        if note != TRANSPARENT or not opaque:
            log.warning("the image to start from: %s", note)
    return (image if opaque else flattened(image, "white")).convert("RGB")


def _mask(given: Any) -> Image.Image:
    """A mask as shades of grey; a warning says that its transparent parts are black, if they may be meant as white."""
    image, notes = load_noted(given, colours=False)
    if ANIMATED in notes:
        log.warning("the mask: %s", ANIMATED)
    if not image.has_transparency_data:
        return image.convert("L")
    alpha = image.convert("RGBA").getchannel("A")
    mask = flattened(image, "black").convert("L")
    clear, white = np.asarray(alpha) < WHITE, np.asarray(mask) >= WHITE
    painted = white[~clear].all()  # with white on nothing
    if clear.any() and white.any() and not painted:
        log.warning("the mask's transparent parts count as black; only its white pixels are made anew")
    return mask


CONTROLLING = (*EACH, "guess")
OWN = {"prompt", *TEXTS, "seed", "image", "mask", "size", "adapters"}  # settings that a request has in another form


def defaults(
    family: Family, image: Image.Image | None, masked: bool, given: Collection[str], few: FewStep | None
) -> dict[str, Any]:
    """The defaults that depend on the model, on the given image and mask, and on which settings are given.

    `few` is what an adapter of all prompts was made for.
    """
    few = few or family.few_step
    width, height = (family.size, family.size) if image is None else fitted(image, family.autoencoder.factor)
    usual = {
        "width": width,
        "height": height,
        "steps": family.steps,
        "guidance": family.guidance,
        "strength": 1.0 if masked else 0.8,
    }
    return usual | (few.settings(given) if few else {})


def task_of(family: Family, image: Image.Image | None, mask: Image.Image | None) -> str:
    """The task of a call: the only one that the model has, or the one for the given images."""
    if family.task in ("edit", "inpaint"):
        return family.task
    return "inpaint" if mask else "image-to-image" if image else "text-to-image"


def seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Seeds of `count` images: the given ones, or `seed` (by default a random one) and the numbers after it.

    Raises:
        LdmError: a seed is out of range, or there are too many or too few.
    """
    first = secrets.randbelow(2**32) if seed is None else seed
    values = tuple(range(first, first + count)) if isinstance(first, int) else tuple(first)
    if len(values) != count or values[-1] > LARGEST_SEED:
        raise LdmError(
            f"seed {seed!r}: a whole number from 0 to {LARGEST_SEED - count + 1} (or {count} of them) is needed"
        )
    return values


def fitted(image: Image.Image, factor: int) -> tuple[int, int]:
    """Width and height of an image, each rounded down to a multiple of `factor`, at least one."""
    return tuple(max(factor, math.floor(side / factor) * factor) for side in image.size)  # type: ignore[return-value]


def _for_each(name: str, value: str | Sequence[str | None], count: int, each: int) -> tuple[Any, ...]:
    """A text, or one for each of `count` prompts, repeated for `each` image of the same prompt.

    Raises:
        LdmError: the number of texts is neither one nor `count`.
    """
    texts = [value] * count if isinstance(value, str) else value
    if len(texts) != count:
        raise LdmError(f"{name} {value!r}: one text, or one for each of the {count} prompts, is needed")
    return tuple(text for text in texts for _ in range(each))


# --- checks of several settings, or of a family -----------------------------------------------------------------------


def check_request(request: Request, family: Family) -> None:
    """Raise unless the settings fit the model and each other; tasks and passes have checks of their own.

    Raises:
        LdmError: settings do not fit; the message names values that would.
    """
    check_size(request, family)
    if request.scheduler is None or isinstance(request.scheduler, str):
        request.plan(family.schedule, family.xl)
    check_patches(request, family)
    for texts in (request.prompts, request.negative, request.prompts_2 or (), request.negative_2 or ()):
        for text in texts:
            if text is not None:
                request.reader.parts(text)
    if len(family.text) == 1 and (request.prompts_2 or request.negative_2):
        raise LdmError(f"a {family.name} model has one text encoder, and so one prompt")
    if request.guidance.embedded is not None and any(request.negative):
        log.warning("this model reads its guidance scale, and no negative prompt: the negative prompt has no effect")


def check_size(request: Request, family: Family) -> None:
    """Raise unless the sides are multiples of the autoencoder's factor, and not too large.

    Raises:
        LdmError: a side is not; the message names the nearest one that fits.
    """
    factor = family.autoencoder.factor
    for name in ("width", "height"):
        side = getattr(request, name)
        if not factor <= side <= LARGEST_SIDE or side % factor:
            near = min(max(round(side / factor), 1) * factor, LARGEST_SIDE)
            raise LdmError(
                f"{name} {side!r}: a multiple of {factor} from {factor} to {LARGEST_SIDE} is needed, such as {near}"
            )


def check_patches(request: Request, family: Family) -> None:
    """Raise unless the U-Net has the levels that DeepCache and token merging work in.

    Raises:
        LdmError: the U-Net lacks them.
    """
    if request.reuse > 1 and len(family.unet.channels) < 2:
        raise LdmError("reuse: this model's U-Net has one level, of which nothing can be reused; leave it out")
    if request.merge and not any(family.unet.depth):
        raise LdmError(f"merge: no level of a {family.name} model has a transformer to merge tokens in; leave it out")


def whole_steps(steps: int, name: str, strength: float) -> int:
    """The number of steps in a part `strength` of the run, rounded down.

    Raises:
        LdmError: the part is less than one step.
    """
    count = min(int(steps * strength), steps)
    if not count:
        raise LdmError(f"{name} {strength} of {steps} steps is less than one step; raise one of them")
    return count


# --- records ----------------------------------------------------------------------------------------------------------


def records(request: Request, family: Family) -> list[dict[str, Any]]:
    """The record of each image of a batch, ready for JSON, without the images that it starts from."""
    scheduler = request.scheduler
    if not isinstance(scheduler, str):  # None, or an object of the user's own
        scheduler = own_name(family.schedule) if scheduler is None else f"{type(scheduler).__name__} object"
    common = {**request.values, **settings.expanded({"guidance": request.guidance}), "scheduler": scheduler}
    common["control"] = [one.record for one in request.control]
    rows = [row for row in settings.at("record").values() if row.kind is not settings.IMAGE and row.used(request)]
    found = []
    for index, prompt in enumerate(request.prompts):
        own: dict[str, Any] = {"prompt": prompt, "negative": request.negative[index], "seed": request.seeds[index]}
        own |= {"adapters": recorded(request.mixes[index])} if request.mixes else {}
        own |= {"prompt_2": request.prompts_2[index]} if request.prompts_2 else {}
        own |= {"negative_2": request.negative_2[index]} if request.negative_2 else {}
        values = {**common, **own}
        record = settings.nested({row.key: values[row.name] for row in rows})
        record |= {"task": request.task, "family": family.name}
        if request.margins and request.masked:
            record |= {"mask": {"path": ""}}  # whose file is not known here
        if len(request.prompts) > 1:
            record |= {"batch": len(request.prompts), "place": index}  # rounding depends on the batch
        found.append(record)
    return found
