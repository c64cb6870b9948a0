"""Axes of a comparison: one setting or two with several values each, whose combinations are the cells of a sheet.

A value is read by the setting's own parser. Beside the settings of a call and of loading a model there are two more:
`replace` puts other words into the place of its first in the prompts, and `lora_weight` is the weight of the adapter
that is given besides. Nothing here imports torch.
"""

from __future__ import annotations

import csv
import io
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from os import PathLike
from typing import Any

from ldm.errors import LdmError, listing
from pipelines.jobs import TEXTS, Job
from pipelines.mixes import LARGEST, wanted
from pipelines.settings import (
    LOADING,
    TEXT,
    Setting,
    at,
    checked,
    every_row,
    find,
    number,
    parsed,
    parted,
    plain,
    shown,
)

MOST = 2  # axes
SHEET = "xy"  # the key of a sheet's record that holds its labels and cells
DERIVED = (
    Setting("replace", TEXT, "Words of the prompts, and what takes their place.",
            names=("S/R", "s/r", "search_replace", "prompt_s/r")),
    Setting("lora_weight", number(-LARGEST, LARGEST), "Weight of the adapter.",
            names=("adapter_weight", "lora_strength", "strength_model")),
)  # fmt: skip
PROMPTS = ("prompt", *TEXTS)  # in which words are replaced


@dataclass(frozen=True)
class SheetAxis:
    """A setting with its values: those of a sheet's columns, or of its rows."""

    called: str  # for errors, such as "--xy steps"
    labels: tuple[str, ...]  # one for each value
    values: tuple[Mapping[str, Any], ...]  # the settings that each changes, by our names

    @property
    def names(self) -> set[str]:
        """The settings that its values change."""
        return {name for value in self.values for name in value}


# --- reading ----------------------------------------------------------------------------------------------------------


def values_of(text: str) -> list[str]:
    """The values in VALUE,VALUE,…; one with commas stands in double quotes, as in a table of CSV.

    Raises:
        LdmError: something follows a closing quote, or it is missing.
    """
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
    except csv.Error:
        raise LdmError(f'{text!r}: a value with a comma stands in double quotes, as "a fox, oil paint",cat') from None
    if len(rows) > 1:
        raise LdmError(f"{text!r}: the values stand in one line")
    return [value.strip() for value in rows[0]] if rows else [""]


def parsed_axes(texts: Sequence[str]) -> tuple[SheetAxis, ...]:
    """The axes that the command line asks for by NAME=VALUE,VALUE,…: the columns', then the rows'.

    Raises:
        LdmError: there are too many, a name is not known, or a value is wrong.
    """
    found = []
    for text in texts:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise LdmError(f"--xy {text!r}: write NAME=VALUE,VALUE, such as steps=10,20")
        called = f"--xy {name}"
        row, own = _named(name, called)
        try:
            parts = values_of(values)
        except LdmError as error:
            raise LdmError(f"{called}: {error}") from None
        if row.kind is not TEXT and "" in parts:
            raise LdmError(f"{called}={values}: a value is empty; leave out the comma beside it")
        found.append(_axis(row, called, parts, [_parsed(row, own, part, called) for part in parts]))
    return _together(found, texts)


def given_axes(given: Mapping[str, Sequence[Any]]) -> tuple[SheetAxis, ...]:
    """The axes of a call in Python: names of settings with their values, the columns' first.

    Raises:
        LdmError: as `parsed_axes`.
    """
    found = []
    for name, values in given.items():
        called = f"axes: {name}"
        row, _ = _named(name, called)
        if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence) or not values:
            raise LdmError(f"{called} {shown(values)}: a list of values is needed")
        parts = [_checked(row, name, value) for value in values]
        found.append(_axis(row, called, [_text(value) for value in values], parts))
    return _together(found, list(given))


def _named(name: str, called: str) -> tuple[Setting, str]:
    """The setting of an axis, by the name of its option or by any of its names; and which of its names that is."""
    rows, option = (*every_row(), *DERIVED), f"--{name.replace('_', '-')}"
    own = next((row.name for row in rows if row.option == option), name.replace("-", "_"))
    return find(own, "axis", called, rows), own


def _parsed(row: Setting, name: str, text: str, called: str) -> dict[str, Any]:
    """The settings that a text stands for; `name` is one of the setting's names."""
    if row in DERIVED:
        return {row.name: row.parse(text, called)}
    given = {name: [text] if row.kind.joined else text}
    loading, call = parted(parsed(given, at("shell", every_row()), {name: called}), "shell")
    return loading | call


def _checked(row: Setting, name: str, value: Any) -> dict[str, Any]:
    """The settings that a value in Python stands for."""
    if row in DERIVED or row in LOADING:
        return {row.name: row.check(value)}
    return checked({name: value}, "python")


def _axis(row: Setting, called: str, texts: Sequence[str], values: Sequence[Mapping[str, Any]]) -> SheetAxis:
    """An axis with a label for each value: texts as they are, others behind the setting's name, files without folders.

    Raises:
        LdmError: a value comes twice, or is of several prompts or seeds.
    """
    if len(set(texts)) < len(texts):
        raise LdmError(f"{called}: each value once, not {', '.join(texts)}")
    for text, value in zip(texts, values, strict=True):
        if any(isinstance(value.get(name), (tuple, range)) for name in (*PROMPTS, "seed")):
            raise LdmError(f"{called} {text}: a cell has one image, and so one value")
    name = {"source": "model", "adapters": "LoRA", "lora_weight": "LoRA weight"}.get(row.name, row.name)
    name = name.replace("_", " ")
    if row.kind is TEXT:
        labels = [text if row.name in ("prompt", "replace") else f"{name}: {text}" for text in texts]
    else:
        short = [re.sub(r"^.*[/\\]", "", text) for text in texts]
        labels = [f"{name} {text}" for text in (short if len(set(short)) == len(short) else texts)]
    return SheetAxis(called, tuple(labels), tuple(values))


def _text(value: Any) -> str:
    """A value in Python as a label."""
    value = plain(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}:{_text(part)}" for name, part in value.items())
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, (str, int, PathLike)) or value is None else shown(value)


def _together(axes: list[SheetAxis], given: Sequence[str]) -> tuple[SheetAxis, ...]:
    """The axes, if a sheet can have them.

    Raises:
        LdmError: there are too many or none, or both set the same.
    """
    if not 0 < len(axes) <= MOST:
        raise LdmError(
            f"a sheet has one setting for its columns and one for its rows; leave out {', '.join(given[MOST:])}"
            if axes else "no axis: name a setting and its values"
        )  # fmt: skip
    if len(axes) == MOST and (twice := sorted(axes[0].names & axes[1].names)):
        names = " and ".join(axis.called for axis in axes)
        raise LdmError(f"{names} both set {', '.join(twice)}; leave one out")
    return tuple(axes)


# --- cells ------------------------------------------------------------------------------------------------------------


def cells(axes: Sequence[SheetAxis], prompt: str | None, seed: int | None, base: Mapping[str, Any]) -> list[Job]:
    """The images of a sheet, row after row.

    Args:
        axes: the columns', and perhaps the rows'.
        prompt: of all cells; None if an axis has it.
        seed: of all cells; None if an axis has it, or for a random one.
        base: the checked settings of all cells and of loading their models.

    Raises:
        LdmError: there is no prompt, or an axis sets what is given already; or nothing to replace, or no adapter to
            weigh.
    """
    given = base.keys() | ({"prompt"} if prompt is not None else set()) | ({"seed"} if seed is not None else set())
    for axis in axes:
        if twice := sorted(axis.names & given):
            raise LdmError(f"{axis.called}: {listing(twice)} is given besides the axis; leave one out")
    if prompt is None and not any("prompt" in axis.names for axis in axes):
        raise LdmError("no prompt: give one, or an axis prompt=…")
    seed = secrets.randbelow(2**32) if seed is None else seed
    found: list[Job] = []
    rows: list[tuple[str, Mapping[str, Any]]] = [("", {})]
    if len(axes) == MOST:
        rows = list(zip(axes[1].labels, axes[1].values, strict=True))
    for (down, low), (across, high) in product(rows, zip(axes[0].labels, axes[0].values, strict=True)):
        own = _resolved(axes, {"prompt": prompt, **base}, {**high, **low})
        text, number = own.pop("prompt", prompt), own.pop("seed", seed)
        loading = tuple(sorted((name, own.pop(name)) for name in at("python", LOADING) if name in own))
        place = f"cell {', '.join(filter(None, (across, down)))}: "
        found.append(Job(len(found), text, number, tuple(sorted(own.items())), place, loading))
    return found


def _resolved(axes: Sequence[SheetAxis], base: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A cell's own settings, with words replaced and a weight given to the adapter."""
    found = {name: value for name, value in own.items() if name not in ("replace", "lora_weight")}
    if "replace" in own:
        axis = next(axis for axis in axes if "replace" in axis.values[0])
        word = axis.values[0]["replace"]
        texts = {name: text for name in PROMPTS if isinstance(text := found.get(name, base.get(name)), str)}
        changed = {name: text.replace(word, own["replace"]) for name, text in texts.items() if word in text}
        if not word or not changed:
            raise LdmError(f"{axis.called} {word!r}: the prompts do not have it; the first value is what is replaced")
        found |= changed
    if "lora_weight" in own:
        mix, *others = wanted(found.get("adapters", base.get("adapters", ())), 1)
        if len(mix) != 1 or others:
            raise LdmError(f"the axis lora_weight needs one adapter (--lora FILE, adapters=), and has {len(mix)}")
        found["adapters"] = ((mix[0].name, own["lora_weight"]),)
    return found


def sheet_labels(axes: Sequence[SheetAxis]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels of a sheet's columns and of its rows."""
    return axes[0].labels, axes[1].labels if len(axes) == MOST else ()
