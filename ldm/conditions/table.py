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
    make: Callable[..., Image.Image]  # of an image; with the name of a model, if it has one
    model: str = ""  # the network that makes it by default; "": none does
    opencv: bool = False  # whether OpenCV makes it


KINDS: dict[str, ConditionKind] = {
    "image": ConditionKind("a condition image as it is", filters.same),
    "canny": ConditionKind("edges (Canny), white on black", filters.canny, opencv=True),
    "lineart": ConditionKind("dark lines, white on black", filters.lineart, opencv=True),
    "gray": ConditionKind("the image without colours", filters.gray),
    "blur": ConditionKind("the image under a Gaussian blur", filters.blur),
    "tile": ConditionKind("the image without its details", filters.tile),
    "depth": ConditionKind("a depth map, near is bright", networks.depth, networks.DEPTH),
    "normal": ConditionKind("the normals of the depth map", networks.normal, networks.DEPTH),
    "pose": ConditionKind("OpenPose's skeletons of people", networks.pose, networks.POSE),
    "seg": ConditionKind("segments in ADE20K's colours", networks.seg, networks.SEGMENTS),
}


MASKED = "inpaint"  # the kind of control that no image holds: -1 where a mask is white


def check_kind(kind: str) -> None:
    """Raise unless what makes condition images of a kind is here: OpenCV, or its network, which may be on the Hub.

    Raises:
        LdmError: it is not.
    """
    found = KINDS.get(kind)
    if found and found.opencv:
        filters.opencv()
    if found and found.model:
        networks.check_network(found.model)


def condition(kind: str, image: Image.Image, *, model: str | None = None) -> Image.Image:
    """The condition image of an image (RGB), of the same size.

    Args:
        kind: a name of `KINDS`.
        image: the image that it is made of.
        model: the Hub name or folder of the network that makes it, in place of the kind's own.

    Raises:
        LdmError: the kind is not known, its model cannot be opened, or it takes no model.
    """
    if kind == MASKED:
        raise LdmError(
            f"{MASKED}: no image file holds what ControlNets read where the mask is white, -1; give the image itself "
            f"in the call (--control {MASKED}=FILE --mask FILE)"
        )
    if kind not in KINDS:
        raise LdmError(f"the kind {kind!r} of condition images is not known; {suggestion(kind, list(KINDS))}")
    found = KINDS[kind]
    if model and not found.model:
        raise LdmError(f"{kind} {model!r}: this kind of condition images needs no model; leave it out")
    return found.make(image, model or found.model) if found.model else found.make(image)
