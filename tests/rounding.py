"""How far numbers may lie apart that differ by rounding alone: ours and others' from the same weights, by other code.

Where sums run in another order their last bits differ, and the larger the numbers that go through a network, the more
comes of it: distances are parts of the largest number. How much there is was measured on the reference itself:
diffusers, compared with itself by other kernels, with AVX-512 and AVX2 (`ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2`), with oneDNN and without, on one thread and on two. Four times
that is allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 4
NETWORK = FACTOR * 2e-6  # a U-Net or an encoder, once
RUN = FACTOR * 4.2e-6  # latents of a run through some steps
DECODER = FACTOR * 8.3e-6  # an autoencoder's images


def near(found: Tensor, wanted: Tensor, part: float) -> None:
    """Everywhere no further apart than this part of the largest number that is wanted."""
    torch.testing.assert_close(found, wanted, atol=part * float(wanted.abs().max()), rtol=0)
