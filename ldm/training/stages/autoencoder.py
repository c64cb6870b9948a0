"""The stage `autoencoder`: the autoencoder learns to reconstruct images from their latents.

Rombach et al. 2022 (arXiv 2112.10752), section 3.1: losses of pixels and LPIPS, a small KL term or a codebook, and
later a discriminator. At the end the latents' scale is measured and written into the model. A decoder alone may learn
from latents with noise (Zheng et al. 2025, arXiv 2510.11690, section 4.3), as a U-Net's are never exact.

B batch, C latent channels, h×w height and width of the latents, H×W those of the images
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ldm.data.keyed import generator, normal, uniform
from ldm.data.loader import Batch
from ldm.errors import LdmError
from ldm.evaluation.metrics.reconstruction import WINDOW, psnr, ssim
from ldm.evaluation.networks.lpips import BACKBONES, LPIPS, load_lpips
from ldm.images import to_images
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian, PointPosterior, VQModel
from ldm.models.discriminator import Discriminator, DiscriminatorConfig
from ldm.sheets import grid
from ldm.training.latents import LatentMoments, measure, merge, over_ranks
from ldm.training.losses.codebook import MovingCodebook, codebook_losses
from ldm.training.losses.reconstruction import AdaptiveWeight, discriminator_loss, kl_loss, reconstruction_loss
from ldm.training.stages.sections import AutoencoderSection
from ldm.training.stages.stage import ForwardPasses, Learner, Loss, StageInputs, freeze, trained
from ldm.training.start import with_changes
from ldm.weights.components import Components

HIGHEST = 100.0  # PSNR in dB that stands for infinity, of an exact reconstruction
SHOWN = 4  # pairs of a preview


class Sampled(nn.Module):
    """An `AutoencoderKL` whose forward pass takes the noise of the latents as arguments."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor, noise: Tensor, added: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), standard normal noise of the posterior (B, C, h, w) and noise added to unscaled latents
        (B, C, h, w) or () to reconstructions (B, 3, H, W), and the mean and log-variance of the latents, (B, C, h, w)
        each."""
        posterior = self.autoencoder.encode(x)
        latents = posterior.mean + posterior.std * noise + added
        return self.autoencoder.decode(latents), posterior.mean, posterior.logvar


@dataclass
class Spread:
    """The moments of the latents of at most `most` images."""

    most: int  # images that are measured
    moments: LatentMoments
    images: int = 0

    @property
    def full(self) -> bool:
        return self.images == self.most

    def add(self, latents: Tensor) -> None:
        """Measure unscaled latents (B, C, h, w), unless `most` images are measured already."""
        latents = latents[: self.most - self.images]
        if len(latents):
            self.moments = merge(self.moments, measure(latents))
            self.images += len(latents)


def discriminator_config(section: AutoencoderSection) -> DiscriminatorConfig | None:
    """The configuration of the discriminator, if there is one."""
    config = with_changes(DiscriminatorConfig(), section.discriminator, "autoencoder.discriminator")
    return config if section.adversarial_weight else None


def learners(section: AutoencoderSection, parts: Components) -> dict[str, Learner]:
    """The autoencoder, or its decoder alone; and the discriminator, with random weights."""
    freeze(parts)
    autoencoder, rate = parts.autoencoder.requires_grad_(True).train(), section.optimizer.learning_rate
    if section.decoder_only:
        autoencoder.encoder.requires_grad_(False)
        autoencoder.quant_conv.requires_grad_(False)
    module: nn.Module = autoencoder
    if isinstance(autoencoder, AutoencoderKL):
        module = Sampled(autoencoder)
    elif section.codebook_decay:  # the vectors are moving averages of latents
        autoencoder.quantize.requires_grad_(False)
    found = {"autoencoder": Learner(module, [(trained(module), rate)])}
    if config := discriminator_config(section):
        discriminator = Discriminator(config)
        own_rate = section.discriminator_learning_rate or rate
        found["discriminator"] = Learner(discriminator, [(trained(discriminator), own_rate)], averaged=False)
    return found


def helpers(section: AutoencoderSection) -> list[nn.Module]:
    """The network of LPIPS, with random weights."""
    if not section.perceptual:
        return []
    backbone = section.perceptual
    if backbone not in BACKBONES:  # a file, read on the CPU even if the default device is another
        with torch.device("cpu"):
            backbone = load_lpips(backbone).backbone
    return [LPIPS(backbone)]


def passes(
    section: AutoencoderSection, parts: Components, found: Mapping[str, Learner], size: int, cached: bool
) -> ForwardPasses:
    """The passes of the trained networks, from the encoder or the decoder to LPIPS and the discriminator."""
    image = torch.empty(1, 3, size, size, device="meta")
    with torch.device("meta"):
        perceptual = helpers(section) if section.perceptual_weight else []

    def judged(reconstruction: Tensor) -> Tensor:
        loss = reconstruction.mean()
        for network in perceptual:
            loss = loss + network(reconstruction, image).mean()
        if "discriminator" in found:
            loss = loss + found["discriminator"].module(reconstruction).mean()
        return loss

    if section.decoder_only:
        latents = parts.autoencoder.encode(image).mode()
        return ForwardPasses(
            lambda: judged(parts.autoencoder.decode(latents)), [lambda: parts.autoencoder.encode(image).mode()]
        )
    return ForwardPasses(lambda: judged(parts.autoencoder(image)[0]))


class AutoencoderStage:
    """Training of an autoencoder, with KL or with a codebook."""

    name = "autoencoder"
    divisible = True

    def __init__(
        self,
        section: AutoencoderSection,
        model: LatentDiffusion,
        accelerator: Accelerator,
        seed: int,
        sides: Sequence[tuple[int, int]],
        images: Callable[[], Iterable[Batch]],
    ) -> None:
        """Args:
            section: of the configuration.
            model: on the accelerator's device, weights in fp32.
            accelerator: for autocast and sums over ranks.
            seed: of the run.
            sides: width and height of every size that the images may come in.
            images: batches of training images, this rank's, to measure latents on if no images are held out.

        Raises:
            LdmError: the file of LPIPS cannot be used, or options do not go together or with the images.
        """
        self.section, self.model, self.accelerator, self.seed, self.images = (
            section, model, accelerator, seed, images,
        )  # fmt: skip
        _check(section, model, accelerator.mixed_precision)
        self.perceptual = load_lpips(section.perceptual, accelerator.device) if section.perceptual else None
        _check_sizes(sides, model, self.perceptual, discriminator_config(section))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # for the discriminator's weights
            found = learners(section, model)
        for learner in found.values():
            learner.module.to(accelerator.device)
        self.players = {name: learner.player(section.optimizer) for name, learner in found.items()}
        self.adaptive = AdaptiveWeight().to(accelerator.device)
        self.extra: dict[str, nn.Module] = {"adaptive": self.adaptive}
        self.fixed: Mapping[str, str] = {}
        self.moving: MovingCodebook | None = None
        if isinstance(model.autoencoder, VQModel) and section.codebook_decay:
            self.moving = MovingCodebook(model.autoencoder.quantize, section.codebook_decay, section.codebook_patience)
            self.extra["codebook"] = self.moving

    # --- a step -----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The autoencoder's loss and, once the adversary takes part, the discriminator's."""
        section, target = self.section, _pixels(batch)
        adversary = self.players.get("discriminator") if step >= section.adversarial_start else None
        reconstruction, regularisation, report = self._forward(batch)
        with self.accelerator.autocast():
            perceptual = self.perceptual if section.perceptual_weight else None
            loss = reconstruction_loss(
                reconstruction, target, section.pixel_loss, perceptual, section.perceptual_weight
            )
            total = loss.total
            if adversary:
                last_layer = self.model.autoencoder.decoder.conv_out.weight
                assert isinstance(last_layer, nn.Parameter)
                discriminator = self.accelerator.unwrap_model(adversary.module)
                joined = self.adaptive.join(
                    total, reconstruction, last_layer, discriminator, section.adversarial_weight
                )
                total = joined.total
                report |= {"adversarial": joined.adversarial, "adaptive_weight": self.adaptive.value}
        report["pixels"] = loss.pixels
        if perceptual:
            report["perceptual"] = loss.perceptual
        yield Loss("autoencoder", total + regularisation, report)
        if adversary:
            judged = discriminator_loss(adversary.module, target, reconstruction)
            yield Loss("discriminator", judged.total, {"real": judged.real, "fake": judged.fake})

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstructions (B, 3, H, W), the KL or codebook loss () of the latents, and its parts for the log."""
        autoencoder, module, target = self.model.autoencoder, self.players["autoencoder"].module, _pixels(batch)
        if isinstance(autoencoder, VQModel):
            reconstruction, latents, index = module(target)
            vectors, commitment = codebook_losses(autoencoder.quantize, latents, index)
            loss = self.section.commitment_weight * commitment
            if self.moving:
                self.moving.add(latents, index)
            else:
                loss = loss + vectors
            return reconstruction, loss, {"commitment": commitment.detach()}
        reconstruction, mean, logvar = module(target, self._noise(batch, "posterior"), self._added(batch))
        kl = kl_loss(DiagonalGaussian(mean, logvar), target)
        return reconstruction, self.section.kl_weight * kl, {"kl": kl.detach()}

    def _noise(self, batch: Batch, purpose: str) -> Tensor:
        """Standard normal noise (B, C, h, w) for the latents of a batch."""
        config = self.model.autoencoder.config
        height, width = (side // config.factor for side in _pixels(batch).shape[2:])
        shape = (config.latent_channels, height, width)
        return normal(shape, self.seed, purpose, batch.keys, batch.epochs).to(self.accelerator.device)

    def _added(self, batch: Batch) -> Tensor:
        """Noise (B, C, h, w) added to unscaled latents, whose level is another for each image, or 0."""
        if not self.section.latent_noise:
            return torch.zeros((), device=self.accelerator.device)
        most = self.section.latent_noise / self.model.autoencoder.config.scaling_factor
        pairs = zip(batch.keys, batch.epochs, strict=True)
        levels = torch.tensor([most * uniform(self.seed, "level", *pair) for pair in pairs])
        return levels.to(self.accelerator.device)[:, None, None, None] * self._noise(batch, "added")

    def forget(self) -> None:
        """Drop the measurements of the step by the adversary's weight and the codebook."""
        self.adaptive.forget()
        if self.moving:
            self.moving.forget()

    def updated(self, step: int) -> dict[str, float]:
        """Update the adversary's weight and the codebook."""
        self.adaptive.update(self._sum)
        if not self.moving:
            return {}
        autoencoder, accelerator = self.model.autoencoder, self.accelerator
        assert isinstance(autoencoder, VQModel)
        random = generator(self.seed, "codebook", step)
        self.moving.update(
            autoencoder.quantize, random, self._sum, accelerator.process_index, accelerator.num_processes
        )
        return {"codebook/usage": self.moving.usage(), "codebook/perplexity": self.moving.perplexity()}

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, which can exchange tensors on their devices only."""
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum").to(tensor.device)

    # --- between steps ----------------------------------------------------------------------------------------------

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over held-out images, decoded from the most probable latents: the reconstruction loss, PSNR in dB,
        SSIM, and LPIPS if it is configured."""
        return self._measure(batches, self._spread())

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """Pairs of an image and its reconstruction."""
        target = _pixels(batch)[:SHOWN]
        with torch.no_grad(), self.accelerator.autocast():
            reconstruction = self._reconstruct(target)[0]
        pairs = zip(to_images(target), to_images(reconstruction), strict=True)
        return [grid(pair, columns=2) for pair in pairs]

    def finish(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Measure the latents' scale, on held-out images or else on training images, and write it into the model,
        unless the decoder alone was trained.

        Raises:
            LdmError: the latents are all the same, so that they have no scale.
        """
        spread = self._spread()
        figures = self._measure(batches, spread)
        if not figures:  # the same on every rank: no images are held out
            for batch in self.images():
                with torch.no_grad(), self.accelerator.autocast():
                    posterior = self.model.autoencoder.encode(_pixels(batch))
                spread.add(self._latents(posterior, batch))
                if spread.full:
                    break
        moments, count = over_ranks(spread.moments, self._sum), int(self._sum(torch.tensor(spread.images)))
        config = self.model.autoencoder.config
        if not self.section.decoder_only:
            shift = moments.shift if self.section.measure_shift else config.shift_factor
            config = replace(config, scaling_factor=moments.scale, shift_factor=shift)
            self.model.autoencoder.config = config
            self.model.family = replace(self.model.family, autoencoder=config, preview=())  # factors of the old latents
        return {
            "scaling_factor": config.scaling_factor,
            "shift_factor": config.shift_factor,
            "latent_mean": moments.mean.tolist(),
            "latent_std": moments.channel_std.tolist(),
            "measured_on": f"{count} held-out images" if figures else f"{count} views of training images",
            **figures,
        }

    def _spread(self) -> Spread:
        """Empty moments, for this rank's share of the images to measure."""
        channels = torch.zeros(self.model.autoencoder.config.channels_out, dtype=torch.float64)
        share = -(-self.section.measure // self.accelerator.num_processes)
        return Spread(share, LatentMoments(torch.zeros((), dtype=torch.float64), channels, channels))

    @torch.no_grad()
    def _measure(self, batches: Iterable[Batch], spread: Spread) -> dict[str, float]:
        """The figures of `validate`, none if there are no images; the latents are added to `spread`."""
        section = self.section
        names = ("loss", "psnr", "ssim", "lpips")
        total = torch.zeros(len(names) + 1, dtype=torch.float64)
        for batch in batches:
            target = _pixels(batch)
            with self.accelerator.autocast():
                reconstruction, posterior = self._reconstruct(target)
                loss = reconstruction_loss(
                    reconstruction, target, section.pixel_loss, self.perceptual, section.perceptual_weight
                )
            peaks = psnr(reconstruction, target).clamp(max=HIGHEST).mean()
            means = [loss.total, peaks, ssim(reconstruction, target).mean(), loss.perceptual, torch.ones_like(peaks)]
            total += len(batch.keys) * torch.stack(means).to(total)
            spread.add(self._latents(posterior, batch))
        *sums, count = self._sum(total).tolist()
        means_of = {name: value / count for name, value in zip(names, sums, strict=True)} if count else {}
        if not self.perceptual:
            means_of.pop("lpips", None)
        return means_of

    def _reconstruct(self, target: Tensor) -> tuple[Tensor, DiagonalGaussian | PointPosterior]:
        """Reconstructions (B, 3, H, W) from the most probable latents, and the latents' posterior."""
        posterior = self.model.autoencoder.encode(target)
        return self.model.autoencoder.decode(posterior.mode()), posterior

    def _latents(self, posterior: DiagonalGaussian | PointPosterior, batch: Batch) -> Tensor:
        """Unscaled latents (B, C, h, w) as in the U-Net's training: sampled, and not quantised."""
        if isinstance(posterior, PointPosterior):
            return posterior.value
        return posterior.mean + posterior.std * self._noise(batch, "validation")


def build(given: StageInputs[AutoencoderSection]) -> AutoencoderStage:
    """The stage of a run."""
    return AutoencoderStage(given.section, given.model, given.accelerator, given.seed, given.sides, given.batches)


def _pixels(batch: Batch) -> Tensor:
    """The images (B, 3, H, W) of a batch: this stage never reads cached latents."""
    assert batch.pixels is not None
    return batch.pixels


def _check(section: AutoencoderSection, model: LatentDiffusion, precision: str) -> None:
    """Raise where options exclude each other."""
    config = model.autoencoder.config
    if section.perceptual_weight and not section.perceptual:
        raise LdmError(
            "autoencoder.perceptual is not set: choose vgg16 (fetch LPIPS with tools/fetch_weights.py), or set "
            "autoencoder.perceptual_weight=0 to train without"
        )
    if section.adversarial_weight and precision == "fp16":
        raise LdmError(
            "precision fp16: its loss scale cannot serve an autoencoder and its adversary; set precision=bf16, or "
            "autoencoder.adversarial_weight=0"
        )
    if section.adversarial_weight and section.compile:
        raise LdmError(
            "autoencoder.compile: the adversary needs gradients in the middle of the network; set it to false, or "
            "autoencoder.adversarial_weight=0"
        )
    if section.adversarial_weight and section.adversarial_start >= section.steps:
        raise LdmError(
            f"autoencoder.adversarial_start is {section.adversarial_start}, but there are {section.steps} steps: the "
            "adversary would never take part; lower it, or set autoencoder.adversarial_weight=0"
        )
    if section.latent_noise and (not section.decoder_only or config.codebook):
        raise LdmError(
            "autoencoder.latent_noise: its scale is known for a trained encoder with KL alone; set "
            "autoencoder.decoder_only=true, or autoencoder.latent_noise=0"
        )
    if section.measure_shift and config.codebook:
        raise LdmError("autoencoder.measure_shift: files of autoencoders with a codebook hold no shift; leave it out")
    if (config.in_channels, config.out_channels) != (3, 3):
        raise LdmError(
            f"model.autoencoder: in_channels {config.in_channels} and out_channels {config.out_channels}; images have 3"
        )


def _check_sizes(
    sides: Sequence[tuple[int, int]],
    model: LatentDiffusion,
    perceptual: LPIPS | None,
    discriminator: DiscriminatorConfig | None,
) -> None:
    """Raise where images are too small, or reconstructions would have another size."""
    least = {"SSIM": WINDOW}
    if perceptual:
        least["LPIPS"] = BACKBONES[perceptual.backbone].smallest
    if discriminator:
        least["the discriminator"] = discriminator.smallest
    name = max(least, key=lambda name: least[name])
    factor = model.autoencoder.config.factor
    for width, height in sides:
        if min(width, height) < least[name]:
            raise LdmError(
                f"autoencoder.sizes: images of {width}×{height} pixels are too small for {name}, which needs "
                f"{least[name]}×{least[name]}; choose a larger size, or a smaller data.aspect"
            )
        if width % factor or height % factor:
            raise LdmError(
                f"data.bucket_step: images of {width}×{height} pixels do not divide by the autoencoder's factor "
                f"{factor}; choose a multiple of it"
            )
