"""The values of the setting `control`: condition images, each with its kind.

A kind (`ldm.conditions.table.KINDS`) says how the condition image is made of the given one; `image` is a condition
image as it is, and `inpaint` hides the masked part of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.conditions.table import KINDS, MASKED, condition
from ldm.errors import LdmError, suggestion
from ldm.files import file_digest
from ldm.images import load_image

READY = "image"  # the kind of condition images that are taken as they are
EACH = ("control_scale", "control_fall", "control_begin", "control_end")  # settings with a value for each image


@dataclass(frozen=True)
class ControlImage:
    """A condition image, or the image that it is made of."""

    kind: str
    source: Any  # a path, or an image of PIL
    sha256: str = ""  # of the file
    made: dict[tuple[int, int], Image.Image] = field(default_factory=dict, compare=False)  # by width and height

    @cached_property
    def given(self) -> Image.Image:
        """The given image, in RGB."""
        return load_image(self.source)

    def at(self, width: int, height: int) -> Image.Image:
        """The condition image, made of the given one at that size; of the kind inpaint, before its part is hidden.

        Raises:
            LdmError: the network that makes it cannot be opened.
        """
        image = self.given
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if self.kind == MASKED:
            return image
        if (width, height) not in self.made:
            self.made[width, height] = condition(self.kind, image)
        return self.made[width, height]

    def closed(self) -> ControlImage:
        """The same image, of which nothing is in memory if it is a file."""
        return replace(self, made={})

    @property
    def record(self) -> dict[str, str]:
        """Its part of a record: the kind and, of a file, path and SHA-256."""
        return {"kind": self.kind, **({"path": str(self.source), "sha256": self.sha256} if self.sha256 else {})}


def control_images(value: Any) -> tuple[ControlImage, ...]:
    """The condition images of a value of the setting `control`, all of them found.

    Raises:
        LdmError: a kind is not known, or a file cannot be read or is not that of the record.
    """
    if value is None:
        return ()
    if isinstance(value, (tuple, list)):
        return tuple(one for part in value for one in control_images(part))
    if isinstance(value, Mapping) and "kind" in value:  # as in a record
        if "path" not in value:
            raise LdmError(
                f"control {value['kind']}: the image was made with a condition image that its record does not name; "
                "name it (control=, --control)"
            )
        return (_control_image(value["kind"], value["path"], value.get("sha256", "")),)
    if isinstance(value, Mapping):
        return tuple(_control_image(kind, image, "") for kind, image in value.items())
    if isinstance(value, str):
        kind, equals, path = value.partition("=")
        return (_control_image(kind, path, "") if equals else _control_image(READY, value, ""),)
    return (_control_image(READY, value, ""),)


def _control_image(kind: str, image: Any, sha256: str) -> ControlImage:
    if kind not in (*KINDS, MASKED):
        near = suggestion(kind, [*KINDS, MASKED])
        raise LdmError(f"control: the kind {kind!r} of condition images does not exist; {near}")
    if not isinstance(image, (str, PathLike)):
        return ControlImage(kind, load_image(image))
    path = Path(fspath(image))
    found = ControlImage(kind, path, file_digest(path, plain=True) if path.is_file() else "")
    load_image(path)
    if sha256 and found.sha256 != sha256:
        raise LdmError(f"the condition image {path} has changed since the image was made; name it (--control)")
    return found
