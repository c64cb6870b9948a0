"""Images beside others that are read from files: each is found by the name of its image, once, before training."""

from __future__ import annotations

import logging
import posixpath
from dataclasses import dataclass, replace

import numpy as np

from ldm.data.beside import Framed
from ldm.data.framing import decoded_side, render
from ldm.data.image_set import ImageSet
from ldm.errors import LdmError, listing

log = logging.getLogger(__name__)
ALIKE = 1.02  # greatest ratio of two aspects that count as the same


@dataclass(frozen=True)
class Given:
    """Images beside others, in an image set of their own."""

    name: str  # of the kind
    images: ImageSet
    rows: np.ndarray  # (N,): the index of each image's companion

    def of(self, image: Framed) -> np.ndarray:
        """The companion in its image's frame: (H, W, C) uint8. One of another size is resized to its image's."""
        index = int(self.rows[image.index])
        example = self.images.example(index)
        frame = replace(image.frame, original=(example.width, example.height))
        try:
            found = self.images.read(index, decoded_side(frame))
        except LdmError as error:
            raise LdmError(f"{example.key}, its {self.name}: {error}") from None
        pixels = render(found, frame)
        return pixels if pixels.ndim == 3 else pixels[..., None]


def given(name: str, images: ImageSet, companions: ImageSet) -> Given:
    """The companion of each image: that of the same key, or else the only one of the same key without its suffix.

    Sizes that differ are told once, with their number.

    Raises:
        LdmError: some images have none, or several.
    """
    keys = companions.all_keys()
    exact = {key: row for row, key in enumerate(keys)}
    stems: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        stems.setdefault(posixpath.splitext(key)[0], []).append(row)
    found = [
        [exact[key]] if key in exact else stems.get(posixpath.splitext(key)[0], []) for key in images.all_keys()
    ]  # fmt: skip
    _check_one_each(name, images, companions, found)
    rows = np.array([one for (one,) in found])
    _tell_sizes(name, images, companions, rows)
    return Given(name, companions, rows)


def _check_one_each(name: str, images: ImageSet, companions: ImageSet, found: list[list[int]]) -> None:
    """Raise unless each image has one companion."""
    source, where = images.source.name, companions.source.name
    for row, some in enumerate(found):
        if len(some) > 1:
            several = listing([companions.key(index) for index in some])
            raise LdmError(
                f"{source}: {images.key(row)} has several images of its name in {where} ({several}); keep one"
            )
    bare = [row for row, some in enumerate(found) if not some]
    if bare:
        names = [images.key(row) for row in bare[:5]]
        bad = companions.skipped
        why = f"; {len(bad.reasons)} there cannot be read, see {bad.path}" if bad.reasons else ""
        raise LdmError(
            f"{source}: {len(bare)} of {len(found)} images have no {name} in {where} ({listing(names, 5, len(bare))})"
            f"{why}; add them, or take the images out"
        )


def _tell_sizes(name: str, images: ImageSet, companions: ImageSet, rows: np.ndarray) -> None:
    """Tell how many companions have another size than their image, and how many of them another aspect."""
    (widths, heights), (across, down) = images.sizes(), (lengths[rows] for lengths in companions.sizes())
    other = np.flatnonzero((widths != across) | (heights != down))
    if not len(other):
        return
    first = int(other[0])
    ratio = np.abs(np.log(widths[other] / heights[other] * down[other] / across[other]))
    bent = int((ratio > np.log(ALIKE)).sum())
    log.warning(
        "%s: %d of %d images have a %s of another size (%s has %d×%d pixels, its %s %d×%d): they are resized to their "
        "image's size%s",
        images.source.name, len(other), len(rows), name, images.key(first), widths[first], heights[first], name,
        across[first], down[first], f", {bent} of them with another aspect, which bends them" if bent else "",
    )  # fmt: skip
