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
import threading
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ldm.conditions.table import KINDS
from ldm.errors import LdmError
from ldm.images import ANIMATED, load_noted
from ldm.server.limits import Limits
from pipelines.settings import CONTROL, IMAGE, IMAGE_MASKS, IMAGE_PROMPTS, at, checked, find, renamed

log = logging.getLogger(__name__)
FORMATS = ("PNG", "JPEG", "WEBP")
UPLOADS = (IMAGE, IMAGE_MASKS, IMAGE_PROMPTS, CONTROL)  # kinds of values that hold images
DECODING = threading.Semaphore(4)  # images that are decoded at a time
TEXTS = ("prompt", "negative", "prompt_2", "negative_2")


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        LdmError: it is none.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise LdmError(f"the request is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise LdmError(f"the request is a JSON {type(found).__name__}; an object with settings is needed")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def settings_of(given: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Settings of a call, by our names, within the limits.

    Raises:
        LdmError: a setting is not known or not taken over HTTP, or its value is not allowed or above a limit.
    """
    found = renamed(given, "http")
    for name, value in found.items():
        row = find(name, "http")
        if value is None:
            continue
        if row.kind in UPLOADS:
            found[name] = _uploads(row.kind is CONTROL, value, name, limits)
        elif name == "adapters":
            found[name] = _adapters(value)
        elif isinstance(value, Mapping):
            raise LdmError(f"{name}: {row.kind.needed} is needed, not a JSON object")
    values = checked(found, "http")
    check_limits(values, limits)
    return values


def check_limits(values: Mapping[str, Any], limits: Limits) -> None:
    """Raise unless settings that were given are within the limits.

    Raises:
        LdmError: one is not.
    """
    prompts = values.get("prompt", "")
    count = values.get("n", 1) * (1 if isinstance(prompts, str) else len(prompts))
    sides = [values.get(name, 1) for name in ("width", "height")]
    for name, value, most in (
        ("steps", values.get("steps", 1), limits.steps),
        ("images", max(count, values.get("batch", 1)), limits.images),
        ("pixels", round(sides[0] * sides[1] * values.get("hires", 1) ** 2), limits.pixels),
    ):
        if value > most:
            raise LdmError(f"{value:,} {name}: this server makes at most {most:,}")
    for name in TEXTS:
        texts = values.get(name) or ""
        for text in (texts,) if isinstance(texts, str) else texts:
            if text is not None and len(text) > limits.characters:
                raise LdmError(f"{name} has {len(text):,} characters; this server reads at most {limits.characters:,}")


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


def _uploads(controls: bool, value: Any, name: str, limits: Limits) -> Any:
    """A value in which base64 texts are replaced by images; of control, the kinds that need no network."""
    if isinstance(value, str):
        return uploaded(value, name, limits)
    if isinstance(value, Mapping) and controls:
        for kind in value:
            if kind in KINDS and KINDS[kind].model:
                raise LdmError(f"control {kind}: a network makes it, which is not run here; give the condition image")
            if not isinstance(value[kind], str):
                raise LdmError(f"control {kind}: an image in base64 is needed")
        return {kind: uploaded(image, f"control {kind}", limits) for kind, image in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) > limits.images:
            raise LdmError(f"{name}: {len(value)} images; this server takes at most {limits.images}")
        return [one if isinstance(one, (int, float)) else _uploads(controls, one, name, limits) for one in value]
    raise LdmError(f"{name}: an image in base64 is needed, not a JSON {type(value).__name__}")


def uploaded(text: str, name: str, limits: Limits) -> Image.Image:
    """An uploaded image, upright and without its metadata.

    Raises:
        LdmError: it is no image of an allowed format, is too large, or is damaged.
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
    if width * height > limits.upload:
        raise LdmError(f"{name} has {width}×{height} pixels; this server reads at most {limits.upload:,}")
    with DECODING:
        image, notes = load_noted(io.BytesIO(data), name, colours="mask" not in name)
    if ANIMATED in notes:
        log.warning("%s: %s", name, ANIMATED)
    return image
