"""The stages `base` and `refiner`: the U-Net learns to predict what noise was added, perhaps with its text encoders.

B batch, C latent channels, h×w height and width of the latents, H×W those of the images
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ldm.data.keyed import normal
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.families import Family
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import Autoencoder
from ldm.models.text import TextEncoders
from ldm.models.unet import Conditioning, UNet
from ldm.runtime.attention import set_attention
from ldm.training.conditioning import DropOut, Prompt, conditioning, encode, prompt
from ldm.training.config import DenoiserSection, RefinerSection
from ldm.training.losses.diffusion import DiffusionLoss, Timesteps
from ldm.training.optimizers import Group, make_optimizer
from ldm.training.stages.stage import Loss, MakeImages, Player

REFINED = 199  # the last timestep of SDXL's refiner (Podell et al. 2023, section 2.5)
PREVIEW_STEPS = 20  # of the scheduler
LOOKS = 4  # noise levels at which each held-out image is looked at
Encode = Callable[[list[list[str]]], Conditioning]  # texts of each text encoder to what they say


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
        """Noisy latents (B, C, h, w) to the prediction, likewise."""
        encoded = encode(self.text_encoders, prompt.texts)
        return self.unet(x, timestep, conditioning(encoded, prompt, self.family))


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
        texts: Encode | None = None,
    ) -> None:
        """Args:
            name: "base" or "refiner".
            section: of the configuration.
            model: on the accelerator's device, weights in fp32.
            accelerator: for autocast and sums over ranks.
            seed: of the run.
            make_images: for previews; without, there are none.
            texts: encodes captions, from a cache; by default the model's text encoders do.

        Raises:
            LdmError: timesteps and noise schedule do not fit, or the kernel of attention does not run here.
        """
        self.name, self.section, self.model, self.accelerator, self.seed = name, section, model, accelerator, seed
        self.make_images = make_images
        family = model.family
        if family.unet.in_channels != family.autoencoder.latent_channels:
            raise LdmError(
                f"{name}: the U-Net of {family.name} reads an image to edit besides, which there is no training for; "
                "start from a text-to-image model"
            )
        last = family.schedule.train_steps - 1
        usual = (0, min(REFINED, last)) if isinstance(section, RefinerSection) else (0, last)
        low, high = section.timestep_range or usual
        timesteps = Timesteps(low, high, section.timesteps, section.logit_mean, section.logit_std)
        self.loss = DiffusionLoss(family.schedule, timesteps, section.min_snr, section.noise_offset)
        self.plain_loss = DiffusionLoss(family.schedule, Timesteps(low, high))
        self.drop = DropOut(tuple(section.drop_caption), section.drop_together, section.drop_size)
        self.no_drop = DropOut((0.0,))
        self.score = section.default_score if isinstance(section, RefinerSection) else 6.0
        self.encode_texts = texts or (lambda rows: encode(model.text_encoders, rows))
        self.extra: dict[str, nn.Module] = {}
        with accelerator.autocast():
            set_attention(model.unet, section.attention)
        self.players = {"unet": self._player()}

    def _player(self) -> Player:
        section, model = self.section, self.model
        rate = section.optimizer.learning_rate
        for network in model.modules().values():
            network.requires_grad_(False)
        model.unet.requires_grad_(True).train()
        groups: list[Group] = [(list(model.unet.parameters()), rate)]
        module: nn.Module = model.unet
        if section.train_text:
            rates = section.text_learning_rate
            for k, tower in enumerate(model.text_encoders.towers):
                groups.append((_read_by_unet(tower, model.text_encoders, k), rates[min(k, len(rates) - 1)]))
            module = Joint(model.unet, model.text_encoders, model.family)
        return Player(module, make_optimizer(section.optimizer, groups), section.optimizer.clip)

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The weighted error of the prediction for each sample."""
        latents = self.latents(batch, "posterior")
        draw = self.loss.draw(latents.shape[1:], self.seed, batch.keys, batch.epochs).to(latents.device)
        said = prompt(batch, self.model.family, self.drop, self.seed, self.score)
        prediction = self.predict(self.players["unet"].module, self.loss.noisy(latents, draw), draw.timestep, said)
        yield Loss("unet", self.loss(prediction, latents, draw))

    def predict(self, module: nn.Module, x: Tensor, timestep: Tensor, said: Prompt) -> Tensor:
        """The U-Net's answer (B, C, h, w); text encoders that are not trained see no gradient."""
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
        """Steps leave nothing behind."""

    def updated(self, step: int) -> dict[str, float]:
        """Nothing to do after an update."""
        return {}

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The plain loss over held-out images, at noise and timesteps that are always the same."""
        total = torch.zeros(2, device=self.accelerator.device)
        module = self.accelerator.unwrap_model(self.players["unet"].module)
        for batch in batches:
            for look in range(LOOKS):
                epochs = [-1 - look] * len(batch.keys)
                latents = self.latents(batch, "validation")
                draw = self.plain_loss.draw(latents.shape[1:], self.seed, batch.keys, epochs).to(latents.device)
                said = prompt(batch, self.model.family, self.no_drop, self.seed, self.score)
                prediction = self.predict(module, self.plain_loss.noisy(latents, draw), draw.timestep, said)
                errors = self.plain_loss(prediction, latents, draw)
                total += torch.stack([errors.sum(), torch.ones_like(errors).sum()])
        loss, count = self.accelerator.reduce(total, "sum").tolist()
        return {"loss": loss / count} if count else {}

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """Images of the configured prompts, or of the batch's captions, always with the same noise."""
        if self.make_images is None or self.model.family.refiner:
            return []
        prompts = self.section.prompts or batch.captions[:4]
        height, width = batch.size[0, 4:6].int().tolist()
        seeds = [self.seed + number for number in range(len(prompts))]
        return self.make_images(self.model, prompts, (width, height), seeds, {"steps": PREVIEW_STEPS})

    def finish(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """The last validation goes into the record."""
        return dict(self.validate(batches))


def _read_by_unet(tower: nn.Module, encoders: TextEncoders, number: int) -> list[nn.Parameter]:
    """The parameters of a text encoder that the U-Net's conditioning depends on; the others stay as they are.

    With two encoders, the layer after the one that is read serves the pooled text alone, which the first has none of.
    """
    unused = re.compile("(?!)")
    if encoders.pooled and not encoders.configs[number].projection:
        unused = re.compile(rf"(.*\.)?(layers\.{encoders.configs[number].layers - 1}\.|final_layer_norm\.).*")
    chosen = [parameter for name, parameter in tower.named_parameters() if not unused.fullmatch(name)]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen
