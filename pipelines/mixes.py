"""Mixes of adapters: adapters and their weights in a setting, a prompt, a record and AUTOMATIC1111's text.

A prompt names an adapter as AUTOMATIC1111's programs do: `<lora:name>`, `<lora:name:weight>`, `<lora:name:text:unet>`
with a weight for the text encoders and one for the U-Net, or these by name, `<lora:name:te=0.5:unet=0.8>`. The option
of the command line has the same parts behind a file. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import LdmError

if TYPE_CHECKING:
    from ldm.families import FewStep
    from ldm.weights.adapters import Adapter

LARGEST = 1000  # weight: far above meaningful ones, far below an overflow
TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")
PARTS = {"te": "text", "text": "text", "unet": "unet"}  # names of weights
_ABOUT = {"path": str, "sha256": str, "autov3": str, "by_name": bool}  # fields beside weights in records -> type
_UNSAFE = str.maketrans("", "", ":,")  # what names in the list of hashes do not have


@dataclass(frozen=True)
class Wanted:
    """An adapter that a setting or a prompt asks for."""

    name: str  # its name, or the path of its file
    by_name: bool = field(default=False, kw_only=True)  # asked for by a prompt, which does not open paths
    unet: float = 1.0  # its weight in the U-Net
    text: float = 1.0  # its weight in the text encoders
    place: str = ""  # where it is asked for, for errors
    path: str = ""  # of its file, in a record
    sha256: str = ""  # of its file, in a record
    autov3: str = ""  # the first digits of AUTOMATIC1111's hash of its file


@dataclass(frozen=True)
class MixedAdapter:
    """An adapter in a mix, with its weights."""

    name: str
    file: Path
    sha256: str  # of the file
    autov3: str  # the first twelve digits of AUTOMATIC1111's hash of the file
    unet: float
    text: float
    adapter: Adapter = field(compare=False, repr=False)
    few: FewStep | None = field(default=None, compare=False)  # settings that it was made for


Mix = tuple[MixedAdapter, ...]


def few_step(mixes: Sequence[Mix]) -> FewStep | None:
    """The settings that an adapter of all mixes was made for, if it was made for few steps."""
    found = {next((share.few for share in mix if share.few and share.unet), None) for mix in mixes}
    return found.pop() if len(found) == 1 else None


# --- values of the setting --------------------------------------------------------------------------------------------


def parse_mix(text: str) -> tuple[tuple[str, Any], ...]:
    """The value that FILE, FILE:WEIGHT, FILE:TEXT:UNET or FILE:unet=WEIGHT:text=WEIGHT stands for.

    Raises:
        ValueError: a weight is no number, or there is no file.
    """
    name, *weights = text.split(":")
    if len(name) == 1 and weights and weights[0][:1] in ("\\", "/"):  # a drive of Windows
        name, weights = f"{name}:{weights[0]}", weights[1:]
    found = _weighted(name, weights)
    same = found.unet == found.text
    return ((name, found.unet if same else {"unet": found.unet, "text": found.text}),)


def joined_mixes(values: list[Any]) -> Any:
    """The mix of several such values."""
    return tuple(entry for value in values for entry in value)


def are_mixes(value: Any) -> bool:
    """Whether a value is a mix, or a list with one for each prompt."""
    try:
        for one in value if _one_for_each(value) else (value,):
            list(_entries(one))
    except ValueError:
        return False
    return True


def wanted(value: Any, count: int) -> list[tuple[Wanted, ...]]:
    """The adapters that a value of the setting asks for, for each of `count` prompts.

    Raises:
        LdmError: there is a mix for each prompt, but for another number of prompts.
    """
    if not _one_for_each(value):
        return [summed(_entries(value))] * count
    if len(value) != count:
        raise LdmError(f"adapters: {len(value)} mixes for {count} prompts; give one mix, or one for each prompt")
    return [summed(_entries(one)) for one in value]


def summed(entries: Iterable[Wanted]) -> tuple[Wanted, ...]:
    """The same adapters, each once: weights of the same name add."""
    found: dict[str, Wanted] = {}
    for one in entries:
        before = found.get(one.name)
        found[one.name] = (
            one if before is None else replace(before, unet=before.unet + one.unet, text=before.text + one.text)
        )
    return tuple(found.values())


def _one_for_each(value: Any) -> bool:
    """Whether a value is a list with a mix for each prompt: dictionaries, or None for no adapters."""
    many = isinstance(value, (list, tuple)) and len(value) > 0
    return many and all(one is None or isinstance(one, Mapping) for one in value)


def _entries(value: Any) -> Iterator[Wanted]:
    """The adapters of a mix: a dictionary of names or files and weights, or a list of files, or of pairs with weights.

    Raises:
        ValueError: the value is something else.
    """
    if value is None:
        return
    if isinstance(value, Mapping):
        for name, weight in value.items():
            yield _entry(name, weight)
    elif isinstance(value, (str, os.PathLike)):
        yield _entry(value, 1.0)
    elif isinstance(value, (list, tuple)):
        for one in value:
            name, weight = one if isinstance(one, (list, tuple)) and len(one) == 2 else (one, 1.0)
            yield _entry(name, weight)
    else:
        raise ValueError(value)


def _entry(name: Any, weight: Any) -> Wanted:
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise ValueError(name)
    if not isinstance(weight, Mapping):
        return Wanted(str(name), _number(weight), _number(weight), f"adapter {str(name)!r}")
    about = {key: weight[key] for key in _ABOUT if key in weight}
    if not {"unet", "text"} <= weight.keys() <= {"unet", "text", *about}:
        raise ValueError(weight)
    if not all(isinstance(value, _ABOUT[key]) for key, value in about.items()):
        raise ValueError(weight)
    return Wanted(str(name), _number(weight["unet"]), _number(weight["text"]), f"adapter {str(name)!r}", **about)


def _number(value: Any) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not abs(number) <= LARGEST:
        raise ValueError(value)
    return number


# --- prompts ----------------------------------------------------------------------------------------------------------


def read_tags(prompt: str) -> tuple[str, tuple[Wanted, ...]]:
    """A prompt without its `<lora:…>`, and the adapters that they ask for.

    Raises:
        LdmError: a weight is no number, or a part has no meaning here.
    """
    found = []
    for match in TAG.finditer(prompt):
        name, *weights = match[1].split(":")
        try:
            found.append(replace(_weighted(name.strip(), weights), place=match[0], by_name=True))
        except ValueError:
            raise LdmError(
                f"{match[0]} in a prompt: write <lora:NAME:WEIGHT>, or <lora:NAME:te=WEIGHT:unet=WEIGHT>, with numbers "
                f"from -{LARGEST} to {LARGEST}"
            ) from None
    return (TAG.sub("", prompt), tuple(found)) if found else (prompt, ())


def _weighted(name: str, weights: Sequence[str]) -> Wanted:
    """An adapter with weights as texts: none, one for both, or the text encoders' and the U-Net's, or by name.

    Raises:
        ValueError: there is no name, or a weight has no meaning.
    """
    named = dict(part.split("=", 1) for part in weights if "=" in part)
    plain = [float(part) for part in weights if "=" not in part]
    if not name or len(plain) > 2 or len(named) + len(plain) < len(weights) or not named.keys() <= PARTS.keys():
        raise ValueError(name)
    found = {PARTS[part]: float(weight) for part, weight in named.items()}
    if len(found) < len(named):
        raise ValueError(name)
    text = found.get("text", plain[0] if plain else 1.0)
    unet = found.get("unet", plain[1] if len(plain) == 2 else text)
    return Wanted(name, _number(unet), _number(text))


# --- records ----------------------------------------------------------------------------------------------------------


def recorded(mix: Mix) -> dict[str, Any]:
    """The record of a mix, from which it can be made again: its adapters by name."""
    names = [share.name for share in mix]
    return {
        share.name if names.count(share.name) == 1 else str(share.file): {
            "path": str(share.file.absolute()),
            "sha256": share.sha256,
            "autov3": share.autov3,
            "unet": share.unet,
            "text": share.text,
        }
        for share in mix
    }


def to_tags(record: Mapping[str, Any]) -> str:
    """The adapters of such a record as a prompt names them."""
    tags = []
    for name, own in record.items():
        text, unet = (f"{own[part]:.10g}" for part in ("text", "unet"))
        tags.append(f"<lora:{name}:{text}>" if text == unet else f"<lora:{name}:{text}:{unet}>")
    return "".join(tags)


def to_hashes(record: Mapping[str, Any]) -> str:
    """The list of hashes that AUTOMATIC1111 writes: `name: hash, name: hash`."""
    return ", ".join(f"{name.translate(_UNSAFE)}: {own['autov3']}" for name, own in record.items() if own["autov3"])


def from_tags(prompt: str, hashes: str) -> tuple[str, dict[str, Any], set[str]]:
    """A prompt of AUTOMATIC1111's text without its `<lora:…>`, and their record, with the hashes of such a list; and
    the names in the list that the prompt does not have.

    Raises:
        LdmError: as `read_tags`.
    """
    pairs = (part.partition(":") for part in hashes.split(","))
    known = {name.strip(): digest.strip() for name, _, digest in pairs if name.strip()}
    prompt, tags = read_tags(prompt)
    found = {one.name.translate(_UNSAFE): one for one in summed(tags)}
    record = {
        one.name: {"unet": one.unet, "text": one.text, "autov3": known.get(name, ""), "by_name": True}
        for name, one in found.items()
    }
    return prompt, record, known.keys() - found.keys()
