"""SSCD (Pizzi et al. 2022, arXiv 2202.10261): features that are close for an image and its edited copies.

The weights are `sscd_disc_mixup` in eight bits, as ONNX; they run on the CPU. Images are stretched to 320×320, as its
authors do in batches; by their account, nine of ten pairs whose cosine is above 0.75 are copies.

B images
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError, first_line
from ldm.files import file_digest
from ldm.weights.published import SSCD, published

SIDE = 320  # pixels


class CopyDetector:
    """An extractor of `features` (B, 512) of length 1."""

    preparation = f"{SIDE}×{SIDE}, bilinear, antialiased, stretched"
    gives = frozenset({"features"})

    def __init__(self, path: Path | None = None) -> None:
        """Args:
            path: an ONNX file that takes images (B, H, W, 3) in 8 bits; by default the one in the weights folder.

        Raises:
            LdmError: the file is missing or damaged, or holds another network.
        """
        self.name = f"SSCD ({path.name})" if path else "SSCD"
        path = path or published(SSCD, "sscd")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.digest = file_digest(path)
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            takes, gives = self.session.get_inputs(), self.session.get_outputs()
            fits = len(takes) == len(gives) == 1 and _takes_images(takes[0]) and len(gives[0].shape) == 2
        except OSError as error:
            raise LdmError(f"{path} cannot be read: {error.strerror}") from None
        except Exception as error:  # ONNX Runtime has a class for each kind of damage, with no common base
            raise LdmError(
                f"{path} is no ONNX file, or damaged ({first_line(error)}); fetch it with tools/fetch_weights.py sscd"
            ) from None
        if not fits:
            raise LdmError(
                f"{path} is another network: SSCD takes images (B, {SIDE}, {SIDE}, 3) in 8 bits and gives a vector "
                "of each; fetch it with tools/fetch_weights.py sscd"
            )
        self.input = takes[0].name

    def prepare(self, image: Image.Image) -> Tensor:
        """An image in RGB to (320, 320, 3) in 8 bits."""
        return torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """Prepared images (B, 320, 320, 3) to `features` (B, 512) of length 1."""
        (features,) = self.session.run(None, {self.input: inputs.numpy()})
        return {"features": torch.from_numpy(features)}


def _takes_images(given: onnxruntime.NodeArg) -> bool:
    """Whether an input takes images of our size in 8 bits; free dimensions have a name instead of a number."""
    sides = zip(given.shape[1:], (SIDE, SIDE, 3), strict=False)
    fits = all(not isinstance(side, int) or side == ours for side, ours in sides)
    return given.type == "tensor(uint8)" and len(given.shape) == 4 and fits
