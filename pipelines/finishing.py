"""Finishing: all that happens to an image between its decoding and its file, the same for every way to make images.

A safety checker looks at each finished image; one that it flags is blurred, or refused. Then the image gets its
watermark. Its file is written by `encoded`, with the image's record, and signed if there is a signer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from PIL import Image, ImageFilter

from ldm.errors import LdmError
from ldm.images import lossy_bytes, png_bytes
from ldm.signing import ManifestSigner
from ldm.watermark import SMALLEST_ELSEWHERE, fits, with_watermark
from ldm.weights.safety_checker import SafetyChecker, load_safety_checker
from pipelines.a1111 import to_parameters
from pipelines.settings import LOADING, find

log = logging.getLogger(__name__)
T = TypeVar("T")
OPTIONS = ("watermark", "safety", "safety_action", "c2pa")  # of loading, which are those of `Finishing`
PASSED, BLURRED, REFUSED = "passed", "blurred", "refused"  # what a record says, and what becomes of a flagged image
_BLUR = 12  # the longer side of an image, in radii of the blur


class FlaggedError(LdmError):
    """Raised if images were refused, after the others of their call are made."""

    def __init__(self, seeds: Sequence[int]) -> None:
        many = f"{len(seeds)} images, of seeds" if len(seeds) > 1 else "the image of seed"
        super().__init__(f"the safety checker flagged {many} {', '.join(map(str, seeds))}: refused")
        self.seeds = tuple(seeds)


def in_turn(parts: Iterable[Iterable[T]]) -> Iterator[T]:
    """What the parts of a list of images give, one after the other.

    Raises:
        FlaggedError: images of some were refused, after all parts are made.
    """
    refused: list[int] = []
    for part in parts:
        try:
            yield from part
        except FlaggedError as error:
            refused += error.seeds
    if refused:
        raise FlaggedError(refused)


class Finishing:
    """What a pipeline does with its finished images."""

    def __init__(
        self,
        watermark: bool | None = None,
        safety: Any = None,
        safety_action: str | None = None,
        c2pa: ManifestSigner | tuple[str | PathLike[str], str | PathLike[str]] | None = None,
        device: torch.device | str = "cpu",
        allow_pickle: bool = False,
    ) -> None:
        """Load what is needed.

        Args:
            watermark: whether images get SDXL's watermark.
            safety: a safety checker, or its folder or Hub name.
            safety_action: "blur" or "refuse", for flagged images.
            c2pa: the signer of images' files, or the files of its certificate chain and private key.
            device: of the safety checker.
            allow_pickle: whether its weights may be a pickle.

        Raises:
            LdmError: a package or a file is missing, or is not what it should be.
        """
        if safety_action is not None and safety is None:
            raise LdmError("safety_action without a safety checker: name one (safety=, --safety)")
        self.watermark, self.refuses = bool(watermark), safety_action == "refuse"
        self.signer = ManifestSigner(*c2pa) if isinstance(c2pa, tuple) else c2pa
        self.checker: SafetyChecker | None = None
        if isinstance(safety, SafetyChecker):
            self.checker = safety
        elif safety is not None:
            self.checker = load_safety_checker(safety, device, allow_pickle=allow_pickle)

    def check(self, width: int, height: int) -> None:
        """Raise if images of a size cannot have the watermark; log if other programs do not read it there.

        Raises:
            LdmError: they are too small.
        """
        if not self.watermark:
            return
        if not fits(width, height):
            raise LdmError(f"watermark: images of {width}×{height} pixels have no room for it; at least 64×64 have")
        if width * height < SMALLEST_ELSEWHERE:
            log.warning(
                "watermark: `ldm info` reads it in images of %d×%d pixels, other programs from 256×256 on",
                width,
                height,
            )

    def check_output(self, output: str) -> None:
        """Raise if the results of a call are not the images that are checked and marked.

        Raises:
            LdmError: they are latents.
        """
        if output != "images" and (self.watermark or self.checker is not None):
            raise LdmError(f"output {output!r}: they would have no watermark, and no safety checker looks at them")

    def finished(
        self, images: Sequence[Image.Image], records: Sequence[dict[str, Any]]
    ) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """Finished images and records, of images just decoded; `is_refused` tells of a record whether it is refused."""
        flags = [None] * len(images) if self.checker is None else self.checker.flagged(images)
        made = [self._finished(*one) for one in zip(images, records, flags, strict=True)]
        return [image for image, _ in made], [record for _, record in made]

    def _finished(
        self, image: Image.Image, record: dict[str, Any], flag: bool | None
    ) -> tuple[Image.Image, dict[str, Any]]:
        more: dict[str, Any] = {} if flag is None else {"safety": PASSED}
        if flag:
            more["safety"] = REFUSED if self.refuses else BLURRED
            image = blurred(image)
            if not self.refuses:
                log.warning("the safety checker flagged the image of seed %s: blurred", record.get("seed"))
        if self.watermark:
            more["watermark"] = True
        return self.marked(image), record | more

    def marked(self, image: Image.Image) -> Image.Image:
        """An image with the watermark, if images get one."""
        return with_watermark(image) if self.watermark else image

    def preview(self, image: Image.Image) -> Image.Image:
        """A preview of an image that is not finished: blurred if there is a safety checker, which has not seen it."""
        return image if self.checker is None else blurred(image)

    def encoded(
        self, image: Image.Image, record: dict[str, Any] | None = None, kind: str = "PNG", quality: int = 100
    ) -> bytes:
        """The file of an image with its record, PNG, JPEG or WEBP (PIL's names), signed if there is a signer.

        Raises:
            LdmError: it cannot be signed.
        """
        parameters = "" if record is None else to_parameters(record)
        png = kind == "PNG"
        data = png_bytes(image, record, parameters) if png else lossy_bytes(image, kind, quality, parameters)
        return data if self.signer is None else self.signer.signed(data, kind)


def finishing_of(options: dict[str, Any], device: torch.device) -> Finishing:
    """The finishing that options of loading ask for; its own are taken out of them.

    Raises:
        LdmError: as `Finishing`.
    """
    rows = {name: find(name, "python", rows=LOADING) for name in OPTIONS if name in options}
    own = {name: row.check(options.pop(name)) for name, row in rows.items()}
    return Finishing(**own, device=device, allow_pickle=options.get("allow_pickle", False))


def is_refused(record: dict[str, Any]) -> bool:
    """Whether an image is refused, by its record."""
    return record.get("safety") == REFUSED


def blurred(image: Image.Image) -> Image.Image:
    """An image of which nothing but a few colours can be seen."""
    return image.filter(ImageFilter.GaussianBlur(max(max(image.size) / _BLUR, 2)))
