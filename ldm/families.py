"""The model families: Stable Diffusion's and our own. Each family is one literal of `Family`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.unet import UNetConfig
from ldm.process import NoiseSchedule


@dataclass(frozen=True)
class FewStep:
    """The settings that a model or an adapter was distilled for; the defaults wherever it is used."""

    name: str  # of the method
    steps: int
    scheduler: str  # short name
    spacing: str = "default"
    guidance: float = 1.0  # at most 1: none
    eta: float = 0.0
    prediction_type: str | None = None  # of the distilled model, if it is not the family's

    def settings(self, given: Collection[str]) -> dict[str, float | str]:
        """Settings of a call by name; scheduler, spacing and eta go together, unless one of them is `given`."""
        found: dict[str, float | str] = {"steps": self.steps, "guidance": self.guidance}
        if not {"scheduler", "spacing", "eta"}.intersection(given):
            found |= {"scheduler": self.scheduler, "spacing": self.spacing, "eta": self.eta}
        return found

    def __str__(self) -> str:
        spaced = "" if self.spacing == "default" else f" ({self.spacing})"
        guided = f"guidance {self.guidance:g}" if self.guidance > 1 else "no guidance"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{self.name}, made for {steps} of {self.scheduler}{spaced} and {guided}"


@dataclass(frozen=True)
class Family:
    """The description of a model: everything that is needed to build the model, except its weights."""

    name: str
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    text: tuple[TextEncoderConfig, ...]
    schedule: NoiseSchedule
    zero_empty_prompt: bool = False  # a missing negative prompt is encoded as zeros (SDXL base)
    steps: int = field(default=30, compare=False)  # usual number of sampling steps
    guidance: float = field(default=7.5, compare=False)  # usual guidance scale
    few_step: FewStep | None = field(default=None, compare=False)  # what a distilled model was made for
    # preview colours: one for each latent channel, and a constant; (): not known, see tools/fit_preview.py
    preview: tuple[tuple[float, float, float], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        towers = [config.component for config in self.text]
        if towers not in (["text_encoder"], ["text_encoder_2"], ["text_encoder", "text_encoder_2"]):
            raise LdmError(f"text encoders {towers}: a model has one, or two of which only the second has a projection")
        if bool(self.text[-1].projection) != bool(self.unet.pooled_dim):
            raise LdmError(
                "a text encoder with a projection and a U-Net that reads pooled text go together or not at all"
            )
        latents, reads = self.autoencoder.channels_out, self.unet.in_channels
        if self.unet.out_channels != latents or reads not in (latents, 2 * latents, 2 * latents + 1):
            raise LdmError(
                f"the autoencoder has latents of {latents} channels, the U-Net reads {reads} and "
                f"gives {self.unet.out_channels}; they do not belong together"
            )
        width = sum(config.width for config in self.text)
        if width != self.unet.text_dim:
            raise LdmError(f"the text encoders give {width} channels, the U-Net reads {self.unet.text_dim}")
        if self.unet.pooled_dim not in (0, self.text[-1].projection):
            raise LdmError(
                f"the last text encoder gives {self.text[-1].projection} pooled channels, the U-Net reads "
                f"{self.unet.pooled_dim}"
            )

    @property
    def size(self) -> int:
        """Height and width of the training images in pixels."""
        return self.unet.sample_size * self.autoencoder.factor

    @property
    def task(self) -> str:
        """ "text", or the task of a U-Net that reads more channels beside the latents: "inpaint" or "edit"."""
        extra = self.unet.in_channels - self.unet.out_channels
        latents = self.autoencoder.channels_out
        return {latents + 1: "inpaint", latents: "edit"}.get(extra, "text")

    @property
    def xl(self) -> bool:
        """Whether the model is like SDXL or its refiner: the U-Net also reads pooled text and time ids."""
        return self.unet.pooled_dim > 0

    @property
    def refiner(self) -> bool:
        """Whether the model is like SDXL's refiner: the time ids hold an aesthetic score instead of a target size."""
        return self.unet.size_ids == 5


_LEADING = {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
_EULER = {
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}

CLIP_L = TextEncoderConfig()
OPENCLIP_H = TextEncoderConfig(width=1024, layers=23, heads=16, hidden=4096, activation="gelu", pad_token="!")
OPENCLIP_BIGG = TextEncoderConfig(
    width=1280, layers=32, heads=20, hidden=5120, activation="gelu", projection=1280, pad_token="!"
)

# least-squares fits to the released autoencoders (ldm.sampling.preview), as published for SD 1.4 and for SDXL
PREVIEW = (
    (0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473), (0.0, 0.0, 0.0)
)  # fmt: skip
PREVIEW_XL = (
    (0.3448, 0.4168, 0.4395), (-0.1953, -0.0290, 0.0250), (0.1074, 0.0886, -0.0163), (-0.3730, -0.2499, -0.2088),
    (0.0, 0.0, 0.0),
)  # fmt: skip

SD15 = Family(
    name="sd15",
    unet=UNetConfig(),
    autoencoder=AutoencoderConfig(),
    text=(CLIP_L,),
    schedule=NoiseSchedule(options=_LEADING),
    preview=PREVIEW,
)
SD2 = Family(
    name="sd2",
    unet=UNetConfig(heads=(5, 10, 20, 20), text_dim=1024, linear_projection=True),
    autoencoder=AutoencoderConfig(),
    text=(OPENCLIP_H,),
    schedule=NoiseSchedule(options=_LEADING),
    preview=PREVIEW,
)
SDXL = Family(
    name="sdxl",
    unet=UNetConfig(
        channels=(320, 640, 1280),
        depth=(0, 2, 10),
        mid_depth=10,
        heads=(5, 10, 20),
        text_dim=2048,
        linear_projection=True,
        pooled_dim=1280,
        size_ids=6,
        sample_size=128,
    ),
    autoencoder=AutoencoderConfig(scaling_factor=0.13025, sample_size=1024),
    text=(CLIP_L, OPENCLIP_BIGG),
    schedule=NoiseSchedule(scheduler="EulerDiscreteScheduler", options=_EULER),
    zero_empty_prompt=True,
    guidance=5.0,
    preview=PREVIEW_XL,
)
SDXL_REFINER = Family(
    name="sdxl-refiner",
    unet=UNetConfig(
        channels=(384, 768, 1536, 1536),
        depth=(0, 4, 4, 0),
        mid_depth=4,
        heads=(6, 12, 24, 24),
        text_dim=1280,
        linear_projection=True,
        pooled_dim=1280,
        size_ids=5,
        sample_size=128,
    ),
    autoencoder=SDXL.autoencoder,
    text=(OPENCLIP_BIGG,),
    schedule=SDXL.schedule,
    guidance=5.0,
    preview=PREVIEW_XL,
)

# the built-in model: a small model like SDXL, trained on emoji (configs/emoji-small.yaml)
_SMALL_CLIP = TextEncoderConfig(width=128, layers=3, heads=4, hidden=512, vocab_size=4000, context=32)
_SMALL_POOLED = TextEncoderConfig(
    width=192,
    layers=4,
    heads=6,
    hidden=768,
    activation="gelu",
    projection=192,
    vocab_size=4000,
    context=32,
    pad_token="!",
)
EMOJI = Family(
    name="emoji",
    unet=UNetConfig(
        in_channels=16,
        out_channels=16,
        channels=(96, 192),
        depth=(0, 1),
        mid_depth=1,
        heads=(3, 6),
        layers=1,
        text_dim=320,
        linear_projection=True,
        pooled_dim=192,
        size_ids=6,
        size_dim=16,
        sample_size=12,
    ),
    autoencoder=AutoencoderConfig(
        channels=(16, 32, 64, 128),
        attention=(False, False, False, False),
        mid_attention=False,
        layers=1,
        latent_channels=16,
        groups=8,
        sample_size=96,
    ),
    text=(_SMALL_CLIP, _SMALL_POOLED),
    schedule=NoiseSchedule(
        "v_prediction",
        beta_end=0.02,  # the last timestep is almost pure noise, so sampling can start from pure noise
        scheduler="EulerDiscreteScheduler",
        options={"timestep_spacing": "trailing"},
    ),
    zero_empty_prompt=True,
    steps=20,
    guidance=3.0,
)
EMOJI_REFINER = replace(
    EMOJI,
    name="emoji-refiner",
    unet=replace(EMOJI.unet, channels=(64, 48), depth=(0, 0), heads=(2, 2), groups=16, text_dim=192, size_ids=5),
    text=(_SMALL_POOLED,),
    zero_empty_prompt=False,
)


def variant(family: Family, name: str, in_channels: int) -> Family:
    """A family like `family` with another number of input channels of the U-Net."""
    return replace(family, name=name, unet=replace(family.unet, in_channels=in_channels))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        SD15,
        variant(SD15, "sd15-inpaint", 9),
        variant(SD15, "sd15-edit", 8),  # InstructPix2Pix
        SD2,
        variant(SD2, "sd2-inpaint", 9),
        replace(
            SD2,
            name="sd2-v",
            unet=replace(SD2.unet, sample_size=96),
            autoencoder=replace(SD2.autoencoder, sample_size=768),
            schedule=NoiseSchedule("v_prediction", scheduler="DDIMScheduler", options=_LEADING),
        ),
        SDXL,
        variant(SDXL, "sdxl-inpaint", 9),
        variant(SDXL, "sdxl-edit", 8),
        SDXL_REFINER,
        EMOJI,
        EMOJI_REFINER,
    )
}


def family_named(name: str) -> Family:
    """The family with the given name.

    Raises:
        LdmError: no family has this name.
    """
    if name not in FAMILIES:
        raise LdmError(f"family {name!r} is not known; choose one of: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def recognised(family: Family) -> Family:
    """A family that was read from files, with the name and the usual settings of the known family with the same U-Net,
    text encoders and prediction type; else with the name "custom"."""
    for known in FAMILIES.values():
        same_unet = replace(family.unet, sample_size=known.unet.sample_size, guidance_dim=0) == known.unet
        same_prediction = family.schedule.prediction_type == known.schedule.prediction_type
        if same_unet and family.text == known.text and same_prediction:
            return replace(family, name=known.name, steps=known.steps, guidance=known.guidance, preview=known.preview)
    return replace(family, name="custom", guidance=SDXL.guidance if family.xl else SD15.guidance)


def differences(family: Family) -> list[str]:
    """What a family that was read from files has otherwise than the known family of its name, a line each.

    The kind of sampler and the size of training images are choices of their model's author, and left out.
    """
    known = FAMILIES.get(family.name)
    if known is None:
        return []
    lines = []
    for part, own, usual in (
        ("autoencoder", family.autoencoder, known.autoencoder),
        ("noise schedule", family.schedule, known.schedule),
    ):
        for name in (each.name for each in fields(own)):
            ours, theirs = getattr(own, name), getattr(usual, name)
            if name not in ("sample_size", "scheduler", "options", "force_upcast") and ours != theirs:
                lines.append(f"{part}: {name} is {ours}, of {known.name} {theirs}")
    return lines
