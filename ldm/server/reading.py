"""Settings of a request: JSON to settings of a pipeline. No path is opened and no URL fetched.

Uploaded images are base64 texts, with or without the head of a data URL. Adapters are named by the names that they have
in the folder given at start.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from ldm.conditions.table import KINDS, MASKED
from ldm.errors import LdmError, suggestion
from ldm.images import ANIMATED, load_noted
from ldm.server.limits import Limits, check_most
from ldm.server.uploads import RequestUploads
from pipelines.margins import canvas_size
from pipelines.settings import CONTROL, IMAGE, IMAGE_MASKS, IMAGE_PROMPTS, at, checked, find, renamed

log = logging.getLogger(__name__)
PARTS = 100_000  # brackets and commas of a request: more than any needs, fewer than fill the memory
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a character, or one that the other half follows
DIGITS = 20  # of a whole number
NAME = 100  # characters of a setting's name
FORMATS = ("PNG", "JPEG", "WEBP")
UPLOADS = (IMAGE, IMAGE_MASKS, IMAGE_PROMPTS, CONTROL)  # kinds of values that hold images
DECODING = threading.Semaphore(4)  # images that are decoded at a time


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        LdmError: it is none, has too many parts or half a character, or an object has a name twice.
    """
    parts = sum(map(body.count, (b"[", b"{", b",")))
    if parts > PARTS:
        raise LdmError(f"the request has {parts:,} brackets and commas; this server reads at most {PARTS:,}")
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number, parse_int=_whole, object_pairs_hook=_object)
        if SURROGATE.search(body):
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # no answer could have it either
    except UnicodeEncodeError:
        raise LdmError("the request has half a character (a lone surrogate); it was cut or decoded wrongly") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise LdmError(f"the request is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise LdmError(f"the request is a JSON {type(found).__name__}; an object with settings is needed")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a whole number has {len(text)} digits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def settings_of(given: Mapping[str, Any], share: RequestUploads) -> dict[str, Any]:
    """Settings of a call, by our names, within the limits of a request's `share`, which counts its images.

    Raises:
        LdmError: a setting is not known or not taken over HTTP, or its value is not allowed or above a limit.
        NotTakenError: as `RequestUploads.take`.
    """
    _check_names(given)
    found = renamed(given, "http")
    for name, value in found.items():
        row = find(name, "http")
        if value is None:
            continue
        if row.kind in UPLOADS:
            found[name] = _uploads(row.kind is CONTROL, value, name, share)
            continue
        _check_texts(name, value, share.limits)
        if name == "adapters":
            found[name] = _adapters(value)
        elif isinstance(value, Mapping):
            raise LdmError(f"{name}: {row.kind.needed} is needed, not a JSON object")
    values = checked(found, "http")
    canvas = None
    if "margins" in values and "image" in values:
        canvas = canvas_size(values["image"].size, values["margins"])
    _check_limits(values, canvas or (1, 1), share.limits)
    if canvas:
        share.take("margins", math.prod(canvas))
    return values


def _check_limits(values: Mapping[str, Any], canvas: tuple[int, int], limits: Limits) -> None:
    """Raise unless numbers that were given are within the limits; `canvas` are the sides of an image with its margins.

    Raises:
        LdmError: one is not.
    """
    prompts = values.get("prompt", "")
    count = values.get("n", 1) * (1 if isinstance(prompts, str) else len(prompts))
    sides = [values.get(name, side) for name, side in zip(("width", "height"), canvas, strict=True)]
    check_most(
        ("steps", values.get("steps", 1), limits.steps),
        ("images", max(count, values.get("batch", 1)), limits.images),
        ("pixels", round(sides[0] * sides[1] * values.get("hires", 1) ** 2), limits.pixels),
        ("pixels of an image with its margins", canvas[0] * canvas[1], limits.upload),
    )


def _check_names(given: Mapping[str, Any]) -> None:
    """Raise if a name is far too long, or if one that the command line takes several times comes under two names."""
    for name in given:
        if len(name) > NAME:
            raise LdmError(f"setting {name[:NAME]}… is not known")
    for row in at("http").values():
        names = [name for name in given if row.goes_by(name)]
        if row.kind.joined and len(names) > 1:
            raise LdmError(f"{names[0]} and {names[1]} are one setting; give one of them")


def _check_texts(name: str, value: Any, limits: Limits) -> None:
    """Raise unless all texts of a setting's value are within the limit."""
    for text in _texts(value):
        if len(text) > limits.characters:
            raise LdmError(f"{name} has {len(text):,} characters; this server reads at most {limits.characters:,}")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, with the names in its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def _adapters(value: Any) -> dict[str, dict[str, Any]]:
    """Names of adapters and their weights; a name never stands for a path."""
    row = at("http")["adapters"]
    found = row.check(value) if isinstance(value, Mapping) else None
    if found is None:
        raise LdmError('adapters: an object of names and weights is needed, such as {"style": 0.8}')
    weights = {name: own if isinstance(own, Mapping) else {"unet": own, "text": own} for name, own in found.items()}
    for name, own in weights.items():
        if own.keys() != {"unet", "text"}:
            raise LdmError(f"adapter {name!r}: a weight, or an object with unet and text, is needed")
    return {name: {**own, "by_name": True} for name, own in weights.items()}


# --- uploaded images --------------------------------------------------------------------------------------------------


def _uploads(controls: bool, value: Any, name: str, share: RequestUploads) -> Any:
    """A value in which base64 texts are replaced by images; of control, the kinds that need no network.

    Images that were decoded before, as no JSON has them, are counted alone.
    """
    if isinstance(value, Image.Image):
        share.take(name, value.width * value.height)
        return value
    if isinstance(value, str):
        return uploaded(value, name, share)
    if isinstance(value, Mapping) and controls:
        for kind, image in value.items():
            check_control(kind, image)
        return {kind: _uploads(False, image, f"control {kind}", share) for kind, image in value.items()}
    if isinstance(value, (list, tuple)):
        return [one if isinstance(one, (int, float)) else _uploads(controls, one, name, share) for one in value]
    raise LdmError(f"{name}: an image in base64 is needed, not a JSON {type(value).__name__}")


def check_control(kind: str, image: Any) -> None:
    """Raise unless condition images of a kind can be made here, and there is an image, or a text for it."""
    if kind not in (*KINDS, MASKED):
        known = suggestion(kind[:NAME], [*KINDS, MASKED])
        raise LdmError(f"control: the kind {kind[:NAME]!r} of condition images does not exist; {known}")
    if kind in KINDS and KINDS[kind].model:
        raise LdmError(f"control {kind}: a network makes it, which is not run here; give the condition image")
    if not isinstance(image, (str, Image.Image)):
        raise LdmError(f"control {kind}: an image in base64 is needed")


def image_text(given: Mapping[str, Any], name: str) -> str:
    """The text of an image in a request.

    Raises:
        LdmError: there is none.
    """
    if not isinstance(given.get(name), str):
        raise LdmError(f"{name}: an image in base64 is needed")
    return str(given[name])


def uploaded(text: str, name: str, share: RequestUploads) -> Image.Image:
    """An uploaded image, upright and without its metadata.

    Raises:
        LdmError: it is no image of an allowed format, is too large, or is damaged.
        NotTakenError: as `RequestUploads.take`.
    """
    data = uploaded_bytes(text, name, share)
    with DECODING:
        image, notes = load_noted(io.BytesIO(data), name, colours="mask" not in name, formats=FORMATS)
    if ANIMATED in notes:
        log.warning("%s: %s", name, ANIMATED)
    return image


def uploaded_bytes(text: str, name: str, share: RequestUploads) -> bytes:
    """The file of an uploaded image, whose pixels are counted in a share before they are decoded.

    Raises:
        LdmError: as `uploaded`; whether the file is damaged is not known.
        NotTakenError: as `RequestUploads.take`.
    """
    head, comma, rest = text.partition(",")
    encoded = rest if comma and head.startswith("data:image/") and head.endswith(";base64") else text
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise LdmError(f"{name}: the image is not in base64") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
    except Exception:  # decoders of damaged files raise anything
        raise LdmError(f"{name}: it is no image, or none of these: {', '.join(FORMATS)}") from None
    if width * height > share.limits.upload:
        raise LdmError(f"{name} has {width}×{height} pixels; this server reads at most {share.limits.upload:,}")
    share.take(name, width * height)
    return data
