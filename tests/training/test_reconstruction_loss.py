"""The autoencoder's losses by hand, the adaptive weight by plain autograd, and who gets which gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.evaluation.networks.lpips import LPIPS
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from ldm.models.discriminator import Discriminator, DiscriminatorConfig
from ldm.training.losses.reconstruction import (
    EPS,
    LARGEST,
    AdaptiveWeight,
    discriminator_loss,
    kl_loss,
    reconstruction_loss,
)

FACTOR = 0.5


def networks() -> tuple[AutoencoderKL, Discriminator, LPIPS]:
    config = AutoencoderConfig(channels=(8, 16), attention=(False, False), layers=1, groups=4, mid_attention=False)
    return AutoencoderKL(config), Discriminator(DiscriminatorConfig(channels=8, layers=2, groups=4)), LPIPS("alex")


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# --- losses by hand ---------------------------------------------------------------------------------------------------


def test_reconstruction_by_hand() -> None:
    x, y = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    x[0], x[1] = 0.5, -1
    assert reconstruction_loss(x, y).total.item() == pytest.approx(0.75)
    assert reconstruction_loss(x, y, "l2").total.item() == pytest.approx(0.625)
    perceptual = LPIPS("alex")
    loss = reconstruction_loss(x, y, perceptual=perceptual, perceptual_weight=3.0)
    assert loss.perceptual == perceptual(x, y).mean() > 0
    assert loss.total.item() == pytest.approx(0.75 + 3 * loss.perceptual.item())
    with pytest.raises(LdmError, match="l1 or l2, not 'huber'"):
        reconstruction_loss(x, y, "huber")


def test_kl_by_hand() -> None:
    """Of N(1, e) in 8 numbers: ½ (1 + e - 1 - 1) nats each, over 3·4·4 values of an image."""
    posterior = DiagonalGaussian(torch.ones(2, 2, 2, 2), torch.ones(2, 2, 2, 2))
    expected = 8 * 0.5 * (torch.e - 1) / 48
    assert kl_loss(posterior, torch.empty(2, 3, 4, 4)).item() == pytest.approx(expected)


def test_the_sum_is_latent_diffusions_over_the_values_of_an_image() -> None:
    model, _, perceptual = networks()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction, posterior = model(x)
    ours = reconstruction_loss(reconstruction, x, perceptual=perceptual).total + 1e-6 * kl_loss(posterior, x)
    # CompVis' LPIPSWithDiscriminator, with its variance of 1: sums over an image, means over the batch
    each = (reconstruction - x).abs() + perceptual(reconstruction, x).view(2, 1, 1, 1)
    theirs = each.sum() / 2 + 1e-6 * posterior.kl().sum() / 2
    torch.testing.assert_close(ours, theirs / (3 * 32 * 32))


def test_hinge_by_hand() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(1, 2, 3), keepdim=True)

    real = torch.tensor([3.0, 0.5]).view(2, 1, 1, 1)  # the margin is kept; missed by 0.5
    fake = torch.tensor([-2.0, 0.25]).view(2, 1, 1, 1)  # kept; missed by 1.25
    loss = discriminator_loss(Mean(), real, fake)
    assert loss.total.item() == pytest.approx((0.5 / 2 + 1.25 / 2) / 2)
    assert (loss.real.item(), loss.fake.item()) == (1.75, -0.875)


# --- the adaptive weight ----------------------------------------------------------------------------------------------


def by_autograd(
    model: AutoencoderKL, discriminator: Discriminator, perceptual: LPIPS, images: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction and adversarial loss of a whole batch, and eq. 7's ratio, from the definitions alone."""
    posterior = model.encode(images)
    reconstruction = model.decode(posterior.mean + posterior.std * noise)
    loss = (reconstruction - images).abs().mean() + perceptual(reconstruction, images).mean()
    adversarial = -discriminator(reconstruction).mean()
    last = model.decoder.conv_out.weight
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].float().norm() for x in (loss, adversarial)]
    return loss, adversarial, norms[0] / (norms[1] + EPS)


class Fixed:
    """A step over the same 4 images and noise, in micro-batches."""

    def __init__(self) -> None:
        self.model, self.discriminator, self.perceptual = networks()
        self.images = torch.rand(4, 3, 32, 32) * 2 - 1
        self.noise = torch.randn(4, 4, 16, 16)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        return by_autograd(self.model, self.discriminator, self.perceptual, self.images, self.noise)

    def forward_backward(self, adaptive: AdaptiveWeight, parts: int = 1, scale: float = 1.0) -> Tensor:
        """Gradients of all parameters of the autoencoder after `parts` micro-batches."""
        self.model.zero_grad()
        for x, noise in zip(self.images.chunk(parts), self.noise.chunk(parts), strict=True):
            posterior = self.model.encode(x)
            reconstruction = self.model.decode(posterior.mean + posterior.std * noise)
            loss = reconstruction_loss(reconstruction, x, perceptual=self.perceptual).total
            last = self.model.decoder.conv_out.weight
            joined = adaptive.join(loss, reconstruction, last, self.discriminator, FACTOR)
            ((joined.total + 1e-6 * kl_loss(posterior, x)) / parts * scale).backward()
        return gradients(self.model) / scale


def test_the_weight_and_the_gradients_it_makes() -> None:
    fixed, adaptive = Fixed(), AdaptiveWeight()
    loss, adversarial, ratio = fixed.expected()
    fixed.forward_backward(adaptive)
    assert adaptive.value == 0  # until the step has ended
    adaptive.update()
    torch.testing.assert_close(adaptive.value, ratio, rtol=1e-4, atol=0)
    assert 0.01 < ratio < LARGEST / 100  # neither norm is nothing
    found = fixed.forward_backward(adaptive)
    fixed.model.zero_grad()
    posterior = fixed.model.encode(fixed.images)
    (loss + FACTOR * adaptive.value * adversarial + 1e-6 * kl_loss(posterior, fixed.images)).backward()
    torch.testing.assert_close(found, gradients(fixed.model), rtol=1e-3, atol=1e-6)


def test_the_value_of_the_total() -> None:
    fixed, adaptive = Fixed(), AdaptiveWeight()
    adaptive.value.fill_(2.0)
    reconstruction = fixed.model(fixed.images)[0]
    loss = reconstruction_loss(reconstruction, fixed.images).total
    last = fixed.model.decoder.conv_out.weight
    joined = adaptive.join(loss, reconstruction, last, fixed.discriminator, FACTOR)
    assert joined.adversarial == -fixed.discriminator(reconstruction).mean()
    torch.testing.assert_close(joined.total, loss + FACTOR * 2.0 * joined.adversarial)


def test_micro_batches_and_ranks_give_the_same_weight() -> None:
    fixed, whole = Fixed(), AdaptiveWeight()
    first = fixed.forward_backward(whole)
    whole.update()
    second = fixed.forward_backward(whole)
    for parts in (2, 4):
        adaptive = AdaptiveWeight()
        torch.testing.assert_close(fixed.forward_backward(adaptive, parts), first, rtol=1e-3, atol=1e-6)
        adaptive.update()
        torch.testing.assert_close(adaptive.value, whole.value, rtol=1e-4, atol=0)
        torch.testing.assert_close(fixed.forward_backward(adaptive, parts), second, rtol=1e-3, atol=1e-6)
    # two ranks with two images each
    images, noise, handed_in = fixed.images, fixed.noise, []
    ranks = AdaptiveWeight(), AdaptiveWeight()
    for rank, adaptive in enumerate(ranks):
        fixed.images, fixed.noise = images.chunk(2)[rank], noise.chunk(2)[rank]
        fixed.forward_backward(adaptive)
    ranks[0].update(lambda tensor: handed_in.append(tensor) or tensor)
    ranks[1].update(lambda tensor: tensor + handed_in[0])
    torch.testing.assert_close(ranks[1].value, whole.value, rtol=1e-4, atol=0)
    assert not torch.isclose(ranks[0].value, whole.value, rtol=1e-3)  # so that it matters


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_weight_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    fixed, adaptive = Fixed(), AdaptiveWeight()
    ratio = fixed.expected()[2].item()
    for scale in (1.0, 2.0**12):  # a scaled loss makes no difference
        with torch.autocast("cpu", dtype):
            fixed.forward_backward(adaptive, scale=scale)
        adaptive.update()
        assert adaptive.value.item() == pytest.approx(ratio, rel=tolerance)


def test_the_weight_of_gradients_that_vanish_in_half_precision() -> None:
    """Those for the images are 1e-8 here, where fp16 ends at 6e-8."""

    class Faint(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.01 * x.mean(dim=(1, 2, 3))

    z, adaptive = torch.rand(8, 4, 128, 128), AdaptiveWeight()
    last = nn.Parameter(torch.rand(3, 4, 1, 1))
    with torch.autocast("cpu", torch.float16):
        reconstruction = F.conv2d(z, last)
        loss = reconstruction_loss(reconstruction, torch.zeros(8, 3, 128, 128)).total
        adaptive.join(loss, reconstruction, last, Faint(), FACTOR)
    adaptive.update()
    assert reconstruction.dtype == torch.float16
    assert adaptive.value.item() == pytest.approx(100, rel=0.01)  # all reconstructions are positive


def test_the_weight_is_limited_and_survives_overflow() -> None:
    fixed, adaptive = Fixed(), AdaptiveWeight()
    nn.init.zeros_(fixed.discriminator.conv_out.weight)  # no gradient passes through it
    fixed.forward_backward(adaptive)
    adaptive.update()
    assert adaptive.value == LARGEST
    fixed.forward_backward(adaptive)
    adaptive.update(lambda tensor: tensor * float("inf"))
    assert adaptive.value == LARGEST
    adaptive.update()  # nothing was measured
    assert adaptive.value == LARGEST


def test_the_weight_is_kept_in_a_checkpoint() -> None:
    adaptive, resumed = AdaptiveWeight(), AdaptiveWeight()
    adaptive.value.fill_(3.5)
    resumed.load_state_dict(adaptive.state_dict())
    assert resumed.value == 3.5


# --- no gradient goes astray ------------------------------------------------------------------------------------------


def test_each_side_leaves_the_other_alone() -> None:
    fixed, adaptive = Fixed(), AdaptiveWeight()
    adaptive.value.fill_(1.0)
    fixed.forward_backward(adaptive)
    assert all(parameter.grad is None for parameter in fixed.discriminator.parameters())
    before = gradients(fixed.model)
    reconstruction = fixed.model(fixed.images)[0]
    discriminator_loss(fixed.discriminator, fixed.images, reconstruction).total.backward()
    assert torch.equal(gradients(fixed.model), before)
    theirs = gradients(fixed.discriminator)
    assert theirs.norm() > 0
    fixed.forward_backward(adaptive)
    assert torch.equal(gradients(fixed.discriminator), theirs)


def test_perceptual_gradient_reaches_the_encoder() -> None:
    """diffusers' trainer measures LPIPS without gradients."""
    model, _, perceptual = networks()
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    reconstruction = model(x)[0]
    with_it, without = (
        torch.autograd.grad(
            reconstruction_loss(reconstruction, x, perceptual=lpips).total,
            model.encoder.conv_in.weight,
            retain_graph=True,
        )[0]
        for lpips in (perceptual, None)
    )
    assert (with_it - without).norm() > 1e-6
    assert F.cosine_similarity(with_it.flatten(), without.flatten(), dim=0) < 0.9999
