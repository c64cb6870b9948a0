"""Training a codebook: by its losses, or as moving averages of the latents, with unused vectors replaced.

Van den Oord et al. 2017 (arXiv 1711.00937), eq. 3; Razavi et al. 2019 (arXiv 1906.00446), appendix A.1. Gradients pass
from the decoder straight through to the encoder in `ldm.models.autoencoder.Codebook` itself.

B batch, D channels of the latents, h×w their height and width, K vectors in the codebook
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole
from ldm.models.autoencoder import Codebook
from ldm.training.parallel.ranks import Reduce, alone


def codebook_losses(codebook: Codebook, latents: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The codebook loss and the commitment loss: the mean squared distance of latents and their vectors, () each.

    The first has a gradient for the vectors alone and is not needed with `MovingCodebook`; the second has one for the
    latents alone, and usually a weight of 0.25.

    Args:
        latents: (B, D, h, w), not yet quantised.
        index: (B, h, w), the numbers of their vectors.
    """
    nearest = codebook.embedding(index).movedim(-1, 1).float()
    latents = latents.float()
    return F.mse_loss(nearest, latents.detach()), F.mse_loss(latents, nearest.detach())


class MovingCodebook(nn.Module):
    """The codebook's vectors as moving averages of the latents nearest to them; vectors out of use start anew.

    `add` counts a micro-batch, `update` ends a step. The state (buffers, fp32) is for checkpoints and stays out of the
    autoencoder's, whose names are diffusers'. The constructor freezes the vectors.
    """

    counts: Tensor  # (K,): moving average of how many latents of a step are nearest to each vector; 0: not used yet
    sums: Tensor  # (K, D): moving average of the sum of these latents
    idle: Tensor  # (K,): steps since each vector was last used

    def __init__(self, codebook: Codebook, decay: float = 0.99, patience: int = 100) -> None:
        """Args:
            decay: γ of the moving averages, for each step.
            patience: after how many steps out of use a vector is replaced.

        Raises:
            LdmError: one of them is out of range.
        """
        super().__init__()
        if not 0 <= decay < 1:
            raise LdmError(f"codebook: decay is {decay!r}; it must be at least 0 and less than 1")
        check_whole("codebook", "patience", patience, 1, 2**31)
        self.decay = decay
        self.patience = patience
        vectors = codebook.embedding.weight.requires_grad_(False)
        self.register_buffer("counts", torch.zeros(len(vectors), device=vectors.device))
        self.register_buffer("sums", torch.zeros(vectors.shape, device=vectors.device))
        self.register_buffer("idle", torch.zeros(len(vectors), dtype=torch.long, device=vectors.device))
        self._step: Tensor | None = None  # (K, 1 + D): numbers and sums of the step's micro-batches so far
        self._latents = torch.empty(0)  # (B · h · w, D), of the last micro-batch

    @torch.no_grad()
    def add(self, latents: Tensor, index: Tensor) -> None:
        """Count a micro-batch: latents (B, D, h, w), not yet quantised, and the numbers (B, h, w) of their vectors."""
        self._latents = latents.movedim(1, -1).flatten(0, 2).float()
        if self._step is None:
            self._step = torch.zeros(len(self.counts), 1 + self.sums.shape[1], device=self.counts.device)
        self._step.index_add_(0, index.flatten(), F.pad(self._latents, (1, 0), value=1.0))

    def forget(self) -> None:
        """Drop the latents that were added since the last step."""
        self._step, self._latents = None, torch.empty(0)

    @torch.no_grad()
    def update(
        self, codebook: Codebook, generator: torch.Generator, reduce: Reduce = alone, rank: int = 0, ranks: int = 1
    ) -> None:
        """End a step: move the vectors in use; give those out of use for `patience` steps a random latent each.

        Args:
            generator: on the CPU; draws the random latents. K numbers are drawn in every step.
            reduce: gives the sum over all ranks, each of which must call this.
            rank: of this process; the ranks take turns in offering latents.
            ranks: how many there are.

        Raises:
            RuntimeError: nothing was added.
        """
        if self._step is None:
            raise RuntimeError("MovingCodebook.update without add")
        size, dim = self.sums.shape
        chosen = torch.randint(len(self._latents), (size,), generator=generator).to(self._latents.device)
        turn = (torch.arange(size, device=self.counts.device) % ranks == rank).unsqueeze(1)
        offered = torch.where(turn, self._latents[chosen], 0)
        step, offered = reduce(torch.cat([self._step, offered], dim=1)).split([1 + dim, dim], dim=1)
        self.forget()
        # where fp16 overflows, the optimiser skips the step, and so do the vectors
        if not step.isfinite().all():
            return
        used = step[:, 0] > 0
        self.counts.lerp_(step[:, 0], 1 - self.decay)
        self.sums.lerp_(step[:, 1:], 1 - self.decay)
        self.idle.copy_(torch.where(used, 0, self.idle + 1))
        dead = self.idle >= self.patience
        for state in (self.counts, self.sums, self.idle):
            state[dead] = 0
        vectors = codebook.embedding.weight
        # An unused vector keeps its value. A vector used for the first time takes the mean of its latents.
        moved = torch.where(used.unsqueeze(1), self.sums / self.counts.unsqueeze(1), vectors.float())
        vectors.copy_(torch.where(dead.unsqueeze(1), offered, moved))

    def usage(self) -> float:
        """Share of the vectors that were used in the last `patience` steps."""
        return float((self.counts > 0).float().mean())

    def perplexity(self) -> float:
        """The perplexity of the codebook's use, from the moving averages: 1 to K equally used vectors."""
        share = self.counts / self.counts.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return float(torch.special.entr(share).sum().exp())
