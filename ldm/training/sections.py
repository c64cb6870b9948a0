"""The parts of a configuration that all kinds of stages share; each kind's own part lies beside its stage."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a configuration: no unknown keys, no changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model to start from."""

    usual: ClassVar[str | None] = None  # the family that is built by default
    source: str | None = Field(None, description="a model folder, checkpoint file or Hub name; null: random weights")
    family: str | None = Field(None, description="sd15, sdxl, …: family to build, or of a single file")
    components: dict[str, str] = Field(
        {}, description="parts from elsewhere: vae, unet, text_encoder[_2]: path or Hub name"
    )
    fresh: list[Literal["unet", "autoencoder", "text"]] = Field([], description="parts to begin with random weights")
    unet: dict[str, Any] = Field({}, description="fields of UNetConfig that differ from the family's")
    autoencoder: dict[str, Any] = Field({}, description="fields of AutoencoderConfig that differ")
    text: list[dict[str, Any]] = Field([], description="fields of TextEncoderConfig that differ, for each text encoder")
    schedule: dict[str, Any] = Field({}, description="fields of NoiseSchedule that differ")
    zero_empty_prompt: bool | None = Field(None, description="zeros encode an empty prompt; null: as in the family")


class OptimizerSection(Section):
    """How weights are updated. The learning rate depends on the update's number alone, not on the processes."""

    name: Literal["adamw", "adamw-8bit", "adafactor", "prodigy", "muon"] = Field("adamw", description="the method")
    learning_rate: float = Field(1e-4, gt=0, description="highest learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="how the rate falls at the end")
    warmup: int = Field(0, ge=0, description="updates until the highest learning rate is reached")
    cooldown: int = Field(0, ge=0, description="last updates, in which the learning rate falls; 0: all after warm-up")
    final: float = Field(0.0, ge=0, le=1, description="part of the learning rate left at the last update")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of the first and second moments")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no clipping")

    @field_validator("cooldown")
    @classmethod
    def _falls(cls, cooldown: int, info: ValidationInfo) -> int:
        """A cooldown needs a schedule that falls."""
        if cooldown and info.data.get("schedule") == "constant":
            raise ValueError("a constant learning rate does not fall; choose the schedule linear or cosine")
        return cooldown


class EmaSection(Section):
    """Averages of the weights (EMA), which are saved, sampled and validated in place of the weights."""

    decay: float = Field(0.9999, ge=0, lt=1, description="decay of the exponential average; 0: none")
    ramp: bool = Field(True, description="a shorter average at first: at most (1 + n) / (10 + n) after n updates")
    widths: list[float] = Field([], description="relative widths of power-function averages (Karras et al. 2024)")
    every: int = Field(5000, ge=1, description="updates between snapshots, from which any width can be computed later")


class SizeSection(Section):
    """A part of a stage at one resolution."""

    size: int = Field(512, ge=8, le=8192, description="images have about size² pixels")
    steps: int | None = Field(None, ge=1, description="updates at this size; null: the rest")
    batch: int | None = Field(None, ge=1, description="images in an update at this size, if it differs")
    micro_batch: int | None = Field(None, ge=1, description="images at a time on each device, if it differs")


class StageSection(Section):
    """The settings that all stages share."""

    beside: ClassVar[tuple[str, ...]] = ()  # the images beside each image (`data.beside`) that the stage needs
    reads: ClassVar[tuple[str, ...]] = ()  # those that it reads if they are there, besides these
    needed: ClassVar[tuple[str, ...]] = ()  # keys that have no default
    fixed: ClassVar[tuple[str, ...]] = ()  # keys whose values stay while a run goes on, because its weights need them
    steps: int = Field(100_000, ge=1, description="updates of the weights")
    batch: int = Field(32, ge=1, description="images in an update, over all devices")
    micro_batch: int | None = Field(
        None, ge=1, description="most images at a time on each device; null: its whole share of the batch"
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


class EvaluationSection(Section):
    """Images made and measured while training, for each average of the weights (`ldm eval` measures a result)."""

    every: int = Field(0, ge=0, description="updates between evaluations; 0: none")
    metrics: list[str] = Field(["kid"], min_length=1, description="metrics of `ldm eval`, but those of reconstructions")
    n: int | None = Field(None, ge=2, description="images to make; null: one for each caption of the data")
    data: str | None = Field(None, description="reference images with captions; null: the held-out ones")
    features: str = Field("inception", description="network for FID, KID and the like")
    clip: str | None = Field(None, description="network for CLIP score and the like: clip:MODEL@WEIGHTS, clip:FOLDER")
    steps: int = Field(30, ge=1, le=1000, description="steps of the scheduler")
    guidance: float | None = Field(None, ge=0, le=1000, description="guidance scale; null: the family's default")
    batch: int = Field(8, ge=1, description="images made at a time on each device")
    choose: str | None = Field(None, description="metric whose best weights become the result; null: the last ones")

    @field_validator("choose")
    @classmethod
    def _measured(cls, choose: str | None, info: ValidationInfo) -> str | None:
        """The metric to choose by must be measured."""
        if choose is not None and info.data.get("every", 1) == 0:
            raise ValueError("no evaluation is made to choose by; set every")
        if choose is not None and choose not in info.data.get("metrics", [choose]):
            raise ValueError("this metric is not among evaluation.metrics")
        return choose


class BesideSection(Section):
    """Images beside each image: a folder with the same names, a column of the data, or what makes them of it."""

    condition: str | None = Field(
        None, description="condition images, which a ControlNet reads; or canny, lineart, gray, blur, tile"
    )
    mask: str | None = Field(
        None, description="masks, white where errors count, or what to inpaint; or alpha, boxes, strokes, random"
    )
    before: str | None = Field(None, description="the images before the edit that a caption describes")

    def named(self) -> dict[str, str]:
        """Those that are set."""
        return {kind: place for kind, place in self if place is not None}


class FolderSection(Section):
    """What holds for the images of one folder of the data."""

    repeats: int = Field(1, ge=1, le=10_000, description="how often each comes in an epoch")
    weight: float = Field(1.0, ge=0, le=1000, description="weight of their loss")
    caption: str = Field("", description="caption of images without one")


class PriorSection(Section):
    """Class images, trained along with the others so that the model keeps what it knew (DreamBooth)."""

    prompt: str = Field("", description="prompt of class images, such as a photo of a dog; empty: no class images")
    source: str | None = Field(None, description="a folder of class images; null: the model makes them before training")
    images: int = Field(200, ge=1, description="class images to make")
    weight: float = Field(1.0, ge=0, description="weight of the class images' loss beside that of the others")
    steps: int = Field(30, ge=1, le=1000, description="steps of the scheduler")
    batch: int = Field(4, ge=1, description="class images made at a time on each device")

    @field_validator("source", "images", "weight", "steps", "batch")
    @classmethod
    def _told(cls, value: Any, info: ValidationInfo) -> Any:
        """Class images need their prompt; those of a source are not made."""
        name = str(info.field_name)
        if value == cls.model_fields[name].default:
            return value
        if not info.data.get("prompt"):
            raise ValueError("class images need their prompt; set it too")
        if name in ("images", "steps", "batch") and info.data.get("source"):
            raise ValueError("it is for class images that are made, and a source is named; leave one of them out")
        return value


class DataSection(Section):
    """The images and their captions."""

    loading: ClassVar[frozenset[str]] = frozenset(  # how images are framed and loaded, class images too
        ("buckets", "bucket_step", "aspect", "crop", "flip", "upscale", "workers", "cache", "crops")
    )
    source: str | None = Field(
        None, description="a folder, WebDataset shards (*.tar, {000..012}), or a dataset of the Hub"
    )
    split: str = Field("train", description="split of a dataset")
    caption_column: str | None = Field(
        None, description="column of captions in a dataset, metadata or .json; null: text, caption, captions or prompt"
    )
    image_column: str | None = Field(None, description="column of images in a dataset; null: the first")
    beside: BesideSection = BesideSection()
    captions: Literal["required", "optional"] = Field("required", description="optional: keep images without caption")
    trigger: str = Field("", description="words put in front of each caption, and in place of a missing one")
    folders: dict[str, FolderSection] = Field(
        {}, description="folders within the source: {dog: {repeats: 10, weight: 1.0, caption: a dog}}"
    )
    numbered_folders: bool = Field(
        False, description="read folders named 10_dog as kohya does: ten repeats, and dog as caption of bare images"
    )
    shuffle_tags: bool = Field(False, description="put the tags of a caption, between commas, in a new order each time")
    keep_tags: int = Field(0, ge=0, le=1000, description="first tags that stay in place, beside the trigger")
    drop_tags: float = Field(0.0, ge=0, lt=1, description="part of the other tags left out, others each time")
    holdout: float = Field(64, ge=0, description="images held out of training for validation; below 1: a part of all")
    buckets: bool = Field(True, description="keep aspect ratios, in buckets; else crop squares")
    bucket_step: int = Field(
        64, ge=8, le=1024, multiple_of=8, description="sides of the buckets are multiples of it, in pixels"
    )
    aspect: float = Field(4.0, ge=1, le=16, description="width / height of the widest bucket")
    crop: Literal["random", "center"] = Field("random", description="place of the crop")
    flip: bool = Field(False, description="mirror half of the images; not where left and right matter")
    upscale: float = Field(
        1.25, ge=1, le=64, description="images to be enlarged more than this are left out, and counted"
    )
    stream: bool = Field(False, description="read shards or a dataset from the beginning, without a copy on disk")
    workers: int = Field(2, ge=0, description="processes that load images")
    cache: bool = Field(False, description="encode images and captions once, and keep them in the run's folder")
    crops: int = Field(1, ge=1, le=64, description="crops of each image in the cache")
