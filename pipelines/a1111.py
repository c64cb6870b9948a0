"""The text of settings that AUTOMATIC1111's programs write into PNG files and read: from and to our records."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from ldm.errors import LdmError, listing
from ldm.sampling.scheduler_names import A1111_NAMES, SAMPLERS, SPACINGS
from pipelines.axes import SHEET
from pipelines.mixes import from_tags, to_hashes, to_tags
from pipelines.settings import every_row, expanded

log = logging.getLogger(__name__)

USUAL = ("", "Automatic", "Uniform")  # schedule types that stand for the sampler's own spacing
AUTOMATIC = {  # what the schedule type Automatic means, if not Uniform
    **dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM2", "DPM2 a"), "karras"),
    **dict.fromkeys(("DPM++ 2M SDE", "DPM++ 3M SDE"), "exponential"),
}
ADAPTERS = "Lora hashes"  # the key of adapters, whose names and weights are in the prompt
EMBEDDINGS = "TI hashes"  # the key of textual inversion: names and the first 12 digits of the files' SHA-256
ABOUT = {"Model", "Model hash", "Version", "User", EMBEDDINGS}  # keys that are no settings
SPACING_NAMES = {"Simple": "trailing", "SGM Uniform": "trailing", "Normal": "linspace", **SPACINGS}
# a key, and a value in quotation marks, a value in JSON, or one that ends at a comma
_PAIR = re.compile(r"""\s*([\w /-]{1,99}):\s*("(?:\\.|[^\\"])*"|\{[^{}]{0,9999}\}|\[\{.{0,9999}?\}\]|[^,]*)(?:,|$)""")


def to_parameters(record: Mapping[str, Any]) -> str:
    """An image's record as the text of AUTOMATIC1111: prompt, negative prompt, a line of the rest; a sheet has none."""
    if SHEET in record:
        return ""
    found = expanded(record)
    found["size"] = f"{found['width']}x{found['height']}"
    found["scheduler"] = A1111_NAMES.get(found["scheduler"], found["scheduler"])
    uniform = "Uniform" if found["scheduler"] in AUTOMATIC and found["spacing"] == "default" else None
    found["spacing"] = {ours: theirs for theirs, ours in SPACING_NAMES.items()}.get(found["spacing"], uniform)
    found["clip_skip"] = found["clip_skip"] + 1 if found["clip_skip"] else None
    mix = found.get("adapters") or {}
    found["adapters"] = to_hashes(mix) or None
    pairs: dict[str, Any] = {}
    for row in every_row():
        if row.a1111 and row.name != "negative" and found.get(row.name) is not None:
            pairs[row.a1111] = found[row.name]
        if row.name == "size":
            pairs |= {"Model hash": found.get("model_hash"), "Model": found.get("model")}
    if "embeddings" in found:
        hashes = [f"{listed(one['name'])}: {one['sha256'][:12]}" for one in found["embeddings"]]
        pairs[EMBEDDINGS] = ", ".join(hashes)
    pairs["Version"] = found.get("version")
    lines = [found["prompt"] + to_tags(mix)]
    if found.get("negative"):
        lines.append(f"Negative prompt: {found['negative']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def from_parameters(text: str) -> dict[str, Any]:
    """Settings from the text of AUTOMATIC1111, as far as we have them; a warning names the others.

    Raises:
        LdmError: the text is of another kind, or names a sampler or a schedule type that we do not have.
    """
    prompt, negative, pairs, rest = _parts(text)
    if "Steps" not in pairs:
        raise LdmError("the image's text does not say how it was made: it has no line with Steps")
    if rest:
        log.warning("the image's text goes on after its settings, which ldm does not read: %.60s", rest[0])
    hashes = pairs.get(ADAPTERS, "")
    text, mix, unnamed = from_tags(prompt, hashes)
    known = ABOUT | {row.a1111 for row in every_row()} - ({ADAPTERS} if unnamed else set())
    unknown = [name for name in pairs if name not in known]
    if unknown:
        log.warning("settings in the image's text that ldm does not read; it may differ: %s", listing(unknown, 8))
    texts = {row.name: pairs[row.a1111] for row in every_row() if row.a1111 in pairs and row.a1111 != ADAPTERS}
    texts.pop("strength" if "hires" in texts else "hires_strength", None)  # both have the same key
    scheduler, spacing = _sampler(texts.pop("scheduler", ""), texts.pop("spacing", ""))
    settings: dict[str, Any] = {
        "prompt": text, "negative": negative or None, "scheduler": scheduler,
        "spacing": spacing,
    }  # fmt: skip
    try:
        settings |= {row.name: row.kind.parse(texts[row.name]) for row in every_row() if row.name in texts}
    except ValueError as error:
        raise LdmError(f"the image's text is damaged: {error}") from None
    settings |= {"adapters": mix} if mix else {}
    if "size" in settings:
        settings["width"], settings["height"] = settings.pop("size")
    if "clip_skip" in settings:
        settings["clip_skip"] = max(0, settings["clip_skip"] - 1)
    return settings


def fields_of(text: str) -> dict[str, str]:
    """The fields of the text of AUTOMATIC1111 as its API gives them: prompts, and what the line of settings has."""
    prompt, negative, pairs, _ = _parts(text)
    found = {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **pairs}
    width, times, height = found.get("Size", "").partition("x")
    return found | ({"Size-1": width, "Size-2": height} if times else {})


def embeddings_of(text: str) -> dict[str, str]:
    """The embeddings of textual inversion in the text of AUTOMATIC1111: the start of the SHA-256 of each, by name."""
    _, _, pairs, _ = _parts(text)
    stated = pairs.get(EMBEDDINGS, "")
    return dict(re.findall(r"\s*([^:,]+):\s*([0-9a-f]+)", stated))


def listed(name: str) -> str:
    """The name of an embedding in that text."""
    return re.sub("[:,]", "", name)


def _parts(text: str) -> tuple[str, str, dict[str, str], list[str]]:
    """The prompt, the negative prompt, the keys and values of the line of settings, and the lines after it.

    The line of settings is the last that begins with Steps, or the last of all.
    """
    lines = text.strip().split("\n")
    at = max((number for number, line in enumerate(lines) if line.startswith("Steps:")), default=len(lines) - 1)
    prompt: list[str] = []
    negative: list[str] = []
    current = prompt
    for line in lines[:at]:
        if line.startswith("Negative prompt:"):
            current, line = negative, line.removeprefix("Negative prompt:").strip()
        current.append(line)
    pairs = {name: _unquoted(value) for name, value in _PAIR.findall(lines[at])}
    return "\n".join(prompt), "\n".join(negative), pairs, lines[at + 1 :]


def _quoted(value: Any) -> str:
    """A value as the web interface writes it: in JSON's quotes where a comma, a colon or a line break would end it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _unquoted(text: str) -> str:
    """The value of such a text."""
    try:
        return str(json.loads(text)) if text.startswith('"') else text
    except ValueError:
        return text


def _sampler(sampler: str, spacing: str) -> tuple[str | None, str]:
    """Our scheduler and spacing for A1111's sampler and schedule type.

    Raises:
        LdmError: one of them does not exist here.
    """
    for name in SPACINGS:  # older versions write the spacing after the sampler
        if sampler.endswith(f" {name}"):
            sampler, spacing = sampler.removesuffix(f" {name}"), name
    if sampler and sampler not in SAMPLERS:
        raise LdmError(f"the image was made with sampler {sampler!r}, which does not exist here")
    if spacing not in (*SPACING_NAMES, *USUAL):
        raise LdmError(f"the image was made with schedule type {spacing!r}, which does not exist here")
    automatic = AUTOMATIC.get(sampler, "default") if spacing == "Automatic" else "default"
    return SAMPLERS.get(sampler), SPACING_NAMES.get(spacing, automatic)
