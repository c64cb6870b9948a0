"""Group norm and GEGLU on GPUs, in Triton: each reads memory once for its sums, if it has any, and once for its result.

An image's statistics are shared out among many programs, as one for each group would leave most of a GPU idle: a
program takes some groups of a chunk of pixels, and the next kernel puts the chunks together. There are no atomics, and
what a program does depends on the shape of one image alone: results do not change from run to run, nor with the
batch. All is computed in fp32, whatever comes in. Configurations are fixed: nothing is tuned while it runs. Nothing
waits for the GPU either, so that all of it may be captured in a CUDA graph, once it has run with that shape.

B batch, C channels, P pixels of an image, G groups; images lie channels last: (B, P, C)
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

FEW = 256  # pixels which a program takes alone, without chunks
TILE = 4096  # numbers that a program has in its registers at a time
WARPS = {"num_warps": 8, "enable_fp_fusion": True}
FEWER = {"num_warps": 4, "enable_fp_fusion": True}
CHUNKS = 128  # chunks whose statistics are read at a time
ROWS, COLUMNS = 8, 256  # of GEGLU: the inner widths of all released models are multiples of 256
# arguments whose values do not specialise a kernel
NUMBERS = ["has_offset", "eps", "pixels", "groups", "per_group", "length", "chunks"]


class Share(NamedTuple):
    """The share of an image's channels that one program takes."""

    width: int  # channels, of whole groups
    tile_c: int  # the power of two that holds them
    tile_p: int  # pixels at a time
    tile_g: int  # a power of two that holds its groups


def group_norm(norm: nn.GroupNorm, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
    """`norm` of images (B, C, H, W) that lie channels last, plus an offset (B, C); with `silu`, SiLU of it.

    Wu and He 2018 (arXiv 1803.08494). Means and variances are updated number by number (Welford 1962) and put together
    by Chan, Golub and LeVeque's formula (1979): a mean that is large beside the spread does no harm, as it would to
    sums of squares.
    """
    batch, channels, height, width = x.shape
    pixels, groups = height * width, norm.num_groups
    out = torch.empty_like(x)
    offset = None if offset is None else offset.expand(batch, channels).contiguous()
    given = (x, x if offset is None else offset, int(offset is not None))  # a pointer must point somewhere
    shape = (pixels, channels, groups, channels // groups)
    share = shared(channels, groups)
    blocks = triton.cdiv(channels, share.width)
    with torch.cuda.device_of(x):
        if pixels <= FEW:
            _whole[blocks, batch](*given, norm.weight, norm.bias, out, norm.eps, *shape, silu, *share, **WARPS)
            return out
        length = chunk(pixels)
        chunks = triton.cdiv(pixels, length)
        means, squares = x.new_empty(2, batch, chunks, groups, dtype=torch.float32)
        grid = (blocks, chunks, batch)
        _chunk_moments[grid](*given, means, squares, *shape, length, chunks, *share, **WARPS)
        _chunk_normalised[grid](
            *given, means, squares, norm.weight, norm.bias, out, norm.eps, *shape, length, chunks, silu, CHUNKS, *share,
            **WARPS,
        )  # fmt: skip
    return out


def geglu(x: Tensor, bias: Tensor) -> Tensor:
    """GEGLU of `x` (…, 2 C) plus a bias (2 C,), the first half of the channels times GELU of the second: (…, C).

    Shazeer 2020 (arXiv 2002.05202), with the exact GELU.
    """
    x = x.contiguous()
    channels = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], channels)
    rows = out.numel() // channels
    with torch.cuda.device_of(x):
        _geglu[triton.cdiv(rows, ROWS), triton.cdiv(channels, COLUMNS)](
            x, bias, out, rows, channels, ROWS, COLUMNS, **FEWER
        )
    return out


@cache
def shared(channels: int, groups: int) -> Share:
    """Each program's share: whole groups, so many that reads are aligned and few places of a tile stay empty."""
    per_group = channels // groups

    def tile(count: int) -> int:
        return max(64, triton.next_power_of_2(count * per_group))

    def waste(count: int) -> tuple[int, int, int]:
        return -math.gcd(count * per_group, 8), triton.cdiv(groups, count) * tile(count), tile(count)

    count = min((n for n in range(1, groups + 1) if n == 1 or n * per_group <= 256), key=waste)
    tile_c = tile(count)
    tile_g = max(16, triton.next_power_of_2(count))  # one kernel for several widths
    return Share(count * per_group, tile_c, max(1, TILE // tile_c), tile_g)


def chunk(pixels: int) -> int:
    """Pixels of a chunk: a power of two near 2 √P, so that neither pixels of a chunk nor chunks to combine are many."""
    return max(64, 1 << math.isqrt(4 * pixels - 1).bit_length())


@triton.jit
def _columns(
    block: tl.tensor, channels: int, per_group: int, width: tl.constexpr, tile_c: tl.constexpr, tile_g: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A program's channels (tile_c,), a mask of those that exist, and the members of each group (tile_g, tile_c)."""
    column = tl.arange(0, tile_c)
    c = block * width + column
    here = (column < width) & (c < channels)
    member = (column // per_group)[None, :] == tl.arange(0, tile_g)[:, None]
    return c, here, member & here[None, :]


@triton.jit
def _groups(
    block: tl.tensor, groups: int, per_group: int, width: tl.constexpr, tile_g: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A program's groups (tile_g,), and a mask of those that exist."""
    group = tl.arange(0, tile_g)
    g = block * (width // per_group) + group
    return g, (group < width // per_group) & (g < groups)


@triton.jit
def _added(offset: tl.tensor, has_offset: int, here: tl.tensor) -> tl.tensor:
    """The offset of each channel in fp32, 0 where there is none (what `offset` points to then is not used)."""
    return tl.where(has_offset > 0, tl.load(offset, mask=here, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _of_groups(values: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Sums over the channels of each group: (tile_c,) to (tile_g,). A number that is not finite stays in its group."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def _of_channels(values: tl.tensor, member: tl.tensor) -> tl.tensor:
    """To each channel its group's number: (tile_g,) to (tile_c,)."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def _moments(
    x: tl.tensor, added: tl.tensor, c: tl.tensor, here: tl.tensor, member: tl.tensor, begin: int, end: int,
    channels: int, per_group: int, tile_c: tl.constexpr, tile_p: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Each group's mean over pixels `begin` to `end`, and the sum of squared distances from it."""
    row = tl.arange(0, tile_p)
    at = row[:, None] * channels + c[None, :]
    step = tl.cast(channels, tl.int64)
    mean = tl.zeros((tile_p, tile_c), tl.float32)  # the mean of each place of the tile so far
    square = tl.zeros((tile_p, tile_c), tl.float32)
    number = 0.0
    for p in range(begin, end, tile_p):
        number += 1.0
        valid = (row < end - p)[:, None] & here[None, :]
        value = tl.load(x + p * step + at, mask=valid, other=0.0).to(tl.float32) + added[None, :]
        away = tl.where(valid, value - mean, 0.0)
        mean += away * (1.0 / number)
        square += away * (value - mean)
    seen = ((end - begin - row + tile_p - 1) // tile_p).to(tl.float32)[:, None]  # pixels in each row of the tile
    total = tl.cast(end - begin, tl.float32) * per_group
    center = _of_groups(tl.sum(seen * mean, axis=0), member) / total
    away = mean - _of_channels(center, member)[None, :]
    return center, _of_groups(tl.sum(square + seen * away * away, axis=0), member)


@triton.jit
def _normalise(
    x: tl.tensor, out: tl.tensor, added: tl.tensor, weight: tl.tensor, bias: tl.tensor, eps: float, center: tl.tensor,
    variance: tl.tensor, c: tl.tensor, here: tl.tensor, member: tl.tensor, begin: int, end: int, channels: int,
    silu: tl.constexpr, tile_p: tl.constexpr,
) -> None:  # fmt: skip
    """Write pixels `begin` to `end`, with each group's mean and variance."""
    scale = _of_channels(tl.rsqrt(variance + eps), member)
    scale *= tl.load(weight + c, mask=here, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    center = _of_channels(center, member) - added
    row = tl.arange(0, tile_p)
    at = row[:, None] * channels + c[None, :]
    step = tl.cast(channels, tl.int64)
    for p in range(begin, end, tile_p):
        valid = (row < end - p)[:, None] & here[None, :]
        value = tl.load(x + p * step + at, mask=valid, other=0.0).to(tl.float32)
        value = (value - center[None, :]) * scale[None, :]  # the difference first, as the mean may be large
        value += shift[None, :]
        if silu:
            value = value / (1.0 + tl.exp(-value))
        tl.store(out + p * step + at, value.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=NUMBERS)
def _whole(
    x: tl.tensor, offset: tl.tensor, has_offset: int, weight: tl.tensor, bias: tl.tensor, out: tl.tensor,
    eps: float, pixels: int, channels: int, groups: int, per_group: int, silu: tl.constexpr, width: tl.constexpr,
    tile_c: tl.constexpr, tile_p: tl.constexpr, tile_g: tl.constexpr,
) -> None:  # fmt: skip
    """A program for each of (blocks of groups, images): statistics and result."""
    c, here, member = _columns(tl.program_id(0), channels, per_group, width, tile_c, tile_g)
    image = tl.program_id(1)
    start = image.to(tl.int64) * pixels * channels
    added = _added(offset + image * channels + c, has_offset, here)
    center, square = _moments(x + start, added, c, here, member, 0, pixels, channels, per_group, tile_c, tile_p)
    variance = square / (tl.cast(pixels, tl.float32) * per_group)
    _normalise(
        x + start, out + start, added, weight, bias, eps, center, variance, c, here, member, 0, pixels, channels, silu,
        tile_p,
    )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _chunk_moments(
    x: tl.tensor, offset: tl.tensor, has_offset: int, means: tl.tensor, squares: tl.tensor, pixels: int,
    channels: int, groups: int, per_group: int, length: int, chunks: int, width: tl.constexpr, tile_c: tl.constexpr,
    tile_p: tl.constexpr, tile_g: tl.constexpr,
) -> None:  # fmt: skip
    """A program for each of (blocks of groups, chunks, images): statistics, to (B, chunks, G)."""
    c, here, member = _columns(tl.program_id(0), channels, per_group, width, tile_c, tile_g)
    number, image = tl.program_id(1), tl.program_id(2)
    start = image.to(tl.int64) * pixels * channels
    added = _added(offset + image * channels + c, has_offset, here)
    begin = number * length
    center, square = _moments(
        x + start, added, c, here, member, begin, tl.minimum(begin + length, pixels), channels, per_group, tile_c,
        tile_p,
    )  # fmt: skip
    g, own = _groups(tl.program_id(0), groups, per_group, width, tile_g)
    at = (image * chunks + number) * groups + g
    tl.store(means + at, center, mask=own)
    tl.store(squares + at, square, mask=own)


@triton.jit(do_not_specialize=NUMBERS)
def _chunk_normalised(
    x: tl.tensor, offset: tl.tensor, has_offset: int, means: tl.tensor, squares: tl.tensor, weight: tl.tensor,
    bias: tl.tensor, out: tl.tensor, eps: float, pixels: int, channels: int, groups: int, per_group: int, length: int,
    chunks: int, silu: tl.constexpr, tile_k: tl.constexpr, width: tl.constexpr, tile_c: tl.constexpr,
    tile_p: tl.constexpr, tile_g: tl.constexpr,
) -> None:  # fmt: skip
    """A program for each of (blocks of groups, chunks, images): the statistics of all chunks, and its own result."""
    c, here, member = _columns(tl.program_id(0), channels, per_group, width, tile_c, tile_g)
    number, image = tl.program_id(1), tl.program_id(2)
    start = image.to(tl.int64) * pixels * channels
    added = _added(offset + image * channels + c, has_offset, here)
    g, own = _groups(tl.program_id(0), groups, per_group, width, tile_g)
    k = tl.arange(0, tile_k)
    at = image * chunks * groups + k[:, None] * groups + g[None, :]
    center = tl.zeros((tile_g,), tl.float32)
    for first in range(0, chunks, tile_k):
        there = (k < chunks - first)[:, None] & own[None, :]
        part = tl.minimum(pixels - (first + k) * length, length).to(tl.float32) / pixels  # of the image's pixels
        center += tl.sum(part[:, None] * tl.load(means + first * groups + at, mask=there, other=0.0), axis=0)
    square = tl.zeros((tile_g,), tl.float32)
    for first in range(0, chunks, tile_k):
        there = (k < chunks - first)[:, None] & own[None, :]
        weights = tl.minimum(pixels - (first + k) * length, length).to(tl.float32) * per_group
        away = tl.load(means + first * groups + at, mask=there, other=0.0) - center[None, :]
        away = tl.where(there, weights[:, None] * away * away, 0.0)
        square += tl.sum(away + tl.load(squares + first * groups + at, mask=there, other=0.0), axis=0)
    variance = square / (tl.cast(pixels, tl.float32) * per_group)
    begin = number * length
    _normalise(
        x + start, out + start, added, weight, bias, eps, center, variance, c, here, member, begin,
        tl.minimum(begin + length, pixels), channels, silu, tile_p,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _geglu(
    x: tl.tensor, bias: tl.tensor, out: tl.tensor, rows: int, channels: int, tile_r: tl.constexpr, tile_c: tl.constexpr
) -> None:
    """A program for each of (blocks of rows, blocks of channels)."""
    row = tl.program_id(0) * tile_r + tl.arange(0, tile_r)
    c = tl.program_id(1) * tile_c + tl.arange(0, tile_c)
    here = c < channels
    valid = (row < rows)[:, None] & here[None, :]
    at = row.to(tl.int64)[:, None] * channels
    value = tl.load(x + 2 * at + c[None, :], mask=valid, other=0.0).to(tl.float32)
    gate = tl.load(x + 2 * at + channels + c[None, :], mask=valid, other=0.0).to(tl.float32)
    value += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + channels + c, mask=here, other=0.0).to(tl.float32)[None, :]
    value *= gate * (0.5 + 0.5 * tl.math.erf(gate * 0.7071067811865476))
    tl.store(out + at + c[None, :], value.to(out.dtype.element_ty), mask=valid)
