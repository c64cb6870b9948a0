"""The table of tasks: for each, the function that makes latents and the check of a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm.families import Family
from pipelines.request import Request
from pipelines.run import SamplingRun
from pipelines.tasks.edit import check_edit, edit
from pipelines.tasks.image_to_image import check_image_to_image, image_to_image
from pipelines.tasks.inpaint import check_inpaint, inpaint
from pipelines.tasks.text_to_image import text_to_image


@dataclass(frozen=True)
class Task:
    """One row of the table."""

    latents: Callable[[SamplingRun], Tensor]  # (B, C, h, w) of the images
    check: Callable[[Request, Family], None] | None = None  # raises an LdmError unless a request fits task and model


TASKS = {
    "text-to-image": Task(text_to_image),
    "image-to-image": Task(image_to_image, check_image_to_image),
    "inpaint": Task(inpaint, check_inpaint),
    "edit": Task(edit, check_edit),
}
