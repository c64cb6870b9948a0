"""The table of settings: every setting of a call is declared here, once, with its bounds, help, default and names.

The command line, the keywords of `Pipeline`, lines of a list of prompts, `ldm eval --with`, records in images, `ldm
repro` and the text of AUTOMATIC1111's programs are all derived from `SETTINGS`, and from `LOADING`, the
settings of loading a model. Nothing here imports torch, so that `ldm --help` answers at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

from ldm.errors import LdmError
from ldm.sampling.scheduler_names import OTHER_NAMES, OTHER_SPACINGS
from pipelines.mixes import LARGEST, are_mixes, joined_mixes, parse_mix
from pipelines.translation import TRANSLATED, with_own_scheduler

DOORS = {
    "python": "a keyword of Pipeline",
    "shell": "an option of ldm generate",
    "list": "a key of a line of ldm generate --prompts",
    "record": "a key of the record in an image",
    "eval": "a key of ldm eval --with",
    "http": "a key of a request to ldm serve",
    "axis": "an axis of a comparison: ldm generate --xy",
}
LARGEST_SIDE = 16_384  # pixels
LARGEST_SEED = 2**63 - 1
MOST_STEPS = 1000
MOST_IMAGES = 100_000  # of each prompt


class Elsewhere(str):
    """A default that depends on the model or on other settings, described in words."""


FAMILY = Elsewhere("the family's")


@dataclass(frozen=True)
class Kind:
    """A kind of values, with their texts and bounds."""

    metavar: str  # for the help of the command line
    needed: str  # the allowed values, in words, for errors
    allowed: Callable[[Any], bool]
    parse: Callable[[str], Any] = str  # text -> value; raises ValueError
    structured: bool = False  # whether texts from anywhere are parsed, not only those of the command line
    joined: Callable[[list[Any]], Any] | None = None  # the value of an option given several times, of its values
    schema: Mapping[str, Any] = field(default_factory=dict)  # JSON Schema of its values in a request to `ldm serve`


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str  # the keyword of `Pipeline`, the key in a list and of --with
    kind: Kind
    help: str
    default: Any = None
    flag: str = ""  # on the command line, if not --name
    names: tuple[str, ...] = ()  # its other names, accepted by every door: diffusers' first, then other programs'
    record: str = ""  # its key in a record, if not its name; "guidance.scale" is the key scale within guidance
    a1111: str = ""  # its key in the text of A1111's programs
    closed: Mapping[str, str] = field(default_factory=dict)  # doors that do not accept it, with the reason
    used: Callable[[Any], bool] = lambda request: True  # whether a request uses it; if not, it is not recorded

    def goes_by(self, name: str) -> bool:
        """Whether a name, with hyphens or underscores, is its name or another of its names."""
        return name.replace("-", "_") in (self.name, *self.names)

    @property
    def option(self) -> str:
        """The name of its option on the command line."""
        return self.option_of(self.name)

    def option_of(self, name: str) -> str:
        """The option of one of its names; those of its other names are hidden from the help."""
        return self.flag if self.flag and name == self.name else f"--{name.replace('_', '-')}"

    @property
    def key(self) -> str:
        """Its key in a record."""
        return self.record or self.name

    @property
    def usual(self) -> Any:
        """Its default; None if that depends on the model or on other settings."""
        return None if isinstance(self.default, Elsewhere) else self.default

    def check(self, value: Any, called: str = "") -> Any:
        """The value as the pipeline takes it: lists as tuples, numpy's numbers as Python's, structured texts parsed.

        Raises:
            LdmError: the value is not allowed.
        """
        if self.kind.structured and isinstance(value, str):
            return self.parse(value, called)
        value = plain(value)
        if not self.kind.allowed(value):
            raise LdmError(f"{called or self.name} {shown(value)}: {self.kind.needed} is needed")
        return value

    def parse(self, text: str, called: str = "") -> Any:
        """The value that a text stands for.

        Raises:
            LdmError: the text has no meaning, or its value is not allowed.
        """
        value: Any = text
        try:
            value = self.kind.parse(text)
            allowed = self.kind.allowed(value)
        except ValueError:
            allowed = False
        if not allowed:
            raise LdmError(f"{called or self.name} {value!r}: {self.kind.needed} is needed")
        return value

    def gathered(self, texts: list[str], called: str = "") -> Any:
        """The value that the texts of an option stand for, which was given several times.

        Raises:
            LdmError: a text has no meaning, or the values do not go together.
        """
        values = [self.parse(text, called) for text in texts]
        if self.kind.joined is None:
            raise LdmError(f"{called or self.name}: give it once")
        return self.kind.joined(values)


@dataclass(frozen=True)
class ImagePrompt:
    """Images that a U-Net reads together by an IP-Adapter; paths, open files or images of PIL."""

    images: tuple[Any, ...]
    weight: float = 1.0
    mask: Any = None  # white: where the images count
    begin: float = 0.0  # part of the steps
    end: float = 1.0
    digests: Mapping[str, str] = field(default_factory=dict, compare=False)  # path of a file -> SHA-256


# --- kinds of values --------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's: a single one, or a row of them as a tuple. Lists become tuples, too."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape) < 2 and hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(plain(part) for part in value) if isinstance(value, (list, tuple)) else value


def shown(value: Any) -> str:
    """A value in an error: as it is written, or what it is if that says more than a page of numbers would."""
    if isinstance(value, (str, int, float)) or value is None:
        return repr(value)
    if isinstance(value, tuple) and all(isinstance(part, (str, int, float)) or part is None for part in value):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {shown(part)}' for name, part in value.items())}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value[:3]))}{', …' if len(value) > 3 else ''})"
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(low: int, high: int) -> Kind:
    """Whole numbers within bounds."""
    needed = f"a whole number from {low} to {high}"
    bounds = {"type": "integer", "minimum": low, "maximum": high}
    return Kind("INTEGER", needed, lambda value: is_whole(value) and low <= value <= high, int, schema=bounds)


def number(low: float, high: float) -> Kind:
    """Numbers within bounds."""

    def allowed(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high

    bounds = {"type": "number", "minimum": low, "maximum": high}
    return Kind("NUMBER", f"a number from {low} to {high}", allowed, float, schema=bounds)


def share() -> Kind:
    """Numbers above 0 up to 1."""
    inner = number(0, 1)
    bounds = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    needed = "a number above 0, at most 1,"
    return Kind("NUMBER", needed, lambda value: inner.allowed(value) and value > 0, float, schema=bounds)


def choice(*names: str) -> Kind:
    """One of several names."""
    needed = f"{', '.join(names[:-1])} or {names[-1]}"
    return Kind("NAME", needed, lambda value: value in names, schema={"type": "string", "enum": list(names)})


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _wholes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:[x×](\d{1,9}))?", text.strip().lower())
    if not match:
        raise ValueError(text)
    return int(match[1]), int(match[2] or match[1])


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(is_whole(side) and 0 <= side <= 2**20 for side in value)


def _both_sides(size: Any) -> Any:
    """A size as a pair: one number is both sides."""
    return size if isinstance(size, tuple) else (size, size)


def _is_size(value: Any) -> bool:
    return _is_pair(_both_sides(value))


def _margins(text: str) -> int | tuple[int, ...]:
    numbers = _wholes(text)
    return numbers[0] if len(numbers) == 1 else numbers


def _are_margins(value: Any) -> bool:
    sides = value if isinstance(value, tuple) else (value,) * 4
    return len(sides) == 4 and all(is_whole(side) and 0 <= side <= LARGEST_SIDE for side in sides) and any(sides)


def _component(text: str) -> dict[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(text)
    return {name: path}


def _joined_components(values: list[dict[str, str]]) -> dict[str, str]:
    found = {name: path for value in values for name, path in value.items()}
    if len(found) < len(values):
        raise LdmError(f"--component {', '.join(name for value in values for name in value)}: each name once")
    return found


def _are_components(value: Any) -> bool:
    pairs = value.items() if isinstance(value, Mapping) else ()
    return bool(pairs) and all(isinstance(name, str) and isinstance(path, (str, PathLike)) for name, path in pairs)


def _are_paths(value: Any) -> bool:
    paths = value if isinstance(value, tuple) else (value,)
    return all(isinstance(path, PathLike) or (isinstance(path, str) and path != "") for path in paths)


def _are_two_paths(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _are_paths(value)


def _joined_paths(values: list[Any]) -> tuple[Any, ...]:
    return tuple(path for value in values for path in (value if isinstance(value, (list, tuple)) else (value,)))


def _is_interval(value: Any) -> bool:
    numbers = isinstance(value, tuple) and all(isinstance(part, (int, float)) for part in value)
    return numbers and len(value) == 2 and 0 <= value[0] <= value[1] <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, tuple) and all(text is None or isinstance(text, str) for text in value)
    )


def _is_image(value: Any) -> bool:
    """Whether a value is a path, an open file or an image of PIL."""
    if isinstance(value, str):
        return value != ""
    return any(hasattr(value, name) for name in ("__fspath__", "read", "getbbox"))


def _are_images(value: Any) -> bool:
    return all(_is_image(one) for one in value) if isinstance(value, tuple) and value else _is_image(value)


def _weighted(value: Any) -> bool:
    """Whether a value is a pair whose second part is a weight."""
    return isinstance(value, tuple) and len(value) == 2 and WEIGHT.allowed(value[1])


def _is_image_prompt(value: Any) -> bool:
    """Whether a value is an image, or several, or these with a weight."""
    return isinstance(value, ImagePrompt) or _are_images(value[0] if _weighted(value) else value)


def _are_image_prompts(value: Any) -> bool:
    return _is_image_prompt(value) or (isinstance(value, tuple) and bool(value) and all(map(_is_image_prompt, value)))


def _image_prompt(text: str) -> tuple[Any, ...]:
    """An image, with a weight after its last colon."""
    path, _, weight = text.rpartition(":")
    number = re.fullmatch(r"-?\d{1,9}(\.\d{0,9})?|-?\.\d{1,9}", weight)
    return ((path, float(weight)),) if path and number else (text,)


def _each(kind: Kind, count: str) -> Kind:
    """A value of a kind, or one for each of several things."""

    def allowed(value: Any) -> bool:
        return all(map(kind.allowed, value)) if isinstance(value, tuple) and value else kind.allowed(value)

    def parse(text: str) -> Any:
        values = tuple(kind.parse(part) for part in text.split(","))
        return values[0] if len(values) == 1 else values

    return Kind(
        f"{kind.metavar},...", f"{kind.needed}, or one for each {count},", allowed, parse, structured=True,
        schema=_or_several(kind.schema),
    )  # fmt: skip


def _or_several(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a value or a list of them."""
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}


def _control(text: str) -> tuple[dict[str, str], ...]:
    kind, equals, path = text.partition("=")
    if not (text and (path or not equals)):
        raise ValueError(text)
    return ({"kind": kind, "path": path} if equals else {"kind": "image", "path": text},)


def _are_controls(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_are_controls(one) for one in value)
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(kind, str) and _is_image(one) for kind, one in value.items())
    return _is_image(value)


def _is_seed(value: Any) -> bool:
    values = value if isinstance(value, (tuple, range)) else (value,)
    return all(is_whole(seed) and 0 <= seed <= LARGEST_SEED for seed in values)


NAME = Kind("NAME", "a name", lambda value: isinstance(value, str))
BASE64 = {"type": "string", "contentEncoding": "base64", "description": "a PNG, JPEG or WebP"}
WEIGHTED = {"type": "array", "prefixItems": [BASE64, {"type": "number"}], "minItems": 2, "maxItems": 2}
TWO = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
FOLDER = Kind("FOLDER", "a path", lambda value: isinstance(value, (str, PathLike)) and str(value) != "")
FLAG = Kind("BOOLEAN", "true or false", lambda value: isinstance(value, bool), _flag, schema={"type": "boolean"})
TEXT = Kind("TEXT", "a text, or one for each prompt,", _is_text, schema=_or_several({"type": "string"}))
IMAGE = Kind("FILE", "a path or a PIL image", _is_image, schema=BASE64)
SEED = Kind(
    "INTEGER", f"a whole number from 0 to {LARGEST_SEED}, or one for each image,", _is_seed, int,
    schema=_or_several({"type": "integer", "minimum": 0, "maximum": LARGEST_SEED}),
)  # fmt: skip
IMAGE_MASKS = Kind("FILE", "a path or a PIL image, or one for each image prompt,", _are_images,
                   joined=_joined_paths, schema=_or_several(BASE64))  # fmt: skip
IMAGE_PROMPTS = Kind(
    "FILE[:WEIGHT]", "an image, or several of them, each alone or with a weight from -10 to 10,", _are_image_prompts,
    _image_prompt, structured=True, joined=_joined_paths,
    schema={"anyOf": [BASE64, {"type": "array", "items": {"anyOf": [BASE64, WEIGHTED]}, "minItems": 1}]},
)  # fmt: skip
SIDE = whole(1, LARGEST_SIDE)
SIZE = Kind(
    "WxH", "WIDTHxHEIGHT, such as 768x512,", _is_size, _size, structured=True,
    schema={"anyOf": [{"type": "string", "pattern": "^[0-9]{1,9}(x[0-9]{1,9})?$"}, SIDE.schema, TWO]},
)  # fmt: skip
PAIR = Kind("HEIGHT,WIDTH", "two whole numbers of pixels, height (top) first,", _is_pair, _wholes, structured=True,
            schema=TWO)  # fmt: skip
MARGINS = Kind(
    "PIXELS", f"a whole number from 1 to {LARGEST_SIDE}, or four, LEFT,TOP,RIGHT,BOTTOM, of which some may be 0,",
    _are_margins, _margins, structured=True,
    schema={"anyOf": [
        {"type": "integer", "minimum": 1, "maximum": LARGEST_SIDE},
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": LARGEST_SIDE}, "minItems": 4,
         "maxItems": 4},
    ]},
)  # fmt: skip
INTERVAL = Kind(
    "START,END", "two rising numbers from 0 (noise) to 1 (image), such as 0.1,0.8,", _is_interval, _numbers,
    structured=True,
    schema={"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 2, "maxItems": 2},
)  # fmt: skip
SCALE = number(0, 1000)
PART = number(0, 1)
WEIGHT = number(-10, 10)
SHARE = share()
SPACING = Kind(
    "NAME", "a name, or falling noise levels such as 14.6,7,3,1,0.1, one for each step,",
    lambda value: isinstance(value, (str, tuple)), lambda text: _numbers(text) if "," in text else text,
    structured=True,
    schema={
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}],
        "examples": list(OTHER_SPACINGS),
    },
)  # fmt: skip
SCHEDULER = Kind(
    "NAME", "a name, or an object with diffusers' interface,",
    lambda value: isinstance(value, str) or hasattr(value, "set_timesteps"),
    schema={"type": "string", "examples": list(OTHER_NAMES)},
)  # fmt: skip
SOURCE = Kind(
    "MODEL", "the name of a model", lambda value: not isinstance(value, (bool, int, float, tuple))
)  # fmt: skip
COMPONENTS = Kind(
    "NAME=PATH", "NAME=PATH, such as vae=better-vae.safetensors, or a dictionary of such pairs,", _are_components,
    _component, structured=True, joined=_joined_components,
)  # fmt: skip
ADAPTERS = Kind(
    "FILE[:WEIGHT]",
    f"FILE or FILE:WEIGHT, such as style.safetensors:0.8, or a dictionary of files and weights from -{LARGEST} to "
    f"{LARGEST}, or a list with one for each prompt,",
    are_mixes, parse_mix, structured=True, joined=joined_mixes,
    schema={
        "type": "object", "description": "names of adapters, each with its weight",
        "additionalProperties": {"type": "number", "minimum": -LARGEST, "maximum": LARGEST},
    },
)  # fmt: skip
PATHS = Kind("PATH", "a path, or a list of them,", _are_paths, lambda text: (text,), structured=True,
             joined=_joined_paths)  # fmt: skip
CONTROL = Kind(
    "KIND=FILE", "KIND=FILE, such as canny=photo.png, or a dictionary of kinds and images,", _are_controls, _control,
    structured=True, joined=lambda values: tuple(one for value in values for one in value),
    schema={"type": "object", "additionalProperties": BASE64},
)  # fmt: skip
CONTROL_MODELS = Kind(
    "MODEL", "a file, folder or name, or a list or dictionary of them,",
    lambda value: bool(value) and not isinstance(value, (bool, int, float)), lambda text: (text,), structured=True,
    joined=_joined_paths,
)  # fmt: skip
SIGNING = Kind("CERT,KEY", "two files, a certificate chain and its private key,", _are_two_paths,
               lambda text: tuple(text.split(",")), structured=True)  # fmt: skip
DTYPE = choice("fp32", "fp16", "bf16", "float32", "float16", "bfloat16")

# --- the tables -------------------------------------------------------------------------------------------------------

PROMPTS_OF_DATA = {"eval": "prompts are those of the data, or of its --prompts"}
FROM_TEXT = {"eval": "images are made of prompts alone"}
RECORDED_AS_SIZE = {"record": "width and height are there"}
RECORDED_AS_FILES = {"record": "image_prompt there lists each image with all that belongs to it"}
ONE_MODEL = {"list": "one model makes the whole list"}

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "prompt", TEXT, "The prompt: a description of the images.", "", flag="PROMPT...", names=("text", "positive"),
        closed=PROMPTS_OF_DATA,
    ),
    Setting("negative", TEXT, "Negative prompt: what the images should not show.", names=("negative_prompt",),
            a1111="Negative prompt"),
    Setting("prompt_2", TEXT, "Prompt for SDXL's second text encoder.", closed=PROMPTS_OF_DATA,
            used=lambda request: request.prompts_2 is not None),
    Setting("negative_2", TEXT, "Negative prompt for SDXL's second text encoder.", names=("negative_prompt_2",),
            used=lambda request: request.negative_2 is not None),
    Setting(
        "n", whole(1, MOST_IMAGES), "Images of each prompt.", 1, flag="-n",
        names=("num_images_per_prompt", "images_per_prompt", "num_images", "n_iter", "n_samples", "batch_count"),
        closed={"record": "a record is of one image", "eval": "its own -n says how many",
                "axis": "a cell has one image; compare seeds"},
    ),
    Setting(
        "batch", whole(1, MOST_IMAGES), "Images made at a time.", Elsewhere("as many as keep the device busy"),
        names=("batch_size",),
        closed={"list": "lines with the same settings share a batch", "record": "batch and place say what was made "
                "together", "eval": "its own --batch says how many", "axis": "cells that differ in texts and seeds "
                "alone share a batch"},
    ),
    Setting("steps", whole(1, MOST_STEPS), "Steps of the scheduler; the built-in model 20, others 30.", FAMILY,
            names=("num_inference_steps", "ddim_steps", "sample_steps", "sampling_steps"), a1111="Steps"),
    Setting("scheduler", SCHEDULER, "Name of a scheduler: see `ldm schedulers`.", Elsewhere("the model's own"),
            names=("sampler", "sampler_name", "sampler_index", "sample_sampler"), a1111="Sampler"),
    Setting("spacing", SPACING, "Spacing of the steps: see `ldm schedulers`; or noise levels, as 14.6,7,3,1,0.1.",
            "default", names=("timestep_spacing", "schedule_type", "sigmas"), a1111="Schedule type"),
    Setting("guidance", SCALE, "Scale of classifier-free guidance (CFG); at most 1: none.", FAMILY,
            names=("guidance_scale", "cfg", "cfg_scale", "unconditional_guidance_scale"), record="guidance.scale",
            a1111="CFG scale"),
    Setting("rescale", PART, "Guidance rescale of Lin et al., 0 to 1.", 0.0, names=("guidance_rescale",),
            record="guidance.rescale"),
    Setting("interval", INTERVAL, "Guidance interval: the part of the run in which guidance is on.", (0.0, 1.0),
            names=("guidance_interval",), record="guidance.interval"),
    Setting("threshold", PART, "Dynamic thresholding: the percentile, such as 0.995; 0: none.", 0.0,
            names=("dynamic_thresholding_ratio",), record="guidance.threshold"),
    Setting("perturbed", SCALE, "Perturbed-attention guidance (PAG): its scale; 0: none.", 0.0, names=("pag_scale",),
            record="guidance.perturbed"),
    Setting("image_guidance", SCALE, "InstructPix2Pix: guidance scale of the image; higher keeps more of it.", 1.5,
            names=("image_guidance_scale", "image_cfg_scale"), record="guidance.image"),
    Setting("seed", SEED, "Seed of the first image; the others have the numbers after it.", Elsewhere("random"),
            names=("generator", "noise_seed"), a1111="Seed", closed={"eval": "its own --seed gives each image one"}),
    Setting("size", SIZE, "Size in pixels; one number for both sides.", Elsewhere("the image's, or the trained size"),
            names=("resolution", "image_size"), a1111="Size", closed=RECORDED_AS_SIZE),
    Setting("width", SIDE, "Width in pixels, in place of size.", Elsewhere("the image's, or the trained size"),
            names=("W",)),
    Setting("height", SIDE, "Height in pixels, in place of size.", Elsewhere("the image's, or the trained size"),
            names=("H",)),
    Setting("image", IMAGE, "An image to start from.", names=("init_image", "init_img", "init_images"),
            closed=FROM_TEXT),
    Setting("strength", SHARE, "How much the image to start from changes, above 0 to 1.",
            Elsewhere("0.8, with a mask or margins 1"),
            names=("denoising_strength", "denoise"), a1111="Denoising strength", closed=FROM_TEXT,
            used=lambda request: request.task in ("image-to-image", "inpaint")),
    Setting("mask", IMAGE, "Inpainting mask: its white pixels are made anew.", names=("mask_image",), closed=FROM_TEXT),
    Setting("margins", MARGINS,
            "Outpainting: pixels by which the image to start from is extended, on all sides or LEFT,TOP,RIGHT,BOTTOM.",
            names=("outpaint", "outpainting", "margin"), closed=FROM_TEXT,
            used=lambda request: request.margins is not None),
    Setting("adapters", ADAPTERS,
            "LoRA or other adapter, as FILE, FILE:WEIGHT or FILE:TEXT:UNET (weights for text encoders and U-Net).",
            flag="--lora", names=("loras", "lora"), a1111="Lora hashes",
            used=lambda request: any(request.mixes)),
    Setting("control", CONTROL,
            "For a control model, KIND=FILE: canny=photo.png (see ldm preprocess), or image=edges.png as it is.",
            names=("control_image",), closed=FROM_TEXT, used=lambda request: bool(request.control)),
    Setting("control_scale", _each(number(0, 10), "condition image"), "Scale of each control model.", 1.0,
            names=("controlnet_conditioning_scale", "adapter_conditioning_scale"), closed=FROM_TEXT,
            used=lambda request: bool(request.control)),
    Setting("control_fall", _each(PART, "condition image"),
            "Control models: factor from each depth's scale to that of the one above, such as 0.825.", 1.0,
            names=("soft_injection",), closed=FROM_TEXT, used=lambda request: bool(request.control)),
    Setting("control_begin", _each(PART, "condition image"), "Part of the steps at which control models begin.", 0.0,
            names=("control_guidance_start",), closed=FROM_TEXT, used=lambda request: bool(request.control)),
    Setting("control_end", _each(PART, "condition image"), "Part of the steps at which control models end.", 1.0,
            names=("control_guidance_end", "adapter_conditioning_factor"), closed=FROM_TEXT,
            used=lambda request: bool(request.control)),
    Setting("guess", FLAG, "Guess mode: control models act on the prompt's half of guidance alone.", False,
            names=("guess_mode",), closed=FROM_TEXT, used=lambda request: bool(request.control)),
    Setting("clip_skip", whole(0, 100), "Last layers of the text encoders to leave out, for the negative prompt too.",
            0, a1111="Clip skip", names=("stop_at_clip_layer", "CLIP_stop_at_last_layers")),
    Setting("refiner_at", number(0.01, 0.99), "Part of the run after which the refiner takes over, such as 0.8.",
            Elsewhere("it refines the finished image"),
            names=("denoising_end", "refiner_switch_at", "high_noise_frac", "denoising_start"),
            used=lambda request: bool(request.refiner_at)),
    Setting("refiner_strength", SHARE, "How much the refiner changes a finished image, above 0 to 1.", 0.3,
            used=lambda request: request.refined and not request.refiner_at),
    Setting("hires", number(1, 8), "Factor of enlargement by a second pass.",
            names=("hr_scale", "upscale_by", "hires_upscale"), a1111="Hires upscale",
            used=lambda request: bool(request.hires)),
    Setting("hires_strength", SHARE, "How much the second pass (hires) changes the image, above 0 to 1.", 0.55,
            a1111="Denoising strength", used=lambda request: bool(request.hires)),
    Setting("hires_latents", FLAG, "Enlarge the latents for the second pass, not the image.", False,
            used=lambda request: bool(request.hires)),
    Setting("weights", FLAG, "Read (word:1.2) in prompts as weights.", True),
    Setting("chunks", FLAG, "Split long prompts instead of cutting them.", True),
    Setting("eta", PART, "Share of noise in DDIM's and TCD's steps, 0 to 1.", 0.0, names=("ddim_eta",)),
    Setting("rng", choice("ldm", "diffusers"), "Random numbers: of ldm, or the same as diffusers draws.", "ldm",
            names=("randn_source",)),
    Setting("reuse", whole(1, MOST_STEPS),
            "DeepCache: calls of the U-Net for one run of its inner levels; more is faster, but rougher.", 1,
            names=("cache_interval",)),
    Setting("merge", number(0, 0.75),
            "Token merging (ToMe): part of the tokens merged for self-attention, up to 0.75; faster, rougher.", 0.0,
            names=("token_merging_ratio", "tome_ratio")),
    Setting("image_prompt", IMAGE_PROMPTS, "Image prompt: an image that shows what the images should be like; "
            "once for each.", names=("ip_adapter_image",), closed=FROM_TEXT | RECORDED_AS_FILES),
    Setting("image_prompt_weight", _each(WEIGHT, "image prompt"), "Weights of the image prompts.", 1.0,
            names=("ip_adapter_scale",), closed=FROM_TEXT | RECORDED_AS_FILES),
    Setting("image_prompt_mask", IMAGE_MASKS, "Masks of the image prompts: each counts where its mask is white.",
            names=("ip_adapter_masks",), closed=FROM_TEXT | RECORDED_AS_FILES),
    Setting("image_prompt_begin", _each(PART, "image prompt"), "Part of the steps at which the image prompts begin.",
            0.0, closed=FROM_TEXT | RECORDED_AS_FILES),
    Setting("image_prompt_end", _each(PART, "image prompt"), "Part of the steps at which the image prompts end.", 1.0,
            closed=FROM_TEXT | RECORDED_AS_FILES),
    Setting("original_size", PAIR, "SDXL's time ids: the size of the image before cropping.",
            Elsewhere("the image's")),
    Setting("crop", PAIR, "SDXL's time ids: top and left of the crop.", (0, 0),
            names=("crops_coords_top_left",)),
    Setting("target_size", PAIR, "SDXL's time ids: the size of the image.", Elsewhere("the image's")),
    Setting("negative_original_size", PAIR, "Original size for the negative prompt.", Elsewhere("like the prompt's")),
    Setting("negative_crop", PAIR, "Crop for the negative prompt.", Elsewhere("like the prompt's"),
            names=("negative_crops_coords_top_left",)),
    Setting("negative_target_size", PAIR, "Target size for the negative prompt.", Elsewhere("like the prompt's")),
    Setting("aesthetic_score", number(0, 10), "Time ids of SDXL's refiner: the aesthetic score.", 6.0,
            names=("ascore",)),
    Setting("negative_aesthetic_score", number(0, 10), "Aesthetic score for the negative prompt.", 2.5),
)  # fmt: skip

LOADING: tuple[Setting, ...] = (
    Setting("source", SOURCE, "A model folder, a checkpoint file, or a Hub name.", Elsewhere("the built-in model"),
            flag="--model",
            names=("pretrained_model_name_or_path", "ckpt", "checkpoint", "ckpt_name", "sd_model_checkpoint"),
            closed=ONE_MODEL | {"eval": "its arguments are the models"}),
    Setting("refiner", SOURCE, "A model of the family sdxl-refiner, or emoji-refiner.", closed=ONE_MODEL),
    Setting("device", NAME, "Device: cuda, mps or cpu.", Elsewhere("the best there is"),
            closed=ONE_MODEL | {"record": "an image can be made again on any", "eval": "it has its own --device"}),
    Setting("dtype", DTYPE, "Type of the weights: fp32, fp16 or bf16.", Elsewhere("what the device is good at"),
            names=("torch_dtype",), closed=ONE_MODEL),
    Setting("attention", NAME,
            "Attention kernel: sdpa, math, cpu, flash, efficient, cudnn, xformers or flash-attn; auto is the best.",
            "auto", closed=ONE_MODEL),
    Setting("quick", FLAG, "Fused layers in place of plain ones.", True,
            closed=dict.fromkeys(("shell", "list", "record", "eval", "axis"),
                                 "plain layers are for comparing: ldm bench")),
    Setting("compile", FLAG, "Compile the networks first: for many images.", False, closed=ONE_MODEL),
    Setting("quantize", choice("int8", "int8-weights", "fp8"),
            "Quantisation of linear layers by torchao: int8, int8-weights or fp8.", closed=ONE_MODEL),
    Setting("offload", choice("auto", "none", "components", "layers"),
            "Offload of large models from a GPU: none, components or layers; auto chooses.", "auto", closed=ONE_MODEL),
    Setting("family", NAME, "Family of a single file, if its tensors do not tell: sd2 or sd2-v.",
            record="source_family", closed=ONE_MODEL),
    Setting("components", COMPONENTS,
            "A component from elsewhere: unet, vae, text_encoder or text_encoder_2; once for each.",
            flag="--component", closed=ONE_MODEL),
    Setting("lora_dir", FOLDER, "Folder in which prompts find adapters by name: <lora:NAME:WEIGHT>.",
            names=("lora_path",), closed=ONE_MODEL | {"record": "a record has the files themselves"}),
    Setting("partial_adapters", FLAG, "Use what fits of an adapter that does not fit the model as a whole.", False,
            closed=ONE_MODEL),
    Setting("ip_adapter", PATHS, "An IP-Adapter, by which image prompts are read; once for each of them.",
            names=("ip_adapters",), closed=ONE_MODEL | FROM_TEXT | {"record": "its image prompts name it"}),
    Setting("image_encoder", SOURCE, "Image encoder of the IP-Adapter: a folder or a Hub name.",
            Elsewhere("the folder image_encoder beside it"),
            closed=ONE_MODEL | FROM_TEXT | {"record": "it is there with the image prompts"}),
    Setting("control_models", CONTROL_MODELS,
            "A ControlNet or T2I-Adapter: folder, file or Hub name. Once for each condition image, in their order.",
            flag="--control-model", names=("controlnet",), closed=ONE_MODEL | FROM_TEXT),
    Setting("embeddings", PATHS,
            "An embedding of textual inversion, named in prompts, or a folder of them; once for each.",
            flag="--embedding", names=("embedding_dir", "embeddings_dir", "textual_inversion"),
            closed=ONE_MODEL | {"record": "it lists the embeddings that the image's prompts use"}),
    Setting("variant", NAME, "Which of a folder's weights to read, such as fp16.", closed=ONE_MODEL),
    Setting("watermark", FLAG, "Invisible watermark in every image: SDXL's; `ldm info IMAGE` finds it.",
            names=("add_watermarker",), closed=ONE_MODEL),
    Setting("safety", SOURCE, "A safety checker's folder or Hub name: it looks at each image, and those that it flags "
            "are blurred.", names=("safety_checker",), record="safety_model", closed=ONE_MODEL),
    Setting("safety_action", choice("blur", "refuse"), "What becomes of an image that the safety checker flags.",
            Elsewhere("blur"), closed=ONE_MODEL | {"record": "safety there says what became of the image"}),
    Setting("c2pa", SIGNING, "Sign images as made by a model: C2PA manifests, with a certificate chain and its key.",
            closed=ONE_MODEL | {"record": "the manifest says who signed it", "eval": "its images are not given away",
                                "axis": "a sheet and its images are signed by one"}),
    Setting("allow_pickle", FLAG, "Read tensors, and nothing else, from .ckpt and .bin.", False,
            closed=ONE_MODEL | {"record": "it must be allowed each time"}),
)  # fmt: skip


def every_row() -> tuple[Setting, ...]:
    """The rows of both tables."""
    return SETTINGS + LOADING


def at(door: str, rows: Iterable[Setting] | None = None) -> dict[str, Setting]:
    """The rows that a door accepts, by name; by default rows of `SETTINGS`."""
    return {row.name: row for row in (SETTINGS if rows is None else rows) if door not in row.closed}


def find(name: str, door: str, called: str = "", rows: Iterable[Setting] | None = None) -> Setting:
    """The row of that name or other name (with hyphens or underscores), if the door accepts it.

    Raises:
        LdmError: the name is not known (the message suggests the nearest), or the door does not accept it (the message
            has the reason).
    """
    called, plain = called or f"setting {name}", name.replace("-", "_")
    rows = SETTINGS if rows is None else tuple(rows)
    for row in rows:
        if row.goes_by(name):
            if door in row.closed:
                raise LdmError(f"{called} is not taken here: {row.closed[door]}")
            return row
    names = {other: row for row in at(door, rows).values() for other in (row.name, *row.names)}
    near = difflib.get_close_matches(plain, names, 1, 0.4)
    if not near:
        raise LdmError(f"{called} is not known; known are {', '.join(at(door, rows))}")
    row = names[near[0]]
    other = f" ({row.names[0]})" if row.names else ""
    raise LdmError(f"{called} is not known; did you mean {row.name}{other}?")


def renamed(
    given: Mapping[str, Any] | Iterable[tuple[str, Any]],
    door: str,
    rows: Iterable[Setting] | None = None,
    called: Mapping[str, str] | None = None,
    also: Iterable[str] = (),
) -> dict[str, Any]:
    """Settings by our names, those with another meaning translated.

    Args:
        given: settings by any of their names; a name may come twice.
        door: where they come from.
        rows: the rows to choose from; by default `SETTINGS`.
        called: what messages call a name, if it is not the name itself.
        also: further names, which are no settings.

    Raises:
        LdmError: a name is not known, one setting is given by two names with different values, or there is none here.
    """
    rows, called = tuple(SETTINGS if rows is None else rows), called or {}
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in given.items() if isinstance(given, Mapping) else given:
        plain, shown = name.replace("-", "_"), called.get(name, name)
        if plain in also:
            parts = {plain: value}
        elif plain in TRANSLATED:
            parts = {} if value is None else TRANSLATED[plain](value)
            parts = {find(part, door, called.get(name, ""), rows).name: own for part, own in parts.items()}
        else:
            parts = {find(name, door, called.get(name, ""), rows).name: value}
        for part, own in parts.items():
            before = found.get(part)
            if before is not None and own is not None and not _same(before, own):
                joined = None if plain in also else find(part, door, rows=rows).kind.joined
                if joined is not None:
                    found[part] = joined([before, own])
                    continue
                raise LdmError(f"{origin[part]} {before!r} and {shown} {own!r} are one setting; give one of them")
            if own is not None or part not in found:
                found[part], origin[part] = own, shown
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a setting are equal; images must be the same object."""
    one, other = (tuple(value) if isinstance(value, list) else value for value in (one, other))
    return one is other or (isinstance(one, (str, int, float, tuple)) and bool(one == other))


def checked(given: Mapping[str, Any], door: str) -> dict[str, Any]:
    """Settings of a call as the pipeline takes them, each within its bounds; those that are None are left out.

    Raises:
        LdmError: a name is not known, or a value is not allowed.
    """
    values: dict[str, Any] = {}
    for name, value in expanded(renamed(given, door)).items():
        row = find(name, door)
        if value is not None:
            values[row.name] = row.check(value)
    if "size" in values:
        values = dict(zip(("width", "height"), _both_sides(values.pop("size")), strict=True)) | values
    return with_own_scheduler(values)


def parted(given: Mapping[str, Any], door: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings by our names: those of loading a model as they are, and those of a call as `checked`; without None.

    Raises:
        LdmError: as `checked`.
    """
    rows = at(door, LOADING)
    loading = {name: value for name, value in given.items() if name in rows and value is not None}
    return loading, checked({name: value for name, value in given.items() if name not in rows}, door)


def image_prompts(values: Mapping[str, Any]) -> tuple[ImagePrompt, ...]:
    """The image prompts of a call, with the values of the settings that belong to them.

    Raises:
        LdmError: there are such values without image prompts, or neither one of them nor one for each.
    """
    given = values.get("image_prompt")
    parts = {name: values.get(f"image_prompt_{name}") for name in ("weight", "mask", "begin", "end")}
    if given is None:
        alone = [name for name, value in parts.items() if value is not None]
        if alone:
            raise LdmError(f"image_prompt_{alone[0]} without an image prompt: give one (image_prompt=, --image-prompt)")
        return ()
    entries = given if isinstance(given, tuple) and not _weighted(given) else (given,)
    for name, value in parts.items():
        if isinstance(value, tuple) and len(value) != len(entries):
            raise LdmError(
                f"image_prompt_{name}: {len(value)} values for {len(entries)} image prompts; give one for each"
            )
    found = []
    for place, entry in enumerate(entries):
        own: dict[str, Any] = {
            name: value[place] if isinstance(value, tuple) else value
            for name, value in parts.items()
            if value is not None
        }
        if isinstance(entry, ImagePrompt):
            found.append(replace(entry, **own))
            continue
        if _weighted(entry):
            entry, own["weight"] = entry[0], entry[1] * own.get("weight", 1.0)
        found.append(ImagePrompt(entry if isinstance(entry, tuple) else (entry,), **own))
    for one in found:
        if one.begin >= one.end:
            raise LdmError(f"image_prompt_begin {one.begin} is not before image_prompt_end {one.end}")
    return tuple(found)


def parsed(
    given: Mapping[str, Any], rows: Mapping[str, Setting], called: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Settings from the command line: texts as values within their bounds; those that are not given are left out.

    Messages call each by its option, unless `called` says otherwise.

    Raises:
        LdmError: a text has no meaning, or a value is not allowed.
    """
    values: dict[str, Any] = {}
    options = {name: row.option_of(name) for row in rows.values() for name in (row.name, *row.names)}
    called = {**options, **(called or {})}
    for row in rows.values():
        for name in (row.name, *row.names):
            value = given.get(name)
            if value is not None:
                checks = Kind("", row.kind.needed, lambda _: True, row.kind.parse) if name in TRANSLATED else row.kind
                taken = replace(row, kind=checks)
                if isinstance(value, list):
                    value = taken.gathered(value, called[name])
                values[name] = taken.parse(value, called[name]) if isinstance(value, str) else value
    return renamed(values, "shell", rows.values(), called)


def expanded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with `guidance`, if it is a `Guidance` or a record's dictionary, replaced by a setting for each part."""
    found = dict(given)
    guidance = found.get("guidance")
    parts = guidance if isinstance(guidance, Mapping) else vars(guidance) if hasattr(guidance, "scale") else {}
    if parts:
        del found["guidance"]
        names = {row.key: row.name for row in SETTINGS}
        own = {names.get(f"guidance.{part}", f"guidance.{part}"): value for part, value in parts.items()}
        found = own | found
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the keys of a record; keys with a dot make a dictionary within it."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        outer, dot, inner = key.partition(".")
        if dot:
            found.setdefault(outer, {})[inner] = value
        else:
            found[key] = value
    return found
