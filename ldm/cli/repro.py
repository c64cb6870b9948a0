"""`ldm repro`: an image made again from its own record."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ldm.cli.common import to_dtype, to_png
from ldm.cli.record import from_parameters
from ldm.errors import LdmError, listing
from ldm.images import load_image, read_settings, save_png
from ldm.sampling.guidance import Guidance
from pipelines import Pipeline
from pipelines.pipeline import RECORDED

SETTINGS = {
    *RECORDED, "prompt", "negative", "prompt_2", "negative_2", "seed", "steps", "scheduler", "guidance", "strength",
    "hires", "hires_strength", "hires_latents", "refiner_at", "refiner_strength",
}  # fmt: skip
NAMES = {
    "version", "model", "model_hash", "source", "source_family", "variant", "refiner", "dtype", "attention", "quantize",
    "offload",
}  # fmt: skip
DESCRIPTION = {"task", "family", "image", "mask", "compile", "batch", "place"}  # the rest of a record


def run(
    file: str,
    model: str | None,
    refiner: str | None,
    image: str | None,
    mask: str | None,
    out: str | None,
    device: str | None,
    dtype: str | None,
    allow_pickle: bool,
) -> None:
    """Print the largest and the mean difference of the pixels, 0 to 255."""
    path, target = Path(file), to_png(out) if out else None
    record, parameters = read_settings(path)
    if record is None and not parameters:
        raise LdmError(f"{path} does not say how it was made")
    settings = from_parameters(parameters) if record is None else _settings(record)
    record = record or {}
    source = model or record.get("source")
    if source is None:
        raise LdmError(f"{path} does not say with which model it was made; name it (--model)")
    for name, given in (("image", image), ("mask", mask)):
        if given or name in record:
            settings[name] = given or _found(name, record[name])
    if "strength" in settings and "image" not in settings:
        raise LdmError(f"{path} was made from an image, which it does not name; name it (--image)")
    pipeline = Pipeline(
        source, refiner=refiner or record.get("refiner"), device=device, dtype=to_dtype(dtype or record.get("dtype")),
        attention=record.get("attention", "sdpa"), compile=record.get("compile") is True,
        quantize=record.get("quantize"), offload=record.get("offload", "auto"), family=record.get("source_family"),
        variant=record.get("variant"), allow_pickle=allow_pickle,
    )  # fmt: skip
    found, stated = pipeline.model.fingerprint(), record.get("model_hash")
    if stated and found != stated:
        raise LdmError(
            f"{path} was made with other weights ({stated}) than {source} has ({found}); name the right model"
        )
    batch, place = record.get("batch", 1), record.get("place", 0)
    if not isinstance(batch, int) or not isinstance(place, int) or not 0 <= place < batch:
        raise LdmError("the image's record is damaged")
    settings |= {name: [settings[name]] * batch for name in ("prompt", "seed") if name in settings}
    made = pipeline(**settings, batch=batch).images[place]  # among as many others, which numbers are rounded like
    original = load_image(path)
    if original.size != made.size:
        raise LdmError(f"{path} has {original.size} pixels, its record gives {made.size}: it was changed since")
    difference = np.abs(np.asarray(made).astype(int) - np.asarray(original).astype(int))
    if target:
        save_png(made, target, record, parameters)
    same = "identical" if not difference.any() else "different"
    print(f"{same}: largest difference {difference.max()}, mean {difference.mean():.4f} of 255")


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Pipeline.stream` in our own record."""
    unknown = sorted(record.keys() - SETTINGS - NAMES - DESCRIPTION)
    if unknown:
        raise LdmError(f"the image's record has {listing(unknown)}, which this version of ldm does not know")
    settings = {name: value for name, value in record.items() if name in SETTINGS}
    try:
        guidance = settings["guidance"]
        settings["guidance"] = Guidance(**{**guidance, "interval": tuple(guidance["interval"])})
        if not isinstance(settings["prompt"], str) or not all(
            isinstance(record[name], str) for name in NAMES & record.keys()
        ):
            raise TypeError
    except (KeyError, TypeError):
        raise LdmError("the image's record is damaged") from None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _found(name: str, record: Any) -> str:
    """The file that an image was made from, if it is still the same."""
    if not isinstance(record, dict) or not isinstance(record.get("path"), str):
        raise LdmError(f"the image's record of its {name} is damaged")
    path = Path(record["path"])
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != record.get("sha256"):
        raise LdmError(f"the {name} that it was made from, {path}, is gone or has changed; name it (--{name})")
    return str(path)
