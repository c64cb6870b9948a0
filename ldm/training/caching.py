"""The cache of latents and encoded captions: written once before a stage, and read in place of images and captions."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator

from ldm.data.cache import Latents, Texts, build_latents, build_texts
from ldm.data.plan import BatchPlan
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning
from ldm.training.conditioning import encode
from ldm.training.images import TrainingImages
from ldm.training.stages.denoiser import encode_images
from ldm.training.stages.stage import Cached, EncodeTexts
from ldm.weights.components import fingerprint

log = logging.getLogger(__name__)
EVERY = 10.0  # seconds between log lines while a cache is built


@dataclass(frozen=True)
class Caches:
    """The opened cache of a stage."""

    latents: Sequence[Latents] = ()  # at each resolution; empty: images are encoded in each step
    texts: EncodeTexts | None = None
    prior: Sequence[Latents] = ()  # of class images, at each resolution


class CachingLog:
    """Logs the progress of a cache."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.said > EVERY:
            self.said = time.monotonic()
            log.info("encoding %s: %d of %d", self.what, done, total)


def build_caches(
    wanted: Cached,
    model: LatentDiffusion,
    data: TrainingImages,
    plans: Sequence[BatchPlan],
    accelerator: Accelerator,
    prompts: Sequence[str] = (),
) -> Caches:
    """Encode the latents and captions that the cache lacks, and open it; all processes call it.

    Args:
        wanted: whether latents, and whether captions, are cached.
        model: its autoencoder and text encoders encode them.
        data: the run's images.
        plans: the batches at each resolution.
        accelerator: of the stage.
        prompts: further captions.
    """
    assert data.images is not None
    rank, world = accelerator.process_index, accelerator.num_processes
    latents_of, texts_of = (  # the precision, because the same network gives other numbers in 16 bits
        f"{fingerprint(network)} {accelerator.mixed_precision}"
        for network in ({"vae": model.autoencoder}, {"text": model.text_encoders})
    )

    @torch.no_grad()
    def encode_captions(captions: list[str]) -> dict[str, torch.Tensor]:
        with accelerator.autocast():
            cond = encode(model.text_encoders, [captions] * len(model.family.text))
        return {"text": cond.text} | ({} if cond.pooled is None else {"pooled": cond.pooled})

    if wanted.latents:
        for plan in plans:
            build_latents(
                data.folder, plan, latents_of, partial(encode_images, model.autoencoder, accelerator),
                workers=data.section.workers, rank=rank, world=world, report=CachingLog("images"),
            )  # fmt: skip
    if wanted.texts:
        build_texts(
            data.folder, [*data.images.captions(), *prompts], texts_of, encode_captions,
            rank=rank, world=world, report=CachingLog("captions"),
        )  # fmt: skip
    accelerator.wait_for_everyone()
    return Caches(
        [Latents(data.folder, plan, latents_of) for plan in plans] if wanted.latents else [],
        _cached_encode(Texts(data.folder, texts_of), model, accelerator.device) if wanted.texts else None,
    )


def _cached_encode(cache: Texts, model: LatentDiffusion, device: torch.device) -> EncodeTexts:
    """A function like `conditioning.encode` that reads the cache, each text encoder's channels by its own text."""
    widths = [config.width for config in model.family.text]

    def read(texts: list[list[str]]) -> Conditioning:
        columns = [cache.read(column) for column in texts]
        parts = [column["text"].split(widths, dim=-1)[k] for k, column in enumerate(columns)]
        pooled = columns[-1].get("pooled")
        return Conditioning(torch.cat(parts, dim=-1).to(device), None if pooled is None else pooled.to(device))

    return read
