"""The autoencoders against diffusers', and their tiles against the whole."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F
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
        torch.testing.assert_close(posterior.mean, reference.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(posterior.std, reference.std, atol=1e-5, rtol=0)
        torch.testing.assert_close(posterior.kl(), reference.kl(), atol=1e-2, rtol=1e-5)
        z = torch.randn(2, config.latent_channels, 5, 7)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [VQ, replace(VQ, codebook_dim=0), replace(VQ, attention=(False, True, True, True))])
def test_vq_equals_diffusers(config: AutoencoderConfig) -> None:
    ours, theirs = both(config)
    assert isinstance(ours, VQModel)
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        z = ours.encode(x).mode()
        torch.testing.assert_close(z, theirs.encode(x).latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-5, rtol=0)


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
    """Random but smooth, as pictures and latents are."""
    coarse = torch.randn(*shape[:2], shape[2] // 8 + 2, shape[3] // 8 + 2)
    return F.interpolate(coarse, size=shape[2:], mode="bicubic")


class FlatTiles(torch.nn.Module):
    """An "autoencoder" of factor 1 that gives every tile its own brightness: the worst that tiles can disagree."""

    config = AutoencoderConfig(channels=(8,), attention=(False,), groups=8, sample_size=32)

    def decode(self, z: Tensor) -> Tensor:
        return torch.full_like(z, z[0, 0, 0, 0].item())


@pytest.mark.parametrize(("height", "width"), [(32, 96), (64, 128), (33, 64)])
def test_tiles_join_without_a_seam(height: int, width: int) -> None:
    """Tiles that differ by 1 fade into each other over the overlap of 8; without overlap they are cut."""
    z = (torch.arange(height)[:, None] + torch.arange(width)[None, :]).float()[None, None] / 24
    faded = tiling.tiled_decode(FlatTiles(), z)  # type: ignore[arg-type]
    cut = tiling.tiled_decode(FlatTiles(), z, overlap=0)  # type: ignore[arg-type]
    assert faded.shape == z.shape
    assert faded.diff(dim=-1).abs().max() < 0.2 * cut.diff(dim=-1).abs().max()
    if height > 40:
        assert faded.diff(dim=-2).abs().max() < 0.2 * cut.diff(dim=-2).abs().max()


def test_tiles_of_an_identity_are_the_picture() -> None:
    z = torch.randn(2, 4, 45, 70)
    model = FlatTiles()
    model.decode = lambda tile: tile  # type: ignore[method-assign, assignment]
    torch.testing.assert_close(tiling.tiled_decode(model, z), z)  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(20, 20), (17, 25), (33, 8)])
def test_tiled_decode_is_near_the_whole(height: int, width: int) -> None:
    """As near as diffusers' tiles, on random weights, which depend on surroundings more than trained ones."""
    ours, theirs = both(SMALL)
    theirs.enable_tiling()
    z = smooth(1, 4, height, width)
    with torch.no_grad():
        whole, tiles, reference = ours.decode(z), tiling.tiled_decode(ours, z), theirs.decode(z).sample
    assert tiles.shape == whole.shape
    assert (tiles - whole).square().mean() < 1.1 * (reference - whole).square().mean()


@pytest.mark.parametrize(("height", "width"), [(160, 160), (130, 197)])
@pytest.mark.parametrize("config", [SMALL, VQ])
def test_tiled_encode_keeps_shape_and_place(config: AutoencoderConfig, height: int, width: int) -> None:
    model = build_autoencoder(config).eval()
    x = smooth(1, 3, height, width)
    with torch.no_grad():
        whole, tiles = model.encode(x).mode(), tiling.tiled_encode(model, x, tile=96).mode()
    assert tiles.shape == whole.shape
    correlation = torch.corrcoef(torch.stack([whole.flatten(), tiles.flatten()]))[0, 1]
    assert correlation > 0.5


def test_a_picture_of_one_tile_is_not_tiled() -> None:
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
        torch.testing.assert_close(slices.mode(), whole.mode(), atol=1e-5, rtol=0)
        z = whole.mode()
        torch.testing.assert_close(tiling.sliced_decode(model, z), model.decode(z), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("tile", "overlap"), [(3, 0.25), (8, -0.1), (8, 0.6), (8, float("nan"))])
def test_absurd_tiles_are_refused(tile: int, overlap: float) -> None:
    with pytest.raises(LdmError, match="tile of"):
        tiling.tiled_decode(build_autoencoder(SMALL), torch.randn(1, 4, 20, 20), tile, overlap)


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
