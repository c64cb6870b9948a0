"""The stage `text`: the text encoders learn which caption belongs to which image, together with an image encoder.

Radford et al. 2021 (arXiv 2103.00020), section 2.3: an image should be nearer to its own caption than to all others
in the batch, and a caption nearer to its own image. The batch is the global one, over all ranks. Two pairs with the
same caption, or of the same image, are no negatives of each other: they are left out of the softmax. The loss reaches
all layers of the text encoders, so the last but one, which SDXL's U-Net reads, learns too.

B pairs of this rank, N of all ranks, K text encoders, M tokens, D channels in which images and texts are compared
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ldm.data.image_set import ImageSet
from ldm.data.keyed import generator
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.contrastive import LARGEST_SCALE, ContrastivePair, ImageEncoderConfig
from ldm.models.text import TextEncoders
from ldm.training.stages.sections import TextSection
from ldm.training.stages.stage import ForwardPasses, Learner, Loss, StageInputs, freeze, trained
from ldm.weights.components import Components
from ldm.weights.contrastive import write_clip

EMBED_DIM = 512  # if no text encoder has a projection
AT_ONCE = 1024  # rows of a validation's comparisons in memory


class Everywhere(torch.autograd.Function):
    """Gathers the rows (B, …) of each rank to those of all ranks (N, …), with the gradient of the sum of all ranks'
    losses."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, accelerator: Accelerator) -> Tensor:
        ctx.accelerator, ctx.rows = accelerator, len(rows)
        return accelerator.gather(rows.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        first = ctx.accelerator.process_index * ctx.rows
        return ctx.accelerator.reduce(gradients[0].contiguous(), "sum")[first : first + ctx.rows], None


def compare(
    images: Tensor, texts: Tensor, scale: Tensor, same: Tensor, all_images: Tensor, all_texts: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of some pairs among all, and how often a pair's own counterpart is the nearest: () each.

    The loss is that of Radford et al. 2021, figure 3, with the pairs in `same` left out of the softmax.

    Args:
        images: unit vectors (B, D).
        texts: unit vectors (B, D) of the images' captions.
        scale: of the logits, ().
        same: (B, N), a mask of the pairs that must not count as negatives.
        all_images: unit vectors (N, D).
        all_texts: unit vectors (N, D).
        first: index of the first of the B pairs among all pairs.
    """
    own = first + torch.arange(len(images), device=images.device)
    left_out = same.scatter(1, own[:, None], False)
    losses, hits = [], []
    for queries, targets in ((images, all_texts), (texts, all_images)):
        logits = (scale * queries @ targets.T).masked_fill(left_out, -math.inf)
        losses.append(F.cross_entropy(logits, own))
        hits.append((logits.argmax(dim=1) == own).float().mean())
    return torch.stack(losses).mean(), torch.stack(hits).mean()


def retrieval(queries: Tensor, targets: Tensor, right: Tensor, most: tuple[int, ...] = (1, 5)) -> list[float]:
    """Recall: the part of the queries (Q, D) that have a right target (T, D) among the nearest 1, the nearest 5.

    `right` is (Q, T). A wrong target that is as near as the right one counts as nearer.
    """
    ranks = []
    for some, correct in zip(queries.split(AT_ONCE), right.split(AT_ONCE), strict=True):
        nearness = some @ targets.T
        best = nearness.masked_fill(~correct, -math.inf).amax(dim=1, keepdim=True)
        ranks.append(((nearness >= best) & ~correct).sum(dim=1))
    return [(torch.cat(ranks) < few).float().mean().item() for few in most]


def learners(section: TextSection, parts: Components) -> dict[str, Learner]:
    """Image encoder and text encoders, as one network."""
    freeze(parts)
    pair = contrastive_pair(section, parts.text_encoders).requires_grad_(True).train()
    if section.image_only:  # locked text encoders; Zhai et al. 2022 (arXiv 2111.07991) lock the image encoder
        pair.text_encoders.requires_grad_(False)
    parameters, rate = trained(pair), section.optimizer.learning_rate
    return {
        "pair": Learner(
            pair,
            [([p for p in parameters if p.ndim > 1], rate)],
            undecayed=[([p for p in parameters if p.ndim < 2], rate)],  # biases, norms, scales
        )
    }


def passes(
    section: TextSection, parts: Components, found: Mapping[str, Learner], size: int, cached: bool
) -> ForwardPasses:
    """An image and its caption; text encoders that do not learn are run without gradient."""
    pair = found["pair"].module
    assert isinstance(pair, ContrastivePair)
    image = torch.empty(1, 3, size, size, device="meta")
    texts = [torch.zeros(1, tower.context, dtype=torch.long, device="meta") for tower in parts.family.text]
    if section.image_only:
        return ForwardPasses(lambda: pair.embed_images(image), [lambda: pair.embed_texts(texts)])
    return ForwardPasses(lambda: torch.stack([part.mean() for part in pair(image, texts)[:2]]).sum())


class ContrastiveStage:
    """Training of the text encoders, with an image encoder that is written beside the model at the end."""

    name = "text"
    divisible = False  # each pair is compared with all others

    def __init__(
        self,
        section: TextSection,
        model: LatentDiffusion,
        accelerator: Accelerator,
        seed: int,
        sides: Iterable[tuple[int, int]],
        folder: Path,
    ) -> None:
        """Args:
            section: of the configuration.
            model: on the accelerator's device, weights in fp32.
            accelerator: gathers over the ranks.
            seed: of the image encoder's random weights.
            sides: width and height of every bucket, in pixels.
            folder: of the stage; the image encoder goes to `clip` in it.

        Raises:
            LdmError: a setting does not fit the model, the images or the batch.
        """
        self.section, self.model, self.accelerator, self.folder = section, model, accelerator, folder
        _check_batches(section, accelerator.num_processes)
        self.names = [config.component for config in model.text_encoders.configs]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator(seed, "image encoder").initial_seed())
            found = learners(section, model)
        pair = found["pair"].module.to(accelerator.device)
        assert isinstance(pair, ContrastivePair)
        for bucket in sides:
            pair.config.check_sides(*bucket)
        self.players = {name: learner.player(section.optimizer) for name, learner in found.items()}
        self.extra: dict[str, nn.Module] = {}
        self.fixed: Mapping[str, str] = {}

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The contrastive loss, the mean over the text encoders."""
        tokens, numbers = self.read(batch)
        images, texts, scales = self.players["pair"].module(batch.pixels, tokens)
        first = self.accelerator.process_index * len(images)
        all_numbers = self.accelerator.gather(numbers)
        all_images = Everywhere.apply(images, self.accelerator)
        losses: list[Tensor] = []
        report: dict[str, Tensor] = {}
        for k, name in enumerate(self.names):
            same = _same(numbers, all_numbers, k)
            all_texts = Everywhere.apply(texts[k], self.accelerator)
            loss, hits = compare(images, texts[k], scales[k], same, all_images, all_texts, first)
            losses.append(loss)
            report |= {f"accuracy/{name}": hits.detach(), f"scale/{name}": scales[k].detach()}
            report[f"negatives/{name}"] = (~same).sum(dim=1).float().mean()
        yield Loss("pair", torch.stack(losses).mean(), report)

    def read(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Token ids (B, M) for each text encoder; and for each pair its caption, as each text encoder reads it, and
        its image, as numbers (B, K + 1)."""
        tokens = self.model.text_encoders.tokenize(batch.captions)
        columns = [[_number(row.tobytes()) for row in ids.numpy()] for ids in tokens]
        columns.append([_number(ascii(key).encode()) for key in batch.keys])
        device = self.accelerator.device
        return [ids.to(device) for ids in tokens], torch.tensor(columns, device=device).T.contiguous()

    def forget(self) -> None:
        """Nothing to drop: steps keep no state."""

    @torch.no_grad()
    def updated(self, step: int) -> dict[str, float]:
        """Keep the scales of the logits from growing beyond 100 (Radford et al. 2021, section 2.5)."""
        self.accelerator.unwrap_model(self.players["pair"].module).heads.log_scales.clamp_(max=math.log(LARGEST_SCALE))
        return {}

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss and the recall in both directions, over all held-out pairs at once.

        An image should find its caption among the distinct held-out ones, and a caption one of its images.
        """
        module, device = self.accelerator.unwrap_model(self.players["pair"].module), self.accelerator.device
        count, channels = len(self.names), module.config.embed_dim
        images, texts = [torch.zeros(0, channels, device=device)], [torch.zeros(0, count, channels, device=device)]
        numbers = [torch.zeros(0, count + 1, dtype=torch.int64, device=device)]
        for batch in batches:
            tokens, some = self.read(batch)
            one, other, _ = module(batch.pixels, tokens)
            images.append(one)
            texts.append(other.transpose(0, 1))
            numbers.append(some)
        scales = module.heads.log_scales.exp()
        all_images, all_texts, all_numbers = (self.everyone(torch.cat(rows)) for rows in (images, texts, numbers))
        if not len(all_images):
            return {}
        figures: dict[str, float] = {}
        total = 0.0
        for k, name in enumerate(self.names):
            said, meant = all_texts[:, k], all_numbers[:, k]
            for first in range(0, len(said), AT_ONCE):
                rows = slice(first, first + AT_ONCE)
                same = _same(all_numbers[rows], all_numbers, k)
                loss, _ = compare(all_images[rows], said[rows], scales[k], same, all_images, said, first)
                total += loss.item() * len(same) / len(said) / count
            distinct = list({number: row for row, number in enumerate(meant.tolist())}.values())
            right = meant[:, None] == meant[distinct]
            for direction, recall in (
                ("image_to_text", retrieval(all_images, said[distinct], right)),
                ("text_to_image", retrieval(said[distinct], all_images, right.T)),
            ):
                figures |= {f"{name}/{direction}_r1": recall[0], f"{name}/{direction}_r5": recall[1]}
        return {"loss": total, **figures}

    def everyone(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, whose numbers of rows may differ."""
        counts = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        blocks = self.accelerator.gather(self.accelerator.pad_across_processes(rows)).split(max(*counts, 1))
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=False)])

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """No previews: the stage makes no images."""
        return []

    def finish(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Write the image encoder, and return the figures of a last validation for the record."""
        figures = self.validate(batches)
        if self.accelerator.is_main_process:
            write_clip(self.accelerator.unwrap_model(self.players["pair"].module), self.folder / "clip")
        return figures


def build(given: StageInputs[TextSection]) -> ContrastiveStage:
    """The stage of a run.

    Raises:
        LdmError: all captions are the same; or as `ContrastiveStage`.
    """
    if given.data.images is not None:
        check_differ(given.data.images, given.data.rows[0])
    return ContrastiveStage(given.section, given.model, given.accelerator, given.seed, given.sides, given.folder)


def check_differ(images: ImageSet, rows: np.ndarray) -> None:
    """Check that the images have at least two different captions.

    Raises:
        LdmError: all captions are the same.
    """
    if all(images.example(int(row)).captions == images.example(int(rows[0])).captions for row in rows[1:]):
        raise LdmError(
            f"{images.source.name}: {len(rows)} images to train with and no two different captions; "
            "the stage text needs captions to tell apart"
        )


def _check_batches(section: TextSection, processes: int) -> None:
    """Raise unless every process can compare its share of a batch at once."""
    for part in section.sizes:
        batch, micro_batch = part.batch or section.batch, part.micro_batch or section.micro_batch
        if batch < 2:
            raise LdmError("text.batch is 1: a pair is compared with the others of its batch; choose a larger one")
        if micro_batch and micro_batch * processes != batch:
            raise LdmError(
                f"text.micro_batch is {micro_batch}: a batch of {batch} is compared as a whole, so each of {processes} "
                "processes takes its share at once; leave it out (text.checkpointing=true saves memory)"
            )


def contrastive_pair(section: TextSection, text_encoders: TextEncoders) -> ContrastivePair:
    """Text encoders, and an image encoder as the section says, with PyTorch's random initial weights.

    Raises:
        LdmError: text encoders and image encoder do not fit together.
    """
    projections = [config.projection for config in text_encoders.configs if config.projection]
    config = ImageEncoderConfig(
        width=section.image_width,
        layers=section.image_layers,
        heads=section.image_heads,
        patch=section.patch,
        size=section.sizes[-1].size,
        embed_dim=section.embed_dim or (projections or [EMBED_DIM])[0],
    )
    return ContrastivePair(config, text_encoders)


def _same(numbers: Tensor, all_numbers: Tensor, k: int) -> Tensor:
    """(B, N): which pairs have the same caption for text encoder k, or the same image."""
    caption, image = (numbers[:, None, column] == all_numbers[None, :, column] for column in (k, -1))
    return caption | image


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
