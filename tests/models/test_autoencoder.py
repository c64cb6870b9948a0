"""The autoencoders against diffusers', and their tiles against the whole."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F
from rounding import DECODER, NETWORK, near
from torch import Tensor

from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.models import tiling
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderKL, VQModel, build_autoencoder
from ldm.weights.configs import write_autoencoder

SMALL = AutoencoderConfig(channels=(16, 32, 32, 32), groups=8, sample_size=64)
VQ = replace(SMALL, latent_channels=3, codebook=40, codebook_dim=5)


def with_levels(levels: int) -> AutoencoderConfig:
    return replace(SMALL, channels=(16,) * (levels - 1) + (32,), attention=(False,) * levels)


def both(config: AutoencoderConfig) -> tuple[Autoencoder, torch.nn.Module]:
    ours = build_autoencoder(config).eval()
    theirs = getattr(diffusers, "VQModel" if config.codebook else "AutoencoderKL").from_config(
        write_autoencoder(config)
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


@pytest.mark.parametrize("config", [tiny.family(name).autoencoder for name in ("sd15", "sdxl")] + [
    with_levels(3), with_levels(5), with_levels(6),  # f4, f16, f32
    replace(SMALL, mid_attention=False), replace(SMALL, quant_conv=False, post_quant_conv=False),
    replace(SMALL, attention=(False, False, True, True), latent_channels=16),
])  # fmt: skip
def test_kl_equals_diffusers(config: AutoencoderConfig) -> None:
    ours, theirs = both(config)
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior, reference = ours.encode(x), theirs.encode(x).latent_dist
        assert posterior.mode().shape == (2, config.latent_channels, 64 // config.factor, 96 // config.factor)
        near(posterior.mean, reference.mean, NETWORK)
        near(posterior.std, reference.std, NETWORK)
        near(posterior.kl(), reference.kl(), NETWORK)
        z = torch.randn(2, config.latent_channels, 5, 7)
        near(ours.decode(z), theirs.decode(z).sample, DECODER)


def test_bf16_is_no_further_from_fp32_than_diffusers() -> None:
    ours, theirs = both(SMALL)
    z, x = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        exact = ours.decode(z), ours.encode(x).mode()
        ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
        half_z, half_x = z.to(torch.bfloat16), x.to(torch.bfloat16)
        mine = ours.decode(half_z), ours.encode(half_x).mode()
        reference = theirs.decode(half_z).sample, theirs.encode(half_x).latent_dist.mean
    for truth, a, b in zip(exact, mine, reference, strict=True):
        assert (a.float() - truth).abs().mean() <= 1.1 * (b.float() - truth).abs().mean()


@pytest.mark.parametrize("config", [VQ, replace(VQ, codebook_dim=0), replace(VQ, attention=(False, True, True, True))])
def test_vq_equals_diffusers(config: AutoencoderConfig) -> None:
    ours, theirs = both(config)
    assert isinstance(ours, VQModel)
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        z = ours.encode(x).mode()
        near(z, theirs.encode(x).latents, NETWORK)
        near(ours.decode(z), theirs.decode(z).sample, DECODER)


def test_vq_quantises_to_the_nearest_vector_and_passes_gradients() -> None:
    codebook = VQModel(VQ).quantize
    z = torch.randn(2, 5, 3, 4, requires_grad=True)
    quantised, index = codebook(z)
    vectors = codebook.embedding.weight
    for b, y, x in [(0, 0, 0), (1, 2, 3)]:
        distances = (vectors - z[b, :, y, x]).norm(dim=1)
        assert index[b, y, x] == distances.argmin()
        torch.testing.assert_close(quantised[b, :, y, x], vectors[index[b, y, x]])
    quantised.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_posterior_samples_by_its_generator_alone() -> None:
    posterior = AutoencoderKL(SMALL).encode(torch.rand(1, 3, 64, 64))
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert posterior.sample().shape == posterior.mode().shape


def smooth(*shape: int) -> Tensor:
    """Random but smooth, as images and latents are."""
    coarse = torch.randn(*shape[:2], shape[2] // 8 + 2, shape[3] // 8 + 2)
    return F.interpolate(coarse, size=shape[2:], mode="bicubic")


def without_norms(model: Autoencoder) -> Autoencoder:
    """The model with nothing that looks beyond a convolution's neighbourhood outside its middle."""
    for part in (*model.encoder.down_blocks, *model.decoder.up_blocks):
        for module in part.modules():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, name, torch.nn.Identity())
    model.decoder.conv_norm_out = torch.nn.Identity()
    return model


@pytest.mark.parametrize(("height", "width"), [(20, 20), (17, 25), (33, 8), (64, 9)])
@pytest.mark.parametrize("config", [SMALL, VQ, with_levels(3), replace(SMALL, layers=1)])
def test_margins_are_wide_enough(config: AutoencoderConfig, height: int, width: int) -> None:
    """Without group norms tiles are exact, wherever they begin and end."""
    model = without_norms(build_autoencoder(config).eval())
    with torch.no_grad():
        z = torch.randn(1, config.codebook_dim or config.latent_channels, height, width)
        torch.testing.assert_close(tiling.tiled_decode(model, z, tile=8), model.decode(z), atol=1e-4, rtol=1e-4)
        x = torch.randn(1, 3, height * config.factor + 3, width * config.factor + 1)
        tiles = tiling.tiled_encode(model, x, tile=8 * config.factor).mode()
        torch.testing.assert_close(tiles, model.encode(x).mode(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (17, 25), (33, 8)])
def test_tiles_are_nearer_to_the_whole_than_diffusers(height: int, width: int) -> None:
    """On random weights, for which group norms depend on their surroundings more than in trained ones."""
    ours, theirs = both(SMALL)
    theirs.enable_tiling()
    z = smooth(1, 4, height, width)
    with torch.no_grad():
        whole, tiles, reference = ours.decode(z), tiling.tiled_decode(ours, z), theirs.decode(z).sample
    assert tiles.shape == whole.shape
    assert (tiles - whole).square().mean() < 0.7 * (reference - whole).square().mean()


def test_tiles_leave_the_model_alone() -> None:
    model = build_autoencoder(SMALL).eval()
    z = torch.randn(1, 4, 20, 20)
    with torch.no_grad():
        before = model.decode(z)
        tiling.tiled_decode(model, z)
        assert torch.equal(model.decode(z), before)


def test_an_image_of_one_tile_is_not_tiled() -> None:
    model = build_autoencoder(SMALL).eval()
    with torch.no_grad():
        z = torch.randn(1, 4, 8, 8)
        assert torch.equal(tiling.tiled_decode(model, z), model.decode(z))


@pytest.mark.parametrize("config", [SMALL, VQ])
def test_slices_equal_the_batch(config: AutoencoderConfig) -> None:
    model = build_autoencoder(config).eval()
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        whole, slices = model.encode(x), tiling.sliced_encode(model, x)
        near(slices.mode(), whole.mode(), NETWORK)
        z = whole.mode()
        near(tiling.sliced_decode(model, z), model.decode(z), DECODER)


def test_absurd_tiles_are_refused() -> None:
    with pytest.raises(LdmError, match="a tile of 3 latents is too small"):
        tiling.tiled_decode(build_autoencoder(SMALL), torch.randn(1, 4, 20, 20), 3)


def test_factor_of_released_autoencoders() -> None:
    assert {family.autoencoder.factor for family in FAMILIES.values()} == {8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": ()}, "one entry for each level"),
        ({"channels": (16, 30, 32, 32)}, "do not divide"),
        ({"scaling_factor": float("nan")}, "out of range"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_absurd_configurations_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]
