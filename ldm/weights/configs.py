"""Conversion between the `config.json` files of diffusers and transformers and our dataclasses.

Every option is either translated, or must have the value for which our networks are built. An option that is not listed
here is an error that names it, because ignoring it could give wrong images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ldm.errors import LdmError
from ldm.families import Family
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapterConfig
from ldm.models.unet import UNetConfig
from ldm.process import NoiseSchedule

Json = Mapping[str, Any]
UNET_CLASSES = ("UNet2DConditionModel",)
AUTOENCODER_CLASSES = ("AutoencoderKL", "VQModel")
CONTROLNET_CLASSES = ("ControlNetModel",)
T2I_CLASSES = ("T2IAdapter",)
_UNET_ALONE = ("up_block_types", "out_channels", "sample_size")  # options that a ControlNet does not have

# options and the only values that our networks support
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "upcast_attention": (False, True, None),  # without effect in diffusers' default attention too
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}
_AUTOENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "norm_type": ("group",),
    "lookup_from_codebook": (False,),
}
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0,),
    "dropout": (0,),
    "layer_norm_eps": (1e-5,),
    "model_type": ("clip_text_model",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
}
# options of text encoders that do not change the tower's output: initialisation, and text generation
_TEXT_IGNORED = frozenset(
    [
        "architectures",
        "initializer_factor",
        "initializer_range",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "bos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "tie_word_embeddings",
        "is_encoder_decoder",
        "tie_encoder_decoder",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "finetuning_task",
        "id2label",
        "label2id",
        "tokenizer_class",
        "prefix",
        "task_specific_params",
        "problem_type",
        "use_cache",
    ]
)


class Reader:
    """Takes options out of a JSON object one by one and checks them; `done` raises if unknown options are left."""

    def __init__(self, where: str, json: Json, classes: Sequence[str] = ()) -> None:
        self.where = where
        stated = json.get("_class_name")
        if classes and stated is not None and stated not in classes:
            raise self.fail("_class_name", stated, f"{' or '.join(classes)} is needed here")
        self.left = {name: value for name, value in json.items() if not name.startswith("_")}

    def fail(self, name: str, value: Any, wanted: str) -> LdmError:
        return LdmError(f"{self.where}: option {name!r} is {_short(value)}; {wanted}")

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The option's value, checked to be of type `kind`, or the default if the option is absent or null."""
        value = self.left.pop(name, None)
        if value is None:
            if default is None:
                raise LdmError(f"{self.where}: option {name!r} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.fail(name, value, f"it must be of type {' or '.join(k.__name__ for k in kinds)}")
        return value

    def ints(self, name: str, length: int, default: Any = None) -> tuple[int, ...]:
        """A list of whole numbers; a single number is repeated `length` times."""
        value = self.take(name, (int, list), default)
        values = [value] * length if isinstance(value, int) else value
        if len(values) != length or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise self.fail(name, value, f"it must be a whole number or a list of {length}")
        return tuple(values)

    def same(self, name: str, default: Any = None) -> int:
        """One whole number, which may be written as a list of equal numbers."""
        value = self.left.get(name)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            self.left[name] = value[0]
        return self.take(name, int, default)

    def done(self, fixed: Mapping[str, tuple[Any, ...]], ignored: Iterable[str] = ()) -> None:
        """Raise unless every remaining option has a value that our networks support."""
        for name in ignored:
            self.left.pop(name, None)
        for name, value in self.left.items():
            if name not in fixed:
                raise self.fail(name, value, "this program does not know that option")
            plain = value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value
            if plain not in fixed[name]:
                raise self.fail(name, value, f"this program only has {' or '.join(repr(v) for v in fixed[name])}")


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Prefix the errors of a config dataclass with the file's name."""
    try:
        yield
    except LdmError as error:
        raise LdmError(f"{where}: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- U-Net ------------------------------------------------------------------------------------------------------------


def read_unet(where: str, json: Json, pooled_dim: int) -> UNetConfig:
    """The U-Net of a diffusers `config.json`; `pooled_dim` is the text encoders' width of the pooled text, or 0."""
    reader = Reader(where, json, UNET_CLASSES)
    channels = tuple(reader.take("block_out_channels", list))
    n = len(channels)
    down, up = reader.take("down_block_types", list), reader.take("up_block_types", list)
    kinds = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    for name, types, known in (
        ("down_block_types", down, list(kinds)),
        ("up_block_types", up, [kind.replace("Down", "Up") for kind in kinds]),
    ):
        for kind in types:
            if kind not in known:
                raise reader.fail(name, kind, f"this program has {' and '.join(known)}")
    if len(down) != n or [kind.replace("Down", "Up") for kind in reversed(down)] != up:
        raise reader.fail("up_block_types", up, "they must mirror down_block_types, one for each of block_out_channels")
    depths = reader.ints("transformer_layers_per_block", n, default=1)
    embedding = reader.left.pop("addition_embed_type", None)
    if embedding not in (None, "text_time"):
        raise reader.fail("addition_embed_type", embedding, "this program only has None and 'text_time'")
    size_dim = reader.take("addition_time_embed_dim", int, default=256)
    joined = reader.take("projection_class_embeddings_input_dim", int, default=0)
    size_ids, rest = 0, 0
    if embedding:
        size_ids, rest = divmod(joined - pooled_dim, max(size_dim, 1))
    if rest or (embedding and size_ids not in (5, 6)):
        raise reader.fail(
            "projection_class_embeddings_input_dim",
            joined,
            f"it must be the {pooled_dim} channels of the pooled text and 5 or 6 times {size_dim}",
        )
    with _naming(where):
        config = UNetConfig(
            channels=channels,
            depth=tuple(depth if kinds[kind] else 0 for depth, kind in zip(depths, down, strict=True)),
            mid_depth=depths[-1],
            heads=reader.ints("attention_head_dim", n, default=8),  # diffusers' misnomer: it is the number of heads
            layers=reader.same("layers_per_block", default=2),
            text_dim=reader.same("cross_attention_dim", default=1280),
            in_channels=reader.take("in_channels", int, default=4),
            out_channels=reader.take("out_channels", int, default=4),
            linear_projection=reader.take("use_linear_projection", bool, default=False),
            pooled_dim=pooled_dim if embedding else 0,
            size_ids=size_ids,
            size_dim=size_dim,
            guidance_dim=reader.take("time_cond_proj_dim", int, default=0),
            groups=reader.take("norm_num_groups", int, default=32),
            sample_size=reader.take("sample_size", int, default=64),
        )
    reader.done(_UNET_FIXED)
    return config


def write_unet(config: UNetConfig) -> dict[str, Any]:
    """diffusers' `config.json` of a `UNet2DConditionModel`."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depth]
    json: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.channels),
        "cross_attention_dim": config.text_dim,
        "down_block_types": down,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "transformer_layers_per_block": [*(depth or 1 for depth in config.depth[:-1]), config.mid_depth],
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "use_linear_projection": config.linear_projection,
    }
    if config.depth[-1] not in (0, config.mid_depth):
        raise LdmError(
            f"diffusers has no U-Net whose last level has {config.depth[-1]} transformer blocks and whose middle has "
            f"{config.mid_depth}"
        )
    if config.guidance_dim:
        json["time_cond_proj_dim"] = config.guidance_dim
    if config.pooled_dim:
        json |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.size_dim,
            "projection_class_embeddings_input_dim": config.pooled_dim + config.size_ids * config.size_dim,
        }
    return json


# --- control models ---------------------------------------------------------------------------------------------------


def read_controlnet(where: str, json: Json) -> ControlNetConfig:
    """The ControlNet of a diffusers `config.json`."""
    own = {"conditioning_channels", "controlnet_conditioning_channel_order", "conditioning_embedding_out_channels"}
    own |= {"global_pool_conditions", "_class_name"}
    reader = Reader(where, {name: json[name] for name in own if name in json}, CONTROLNET_CLASSES)
    half = {name: value for name, value in json.items() if name not in own}
    down = half.get("down_block_types")
    half["up_block_types"] = [str(kind).replace("Down", "Up") for kind in reversed(down)] if down else down
    pooled_dim = 0
    if half.get("addition_embed_type") == "text_time":
        sizes = Reader(where, half)
        pooled_dim = sizes.take("projection_class_embeddings_input_dim", int, default=0)
        pooled_dim -= 6 * sizes.take("addition_time_embed_dim", int, default=256)
    unet = read_unet(where, half, pooled_dim)
    order = reader.take("controlnet_conditioning_channel_order", str, default="rgb")
    if order not in ("rgb", "bgr"):
        raise reader.fail("controlnet_conditioning_channel_order", order, "this program has 'rgb' and 'bgr'")
    with _naming(where):
        config = ControlNetConfig(
            **vars(unet),
            image_channels=tuple(reader.take("conditioning_embedding_out_channels", list, default=[16, 32, 96, 256])),
            bgr=order == "bgr",
            pooled=reader.take("global_pool_conditions", bool, default=False),
        )
    reader.done({"conditioning_channels": (3,)})
    return config


def write_controlnet(config: ControlNetConfig) -> dict[str, Any]:
    """diffusers' `config.json` of a `ControlNetModel`."""
    json = {name: value for name, value in write_unet(config).items() if name not in _UNET_ALONE}
    return json | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": list(config.image_channels),
        "controlnet_conditioning_channel_order": "bgr" if config.bgr else "rgb",
        "global_pool_conditions": config.pooled,
    }


T2I_KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")


def read_t2i_adapter(where: str, json: Json) -> T2IAdapterConfig:
    """The T2I-Adapter of a diffusers `config.json`."""
    reader = Reader(where, json, T2I_CLASSES)
    kind = reader.take("adapter_type", str, default="full_adapter")
    if kind not in T2I_KINDS:
        raise reader.fail("adapter_type", kind, f"this program has {', '.join(T2I_KINDS)}")
    channels = reader.take("channels", list, default=[320, 640, 1280, 1280])
    if kind == "light_adapter":
        channels = [*channels, *channels[-1:]]
    with _naming(where):
        config = T2IAdapterConfig(
            channels=tuple(channels),
            halves=t2i_halves(len(channels), kind == "full_adapter_xl"),
            layers=reader.take("num_res_blocks", int, default=2),
            in_channels=reader.take("in_channels", int, default=3),
            factor=reader.take("downscale_factor", int, default=8),
            light=kind == "light_adapter",
        )
    reader.done({})
    return config


def write_t2i_adapter(config: T2IAdapterConfig) -> dict[str, Any]:
    """diffusers' `config.json` of a `T2IAdapter`.

    Raises:
        LdmError: diffusers has none with these maps.
    """
    count = len(config.channels)
    kind = "light_adapter" if config.light else "full_adapter"
    if config.halves != t2i_halves(count, False):
        kind = "full_adapter_xl"
        if config.light or config.halves != t2i_halves(count, True):
            raise LdmError(f"diffusers has no T2I-Adapter whose maps are halved as {list(config.halves)}")
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": kind,
        "channels": list(config.channels[:-1] if config.light else config.channels),
        "downscale_factor": config.factor,
        "in_channels": config.in_channels,
        "num_res_blocks": config.layers,
    }


def t2i_halves(count: int, xl: bool) -> tuple[bool, ...]:
    """Which of a T2I-Adapter's feature maps are half as large as the one before; SDXL's has one such map, the third."""
    return tuple(number == 2 if xl else number > 0 for number in range(count))


# --- autoencoder ------------------------------------------------------------------------------------------------------


def read_autoencoder(where: str, json: Json) -> AutoencoderConfig:
    """The autoencoder of a diffusers `config.json`, whose class is `AutoencoderKL` or `VQModel`."""
    reader = Reader(where, json, AUTOENCODER_CLASSES)
    channels = tuple(reader.take("block_out_channels", list))
    down, up = reader.take("down_block_types", list), reader.take("up_block_types", list)
    kinds = {
        "DownEncoderBlock2D": ("UpDecoderBlock2D", False),
        "AttnDownEncoderBlock2D": ("AttnUpDecoderBlock2D", True),
    }
    for kind in down:
        if kind not in list(kinds):
            raise reader.fail("down_block_types", kind, f"this program has {' and '.join(kinds)}")
    if len(down) != len(channels) or [kinds[kind][0] for kind in reversed(down)] != up:
        raise reader.fail("up_block_types", up, "they must mirror down_block_types, one for each of block_out_channels")
    codebook = codebook_dim = 0
    if json.get("_class_name") == "VQModel":
        codebook = reader.take("num_vq_embeddings", int, default=256)
        codebook_dim = reader.take("vq_embed_dim", int, default=0)
    with _naming(where):
        config = AutoencoderConfig(
            channels=channels,
            attention=tuple(kinds[kind][1] for kind in down),
            mid_attention=reader.take("mid_block_add_attention", bool, default=True),
            layers=reader.take("layers_per_block", int, default=1),
            in_channels=reader.take("in_channels", int, default=3),
            out_channels=reader.take("out_channels", int, default=3),
            latent_channels=reader.take("latent_channels", int, default=3 if codebook else 4),
            quant_conv=reader.take("use_quant_conv", bool, default=True),
            post_quant_conv=reader.take("use_post_quant_conv", bool, default=True),
            groups=reader.take("norm_num_groups", int, default=32),
            scaling_factor=reader.take("scaling_factor", (int, float), default=0.18215),
            shift_factor=reader.take("shift_factor", (int, float), default=0.0),
            force_upcast=reader.take("force_upcast", bool, default=not codebook),
            sample_size=reader.take("sample_size", int, default=32),
            codebook=codebook,
            codebook_dim=codebook_dim,
        )
    reader.done(_AUTOENCODER_FIXED)
    return config


def write_autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    """diffusers' `config.json` of an `AutoencoderKL` or a `VQModel`."""
    down = ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in config.attention]
    json: dict[str, Any] = {
        "_class_name": "VQModel" if config.codebook else "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": down,
        "force_upcast": config.force_upcast,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        "up_block_types": [
            kind.replace("DownEncoder", "UpDecoder") for kind in reversed(down)
        ],
    }  # fmt: skip
    if config.codebook:
        return json | {"num_vq_embeddings": config.codebook, "vq_embed_dim": config.codebook_dim or None}
    json |= {"use_quant_conv": config.quant_conv, "use_post_quant_conv": config.post_quant_conv}
    return json | ({"shift_factor": config.shift_factor} if config.shift_factor else {})


# --- text encoders ----------------------------------------------------------------------------------------------------


def read_text(where: str, json: Json, projects: bool, pad_token: str, end_id: int) -> TextEncoderConfig:
    """The tower of a transformers `config.json`; `projects` if its class is `CLIPTextModelWithProjection`.

    `end_id` is the tokenizer's end token; configurations before 2023 have 2 instead, which is accepted.
    """
    reader = Reader(where, json)
    wanted = ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"]
    if json.get("architectures", wanted) != wanted:
        raise reader.fail("architectures", json["architectures"], f"{wanted} is needed here")
    eos = reader.take("eos_token_id", int, default=2)
    if eos not in (2, end_id):
        raise reader.fail("eos_token_id", eos, f"the tokenizer ends texts with {end_id}")
    activation = reader.take("hidden_act", str, default="quick_gelu")
    projection = reader.take("projection_dim", int, default=512)
    with _naming(where):
        config = TextEncoderConfig(
            width=reader.take("hidden_size", int, default=512),
            layers=reader.take("num_hidden_layers", int, default=12),
            heads=reader.take("num_attention_heads", int, default=8),
            hidden=reader.take("intermediate_size", int, default=2048),
            activation=activation,
            projection=projection if projects else 0,
            vocab_size=reader.take("vocab_size", int, default=49408),
            context=reader.take("max_position_embeddings", int, default=77),
            pad_token=pad_token,
        )
    reader.done(_TEXT_FIXED, _TEXT_IGNORED)
    return config


def write_text(config: TextEncoderConfig, end_id: int) -> dict[str, Any]:
    """transformers' `config.json` of a text tower whose tokenizer ends texts with `end_id`."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": end_id - 1,
        "eos_token_id": end_id,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.hidden,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.context,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 1,
        "projection_dim": config.projection or config.width,
        "vocab_size": config.vocab_size,
    }


# --- scheduler --------------------------------------------------------------------------------------------------------

SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in [
        "DDIM",
        "DDPM",
        "PNDM",
        "LMSDiscrete",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "KDPM2AncestralDiscrete",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "DPMSolverSDE",
        "UniPCMultistep",
        "DEISMultistep",
        "LCM",
        "TCD",
    ]
)
_SAMPLER_FLAGS = frozenset(
    [
        "clip_sample", "set_alpha_to_one", "thresholding", "skip_prk_steps", "use_karras_sigmas",
        "use_exponential_sigmas", "use_beta_sigmas", "lower_order_final", "euler_at_final", "use_lu_lambdas",
        "predict_x0",
    ]
)  # fmt: skip
_SAMPLER_NUMBERS: dict[str, tuple[float, float]] = {
    "steps_offset": (0, 1000),
    "dynamic_thresholding_ratio": (0, 1),
    "clip_sample_range": (0, 1000),
    "sample_max_value": (0, 1000),
    "sigma_min": (0, 1e5),
    "sigma_max": (0, 1e5),
    "solver_order": (1, 4),
    "lambda_min_clipped": (-math.inf, 100),
    "original_inference_steps": (1, 1000),
    "timestep_scaling": (0, 1e4),
    "noise_sampler_seed": (0, 2**63),
}
_SAMPLER_WORDS: dict[str, tuple[str, ...]] = {  # (): the scheduler's class checks it
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": (),
    "algorithm_type": (),
    "solver_type": (),
}
_SAMPLER_OPTIONS = frozenset([*_SAMPLER_FLAGS, *_SAMPLER_NUMBERS, *_SAMPLER_WORDS, "disable_corrector", "solver_p"])
_SCHEDULE_FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "use_flow_sigmas": (False,),
    "flow_shift": (1,),
    "use_dynamic_shifting": (False,),
    "time_shift_type": ("exponential",),
    "shift_terminal": (None,),
}


def read_schedule(where: str, json: Json) -> NoiseSchedule:
    """The noise schedule of a diffusers `scheduler_config.json`."""
    reader = Reader(where, json)
    scheduler = json.get("_class_name")
    if not isinstance(scheduler, str) or scheduler not in SCHEDULERS:
        raise LdmError(f"{where}: scheduler {scheduler!r} is not one of {', '.join(sorted(SCHEDULERS))}")
    options = {name: reader.left.pop(name) for name in sorted(_SAMPLER_OPTIONS & reader.left.keys())}
    for name, value in options.items():
        if needed := _unfit(name, value):
            raise reader.fail(name, value, f"{needed} is needed")
    with _naming(where):
        schedule = NoiseSchedule(
            prediction_type=reader.take("prediction_type", str, default="epsilon"),
            beta_start=reader.take("beta_start", float),
            beta_end=reader.take("beta_end", float),
            beta_schedule=reader.take("beta_schedule", str),
            train_steps=reader.take("num_train_timesteps", int, default=1000),
            zero_terminal_snr=reader.take("rescale_betas_zero_snr", bool, default=False),
            scheduler=scheduler,
            options=options,
        )
    reader.done(_SCHEDULE_FIXED)
    return schedule


def _unfit(name: str, value: Any) -> str:
    """What a sampler's option needs, if its value is not that; "" if it is, or null."""
    if value is None:
        return ""
    if name in _SAMPLER_FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if name in _SAMPLER_NUMBERS:
        low, high = _SAMPLER_NUMBERS[name]
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        return "" if fits else f"a number from {low} to {high}"
    if name in _SAMPLER_WORDS:
        words = _SAMPLER_WORDS[name]
        fits = isinstance(value, str) and (value in words if words else len(value) < 100)
        return "" if fits else " or ".join(words) or "a word"
    return "" if isinstance(value, list) else "a list"


def write_schedule(schedule: NoiseSchedule) -> dict[str, Any]:
    """diffusers' `scheduler_config.json`."""
    json = {
        "_class_name": schedule.scheduler,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "num_train_timesteps": schedule.train_steps,
        "prediction_type": schedule.prediction_type,
        **{name: value for name, value in schedule.options.items() if name in _SAMPLER_OPTIONS},
    }
    return json | ({"rescale_betas_zero_snr": True} if schedule.zero_terminal_snr else {})


# --- written configurations must read back as the same ----------------------------------------------------------------


def check_writable(family: Family) -> None:
    """Check that the family's configurations are the same after being written and read back.

    Raises:
        LdmError: the file formats cannot hold some value.
    """
    end_id = 2
    ours = (family.unet, family.autoencoder, family.schedule, *family.text)
    again = (
        read_unet("U-Net", write_unet(family.unet), family.text[-1].projection),
        read_autoencoder("autoencoder", write_autoencoder(family.autoencoder)),
        read_schedule("scheduler", write_schedule(family.schedule)),
        *(read_text("text", write_text(c, end_id), bool(c.projection), c.pad_token, end_id) for c in family.text),
    )
    for config, read in zip(ours, again, strict=True):
        if config != read:
            raise LdmError(f"{config} cannot be written: diffusers' configuration file cannot hold all of its values")
