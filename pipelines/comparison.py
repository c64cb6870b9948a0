"""Comparisons: images of one prompt and one seed with different settings, on one sheet with labels.

found = compare("a red fox", {"steps": [10, 20], "guidance": [1, 3]}, seed=1)
found.image().save("fox.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ldm.errors import LdmError
from ldm.images import MOST_PIXELS
from ldm.sheets import labelled, layout
from ldm.watermark import with_watermark
from pipelines.axes import SHEET, cells, given_axes, sheet_labels
from pipelines.groups import Group, checked_groups, images_by_model, images_of, planned_groups
from pipelines.pipeline import Pipeline
from pipelines.settings import LOADING, at, parted, renamed


@dataclass
class Sheet:
    """The images of a sheet, by number, row after row, and for each its record; some may not be made yet."""

    columns: Sequence[str]  # labels
    rows: Sequence[str] = ()  # labels; without any there is one row
    images: dict[int, Image.Image] = field(default_factory=dict)
    settings: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of cells."""
        return len(self.columns) * max(len(self.rows), 1)

    def image(self) -> Image.Image:
        """The images with their labels, of one made image at least; with the watermark if one of them has it."""
        sheet = labelled(self.images, self.columns, self.rows)
        return with_watermark(sheet) if any(one.get("watermark") for one in self.settings.values()) else sheet

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
) -> Sheet:
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
        FlaggedError: images were refused, after all others are made.
    """
    known = given_axes(axes)
    taken = renamed(settings, "python", (*at("python").values(), *LOADING))
    loading, common = parted(taken, "python")
    if wrong := [name for name in ("n", "prompt") if name in common]:
        raise LdmError(f"{wrong[0]}: a comparison has one prompt and one image in each cell; leave it out")
    jobs = cells(known, prompt, seed, {**common, **loading})
    if pipeline is not None and (loading or any(job.loading for job in jobs)):
        raise LdmError("pipeline is a loaded model: leave it out, or the settings of loading")
    found = Sheet(*sheet_labels(known))
    left = {job.index for job in jobs}
    if pipeline is None:
        check_sheet(found, [group for _, groups in planned_groups(jobs, common, loading) for group in groups])
        made = images_by_model(lambda own: Pipeline(**own), common, loading, jobs, left)
    else:
        check_sheet(found, list(checked_groups(pipeline, common, jobs)))
        made = images_of(pipeline, common, jobs, left)
    for job, image, record in made:
        found.images[job.index], found.settings[job.index] = image, record
    return found


def check_sheet(sheet: Sheet, groups: Sequence[Group]) -> None:
    """Raise if the sheet of these cells would have more pixels than an image that is read.

    Raises:
        LdmError: it would, or as `layout`.
    """
    cell = (
        max(round(group.request.width * (group.request.hires or 1)) for group in groups),
        max(round(group.request.height * (group.request.hires or 1)) for group in groups),
    )
    width, height = layout(cell, sheet.columns, sheet.rows).size
    if width * height > MOST_PIXELS:
        raise LdmError(f"the sheet would have {width}×{height} pixels; at most {MOST_PIXELS:,} are read: compare fewer")


def sheet_of(record: Mapping[str, Any]) -> Sheet:
    """The sheet of a record, with the settings of its images, which are to be made again.

    Raises:
        LdmError: the record is damaged.
    """
    given = record[SHEET]
    lists: list[Any] = [given.get(name) for name in ("columns", "rows", "cells")] if isinstance(given, dict) else []
    if not lists or not all(isinstance(one, list) for one in lists):
        raise LdmError("the sheet's record is damaged")
    columns, rows, own = lists
    found = Sheet(columns, rows)
    if (
        not all(isinstance(text, str) for text in (*columns, *rows))
        or not all(cell is None or isinstance(cell, dict) for cell in own)
        or len(own) != found.count
        or own.count(None) == len(own)
    ):
        raise LdmError("the sheet's record is damaged")
    shared = {name: value for name, value in record.items() if name != SHEET}
    found.settings |= {index: {**shared, **cell} for index, cell in enumerate(own) if cell is not None}
    return found
