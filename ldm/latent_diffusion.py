"""`LatentDiffusion`: a bundle of U-Net, autoencoder, text encoders and noise schedule, loaded from and saved to disk.

B prompts, M tokens, T text channels, P channels of the pooled text
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ldm.errors import LdmError
from ldm.families import Family, family_named
from ldm.files import Progress, silent
from ldm.models.unet import Conditioning
from ldm.process import NoiseSchedule
from ldm.weights.components import Components, build, fingerprint
from ldm.weights.folder import write_folder
from ldm.weights.single_file import write_single_file
from ldm.weights.sources import Source, open_source

_INITIALISING = threading.Lock()  # because initial weights are drawn from PyTorch's global generator


class LatentDiffusion(Components):
    """A latent diffusion model: `family`, and `networks` by name. It holds no state of a single call."""

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        family: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        components: Mapping[str, Source] | None = None,
        allow_pickle: bool = False,
        verify: bool = True,
        progress: Progress = silent,
    ) -> Self:
        """Load a model in evaluation mode from a diffusers folder, an original single-file checkpoint or a Hub name.

        Weights are memory-mapped in the stored dtype unless `dtype` is given. The other arguments are those of
        `ldm.weights.sources.open_source`.

        Raises:
            LdmError: the source cannot be loaded; the message says why, and the remedy.
        """
        opened = open_source(
            source,
            family=family,
            variant=variant,
            revision=revision,
            components=components,
            allow_pickle=allow_pickle,
            verify=verify,
            progress=progress,
        )
        opened.check_dtype(dtype)
        return cls.of(opened.load(dtype, device, progress))

    @classmethod
    def of(cls, parts: Components) -> Self:
        """The model made of these components."""
        return cls(parts.family, dict(parts.networks))

    @classmethod
    def from_family(cls, family: str | Family, seed: int = 0) -> Self:
        """A model to be trained from scratch: random weights (float32, CPU) that depend on the seed alone."""
        with _INITIALISING, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls.of(build(family_named(family) if isinstance(family, str) else family))

    def with_networks(self, networks: Mapping[str, nn.Module]) -> Self:
        """A copy of the model with other networks of these names; all else is shared."""
        other = copy.copy(self)
        other.networks = {**self.networks, **networks}
        return other

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of training."""
        return self.family.schedule

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser's weights."""
        return next(self.unet.parameters()).dtype

    def bring(self, network: nn.Module) -> None:
        """Move one of the model's networks to `device`. Has an effect only if the model is offloaded."""

    def alone(self) -> AbstractContextManager[Any]:
        """A context for generating one batch of images: holds a lock if the model is offloaded."""
        return nullcontext()

    def fingerprint(self) -> str:
        """A digest of the weights, ten hexadecimal digits, which does not depend on the file format."""
        return fingerprint(self.modules())

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        max_shard_size: int = 10 * 10**9,
        overwrite: bool = False,
        progress: Progress = silent,
        lineage: str = "",
    ) -> None:
        """Write a folder that diffusers opens, or, if the path ends in `.safetensors`, an original single file.

        Writing is atomic, and adds digests that are checked on loading. `lineage`, JSON that describes how the model
        was made, goes into the headers.

        Raises:
            LdmError: the path exists and `overwrite` is not set, or writing fails.
        """
        path = Path(path)
        if path.suffix.lower() == ".safetensors":
            write_single_file(self, path, dtype, overwrite, progress, lineage)
        else:
            write_folder(self, path, dtype, variant, max_shard_size, overwrite, progress, lineage)

    def encode_prompt(
        self, prompts: str | Sequence[str], *, clip_skip: int = 0, size: Sequence[float] | None = None
    ) -> Conditioning:
        """Encode prompts to the U-Net's conditioning: text (B, M, T) and, for SDXL, pooled text (B, P) and time ids.

        `size` holds the time ids for all prompts: original height and width, crop top and left, then target height and
        width (SDXL), or the aesthetic score (its refiner). The default is an uncropped image of the training size,
        with a score of 6. Gradients of the text encoders are recorded, except under `torch.no_grad()`.

        Raises:
            LdmError: the list of prompts is empty, or the model does not take `size` or needs another number of ids.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence) or not prompts:
            raise LdmError(f"prompts {prompts!r}: at least one text is needed")
        wanted = self.family.unet.size_ids
        if size is None:
            side = self.family.size
            size = [side, side, 0, 0, *([6.0] if self.family.refiner else [side, side])][:wanted]
        size = size if isinstance(size, Sequence) else [size]
        numbers = [value for value in size if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(numbers) != wanted or len(size) != wanted:
            raise LdmError(
                f"size {list(size)!r}: a {self.family.name} model takes {wanted} time ids, all of them numbers"
            )
        cond = self.text_encoders(prompts, clip_skip)
        if not wanted:
            return cond
        ids = torch.tensor([numbers] * len(prompts), dtype=torch.float32, device=cond.text.device)
        return Conditioning(cond.text, cond.pooled, ids)
