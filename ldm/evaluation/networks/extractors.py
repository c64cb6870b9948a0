"""Networks that give features of images and texts, by name.

B images or texts, D features, C classes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.networks.clip import OpenClip, OwnPair
from ldm.evaluation.networks.copies import CopyDetector
from ldm.weights.builtin import builtin
from ldm.weights.components import check_device


class Extractor(Protocol):
    """A network and the preparation of images for it. Figures are comparable only where name, digest and preparation
    are equal.
    """

    name: str  # shown in reports
    digest: str  # SHA-256 of the weights' file, or of several files' digests
    preparation: str  # how images are resized
    gives: frozenset[str]  # its outputs, of "features", "spatial", "logits"

    def prepare(self, image: Image.Image) -> Tensor:
        """One RGB image of any size to the network's input, on the CPU."""
        ...

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """The outputs of prepared images (B, …), float32, on the CPU.

        `features` are (B, D), `spatial` (B, 2023), `logits` (B, C).
        """
        ...


class TextExtractor(Extractor, Protocol):
    """An extractor that also gives features of texts, in the space of the images' features."""

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions to (B, D), float32, on the CPU."""
        ...


def open_extractor(spec: str, device: torch.device | str = "cpu") -> Extractor:
    """Open a network by its name: `inception`, `sscd`, or a name for `open_text_extractor`.

    `inception:FILE` and `sscd:FILE` name a file, the bare words the one in the weights folder. SSCD runs on the CPU.

    Raises:
        LdmError: the name is not known, weights are missing or damaged, or the device cannot be used.
    """
    check_device(device)
    kind, _, rest = spec.partition(":")
    if kind == "clip":
        return open_text_extractor(spec, device)
    path = Path(rest) if rest else None
    if kind == "inception":
        from ldm.evaluation.networks.inception import Inception  # torch-fidelity imports torchvision

        return Inception(path, device)
    if kind == "sscd":
        return CopyDetector(path)
    raise LdmError(f"extractor {spec!r} is not known; choose inception, clip:MODEL@WEIGHTS, clip:FOLDER or sscd")


def open_text_extractor(spec: str, device: torch.device | str = "cpu") -> TextExtractor:
    """Open a CLIP model by its name: `clip:MODEL@WEIGHTS` of open_clip, or `clip:FOLDER` of the stage `text`.

    WEIGHTS is a file, or open_clip's name of published weights, which it fetches. FOLDER holds `model` and `clip`, as
    the stage `text` writes them, or is a model with `clip` in it; it may be the name of a built-in model.

    Raises:
        LdmError: as `open_extractor`; or the network takes no texts.
    """
    check_device(device)
    kind, _, rest = spec.partition(":")
    if kind != "clip":
        raise LdmError(f"extractor {spec!r} takes no texts; choose clip:MODEL@WEIGHTS or clip:FOLDER")
    folder = builtin(rest) or Path(rest)
    if rest and folder.is_dir():
        return OwnPair(folder, device)
    model, _, weights = rest.partition("@")
    if not (model and weights):
        raise LdmError(
            f"extractor {spec!r}: {rest or 'nothing'} is no folder; write clip:FOLDER, or clip:MODEL@WEIGHTS such as "
            "clip:ViT-B-32@openai"
        )
    return OpenClip(model, weights, device)
