"""Comparisons: images of one prompt and one seed with different settings, on one sheet with labels.

found = compare("a red fox", {"steps": [10, 20], "guidance": [1, 3]}, seed=1)
found.sheet().save("fox.png")
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ldm.errors import LdmError
from ldm.images import MOST_PIXELS
from ldm.sheets import labelled, sheet_size
from pipelines.axes import cells, given_axes, sheet_labels
from pipelines.groups import Group, checked_groups, images_of
from pipelines.jobs import Job, by_loading
from pipelines.pipeline import Pipeline
from pipelines.planned import planned
from pipelines.provenance import provenance
from pipelines.settings import LOADING, at, checked, renamed

SHEET = "xy"  # the key of a sheet's record that holds its labels and cells


@dataclass
class Comparison:
    """The images of a sheet, by number, row after row, and for each its record; some may not be made yet."""

    columns: Sequence[str]  # labels
    rows: Sequence[str] = ()  # labels; without any there is one row
    images: dict[int, Image.Image] = field(default_factory=dict)
    settings: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of cells."""
        return len(self.columns) * max(len(self.rows), 1)

    def sheet(self) -> Image.Image:
        """The sheet with its labels, of one made image at least."""
        return labelled(self.images, self.columns, self.rows)

    def record(self) -> dict[str, Any]:
        """The record of the sheet: what the records of all images share, and under `xy` what each has of its own."""
        first, *others = self.settings.values()
        same = {
            name: value
            for name, value in first.items()
            if all(name in other and other[name] == value for other in others)
        }
        own = [
            {name: value for name, value in self.settings[index].items() if name not in same}
            if index in self.settings
            else None
            for index in range(self.count)
        ]
        return {SHEET: {"columns": list(self.columns), "rows": list(self.rows), "cells": own}, **same}


def compare(
    prompt: str | None,
    axes: Mapping[str, Sequence[Any]],
    *,
    pipeline: Pipeline | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Comparison:
    """Images of a prompt for all combinations of one setting's values and another's.

    Args:
        prompt: of all cells; None if an axis has prompts.
        axes: the setting of the columns with its values, then perhaps that of the rows: settings of a call, of loading
            a model, `replace` or `lora_weight` (see `pipelines.axes`).
        pipeline: a loaded model; by default `settings` say which to load, one after the other if they are an axis.
        seed: of all cells; by default a random one.
        **settings: of all cells, as for `Pipeline` and its calls.

    Raises:
        LdmError: an axis or a setting is wrong; found in all cells before the first image is made.
    """
    known = given_axes(axes)
    taken = renamed(settings, "python", (*at("python").values(), *LOADING))
    loading = {name: value for name, value in taken.items() if name in at("python", LOADING) and value is not None}
    common = checked({name: value for name, value in taken.items() if name not in loading}, "python")
    if wrong := [name for name in ("n", "prompt") if name in common]:
        raise LdmError(f"{wrong[0]}: a comparison has one prompt and one image in each cell; leave it out")
    jobs = cells(known, prompt, secrets.randbelow(2**32) if seed is None else seed, common)
    if pipeline is not None and (loading or any(job.loading for job in jobs)):
        raise LdmError("pipeline is a loaded model: leave it out, or the settings of loading")
    found = Comparison(*sheet_labels(known))
    if len(parts := by_loading(jobs)) > 1:
        for part in parts:
            list(checked_groups(planned({**loading, **dict(part[0].loading)})[1], common, part))
    for part in parts:
        _make(found, part, common, {**loading, **dict(part[0].loading)}, pipeline)
    return found


def _make(
    found: Comparison, jobs: list[Job], common: dict[str, Any], loading: dict[str, Any], pipeline: Pipeline | None
) -> None:
    """Make the images of one model."""
    used = pipeline or Pipeline(**loading)
    groups = list(checked_groups(used, common, jobs))
    check_sheet(groups, found)
    about = {} if pipeline else provenance(loading, used)
    for job, image, record in images_of(used, groups, {job.index for job in jobs}):
        found.images[job.index], found.settings[job.index] = image, {**record, **about}


def check_sheet(groups: Sequence[Group], comparison: Comparison) -> None:
    """Raise if the sheet of these cells has more pixels than an image that is read.

    Raises:
        LdmError: it has.
    """
    width, height = (
        max(round(getattr(group.request, side) * (group.request.hires or 1)) for group in groups)
        for side in ("width", "height")
    )
    size = sheet_size((width, height), len(comparison.columns), max(len(comparison.rows), 1))
    if size[0] * size[1] > MOST_PIXELS:
        raise LdmError(
            f"the sheet would have {size[0]}×{size[1]} pixels; at most {MOST_PIXELS:,} are read: compare fewer"
        )


def records_of(record: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a sheet's images with their numbers.

    Raises:
        LdmError: the sheet's record is damaged.
    """
    _labels(record)
    for index, own in enumerate(record[SHEET]["cells"]):
        if own is not None:
            yield index, {name: value for name, value in {**record, **own}.items() if name != SHEET}


def comparison_of(record: Mapping[str, Any]) -> Comparison:
    """The sheet of a record, without images.

    Raises:
        LdmError: the record is damaged.
    """
    return Comparison(*_labels(record))


def _labels(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    sheet = record[SHEET]
    whole = isinstance(sheet, dict) and all(isinstance(sheet.get(key), list) for key in ("columns", "rows", "cells"))
    texts = [*sheet["columns"], *sheet["rows"]] if whole else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise LdmError("the sheet's record is damaged")
    if len(sheet["cells"]) != len(sheet["columns"]) * max(len(sheet["rows"]), 1) or not all(
        own is None or isinstance(own, dict) for own in sheet["cells"]
    ):
        raise LdmError("the sheet's record is damaged")
    return sheet["columns"], sheet["rows"]
