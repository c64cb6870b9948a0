"""The section of each kind of stage in a configuration, in the order in which a run trains the kinds.

What a kind does with its section is a row of `ldm.training.stages.table`. Nothing here imports PyTorch, so that a wrong
configuration is answered at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from ldm.errors import listing
from ldm.training.sections import (
    EmaSection,
    EvaluationSection,
    ModelSection,
    OptimizerSection,
    PriorSection,
    Section,
    StageSection,
)
from ldm.training.stages.templates import TEMPLATES


def _pattern(text: str) -> str:
    """A regular expression that can be read."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text} is no regular expression: {error}") from None
    return text


Part = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Rank = Annotated[int, Field(ge=1, le=4096)]


class AutoencoderSection(StageSection):
    """The autoencoder, trained to reconstruct images."""

    pixel_loss: Literal["l1", "l2"] = Field("l1", description="loss of pixels")
    perceptual: str | None = Field(
        None, description="network of LPIPS: vgg16 or alex (tools/fetch_weights.py), or a file; null: none"
    )
    perceptual_weight: float = Field(1.0, ge=0, description="weight of LPIPS; 0: only measured")
    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL divergence, as in latent-diffusion")
    commitment_weight: float = Field(0.25, ge=0, description="weight of the commitment loss, with a codebook")
    codebook_decay: float = Field(0.99, ge=0, lt=1, description="decay of a codebook's averages; 0: by gradients")
    codebook_patience: int = Field(100, ge=1, description="updates after which an unused vector is replaced")
    adversarial_weight: float = Field(0.5, ge=0, description="weight of the discriminator; 0: none")
    adversarial_start: int = Field(50_000, ge=0, description="updates before the discriminator takes part")
    discriminator: dict[str, Any] = Field({}, description="fields of DiscriminatorConfig that differ")
    discriminator_learning_rate: float | None = Field(None, gt=0, description="null: as the autoencoder's")
    decoder_only: bool = Field(False, description="train the decoder alone, so that U-Nets of its latents still fit")
    latent_noise: float = Field(
        0.0, ge=0, description="highest standard deviation of noise added to scaled latents (decoder_only), such as 0.5"
    )
    measure: int = Field(10_000, ge=1, description="most images on which the latents' scale is measured at the end")
    measure_shift: bool = Field(False, description="measure the latents' mean too, as a shift")


class TextSection(StageSection):
    """The text encoders, trained contrastively with an image encoder (CLIP)."""

    image_width: int = Field(768, ge=8, description="channels of the image encoder")
    image_layers: int = Field(12, ge=1, description="layers of the image encoder")
    image_heads: int = Field(12, ge=1, description="attention heads of the image encoder")
    patch: int = Field(32, ge=1, description="side of a patch in pixels; it divides the sides of all images")
    embed_dim: int | None = Field(
        None, ge=1, description="channels of the comparison; null: the text encoders' projection, or 512"
    )
    image_only: bool = Field(
        False, description="train the image encoder alone, so that U-Nets that read the text encoders still fit"
    )


class DenoiserSection(StageSection):
    """A U-Net that learns to denoise."""

    reads: ClassVar[tuple[str, ...]] = ("mask",)
    min_snr: float = Field(0.0, ge=0, description="gamma of min-SNR weighting (Hang et al. 2023), usually 5; 0: none")
    noise_offset: float = Field(0.0, ge=0, description="strength of noise shared by a whole channel, usually up to 0.1")
    timesteps: Literal["uniform", "logit-normal", "cubic"] = Field(
        "uniform", description="distribution of timesteps; cubic: mostly those with much noise"
    )
    timestep_range: tuple[int, int] | None = Field(None, description="first and last; null: all, refiner 0 to 199")
    logit_mean: float = Field(0.0, description="mean of the logit-normal distribution (Esser et al. 2024)")
    logit_std: float = Field(1.0, gt=0, description="its standard deviation")
    drop_caption: list[Part] = Field([0.1], min_length=1, max_length=2, description="part of the captions dropped")
    drop_together: bool = Field(False, description="drop a caption for both text encoders, or for none")
    drop_size: float = Field(0.0, ge=0, le=1, description="part of the time ids dropped")
    outside_mask: Part = Field(
        0.0, description="weight of errors where a mask (data.beside.mask) is black; the loss is the mean by weight"
    )
    attention: str = Field("sdpa", description="attention kernel of the U-Net; on a CPU math is faster")
    train_text: bool = Field(False, description="train the text encoders together with the U-Net")
    text_learning_rate: list[NotNegative] = Field(
        [1e-6], min_length=1, max_length=2, description="learning rate of each text encoder"
    )
    prompts: list[str] = Field([], description="prompts of previews; empty: held-out captions")
    evaluation: EvaluationSection = EvaluationSection()


class BaseSection(DenoiserSection):
    """The U-Net of the base model."""

    reads: ClassVar[tuple[str, ...]] = ("mask", "before")
    prior: PriorSection = PriorSection()
    drop_before: Part = Field(0.05, description="part of the images before an edit dropped, if the U-Net reads them")
    drop_both: Part = Field(0.05, description="part of which caption and such an image are dropped, besides those")


class RefinerModelSection(ModelSection):
    """The refiner to start from; a newly built one takes the base's autoencoder and last text encoder."""

    usual: ClassVar[str | None] = "sdxl-refiner"
    family: str | None = Field(None, description="family to build (sdxl-refiner), or of a single file")


class RefinerSection(DenoiserSection):
    """The refiner: the last 200 timesteps, with its own text encoder and an aesthetic score."""

    model: RefinerModelSection = RefinerModelSection()
    default_score: float = Field(6.0, ge=0, le=10, description="aesthetic score of images that have none")


class AdapterEmaSection(EmaSection):
    """Averages of the adapter's weights (EMA), which become the result in place of the weights."""

    decay: float = Field(0.0, ge=0, lt=1, description="decay of the exponential average; 0: none")


class AdapterSection(BaseSection):
    """A low-rank adapter (LoRA and its kin) of the U-Net and, with `train_text`, of its text encoders."""

    place: ClassVar[str] = "adapter"  # in the configuration
    fixed: ClassVar[tuple[str, ...]] = (
        "kind", "dora", "layers", "rank", "alpha", "ranks", "alphas", "lokr_factor", "train_text",
    )  # fmt: skip
    steps: int = Field(2000, ge=1, description="updates of the weights")
    batch: int = Field(4, ge=1, description="images in an update, over all devices")
    ema: AdapterEmaSection = AdapterEmaSection()
    text_learning_rate: list[NotNegative] = Field(
        [5e-5], min_length=1, max_length=2, description="learning rate of each text encoder's adapter"
    )
    kind: Literal["lora", "loha", "lokr"] = Field(
        "lora", description="form of the changes; lora is LoCon in convolutions"
    )
    dora: bool = Field(False, description="train the norms of the weights' rows too (DoRA)")
    layers: list[Pattern] = Field(
        ["attention"],
        min_length=1,
        description="changed layers: attention, transformers, linear, convolutions, or patterns of their names",
    )
    rank: Rank = Field(16, description="rank of the changes")
    alpha: float | None = Field(None, gt=0, description="changes are scaled by alpha / rank; null: the layer's rank")
    ranks: dict[Pattern, Rank] = Field(
        {}, description="other ranks, by patterns of layers' names: {'attn2.to_[kv]': 4}"
    )
    alphas: dict[Pattern, Annotated[float, Field(gt=0)]] = Field({}, description="alphas of some layers, likewise")
    lokr_factor: int | None = Field(
        None, ge=2, description="most rows and columns of LoKr's first matrix; null: about the root of the layer's"
    )
    up_rate: float = Field(
        1.0, gt=0, description="learning rate of LoRA's second matrix by that of its first (LoRA+: 16)"
    )
    rank_dropout: float = Field(
        0.0, ge=0, lt=1, description="part of LoRA's ranks dropped in each layer, for each sample"
    )
    max_norm: float = Field(0.0, ge=0, description="largest norm of a layer's change; 0: any")
    quantize: Literal["int8-weights"] | None = Field(
        None, description="int8-weights: hold the frozen weights of the U-Net's transformer blocks in 8 bits"
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="numbers in the adapter's file")

    @field_validator("text_learning_rate")
    @classmethod
    def _read(cls, rates: list[float], info: ValidationInfo) -> list[float]:
        """A rate of text encoders needs their adapters."""
        if not info.data.get("train_text", True) and rates != cls.model_fields["text_learning_rate"].default:
            raise ValueError("the adapter has no text encoder; set train_text=true, or leave the rate out")
        return rates

    @field_validator("quantize")
    @classmethod
    def _whole(cls, quantize: str | None, info: ValidationInfo) -> str | None:
        """DoRA computes with the frozen weights' norms."""
        if quantize and info.data.get("dora"):
            raise ValueError("DoRA needs the exact norms of the weights; leave one of them out")
        return quantize

    @field_validator("lokr_factor")
    @classmethod
    def _of_lokr(cls, factor: int | None, info: ValidationInfo) -> int | None:
        """LoKr alone has two matrices of chosen sizes."""
        if factor is not None and info.data.get("kind", "lokr") != "lokr":
            raise ValueError("it is for LoKr (kind: lokr); leave it out")
        return factor

    @field_validator("up_rate", "rank_dropout")
    @classmethod
    def _narrow(cls, value: float, info: ValidationInfo) -> float:
        """What LoRA's two matrices alone have."""
        lora = info.data.get("kind") == "lora" and not info.data.get("dora")
        if not lora and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError("it is for plain LoRA (kind: lora, dora: false); leave it out")
        return value


def embedding_name(word: str) -> str:
    """The name of a new word's file, without its ending: in lower case, with _ for what names of files cannot hold."""
    return re.sub(r"[^\w .-]|^\.", "_", " ".join(word.lower().split()))


def _template(text: str) -> str:
    """A group of templates, or a sentence with one place for the word."""
    if text not in TEMPLATES and text.count("{}") != 1:
        raise ValueError(f"write {' or '.join(TEMPLATES)}, or sentences in which {{}} stands for the word")
    return text


class NewWordSection(Section):
    """A new word."""

    vectors: int | None = Field(
        None, ge=1, le=75, description="learned vectors; null: one for each token of the initial words, or one"
    )
    initial: str = Field("", description="words whose embeddings the vectors begin with; empty: random vectors")


class WordsOptimizerSection(OptimizerSection):
    """How the vectors, and the adapter beside them, are updated."""

    learning_rate: float = Field(5e-3, gt=0, description="highest learning rate of the vectors")


WITHOUT_ADAPTER = ("steps", "batch", "ema")  # fields of `AdapterSection`


class TextualInversionSection(AdapterSection):
    """Vectors of new words (textual inversion) and, with `pivotal`, an adapter beside them (pivotal tuning)."""

    place: ClassVar[str] = "textual-inversion"
    fixed: ClassVar[tuple[str, ...]] = (*AdapterSection.fixed, "words", "pivotal")
    optimizer: WordsOptimizerSection = WordsOptimizerSection()
    drop_caption: list[Part] = Field([0.0], min_length=1, max_length=2, description="part of the captions dropped")
    words: dict[str, NewWordSection] = Field(
        {"<new>": NewWordSection()},
        min_length=1,
        description="the new words, as captions have them: {'<cat>': {initial: cat, vectors: 4}}",
    )
    templates: list[Annotated[str, AfterValidator(_template)]] = Field(
        ["object"],
        description="sentences around captions that are a new word, or data.trigger, alone: object, style, or written "
        "out with {} for it; empty: none",
    )
    keep_norm: bool = Field(False, description="keep each vector as long as it was at first")
    pivotal: bool = Field(
        False, validate_default=True, description="train an adapter (rank, layers, …) in the same run: pivotal tuning"
    )
    adapter_learning_rate: float = Field(1e-4, gt=0, description="learning rate of the U-Net's adapter")

    @field_validator("adapter_learning_rate")
    @classmethod
    def _beside(cls, rate: float, info: ValidationInfo) -> float:
        """The rate of an adapter needs one."""
        if not info.data.get("pivotal", True) and rate != cls.model_fields["adapter_learning_rate"].default:
            raise ValueError("no adapter is trained; set pivotal=true, or leave it out")
        return rate

    @field_validator("words")
    @classmethod
    def _distinct(cls, words: dict[str, NewWordSection]) -> dict[str, NewWordSection]:
        """Words differ in lower case, as prompts are read, and in the names of their files."""
        names = [embedding_name(word) for word in words]
        if not all(name.strip("_ ") and len(name) <= 100 for name in names):
            raise ValueError("a word has from 1 to 100 letters and digits")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several words are called {listing(twice)} in their files' names; choose others")
        return words

    @field_validator("pivotal")
    @classmethod
    def _with_adapter(cls, pivotal: bool, info: ValidationInfo) -> bool:
        """What an adapter alone has needs one."""
        for name in () if pivotal else ("train_text", *AdapterSection.__annotations__):
            own = cls.model_fields.get(name)
            if own and name not in WITHOUT_ADAPTER and info.data.get(name, own.default) != own.default:
                raise ValueError(
                    f"{name} belongs to an adapter, and none is trained; set pivotal=true, or leave it out"
                )
        return pivotal


class AttachedSection(DenoiserSection):
    """A network beside a U-Net and text encoders that stay as they are."""

    steps: int = Field(20_000, ge=1, description="updates of the weights")
    batch: int = Field(16, ge=1, description="images in an update, over all devices")
    ema: AdapterEmaSection = AdapterEmaSection()
    source: str | None = Field(None, description="one to begin with: a folder, a file or a Hub name; null: a new one")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="numbers in the result's files")

    @field_validator("train_text")
    @classmethod
    def _still(cls, train_text: bool) -> bool:
        """Text encoders stay as they are."""
        if train_text:
            raise ValueError("the text encoders stay as they are here; leave it out")
        return train_text


class ControlSection(AttachedSection):
    """A network that reads condition images."""

    beside: ClassVar[tuple[str, ...]] = ("condition",)
    drop_condition: Part = Field(0.0, description="part of the condition images that become black")


class ControlNetSection(ControlSection):
    """A ControlNet, which begins as a copy of the U-Net's way down."""

    drop_caption: list[Part] = Field([0.5], min_length=1, max_length=2, description="part of the captions dropped")


class T2IAdapterSection(ControlSection):
    """A T2I-Adapter."""

    fixed: ClassVar[tuple[str, ...]] = ("gray", "layers")
    timesteps: Literal["uniform", "logit-normal", "cubic"] = Field(
        "cubic", description="distribution of timesteps; cubic: mostly those with much noise (Mou et al. 2023)"
    )
    gray: bool = Field(False, description="a new one reads shades of gray, as published ones for edges and lines do")
    layers: int = Field(2, ge=1, le=16, description="residual blocks for each feature map of a new one")

    @field_validator("gray", "layers")
    @classmethod
    def _of_a_new_one(cls, value: Any, info: ValidationInfo) -> Any:
        """The shape of a source is its own."""
        if info.data.get("source") and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError(f"belongs to a new one, and source has its own {info.field_name}; leave one of them out")
        return value


class ImagePromptSection(AttachedSection):
    """An IP-Adapter: cross-attention that reads the image, or its condition image (`data.beside.condition`)."""

    reads: ClassVar[tuple[str, ...]] = ("mask", "condition")
    needed: ClassVar[tuple[str, ...]] = ("encoder",)
    fixed: ClassVar[tuple[str, ...]] = ("kind", "tokens")
    encoder: str | None = Field(
        None,
        description="image encoder: the folder or Hub name of a CLIPVisionModelWithProjection, or of a model with one",
    )
    kind: Literal["base", "plus"] = Field("base", description="form of a new one: base, or plus (reads patches)")
    tokens: int | None = Field(None, ge=1, le=4096, description="tokens of an image; null: 4, plus 16")
    drop_caption: list[Part] = Field([0.05], min_length=1, max_length=2, description="part of the captions dropped")
    drop_image: Part = Field(0.05, description="part of the images dropped")
    drop_both: Part = Field(0.05, description="part of which caption and image are dropped together, besides those")


SECTIONS: dict[str, type[StageSection]] = {
    "autoencoder": AutoencoderSection,
    "text": TextSection,
    "base": BaseSection,
    "refiner": RefinerSection,
    "adapter": AdapterSection,
    "textual-inversion": TextualInversionSection,
    "controlnet": ControlNetSection,
    "t2i-adapter": T2IAdapterSection,
    "ip-adapter": ImagePromptSection,
}
