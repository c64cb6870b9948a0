"""Noise that depends on each image's seed alone: not on the batch, the image's place in it, or the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.errors import LdmError

LARGEST_SEED = 2**63 - 1


class Noise:
    """The random numbers of one run, for images with these seeds.

    With rng "ldm" each image has its own generator, on the CPU. With "diffusers" one generator, seeded with the first
    seed, draws for the whole batch in the model's dtype: the numbers of a diffusers pipeline.
    """

    def __init__(self, seeds: Sequence[int], rng: str = "ldm") -> None:
        if rng not in ("ldm", "diffusers"):
            raise LdmError(f"rng {rng!r} is not known; choose ldm or diffusers")
        for seed in seeds:
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
                raise LdmError(f"seed {seed!r}: a whole number from 0 to {LARGEST_SEED} is needed")
        self.rng = rng
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in (seeds if rng == "ldm" else seeds[:1])]

    @property
    def generator(self) -> torch.Generator | list[torch.Generator]:
        """The `generator` argument of diffusers' schedulers: one for all images, or one for each."""
        return self.generators if self.rng == "ldm" else self.generators[0]

    def draw(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Standard normal noise (B, ...), one image a row."""
        if self.rng == "diffusers":
            return torch.randn(tuple(shape), generator=self.generators[0], dtype=dtype, device="cpu").to(device)
        rows = [  # whatever the process-wide defaults are
            torch.randn(tuple(shape[1:]), generator=generator, dtype=torch.float32, device="cpu")
            for generator in self.generators
        ]
        return torch.stack(rows).to(device, dtype)
