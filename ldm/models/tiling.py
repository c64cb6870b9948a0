"""Encode and decode large pictures piece by piece, so that memory depends on the piece and not on the picture.

Neighbouring tiles overlap, and in the overlap one fades linearly into the other. The weights fall to zero at the edges
of a tile, so the result has no jump where a tile begins or ends: what remains is that each tile sees its own
surroundings only (its own group-norm statistics and its own attention).

B batch, C channels, H×W height and width of the picture, h×w those of the latents
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.autoencoder import Autoencoder, AutoencoderKL, DiagonalGaussian, Point


def sliced_decode(autoencoder: Autoencoder, z: Tensor, size: int = 1) -> Tensor:
    """`autoencoder.decode(z)`, `size` images of the batch at a time."""
    return torch.cat([autoencoder.decode(part) for part in z.split(size)])


def sliced_encode(autoencoder: Autoencoder, x: Tensor, size: int = 1) -> DiagonalGaussian | Point:
    """`autoencoder.encode(x)`, `size` images of the batch at a time."""
    return _posterior(torch.cat([_numbers(autoencoder.encode(part)) for part in x.split(size)]), autoencoder)


def _numbers(posterior: DiagonalGaussian | Point) -> Tensor:
    """A posterior as one tensor (B, C, h, w)."""
    return (
        torch.cat([posterior.mean, posterior.logvar], 1) if isinstance(posterior, DiagonalGaussian) else posterior.value
    )


def _posterior(numbers: Tensor, autoencoder: Autoencoder) -> DiagonalGaussian | Point:
    return DiagonalGaussian(*numbers.chunk(2, 1)) if isinstance(autoencoder, AutoencoderKL) else Point(numbers)


def tiled_decode(autoencoder: Autoencoder, z: Tensor, tile: int = 0, overlap: float = 0.25) -> Tensor:
    """`autoencoder.decode(z)` in tiles of `tile`×`tile` latents (default: what the autoencoder was trained on).

    Raises:
        LdmError: the tile is smaller than 4 latents, or the overlap is not in [0, 0.5].
    """
    config = autoencoder.config
    tile = tile or config.sample_size // config.factor
    return _tiled(autoencoder.decode, z, tile, overlap, config.factor, 1)


def tiled_encode(autoencoder: Autoencoder, x: Tensor, tile: int = 0, overlap: float = 0.25) -> DiagonalGaussian | Point:
    """`autoencoder.encode(x)` in tiles of `tile`×`tile` pixels, rounded down to whole latents (default as above).

    Raises:
        LdmError: as `tiled_decode`.
    """
    factor = autoencoder.config.factor
    tile = (tile or autoencoder.config.sample_size) // factor * factor
    numbers = _tiled(lambda t: _numbers(autoencoder.encode(t)), x, tile, overlap, 1, factor)
    return _posterior(numbers, autoencoder)


def _tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: float, up: int, down: int) -> Tensor:
    """Weighted mean of `function` on overlapping tiles; the result is `up` times larger and `down` times smaller."""
    if tile // down < 4 or not 0 <= overlap <= 0.5:
        raise LdmError(
            f"tile of {tile} with overlap {overlap}: a tile must span at least 4 latents, the overlap lie in [0, 0.5]"
        )
    if max(x.shape[2:]) <= tile:
        return function(x)
    total: Tensor | None = None
    weights = torch.zeros(())
    for top in _starts(x.shape[2], tile, overlap, down):
        for left in _starts(x.shape[3], tile, overlap, down):
            part = function(x[:, :, top : top + tile, left : left + tile])
            if total is None:
                size = [side // down * up for side in x.shape[2:]]
                total = part.new_zeros(*part.shape[:2], *size, dtype=torch.float32)
                weights = total.new_zeros(size)
            height, width = part.shape[2:]
            weight = _fade(height, overlap, total)[:, None] * _fade(width, overlap, total)[None, :]
            rows, columns = (slice(a * up // down, a * up // down + n) for a, n in ((top, height), (left, width)))
            total[:, :, rows, columns] += part * weight
            weights[rows, columns] += weight
            dtype = part.dtype
    assert total is not None
    return (total / weights).to(dtype)


def _starts(side: int, tile: int, overlap: float, unit: int) -> list[int]:
    """Where tiles begin along a side: evenly spread, multiples of `unit`, neighbours sharing at least `overlap`."""
    if side <= tile:
        return [0]
    last = -(-(side - tile) // unit) * unit  # the last tile may be a little smaller, but is aligned like the others
    step = max(unit, int(tile * (1 - overlap)) // unit * unit)
    count = -(-last // step)
    return [round(i * last / count / unit) * unit for i in range(count + 1)]


def _fade(side: int, overlap: float, like: Tensor) -> Tensor:
    """Weights along a tile's side: up from almost 0 over the overlap, 1, and down again."""
    ramp = max(1, int(side * overlap))
    distance = torch.arange(side, device=like.device, dtype=torch.float32) + 0.5
    return torch.minimum(distance, side - distance).clamp(max=ramp) / ramp
