"""The table of the kinds of condition images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ldm.conditions import filters, networks
from ldm.errors import LdmError, suggestion


@dataclass(frozen=True)
class ConditionKind:
    """A kind of condition images."""

    help: str
    make: Callable[..., Image.Image]  # of an image; with the name of a model, or with a mask, if it has one
    model: str = ""  # the network that makes it by default; "": none does
    mask: bool = False  # whether it needs a mask


KINDS: dict[str, ConditionKind] = {
    "image": ConditionKind("a condition image as it is", filters.same),
    "canny": ConditionKind("edges (Canny), white on black", filters.canny),
    "lineart": ConditionKind("dark lines, white on black", filters.lineart),
    "gray": ConditionKind("the image without colours", filters.gray),
    "blur": ConditionKind("the image under a Gaussian blur", filters.blur),
    "tile": ConditionKind("the image without its details", filters.tile),
    "inpaint": ConditionKind("the image, black where a mask is white", filters.hidden, mask=True),
    "depth": ConditionKind("a depth map, near is bright", networks.depth, networks.DEPTH),
    "normal": ConditionKind("the normals of the depth map", networks.normal, networks.DEPTH),
    "pose": ConditionKind("OpenPose's skeletons of people", networks.pose, networks.POSE),
    "seg": ConditionKind("segments in ADE20K's colours", networks.seg, networks.SEGMENTS),
}


def condition(
    kind: str, image: Image.Image, *, model: str | None = None, mask: Image.Image | None = None
) -> Image.Image:
    """The condition image of an image (RGB), of the same size.

    Args:
        kind: a name of `KINDS`.
        image: the image that it is made of.
        model: the Hub name or folder of the network that makes it, in place of the kind's own.
        mask: the mask of the kind inpaint.

    Raises:
        LdmError: the kind is not known, its model cannot be opened, or it takes no model or mask.
    """
    if kind not in KINDS:
        raise LdmError(f"the kind {kind!r} of condition images is not known; {suggestion(kind, list(KINDS))}")
    found = KINDS[kind]
    if model and not found.model:
        raise LdmError(f"{kind} {model!r}: this kind of condition images needs no model; leave it out")
    if found.mask != (mask is not None):
        needed = "a mask is needed (mask=, --mask)" if found.mask else "this kind takes no mask; leave it out"
        raise LdmError(f"{kind}: {needed}")
    if found.mask:
        return found.make(image, mask)
    return found.make(image, model or found.model) if found.model else found.make(image)
