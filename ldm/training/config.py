"""What a run is to do: typed, checked, documented, read from YAML and from `key.sub=value` on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from ldm.errors import LdmError, first_line, suggestion

StageName = Literal["autoencoder", "text", "base", "refiner"]
STAGES: tuple[StageName, ...] = get_args(StageName)
Decay = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of a configuration: no unknown keys, no changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model to start from."""

    usual: ClassVar[str | None] = None  # the family that is built where neither a source nor another one is named
    source: str | None = Field(None, description="a model folder, checkpoint file or Hub name; without: random weights")
    family: str | None = Field(None, description="sd15, sdxl, …: what to build, or what a single file is")
    components: dict[str, str] = Field({}, description="parts from elsewhere: vae, unet, text_encoder[_2]: path")
    fresh: list[Literal["unet", "autoencoder", "text"]] = Field([], description="parts of a source to begin anew")
    unet: dict[str, Any] = Field({}, description="fields of UNetConfig that differ from the family's")
    autoencoder: dict[str, Any] = Field({}, description="fields of AutoencoderConfig that differ")
    text: list[dict[str, Any]] = Field([], description="fields of TextEncoderConfig that differ, for each text encoder")
    schedule: dict[str, Any] = Field({}, description="fields of NoiseSchedule that differ")
    zero_empty_prompt: bool | None = Field(None, description="whether zeros stand for an empty prompt, if it differs")


class OptimizerSection(Section):
    """How weights are updated. The learning rate depends on the update's number alone, whatever runs in parallel."""

    name: Literal["adamw", "adamw-8bit", "adafactor", "prodigy"] = Field("adamw", description="the method")
    learning_rate: float = Field(1e-4, gt=0, description="its highest value")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="how it falls after the warm-up")
    warmup: int = Field(0, ge=0, description="updates until it is reached")
    cooldown: int = Field(0, ge=0, description="the last updates, in which it falls; 0: all after the warm-up")
    final: float = Field(0.0, ge=0, le=1, description="part of it that is left at the last update")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of the first and second moments")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: as it comes")

    @field_validator("cooldown")
    @classmethod
    def _falls(cls, cooldown: int, info: ValidationInfo) -> int:
        """A constant learning rate has no end to it."""
        if cooldown and info.data.get("schedule") == "constant":
            raise ValueError("a constant learning rate does not fall; choose the schedule linear or cosine")
        return cooldown


class EmaSection(Section):
    """Averages of the weights, which are what is saved, sampled and validated."""

    decay: float = Field(0.9999, ge=0, lt=1, description="of the exponential average; 0: none")
    ramp: bool = Field(True, description="a shorter average at first: at most (1 + n) / (10 + n) after n updates")
    widths: list[float] = Field([], description="relative widths of power-function averages (Karras et al. 2024)")
    every: int = Field(
        5000, ge=1, description="updates between their snapshots, from which any width can be made later"
    )


class SizeSection(Section):
    """A part of a run at one resolution."""

    size: int = Field(512, ge=8, le=8192, description="pixels: images have about size² of them")
    steps: int | None = Field(None, ge=1, description="updates at this size; without: the rest")
    batch: int | None = Field(None, ge=1, description="images in an update at this size, if it differs")
    micro_batch: int | None = Field(None, ge=1, description="images at a time on each device, if it differs")


class StageSection(Section):
    """What all stages have."""

    steps: int = Field(100_000, ge=1, description="updates of the weights")
    batch: int = Field(32, ge=1, description="images in an update, over all devices")
    micro_batch: int | None = Field(
        None, ge=1, description="images at a time on each device, at the most; without: all of its share"
    )
    sizes: list[SizeSection] = Field([SizeSection()], min_length=1, description="resolutions, one after the other")
    optimizer: OptimizerSection = OptimizerSection()
    ema: EmaSection = EmaSection()
    checkpointing: bool = Field(False, description="recompute activations in the backward pass: slower, less memory")
    compile: bool = Field(False, description="torch.compile the trained network")
    log_every: int = Field(10, ge=1, description="updates between lines of the log")
    save_every: int = Field(1000, ge=1, description="updates between checkpoints")
    keep: int = Field(2, ge=2, description="checkpoints that are kept")
    validate_every: int = Field(1000, ge=1, description="updates between validations on the held-out images")
    preview_every: int = Field(1000, ge=1, description="updates between previews")


class AutoencoderSection(StageSection):
    """The autoencoder: images through latents and back."""

    pixel_loss: Literal["l1", "l2"] = Field("l1", description="distance of pixels")
    perceptual: str | None = Field(
        None, description="LPIPS: vgg16 or alex (tools/fetch_weights.py), a file; null: none"
    )
    perceptual_weight: float = Field(1.0, ge=0, description="weight of LPIPS; 0: it is measured at most")
    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL divergence, as latent-diffusion counts it")
    commitment_weight: float = Field(0.25, ge=0, description="weight of the commitment loss, with a codebook")
    codebook_decay: float = Field(0.99, ge=0, lt=1, description="of the codebook's moving averages; 0: by gradient")
    codebook_patience: int = Field(100, ge=1, description="updates after which an unused vector is replaced")
    adversarial_weight: float = Field(0.5, ge=0, description="weight of the discriminator; 0: there is none")
    adversarial_start: int = Field(50_000, ge=0, description="updates before it takes part")
    discriminator: dict[str, Any] = Field({}, description="fields of DiscriminatorConfig that differ")
    discriminator_learning_rate: float | None = Field(None, gt=0, description="if it differs")
    decoder_only: bool = Field(False, description="leave the encoder as it is, so that U-Nets of its latents still fit")
    measure: int = Field(10_000, ge=1, description="at most so many images tell the latents' scale at the end")
    measure_shift: bool = Field(False, description="measure their mean too, not only their scale")


class TextSection(StageSection):
    """The text encoders, trained contrastively with an image encoder (CLIP)."""

    image_width: int = Field(768, ge=8, description="channels of the image encoder")
    image_layers: int = Field(12, ge=1, description="its layers")
    image_heads: int = Field(12, ge=1, description="heads of its attention")
    patch: int = Field(32, ge=1, description="pixels of a patch, on each side; it divides those of all images")
    embed_dim: int | None = Field(
        None, ge=1, description="channels of the comparison; without: the text encoders' projection, or 512"
    )
    image_only: bool = Field(
        False, description="leave the text encoders as they are, so that U-Nets that read them still fit"
    )


class EvaluationSection(Section):
    """Images made and measured while training, for each average of the weights (`ldm eval` measures a result)."""

    every: int = Field(0, ge=0, description="updates between evaluations; 0: none")
    metrics: list[str] = Field(["kid"], min_length=1, description="those of `ldm eval` that are not reconstructions'")
    n: int | None = Field(None, ge=2, description="images to make; without: one for each caption of the data")
    data: str | None = Field(None, description="images to compare with, with captions; without: those held out")
    features: str = Field("inception", description="network for FID, KID and the like")
    clip: str | None = Field(None, description="network for metrics of prompts: clip:MODEL@WEIGHTS, clip:FOLDER")
    steps: int = Field(30, ge=1, le=1000, description="of the scheduler")
    guidance: float | None = Field(None, ge=0, le=1000, description="scale; without: the family's usual one")
    batch: int = Field(8, ge=1, description="images made at a time on each device")
    choose: str | None = Field(None, description="metric whose best weights become the result; without: the last ones")

    @field_validator("choose")
    @classmethod
    def _measured(cls, choose: str | None, info: ValidationInfo) -> str | None:
        """What decides has to be known."""
        if choose is not None and info.data.get("every", 1) == 0:
            raise ValueError("nothing is measured to choose by; set every")
        if choose is not None and choose not in info.data.get("metrics", [choose]):
            raise ValueError("it is not among the metrics")
        return choose


class DenoiserSection(StageSection):
    """The U-Net, base or refiner."""

    min_snr: float = Field(0.0, ge=0, description="gamma of min-SNR weighting (Hang et al. 2023), usually 5; 0: none")
    noise_offset: float = Field(0.0, ge=0, description="noise that a whole channel shares, usually up to 0.1")
    timesteps: Literal["uniform", "logit-normal"] = Field("uniform", description="how they are drawn")
    timestep_range: tuple[int, int] | None = Field(None, description="first and last; without: all, refiner 0 to 199")
    logit_mean: float = Field(0.0, description="of the logit-normal distribution (Esser et al. 2024)")
    logit_std: float = Field(1.0, gt=0, description="likewise")
    drop_caption: list[Part] = Field([0.1], min_length=1, max_length=2, description="part of the captions left out")
    drop_together: bool = Field(False, description="leave a caption out of both text encoders, or out of none")
    drop_size: float = Field(0.0, ge=0, le=1, description="part of the size conditioning left out")
    attention: str = Field("sdpa", description="kernel of the U-Net's attention; on a CPU math is faster")
    train_text: bool = Field(False, description="train the text encoders together with the U-Net")
    text_learning_rate: list[NotNegative] = Field(
        [1e-6], min_length=1, max_length=2, description="of each text encoder"
    )
    prompts: list[str] = Field([], description="of the previews; without: held-out captions")
    evaluation: EvaluationSection = EvaluationSection()


class RefinerModelSection(ModelSection):
    """Which refiner to start from; one that is built takes over the base's autoencoder and last text encoder."""

    usual: ClassVar[str | None] = "sdxl-refiner"
    family: str | None = Field(None, description="what to build (sdxl-refiner), or what a single file is")


class RefinerSection(DenoiserSection):
    """The refiner: the last 200 timesteps, with its own text encoder and an aesthetic score."""

    model: RefinerModelSection = RefinerModelSection()
    default_score: float = Field(6.0, ge=0, le=10, description="aesthetic score of images that have none")


class DataSection(Section):
    """The images and their captions."""

    source: str | None = Field(
        None, description="a folder, WebDataset shards (*.tar, {000..012}), or a dataset of the Hub"
    )
    split: str = Field("train", description="of a dataset")
    caption_column: str | None = Field(None, description="of a dataset; without: text, caption, captions or prompt")
    captions: Literal["required", "optional"] = Field("required", description="what to do about images without")
    holdout: float = Field(64, ge=0, description="images kept out of training for validation; below 1: a part of them")
    buckets: bool = Field(True, description="keep aspect ratios, in buckets; else crop squares")
    bucket_step: int = Field(64, ge=8, description="sides of the buckets are multiples of it, in pixels")
    aspect: float = Field(4.0, ge=1, description="width / height of the widest bucket")
    crop: Literal["random", "center"] = Field("random", description="where to crop")
    flip: bool = Field(False, description="mirror half of the images: only where neither they nor captions have a side")
    upscale: float = Field(1.25, ge=1, description="images that would be enlarged more are left out, and counted")
    stream: bool = Field(False, description="read shards or a dataset from the beginning, without a copy on disk")
    workers: int = Field(2, ge=0, description="processes that load images")
    cache: bool = Field(False, description="encode images and captions once, and keep them in the run's folder")
    crops: int = Field(1, ge=1, description="crops of each image in the cache")


class Config(Section):
    """A run."""

    output: str = Field("runs/run", description="its folder; run the same command again and it goes on from there")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything that is random")
    precision: Literal["no", "fp16", "bf16"] = Field("no", description="of the computation; weights stay fp32")
    stages: list[StageName] = Field(["base"], min_length=1, description="what to train, in this order")
    trackers: list[str] = Field(["tensorboard"], description="where the log goes besides: tensorboard, wandb, …")
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    autoencoder: AutoencoderSection = AutoencoderSection()
    text: TextSection = TextSection()
    base: DenoiserSection = DenoiserSection()
    refiner: RefinerSection = RefinerSection()

    @field_validator("precision", mode="before")
    @classmethod
    def _no(cls, precision: Any) -> Any:
        """YAML reads a bare no as false."""
        return "no" if precision is False else precision

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[StageName]) -> list[StageName]:
        """Each starts from the one before."""
        if stages != [name for name in STAGES if name in stages]:
            raise ValueError(f"each stage once, in the order {', '.join(STAGES)}")
        return stages


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, with `key.sub=value` on top; values are written as in YAML.

    Raises:
        LdmError: the file cannot be read, a key is not known (the nearest one is offered), or a value does not fit.
    """
    content = _read(Path(path)) if path else {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise LdmError(f"{override!r}: write KEY=VALUE, such as base.steps=2000")
        try:
            _set(content, name.split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise LdmError(f"{override!r}: the value cannot be read: {first_line(error)}") from None
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise LdmError("; ".join(_message(problem, path) for problem in error.errors()[:3])) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LdmError(f"{path} is not UTF-8 text") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise LdmError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LdmError(f"{path}: keys and values are needed, not a {type(content).__name__}")
    return content


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for index, key in enumerate(keys[:-1]):
        below = content.setdefault(key, {})
        if not isinstance(below, dict):
            raise LdmError(f"{'.'.join(keys)}: {'.'.join(keys[: index + 1])} is {below!r}; give it as a whole")
        content = below
    content[keys[-1]] = value


def _message(problem: ErrorDetails, path: str | Path | None) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        hint = suggestion(str(problem["loc"][-1]), _section(problem["loc"][:-1]))
        return f"{path or 'the configuration'}: {place} is not known; {hint}"
    return f"{path or 'the configuration'}: {place} is {problem['input']!r}: {problem['msg'].lower()}"


def _section(place: Sequence[int | str]) -> list[str]:
    """The known keys at a place of the configuration."""
    section: type[BaseModel] = Config
    for key in place:
        if isinstance(key, str):
            section = _sections(section.model_fields[key].annotation)[0]
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections(part)]


def describe(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of a configuration: its full name, its default as YAML, and what it means."""
    for name, field in section.model_fields.items():
        below = _sections(field.annotation)
        if below and isinstance(field.annotation, type):
            yield f"{prefix}{name}", "", (below[0].__doc__ or "").splitlines()[0]
            yield from describe(below[0], f"{prefix}{name}.")
            continue
        default = field.default
        if isinstance(default, list):
            default = [item.model_dump() if isinstance(item, BaseModel) else item for item in default]
        yield (
            f"{prefix}{name}",
            yaml.safe_dump(default, default_flow_style=True).splitlines()[0],
            field.description or "",
        )


def dump(config: Config) -> str:
    """The whole configuration as YAML, defaults included: what a run's folder keeps."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
