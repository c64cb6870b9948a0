"""What a PNG says of how it was made: our own JSON, and the text that AUTOMATIC1111's programs write and read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldm.errors import LdmError

SAMPLERS = {  # AUTOMATIC1111's name -> ours
    "DDIM": "ddim", "PLMS": "pndm", "LMS": "lms", "Euler": "euler", "Euler a": "euler-a", "Heun": "heun",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2-a", "DPM++ 2M": "dpm++2m", "DPM++ 2M SDE": "dpm++2m-sde", "DPM++ 3M SDE": "dpm++3m-sde",
    "DPM++ SDE": "dpm++sde", "UniPC": "unipc", "DEIS": "deis", "LCM": "lcm", "TCD": "tcd",
    "DDPM": "ddpm",
}  # fmt: skip
SPACINGS = {"Karras": "karras", "Exponential": "exponential", "Beta": "beta", "Align Your Steps": "ays"}
USUAL = ("", "Automatic", "Uniform")  # types of schedule that mean the sampler's own
_PAIR = re.compile(r'\s*([\w /]{1,99}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def to_parameters(settings: Mapping[str, Any]) -> str:
    """Settings as the text of AUTOMATIC1111: prompt, negative prompt, and a line of the rest."""
    samplers = {ours: theirs for theirs, ours in SAMPLERS.items()}
    spacing = {ours: theirs for theirs, ours in SPACINGS.items()}.get(settings["spacing"])
    pairs = {
        "Steps": settings["steps"],
        "Sampler": samplers.get(settings["scheduler"], settings["scheduler"]),
        "Schedule type": spacing,
        "CFG scale": settings["guidance"]["scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings.get("model_hash"),
        "Model": settings.get("model"),
        "Denoising strength": settings.get("hires_strength", settings.get("strength")),
        "Clip skip": settings["clip_skip"] + 1 if settings["clip_skip"] else None,
        "Hires upscale": settings.get("hires"),
        "Version": settings.get("version"),
    }
    lines = [settings["prompt"]]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def from_parameters(text: str) -> dict[str, Any]:
    """Settings from the text of AUTOMATIC1111, as far as they have a meaning here.

    Raises:
        LdmError: it is no such text, or names a sampler or a schedule type that does not exist here.
    """
    lines = text.strip().split("\n")
    pairs = dict(_PAIR.findall(lines[-1])) if lines else {}
    if "Steps" not in pairs:
        raise LdmError("the image's text does not say how it was made: it has no line with Steps")
    prompt: list[str] = []
    negative: list[str] = []
    current = prompt
    for line in lines[:-1]:
        if line.startswith("Negative prompt:"):
            current, line = negative, line.removeprefix("Negative prompt:").strip()
        current.append(line)
    settings: dict[str, Any] = {"prompt": "\n".join(prompt), "negative": "\n".join(negative) or None}
    try:
        settings["steps"] = int(pairs["Steps"])
        sampler, spacing = pairs.get("Sampler", ""), pairs.get("Schedule type", "")
        for name in SPACINGS:  # older versions put it behind the sampler
            if sampler.endswith(f" {name}"):
                sampler, spacing = sampler.removesuffix(f" {name}"), name
        if sampler and sampler not in SAMPLERS:
            raise LdmError(f"the image was made with sampler {sampler!r}, which does not exist here")
        settings["scheduler"] = SAMPLERS.get(sampler)
        if spacing not in (*SPACINGS, *USUAL):
            raise LdmError(f"the image was made with schedule type {spacing!r}, which does not exist here")
        settings["spacing"] = SPACINGS.get(spacing, "default")
        if "CFG scale" in pairs:
            settings["guidance"] = float(pairs["CFG scale"])
        if "Seed" in pairs:
            settings["seed"] = int(pairs["Seed"])
        if "Size" in pairs:
            settings["width"], settings["height"] = map(int, pairs["Size"].split("x"))
        if "Hires upscale" in pairs:
            settings["hires"] = float(pairs["Hires upscale"])
        if "Denoising strength" in pairs:
            settings["hires_strength" if "hires" in settings else "strength"] = float(pairs["Denoising strength"])
        if "Clip skip" in pairs:
            settings["clip_skip"] = max(0, int(pairs["Clip skip"]) - 1)
    except LdmError:
        raise
    except ValueError as error:
        raise LdmError(f"the image's text is damaged: {error}") from None
    return settings
