"""Batching: the number of images made at a time, by default as many as keep a device busy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import torch

from ldm.families import Family
from ldm.models.prompts import count_chunks
from ldm.models.text import TextEncoders
from pipelines.request import Request

BUSY = {"cuda": 2**16, "mps": 2**14, "cpu": 2**12}  # pixels of latents in a batch that keeps a device busy
DECODED = 2**20  # pixels of images in one call of an autoencoder, which takes more memory than a U-Net


def together(request: Request, family: Family, device: torch.device) -> int:
    """The default batch size of a request; 1 if an image's noise would depend on the others in its batch."""
    latents = (request.height // family.autoencoder.factor) * (request.width // family.autoencoder.factor)
    return 1 if request.rng == "diffusers" else max(1, BUSY.get(device.type, 1) // latents)


def decodable(height: int, width: int) -> int:
    """The number of images of a size that one call of an autoencoder decodes."""
    return max(1, DECODED // (height * width))


def shared(count: int, most: int) -> int:
    """The size of the next batch of `count` images, so that batches of at most `most` are about equally large."""
    batches = -(-count // most)
    return -(-count // batches)


def batch_ranges(request: Request, most: int, encoders: TextEncoders) -> Iterator[range]:
    """The batches of a request, as ranges of its images: of its `batch` setting or else of at most `most` images."""
    done, count = 0, len(request.prompts)
    while done < count:
        next_ones = request.part(slice(done, done + (request.batch or shared(count - done, most))))
        end = done + alike(next_ones, encoders)
        yield range(done, end)
        done = end


def alike(request: Request, encoders: TextEncoders) -> int:
    """The number of a request's first images that can share a batch: with the same adapters, at the same weights, and
    with equally many chunks of their prompts.

    In a batch with a longer prompt, a prompt would be padded with empty chunks, which changes its image.
    """
    same = next((row for row, mix in enumerate(request.mixes) if mix != request.mixes[0]), len(request.prompts))
    if same == 1 or not request.chunks:
        return same
    both = request.part(slice(same)).texts(len(encoders.configs))
    counts = [count_chunks(encoders, texts, request.reader) for texts in both if texts[0]]
    first, *others = zip(*counts, strict=True)
    return 1 + len(list(takewhile(lambda row: max(row) == max(first), others)))
