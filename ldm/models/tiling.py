"""Tiled encoding and decoding of large images, so that memory depends on the tile and not on the image.

Convolutions have a small receptive field, so a tile with a margin of that size gives exactly the pixels of the whole
image, if the group norms have the statistics of the whole image. Therefore a first pass over the tiles sums up the
statistics of every group norm, and a second pass normalises with them: neighbouring tiles agree, without blending. The
middle of the network, which has the attention, is small and runs on the whole image. The result is approximate in one
point: the first pass normalises each tile with the tile's own statistics.

B batch, C channels, H×W height and width of the image, h×w height and width of the latents
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.autoencoder import Autoencoder, AutoencoderKL, DiagonalGaussian, PointPosterior, VQModel
from ldm.models.surgery import twin


def sliced_decode(autoencoder: Autoencoder, z: Tensor, size: int = 1) -> Tensor:
    """`autoencoder.decode(z)`, `size` images of the batch at a time."""
    return torch.cat([autoencoder.decode(part) for part in z.split(size)])


def sliced_encode(autoencoder: Autoencoder, x: Tensor, size: int = 1) -> DiagonalGaussian | PointPosterior:
    """`autoencoder.encode(x)`, `size` images of the batch at a time."""
    parts = [autoencoder.encode(part) for part in x.split(size)]
    if isinstance(autoencoder, AutoencoderKL):
        return DiagonalGaussian(*(torch.cat([getattr(p, name) for p in parts]) for name in ("mean", "logvar")))
    return PointPosterior(torch.cat([part.mode() for part in parts]))


def tiled_decode(autoencoder: Autoencoder, z: Tensor, tile: int = 0) -> Tensor:
    """`autoencoder.decode(z)` in tiles of `tile`×`tile` latents (default: the size of the training images).

    Raises:
        LdmError: the tile is smaller than 4 latents.
    """
    config, decoder = autoencoder.config, autoencoder.decoder
    tile = _checked(tile or config.sample_size // config.factor)
    if max(z.shape[2:]) <= tile:
        return autoencoder.decode(z)
    if isinstance(autoencoder, VQModel):
        z = autoencoder.quantize(z)[0]
    middle = decoder.mid_block(decoder.conv_in(autoencoder.post_quant_conv(z)))
    levels = len(config.channels)
    margin = sum(-(-(2 * config.layers + 3) // 2**level) for level in range(levels))
    end = nn.Sequential(*decoder.up_blocks, decoder.conv_norm_out, nn.SiLU(), decoder.conv_out)
    return _tiled(end, middle, tile, margin, config.factor, 1)


def tiled_encode(autoencoder: Autoencoder, x: Tensor, tile: int = 0) -> DiagonalGaussian | PointPosterior:
    """`autoencoder.encode(x)` in tiles of `tile`×`tile` pixels, rounded down to whole latents (default as in decoding).

    Raises:
        LdmError: the tile is smaller than 4 latents.
    """
    config, encoder = autoencoder.config, autoencoder.encoder
    factor = config.factor
    tile = _checked((tile or config.sample_size) // factor) * factor
    if max(x.shape[2:]) <= tile:
        return autoencoder.encode(x)
    margin = sum((2 * config.layers + 2) * 2**level for level in range(len(config.channels)))
    start = nn.Sequential(encoder.conv_in, *encoder.down_blocks)
    middle = _tiled(start, x, tile, -(-margin // factor) * factor, 1, factor)
    features = encoder.conv_out(F.silu(encoder.conv_norm_out(encoder.mid_block(middle))))
    return autoencoder.posterior(autoencoder.quant_conv(features))


def _checked(tile: int) -> int:
    if tile < 4:
        raise LdmError(f"a tile of {tile} latents is too small: at least 4 on each side are needed")
    return tile


Box = tuple[slice, slice]  # rows and columns


class SharedNorm(nn.Module):
    """A group norm for tiles: first sums up the statistics of all tiles without margins, then normalises with them."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm
        self.count = 0
        self.sums: Tensor | float = 0.0  # sums of values and of squares: (2, B, groups), float64
        self.inner: Box | None = None  # in the first pass, the current tile without margins; None: second pass
        self.height = 0  # height of the current tile with margins at the network's input

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (self.norm.num_groups, -1)).float()  # (B, G, C/G, H, W)
        if self.inner:
            scale = x.shape[2] / self.height
            rows, columns = (slice(round(side.start * scale), round(side.stop * scale)) for side in self.inner)
            inside = groups[:, :, :, rows, columns]
            variance, mean = torch.var_mean(inside, dim=(2, 3, 4), correction=0)
            size = inside[0, 0].numel()
            self.sums = self.sums + size * torch.stack([mean, variance + mean**2]).double()
            self.count += size
            return self.norm(x)
        mean, square = self.sums / self.count  # type: ignore[misc]
        deviation = (square - mean**2 + self.norm.eps).sqrt()
        mean, deviation = (value.float()[:, :, None, None, None] for value in (mean, deviation))
        weight, bias = (p.float().view(1, -1, 1, 1) for p in (self.norm.weight, self.norm.bias))
        return (((groups - mean) / deviation).flatten(1, 2) * weight + bias).to(x.dtype)


def _tiled(module: nn.Module, x: Tensor, tile: int, margin: int, up: int, down: int) -> Tensor:
    """Run `module` on `x` in tiles with margins; the result has the size of `x` times `up` divided by `down`."""
    module = twin(module)  # this call needs its own norms, because other threads may be using the module
    norms = _share_norms(module)
    height, width = x.shape[2:]
    boxes = [
        (slice(top, min(top + tile, height)), slice(left, min(left + tile, width)))
        for top in range(0, height - down + 1, tile)
        for left in range(0, width - down + 1, tile)
    ]
    out: Tensor | None = None
    for adding in (True, False):
        for box in boxes:
            starts = [max(side.start - margin, 0) for side in box]
            rows, columns = (slice(start, side.stop + margin) for start, side in zip(starts, box, strict=True))
            inner = tuple(slice(b.start - start, b.stop - start) for b, start in zip(box, starts, strict=True))
            piece = x[:, :, rows, columns]
            for norm in norms:
                norm.inner, norm.height = (inner[0], inner[1]) if adding else None, piece.shape[2]
            part = module(piece)
            if adding:
                continue
            if out is None:
                out = part.new_empty(*part.shape[:2], height // down * up, width // down * up)
            place = out[:, :, _scaled(box[0], up, down), _scaled(box[1], up, down)]
            y, z = (side.start * up // down for side in inner)
            place.copy_(part[:, :, y : y + place.shape[2], z : z + place.shape[3]])
    assert out is not None
    return out


def _scaled(side: slice, up: int, down: int) -> slice:
    return slice(side.start * up // down, side.stop * up // down)


def _share_norms(module: nn.Module) -> list[SharedNorm]:
    """Replace every group norm of a module by a `SharedNorm`."""
    norms = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                norms.append(SharedNorm(child))
                setattr(parent, name, norms[-1])
    return norms
