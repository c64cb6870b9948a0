"""The autoencoder between images and latents, regularised by a Kullback-Leibler term or by a codebook.

Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G. Images are in [-1, 1].

B batch, C channels, H×W height and width of the image, h×w height and width of the latents: H / factor, rounded down
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole
from ldm.models.layers import Downsample, ResnetBlock, SpatialAttention, Upsample

EPS = 1e-6  # epsilon of every group norm here; the U-Net's residual blocks have 1e-5


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an autoencoder. One entry of `channels` and `attention` for each level, full size first."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level; each but the last halves the image
    attention: tuple[bool, ...] = (False, False, False, False)  # attention after each residual block of the level
    mid_attention: bool = True  # attention in the middle
    layers: int = 2  # residual blocks of a level on the way down; one more on the way up
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    quant_conv: bool = True  # 1×1 convolution after the encoder
    post_quant_conv: bool = True  # 1×1 convolution before the decoder
    groups: int = 32  # groups of every group norm
    scaling_factor: float = 0.18215  # the diffusion model sees (latents - shift_factor) · scaling_factor
    shift_factor: float = 0.0
    force_upcast: bool = True  # overflows in fp16 (as SDXL's does), so decode in bf16 or fp32; diffusers' default
    sample_size: int = 512  # height and width of the training images; the default tile
    codebook: int = 0  # number of vectors of the codebook; 0: no codebook, regularised by KL
    codebook_dim: int = 0  # channels of each vector; 0: latent_channels

    def __post_init__(self) -> None:
        if not 1 <= len(self.channels) <= 8 or len(self.attention) != len(self.channels):
            raise LdmError(
                f"autoencoder: channels {self.channels} and attention {self.attention} need one entry for each level, "
                "1 to 8 levels"
            )
        for name, value, low, high in (
            *(("channels", width, 1, 16384) for width in self.channels),
            ("layers", self.layers, 1, 16), ("in_channels", self.in_channels, 1, 1024),
            ("out_channels", self.out_channels, 1, 1024), ("latent_channels", self.latent_channels, 1, 4096),
            ("groups", self.groups, 1, 1024), ("sample_size", self.sample_size, 1, 65536),
            ("codebook", self.codebook, 0, 2**24), ("codebook_dim", self.codebook_dim, 0, 65536),
        ):  # fmt: skip
            check_whole("autoencoder", name, value, low, high)
        for width in self.channels:
            if width % self.groups:
                raise LdmError(f"autoencoder: {width} channels do not divide into {self.groups} groups")
        if not 1e-3 < self.scaling_factor < 1e3 or not -1e3 < self.shift_factor < 1e3:
            raise LdmError(
                f"autoencoder: scaling_factor {self.scaling_factor!r} or shift_factor {self.shift_factor!r} "
                "is out of range"
            )

    @property
    def channels_out(self) -> int:
        """Channels of the latents that the diffusion model reads."""
        return self.codebook_dim or self.latent_channels if self.codebook else self.latent_channels

    @property
    def factor(self) -> int:
        """The ratio of the image's sides to the latents' sides."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class DiagonalGaussian:
    """The encoder's posterior: an independent normal distribution for each element of the latents."""

    mean: Tensor  # (B, latent_channels, h, w)
    logvar: Tensor  # (B, latent_channels, h, w), in [-30, 20]

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most probable latents: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Random latents; noise is drawn on the generator's device, so a CPU seed gives the same on every device."""
        device = generator.device if generator else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal distribution, summed over each image: (B,), in nats."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class PointPosterior:
    """The posterior of an autoencoder with a codebook: a single point, the latents before quantisation."""

    value: Tensor  # (B, codebook_dim, h, w)

    def mode(self) -> Tensor:
        return self.value

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.value


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the level has attention."""

    def __init__(self, config: AutoencoderConfig, ins: list[int], width: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(i, width, config.groups, EPS) for i in ins)
        self.attentions = nn.ModuleList(
            SpatialAttention(width, config.groups) if attention else nn.Identity() for _ in ins
        )

    def forward(self, x: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        return x


class DownLevel(Level):
    """One level of the encoder; every level but the last ends with a downsampling by 2."""

    def __init__(self, config: AutoencoderConfig, level: int) -> None:
        width = config.channels[level]
        ins = [config.channels[max(level - 1, 0)]] + [width] * (config.layers - 1)
        super().__init__(config, ins, width, config.attention[level])
        last = level == len(config.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, asymmetric=True)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpLevel(Level):
    """One level of the decoder; every level but the last ends with an upsampling by 2."""

    def __init__(self, config: AutoencoderConfig, level: int) -> None:
        width = config.channels[level]
        ins = [config.channels[min(level + 1, len(config.channels) - 1)]] + [width] * config.layers
        super().__init__(config, ins, width, config.attention[level])
        self.upsamplers = nn.ModuleList([Upsample(width)] if level else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x, size=torch.Size(2 * side for side in x.shape[2:]))
        return x


class MidLevel(nn.Module):
    """The middle: residual block, attention if the config has it, residual block."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnets = nn.ModuleList(ResnetBlock(width, width, config.groups, EPS) for _ in range(2))
        attention = SpatialAttention(width, config.groups) if config.mid_attention else nn.Identity()
        self.attentions = nn.ModuleList([attention])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) to features (B, channels_out, h, w)."""

    def __init__(self, config: AutoencoderConfig, channels_out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.in_channels, config.channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(DownLevel(config, level) for level in range(len(config.channels)))
        self.mid_block = MidLevel(config)
        self.conv_norm_out = nn.GroupNorm(config.groups, config.channels[-1], EPS)
        self.conv_out = nn.Conv2d(config.channels[-1], channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) to images (B, out_channels, h · factor, w · factor)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.latent_channels, config.channels[-1], 3, padding=1)
        self.mid_block = MidLevel(config)
        self.up_blocks = nn.ModuleList(UpLevel(config, level) for level in reversed(range(len(config.channels))))
        self.conv_norm_out = nn.GroupNorm(config.groups, config.channels[0], EPS)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The autoencoder of every Stable Diffusion: a Gaussian posterior over the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config, 2 * c)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.post_quant_conv else nn.Identity()
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images (B, 3, H, W) in [-1, 1] to the distribution of their unscaled latents (B, latent_channels, h, w)."""
        return self.posterior(self.quant_conv(self.encoder(x)))

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        """The distribution with these means and logarithms of variances (B, 2 · latent_channels, h, w)."""
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, latent_channels, h, w) to images (B, 3, h · factor, w · factor), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Encode, sample, decode: the reconstruction and the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator)), posterior


class Codebook(nn.Module):
    """Vector quantisation: each position takes the nearest learned vector (van den Oord et al. 2017, 1711.00937)."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        self.embedding.weight.data.uniform_(-1 / size, 1 / size)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, h, w) to the nearest vectors (B, D, h, w), with a straight-through gradient to `z`, and the
        vectors' indices (B, h, w)."""
        vectors = z.movedim(1, -1)  # (B, h, w, D)
        index = torch.cdist(vectors.flatten(0, 2), self.embedding.weight).argmin(dim=1).view(vectors.shape[:3])
        nearest = self.embedding(index).movedim(-1, 1)  # (B, D, h, w)
        return (z + (nearest - z).detach()).contiguous(), index


class VQModel(nn.Module):
    """The autoencoder with a codebook: `decode` quantises the latents, `encode` does not."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.channels_out
        self.encoder = Encoder(config, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, dim, 1)
        self.quantize = Codebook(config.codebook, dim)
        self.post_quant_conv = nn.Conv2d(dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> PointPosterior:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, codebook_dim, h, w) before quantisation."""
        return self.posterior(self.quant_conv(self.encoder(x)))

    def posterior(self, latents: Tensor) -> PointPosterior:
        """Latents (B, codebook_dim, h, w) as a posterior of a single point."""
        return PointPosterior(latents)

    def decode(self, z: Tensor) -> Tensor:
        """Quantise latents (B, codebook_dim, h, w) and decode them to images (B, 3, h · factor, w · factor)."""
        return self.decoder(self.post_quant_conv(self.quantize(z)[0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, quantise, decode: the reconstruction, the latents before quantisation, and the codebook indices
        (B, h, w)."""
        z = self.encode(x).value
        quantised, index = self.quantize(z)
        return self.decoder(self.post_quant_conv(quantised)), z, index


Autoencoder = AutoencoderKL | VQModel


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """The autoencoder of a config: `VQModel` if the config has a codebook, else `AutoencoderKL`."""
    return VQModel(config) if config.codebook else AutoencoderKL(config)
