"""Losses of an autoencoder: the reconstruction of images, and the discriminator's judgement of them.

Rombach et al. 2022 (arXiv 2112.10752), appendix G, and Esser et al. 2021 (arXiv 2012.09841), section 3.1. Every loss
here is latent-diffusion's divided by the number of values of an image, 3·H·W: the mean over values where that has a
sum for each image, as taming-transformers has it. Its weights (1e-6 of the KL term, 1 of LPIPS, 0.5 of the adversary)
mean the same here, and the size of losses and gradients does not depend on the size of the images. Only the limit of
the adaptive weight differs: 1e4 is meant for means, and latent-diffusion's sums reach it 3·H·W times sooner.

latent-diffusion also divides the reconstruction by a learned variance. Its optimiser is never given that variance, so
that it stays 1; it is left out.

    loss = reconstruction_loss(reconstruction, target, perceptual=lpips)
    total = loss.total + 1e-6 * kl_loss(posterior, target)      # before the adversary takes part, and after
    total = adaptive.join(loss.total, reconstruction, last_layer, discriminator, 0.5).total + 1e-6 * kl_loss(...)

B batch, H×W height and width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.evaluation.networks.lpips import LPIPS
from ldm.models.autoencoder import DiagonalGaussian
from ldm.training.parallel.ranks import Reduce, alone

LARGEST = 1e4  # adaptive weight
EPS = 1e-6  # added to the norm that the adaptive weight divides by


@dataclass(frozen=True)
class ReconstructionLoss:
    """The distances of reconstructions from their images; every field ()."""

    total: Tensor  # with gradient
    pixels: Tensor  # L1 or L2, unweighted, for the log
    perceptual: Tensor  # LPIPS, unweighted, for the log


@dataclass(frozen=True)
class AdversarialLoss:
    """The reconstruction loss plus the weighted adversarial loss; every field ()."""

    total: Tensor  # with gradient
    adversarial: Tensor  # minus the mean of the discriminator's numbers, unweighted, for the log


@dataclass(frozen=True)
class DiscriminatorLoss:
    """The loss of the discriminator, which tells reconstructions from images; every field ()."""

    total: Tensor  # with gradient
    real: Tensor  # mean of the numbers for images, for the log
    fake: Tensor  # mean of the numbers for reconstructions, for the log


def reconstruction_loss(
    reconstruction: Tensor,
    target: Tensor,
    pixels: str = "l1",
    perceptual: LPIPS | None = None,
    perceptual_weight: float = 1.0,
) -> ReconstructionLoss:
    """Mean absolute ("l1") or squared ("l2") difference, and LPIPS if it is given, of (B, 3, H, W) in [-1, 1].

    Raises:
        LdmError: `pixels` is neither "l1" nor "l2"; or the images are too small for LPIPS.
    """
    if pixels not in ("l1", "l2"):
        raise LdmError(f"the difference of pixels can be l1 or l2, not {pixels!r}")
    x, y = reconstruction.float(), target.float()
    difference = F.l1_loss(x, y) if pixels == "l1" else F.mse_loss(x, y)
    if perceptual is None:
        return ReconstructionLoss(difference, difference.detach(), torch.zeros_like(difference))
    distance = perceptual(x, y).mean()
    return ReconstructionLoss(difference + perceptual_weight * distance, difference.detach(), distance.detach())


def kl_loss(posterior: DiagonalGaussian, target: Tensor) -> Tensor:
    """Divergence from the standard normal, in nats for each value of the images: ()."""
    whole = DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())
    return whole.kl().mean() / target[0].numel()


class AdaptiveWeight(nn.Module):
    """Makes the adversary pull the decoder's last layer as hard as the reconstruction does (Esser et al. 2021, eq. 7).

    The weight is ‖∇ reconstruction‖ / (‖∇ adversarial‖ + EPS), at most `LARGEST`, with the gradients of a whole step:
    added up over its micro-batches and the ranks before their norms are taken. It takes effect in the next step, and is
    0 in the first. With a ratio for each micro-batch and rank, as in other programs, 1×8 and 2×4 images would train
    different networks; the ratio of a whole step is known only after its last micro-batch.

    `value` () is the weight, and all that a checkpoint between two steps needs.
    """

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))
        self._gradients: Tensor | None = None  # (2, N): sums over the step's micro-batches so far

    def join(
        self,
        loss: Tensor,
        reconstruction: Tensor,
        last_layer: nn.Parameter,
        discriminator: nn.Module,
        factor: float,
    ) -> AdversarialLoss:
        """`loss` () of a micro-batch plus `factor` · `value` · the adversarial loss; measures both gradients.

        Args:
            loss: depends on the parameters through `reconstruction` alone; its graph is used up.
            reconstruction: (B, 3, H, W), the decoder's answer.
            last_layer: the weight that made it, `decoder.conv_out.weight`.
            discriminator: not wrapped for data parallelism: its parameters get no gradient here.
        """
        # Both losses are differentiated down to the images, once. From there the two gradients take one way through
        # the decoder, and nothing can reach the discriminator's parameters.
        adversarial = -discriminator(reconstruction.float()).float().mean()
        toward_target = _gradient(loss, reconstruction)
        toward_real = _gradient(adversarial, reconstruction)
        gradients = torch.stack(
            [_at_layer(gradient, reconstruction, last_layer) for gradient in (toward_target, toward_real)]
        )
        self._gradients = gradients if self._gradients is None else self._gradients + gradients
        weight = factor * self.value
        gradient = toward_target + weight * toward_real
        zero = (gradient * (reconstruction.float() - reconstruction.detach().float())).sum()  # 0, with this gradient
        return AdversarialLoss((loss + weight * adversarial).detach() + zero, adversarial.detach())

    def forget(self) -> None:
        """Drop the gradients that were measured since the last step."""
        self._gradients = None

    def update(self, reduce: Reduce = alone) -> None:
        """End a step: make the weight from what its micro-batches have measured.

        Args:
            reduce: gives the sum over all ranks, each of which must call this.
        """
        if self._gradients is None:
            return
        gradients = reduce(self._gradients)
        towards, against = torch.linalg.vector_norm(gradients, dim=1)
        ratio = (towards / (against + EPS)).clamp(max=LARGEST)
        # where fp16 overflows, the step is skipped, and the weight stays
        self.value.copy_(torch.where(gradients.isfinite().all(), ratio, self.value))
        self.forget()


def _gradient(loss: Tensor, reconstruction: Tensor) -> Tensor:
    """Gradient of a loss () for the images, fp32; of a mean over their values, so it is scaled up on its way, as it
    would vanish in fp16."""
    values = reconstruction.numel()
    return torch.autograd.grad(loss * values, reconstruction)[0].float() / values


def _at_layer(gradient: Tensor, reconstruction: Tensor, layer: nn.Parameter) -> Tensor:
    """A gradient for the images, taken back to the decoder's last layer: (N,), fp32.

    On its way it has length 1, with which neither the gradient nor its sums over all places leave fp16's range.
    """
    length = torch.linalg.vector_norm(gradient).clamp_min(torch.finfo(torch.float32).tiny)
    unit = (gradient / length).to(reconstruction.dtype)
    return torch.autograd.grad(reconstruction, layer, unit, retain_graph=True)[0].float().flatten() * length


def discriminator_loss(discriminator: nn.Module, target: Tensor, reconstruction: Tensor) -> DiscriminatorLoss:
    """Hinge loss (Lim and Ye 2017, arXiv 1705.02894): half of mean(max(0, 1 - real)) + mean(max(0, 1 + fake)).

    No gradient reaches the autoencoder. Both halves go through the discriminator together, so that it can
    be wrapped for data parallelism, which wants one forward pass for each backward pass.
    """
    both = discriminator(torch.cat([target.float(), reconstruction.detach().float()])).float()
    real, fake = both.chunk(2)
    loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return DiscriminatorLoss(loss, real.detach().mean(), fake.detach().mean())
