"""The stages `base` and `refiner`: the U-Net, and optionally its text encoders, learn to denoise latents.

B batch, C latent channels, h×w height and width of the latents, H×W those of the images
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ldm.data.keyed import normal
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.families import Family
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.attention import attention_layers, math
from ldm.models.autoencoder import Autoencoder
from ldm.models.text import TextEncoders
from ldm.models.unet import Conditioning, UNet
from ldm.runtime.attention import set_attention
from ldm.training.conditioning import ConditioningDropout, Prompt, conditioning, encode, prompt
from ldm.training.losses.diffusion import DiffusionLoss, Timesteps
from ldm.training.optimizers import Group
from ldm.training.sections import EvaluationSection, PriorSection
from ldm.training.stages.sections import (
    AdapterSection,
    BaseSection,
    DenoiserSection,
    RefinerModelSection,
    RefinerSection,
)
from ldm.training.stages.stage import (
    Cached,
    EncodeTexts,
    ForwardPasses,
    Learner,
    Loss,
    MakeImages,
    Pass,
    StageInputs,
    freeze,
)
from ldm.training.stages.tasks import task_of
from ldm.weights.components import Components

REFINED = 199  # the last timestep of SDXL's refiner (Podell et al. 2023, section 2.5)
PREVIEW: Mapping[str, Any] = {"steps": 20, "batch": None}  # settings of previews, as many at a time as memory allows
VALIDATION_DRAWS = 4  # draws of noise and timestep for each held-out image


def encoding(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The precision in which images are encoded: the run's, but never fp16, in which SDXL's autoencoder overflows."""
    return nullcontext() if accelerator.mixed_precision == "fp16" else accelerator.autocast()


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, accelerator: Accelerator, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) to the mean and standard deviation of their unscaled latents, (B, C, h, w) each, fp32."""
    with encoding(accelerator):
        posterior = autoencoder.encode(pixels.to(accelerator.device))
    mean = posterior.mode().float()
    return mean, getattr(posterior, "std", torch.zeros_like(mean)).float()


class Joint(nn.Module):
    """The U-Net and its text encoders as one module, where both are trained."""

    def __init__(self, unet: UNet, text_encoders: TextEncoders, family: Family) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoders = text_encoders
        self.family = family

    def forward(self, x: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        """Noisy latents (B, C, h, w) to the prediction (B, C, h, w)."""
        encoded = encode(self.text_encoders, prompt.texts)
        return self.unet(x, timestep, conditioning(encoded, prompt, self.family))


def learners(section: DenoiserSection, parts: Components) -> dict[str, Learner]:
    """The U-Net and, with `train_text`, its text encoders."""
    freeze(parts)
    unet = parts.unet.requires_grad_(True).train()
    groups: list[Group] = [(list(unet.parameters()), section.optimizer.learning_rate)]
    if not section.train_text:
        return {"unet": Learner(unet, groups)}
    rates, encoders = section.text_learning_rate, parts.text_encoders
    for k in range(len(encoders.towers)):
        chosen = list(read_by_unet(encoders, k).values())
        for parameter in chosen:
            parameter.requires_grad_(True)
        groups.append((chosen, rates[min(k, len(rates) - 1)]))
    return {"unet": Learner(Joint(unet, encoders, parts.family), groups)}


def passes(
    section: DenoiserSection,
    parts: Components,
    found: Mapping[str, Learner],
    size: int,
    cached: bool,
    more: Mapping[str, Tensor] | None = None,
) -> ForwardPasses:
    """The U-Net; the autoencoder and the text encoders before it, unless their outputs are cached.

    `more` are inputs that it reads beside the text, of one image.
    """
    unet, encoders, side = parts.unet, parts.text_encoders, size // parts.family.autoencoder.factor
    image = torch.empty(1, 3, size, size, device="meta")
    tokens = [torch.zeros(1, tower.context, dtype=torch.long, device="meta") for tower in parts.family.text]
    latents, timestep, cond = blank(parts.family, side, side)
    cond = replace(cond, more=more or {})
    count_attention(section, unet)
    encodes = (0 if cached else 1) + (0 if parts.family.task == "text" else 1)
    frozen: list[Pass] = [lambda: parts.autoencoder.encode(image).mode()] * encodes
    if section.train_text:
        return ForwardPasses(lambda: unet(latents, timestep, replace(cond, text=encoders.encode(tokens).text)), frozen)
    if not cached:
        frozen.append(lambda: encoders.encode(tokens).text)
    return ForwardPasses(lambda: unet(latents, timestep, cond), frozen)


def count_attention(section: DenoiserSection, network: nn.Module) -> None:
    """Let a network on the meta device keep what its kernel of attention keeps."""
    if section.attention == "math":  # the only kernel that keeps the attention scores
        for layer in attention_layers(network):
            layer.kernel = math


def blank(family: Family, height: int, width: int) -> tuple[Tensor, Tensor, Conditioning]:
    """The inputs of a family's U-Net for one image of latents, on the meta device, for the forecast."""
    unet = family.unet
    with torch.device("meta"):
        cond = Conditioning(
            torch.empty(1, family.text[0].context, unet.text_dim),
            torch.empty(1, unet.pooled_dim) if family.xl else None,
            torch.empty(1, unet.size_ids) if family.xl else None,
        )
        return torch.empty(1, unet.in_channels, height, width), torch.zeros(1, dtype=torch.long), cond


def refiner_on_base(section: RefinerSection, refiner: LatentDiffusion, base: LatentDiffusion | None) -> LatentDiffusion:
    """A refiner that is built anew takes the base's autoencoder, and its last text encoder where it has the same."""
    if base is None or section.model.source is not None:
        return refiner
    refiner.family = replace(refiner.family, autoencoder=base.family.autoencoder, preview=base.family.preview)
    refiner.networks["autoencoder"] = base.autoencoder
    if refiner.family.text[-1] == base.family.text[-1]:
        refiner.text_encoders.towers[-1] = base.text_encoders.towers[-1]
        refiner.text_encoders.tokenizers = base.text_encoders.tokenizers[-1:]
    return refiner


class DenoiserStage:
    """Training of a U-Net on noisy latents."""

    divisible = True

    def __init__(
        self,
        name: str,
        section: DenoiserSection,
        model: LatentDiffusion,
        accelerator: Accelerator,
        seed: int,
        make_images: MakeImages | None = None,
        texts: EncodeTexts | None = None,
        choose: Callable[[Any, Components], dict[str, Learner]] = learners,
    ) -> None:
        """Args:
            name: of the kind of stage.
            section: of the configuration.
            model: on the accelerator's device, as in `StageInputs`.
            accelerator: for autocast and sums over ranks.
            seed: of the run.
            make_images: makes previews; None: no previews.
            texts: encodes captions from a cache; by default the model's text encoders do.
            choose: gives the networks to train, as the kind's row says; the player is called "unet".

        Raises:
            LdmError: timesteps and noise schedule do not fit, or the kernel of attention does not run here.
        """
        self.name, self.section, self.model, self.accelerator, self.seed = name, section, model, accelerator, seed
        self.make_images = make_images
        family = model.family
        if family.unet.guidance_dim:
            raise LdmError(
                f"{name}: the U-Net of {family.name} was distilled for few steps and reads a guidance scale; start "
                "from the model that it was distilled from"
            )
        last = family.schedule.train_steps - 1
        usual = (0, min(REFINED, last)) if family.refiner else (0, last)
        low, high = section.timestep_range or usual
        timesteps = Timesteps(low, high, section.timesteps, section.logit_mean, section.logit_std)
        self.loss = DiffusionLoss(family.schedule, timesteps, section.min_snr, section.noise_offset)
        self.plain_loss = DiffusionLoss(family.schedule, Timesteps(low, high))
        self.dropout = ConditioningDropout(tuple(section.drop_caption), section.drop_together, section.drop_size)
        self.no_dropout = ConditioningDropout((0.0,))
        if isinstance(section, BaseSection) and family.task == "edit":
            self.dropout = replace(self.dropout, image=section.drop_before, both=section.drop_both)
        self.task = task_of(family, self.latents, partial(encode_images, model.autoencoder, accelerator), seed)
        self.score = section.default_score if isinstance(section, RefinerSection) else 6.0
        self.encode_texts = texts or (lambda rows: encode(model.text_encoders, rows))
        self.extra: dict[str, nn.Module] = {}
        self.fixed: Mapping[str, str] = {}
        with accelerator.autocast():
            set_attention(model.unet, section.attention)
        found = choose(section, model)
        self.players = {name: learner.player(section.optimizer) for name, learner in found.items()}

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The weighted error of the prediction for each sample."""
        latents = self.latents(batch, "posterior")
        draw = self.loss.draw(latents.shape[1:], self.seed, batch.keys, batch.epochs).to(latents.device)
        said = self.said(batch, self.dropout)
        x = self.task.complete(self.loss.noisy(latents, draw), batch, self.dropout)
        prediction = self.predict(self.players["unet"].module, x, draw.timestep, said)
        yield Loss("unet", batch.weights * self.loss(prediction, latents, draw, self.areas(batch, latents)))

    def areas(self, batch: Batch, latents: Tensor) -> Tensor | None:
        """Weights (B, 1, h, w) of errors by the part of a latent that a mask covers; None without masks."""
        if "mask" not in batch.beside or not self.task.masked:
            return None
        height, width = latents.shape[2:]
        covered = F.adaptive_avg_pool2d(batch.beside["mask"], (height, width))
        return covered.clamp(min=self.section.outside_mask)

    def said(self, batch: Batch, dropout: ConditioningDropout) -> Prompt:
        """The inputs of the network beside the latents, after conditioning dropout."""
        return prompt(batch, self.model.family, dropout, self.seed, self.score)

    def predict(self, module: nn.Module, x: Tensor, timestep: Tensor, said: Prompt) -> Tensor:
        """The U-Net's prediction (B, C, h, w); text encoders that are not trained get no gradient."""
        if self.section.train_text:
            return module(x, timestep, said)
        with torch.no_grad(), self.accelerator.autocast():
            cond = conditioning(self.encode_texts(said.texts), said, self.model.family)
        return module(x, timestep, cond)

    @torch.no_grad()
    def latents(self, batch: Batch, purpose: str) -> Tensor:
        """Scaled latents (B, C, h, w), drawn from the posterior, of pixels or of cached moments."""
        autoencoder = self.model.autoencoder
        if batch.moments is not None:
            mean, std = batch.moments.chunk(2, dim=1)
        else:
            assert batch.pixels is not None
            mean, std = encode_images(autoencoder, self.accelerator, batch.pixels)
        latents = mean + std * normal(mean.shape[1:], self.seed, purpose, batch.keys, batch.epochs).to(mean.device)
        return (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor

    def forget(self) -> None:
        """Nothing to drop: steps keep no state."""

    def updated(self, step: int) -> dict[str, float]:
        """Nothing to do after an update."""
        return {}

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The unweighted loss over held-out images, always with the same noise and timesteps."""
        total = torch.zeros(2, device=self.accelerator.device)
        module = self.accelerator.unwrap_model(self.players["unet"].module)
        for batch in batches:
            latents, said = self.latents(batch, "validation"), self.said(batch, self.no_dropout)
            for number in range(VALIDATION_DRAWS):
                epochs = [-1 - number] * len(batch.keys)
                draw = self.plain_loss.draw(latents.shape[1:], self.seed, batch.keys, epochs).to(latents.device)
                x = self.task.complete(self.plain_loss.noisy(latents, draw), batch, self.no_dropout)
                prediction = self.predict(module, x, draw.timestep, said)
                errors = self.plain_loss(prediction, latents, draw)
                total += torch.stack([errors.sum(), torch.ones_like(errors).sum()])
        loss, count = self.accelerator.reduce(total, "sum").tolist()
        return {"loss": loss / count} if count else {}

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """Images of the configured prompts, or of the batch's captions, always with the same noise.

        A U-Net that edits makes them of the batch's images.
        """
        if self.make_images is None or self.model.family.refiner:
            return []
        prompts = self.section.prompts or batch.captions[:4]
        height, width = batch.size[0, 4:6].int().tolist()
        seeds = [self.seed + number for number in range(len(prompts))]
        model = self.shown()
        if model.family.task == "text":
            return self.make_images(model, prompts, (width, height), seeds, PREVIEW)
        return [
            image
            for number, said in enumerate(prompts)
            for image in self.make_images(
                model, [said], (width, height), seeds[number : number + 1],
                {**PREVIEW, **self.task.example(batch, number % len(batch.keys))},
            )
        ]  # fmt: skip

    def shown(self) -> LatentDiffusion:
        """The model that makes images, with the weights as they are now."""
        return self.model

    def finish(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """The figures of a last validation, for the record."""
        return dict(self.validate(batches))


def build(given: StageInputs[DenoiserSection]) -> DenoiserStage:
    """The stage of a run."""
    return DenoiserStage(
        given.name, given.section, given.model, given.accelerator, given.seed, given.make_images, given.texts
    )


def cached(section: DenoiserSection) -> Cached:
    """Latents, and encoded captions unless the text encoders are trained."""
    return Cached(latents=True, texts=not section.train_text)


def evaluation(section: DenoiserSection) -> EvaluationSection | None:
    """The section on evaluation, if evaluation in training is on."""
    return section.evaluation if section.evaluation.every else None


def prior(section: BaseSection | AdapterSection) -> PriorSection | None:
    """The section on class images, if there are some."""
    return section.prior if section.prior.prompt else None


def refiner_model(section: RefinerSection) -> RefinerModelSection:
    """The section of the model that a refiner starts from, in place of the stage before it."""
    return section.model


def read_by_unet(encoders: TextEncoders, number: int) -> dict[str, nn.Parameter]:
    """The parameters of a text encoder that the U-Net's conditioning depends on; the others stay as they are.

    With two encoders, the last layer serves the pooled text alone, which the first encoder does not give.
    """
    unused = re.compile("(?!)")
    if encoders.pooled and not encoders.configs[number].projection:
        unused = re.compile(rf"(.*\.)?(layers\.{encoders.configs[number].layers - 1}\.|final_layer_norm\.).*")
    named = encoders.towers[number].named_parameters()
    return {name: parameter for name, parameter in named if not unused.fullmatch(name)}
