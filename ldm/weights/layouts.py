"""Key layouts: names and shapes of a component's tensors in each file format.

A layout is a list of links. A link maps one tensor of a file ("theirs") to one or more parameters of our module
("ours"), either unchanged or reshaped. The same list is used for reading (theirs to ours) and writing (ours to theirs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ldm.families import Family
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapterConfig
from ldm.models.unet import UNetConfig
from ldm.process import NoiseSchedule
from ldm.weights.tensors import TensorInfo

Kind = Literal["same", "pointwise", "stack", "transpose"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """One tensor of a file and the parameters of our module that it holds."""

    theirs: str
    ours: tuple[str, ...]
    kind: Kind = "same"  # pointwise: a linear layer kept as a 1×1 convolution; stack: q, k and v in one

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The shape in the file, from the shapes of our parameters."""
        shape = shapes[self.ours[0]]
        match self.kind:
            case "same":
                return shape
            case "pointwise":
                return (*shape, 1, 1)
            case "stack":
                return (len(self.ours) * shape[0], *shape[1:])
            case "transpose":
                return shape[::-1]

    def to_ours(self, tensor: Tensor) -> list[Tensor]:
        """Their tensor as our parameters, without a copy where that is possible."""
        match self.kind:
            case "same":
                return [tensor]
            case "pointwise":
                return [tensor.flatten(1)]
            case "stack":
                return list(tensor.chunk(len(self.ours)))
            case "transpose":
                return [tensor.T.contiguous()]

    def to_theirs(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our parameters as their tensor."""
        match self.kind:
            case "same":
                return tensors[0]
            case "pointwise":
                return tensors[0][:, :, None, None]
            case "stack":
                return torch.cat(list(tensors))
            case "transpose":
                return tensors[0].T


Layout = Callable[[Iterable[str]], list[Link]]  # the names of our parameters -> links


def _rename(rules: Sequence[tuple[str, str]], name: str) -> str:
    """Replace the first of the (ours, theirs) module names that `name` begins with."""
    for ours, theirs in rules:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


# --- diffusers and transformers ---------------------------------------------------------------------------------------


def diffusers(names: Iterable[str]) -> list[Link]:
    """diffusers' names, which are our own."""
    return [Link(name, (name,)) for name in names]


def diffusers_attention_of_old(names: Iterable[str]) -> list[Link]:
    """diffusers' names before 0.15, when an autoencoder's attention layers were query, key, value and proj_attn."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def theirs(name: str) -> str:
        for new, was in old.items():
            name = name.replace(new, was)
        return name

    return [Link(theirs(name), (name,)) for name in names]


def _published(name: str) -> str:
    """A text tower's parameter name in published folders; our towers without a projection lack the prefix."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def transformers(names: Iterable[str]) -> list[Link]:
    """A text tower in the layout of published folders."""
    return [Link(_published(name), (name,)) for name in names]


def transformers_flat(names: Iterable[str]) -> list[Link]:
    """A text tower without projection in transformers 5's layout: without the prefix `text_model.`."""
    return [Link(_published(name).removeprefix("text_model."), (name,)) for name in names]


# --- the original repositories ----------------------------------------------------------------------------------------

_RESNET = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
]


def original_unet(config: UNetConfig, prefix: str) -> Layout:
    """CompVis' and Stability's `UNetModel`: all blocks of a side are numbered consecutively, across the levels."""
    modules = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "time_embedding.cond_proj.": "time_embed.cond_proj.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    levels = len(config.channels)
    block = 1
    for level in range(levels):
        for layer in range(config.layers):
            modules[f"down_blocks.{level}.resnets.{layer}."] = f"input_blocks.{block}.0."
            modules[f"down_blocks.{level}.attentions.{layer}."] = f"input_blocks.{block}.1."
            block += 1
        modules[f"down_blocks.{level}.downsamplers.0."] = f"input_blocks.{block}.0."
        block += level < levels - 1
    block = 0
    for up, level in enumerate(reversed(range(levels))):
        for layer in range(config.layers + 1):
            modules[f"up_blocks.{up}.resnets.{layer}."] = f"output_blocks.{block}.0."
            modules[f"up_blocks.{up}.attentions.{layer}."] = f"output_blocks.{block}.1."
            block += 1
        modules[f"up_blocks.{up}.upsamplers.0."] = f"output_blocks.{block - 1}.{2 if config.depth[level] else 1}."

    def theirs(name: str) -> str:
        module, inner = next((ours, name[len(ours) :]) for ours in modules if name.startswith(ours))
        if ".resnets." in module:
            inner = _rename(_RESNET, inner)
        elif ".downsamplers." in module:
            inner = inner.replace("conv.", "op.")
        return prefix + modules[module] + inner

    return lambda names: [Link(theirs(name), (name,)) for name in names]


def original_controlnet(config: ControlNetConfig, prefix: str) -> Layout:
    """Zhang's `ControlNet`: the U-Net's names, those of its zero convolutions, and of the image's embedding."""
    half = original_unet(config, prefix)
    convolutions = 2 * len(config.image_channels)  # of the embedding; SiLU has every second number
    own = [("controlnet_cond_embedding.conv_in.", "input_hint_block.0.")]
    own += [
        (f"controlnet_cond_embedding.blocks.{i}.", f"input_hint_block.{2 * i + 2}.") for i in range(convolutions - 2)
    ]
    own += [("controlnet_cond_embedding.conv_out.", f"input_hint_block.{2 * convolutions - 2}.")]
    own += [(f"controlnet_down_blocks.{i}.", f"zero_convs.{i}.0.") for i in range(len(config.skips))]
    own += [("controlnet_mid_block.", "middle_block_out.0.")]

    def links(names: Iterable[str]) -> list[Link]:
        names = list(names)
        further = [name for name in names if name.startswith("controlnet_")]
        found = half(name for name in names if not name.startswith("controlnet_"))
        return found + [Link(prefix + _rename(own, name), (name,)) for name in further]

    return links


def original_t2i_adapter(config: T2IAdapterConfig) -> Layout:
    """The names of T2I-Adapter's authors, who number the residual blocks of full ones across the levels."""

    def theirs(name: str) -> str:
        top, *rest = name.removeprefix("adapter.").split(".")
        if top != "body":
            return ".".join([top, *rest])
        level, kind, *inner = rest
        if config.light:
            return ".".join([top, level, kind.replace("resnets", "body"), *inner])
        first = int(level) * config.layers
        if kind == "resnets":
            return ".".join([top, str(first + int(inner[0])), *inner[1:]])
        return ".".join([top, str(first), kind, *inner])

    return lambda names: [Link(theirs(name), (name,)) for name in names]


_SPATIAL_ATTENTION = [
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
]


def original_autoencoder(config: AutoencoderConfig, prefix: str) -> Layout:
    """CompVis' `AutoencoderKL` and `VQModelInterface`: levels by size, attention as 1×1 convolutions."""
    levels = len(config.channels)
    modules = []
    for level in range(levels):
        for side, block, ours in (
            ("encoder", "down", f"down_blocks.{level}"),
            ("decoder", "up", f"up_blocks.{levels - 1 - level}"),
        ):
            modules += [
                (f"{side}.{ours}.resnets.", f"{side}.{block}.{level}.block."),
                (f"{side}.{ours}.attentions.", f"{side}.{block}.{level}.attn."),
                (f"{side}.{ours}.{block}samplers.0.", f"{side}.{block}.{level}.{block}sample."),
            ]
    for side in ("encoder", "decoder"):
        modules += [
            (f"{side}.mid_block.resnets.0.", f"{side}.mid.block_1."),
            (f"{side}.mid_block.attentions.0.", f"{side}.mid.attn_1."),
            (f"{side}.mid_block.resnets.1.", f"{side}.mid.block_2."),
            (f"{side}.conv_norm_out.", f"{side}.norm_out."),
        ]
    modules.append(("", ""))  # all other names are the same

    def link(name: str) -> Link:
        attention = ".attentions." in name
        theirs = _rename(modules, name)
        if attention:
            for ours, original in _SPATIAL_ATTENTION:
                theirs = theirs.replace(f".{ours}", f".{original}")
        theirs = theirs.replace(".conv_shortcut.", ".nin_shortcut.")
        pointwise = attention and ".group_norm." not in name and name.endswith(".weight")
        return Link(prefix + theirs, (name,), "pointwise" if pointwise else "same")

    return lambda names: [link(name) for name in names]


_OPEN_CLIP = [
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
]
_OPEN_CLIP_BLOCK = {
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def open_clip(prefix: str) -> Layout:
    """open_clip's text tower: query, key and value are one matrix, and the projection is transposed."""

    def links(names: Iterable[str]) -> list[Link]:
        result = []
        for name in names:
            published = _published(name)
            if ".k_proj." in name or ".v_proj." in name:
                continue  # part of q_proj's link
            if ".q_proj." in name:
                theirs = _rename(_OPEN_CLIP, published).replace(".self_attn.q_proj.", ".attn.in_proj_")
                ours = tuple(name.replace(".q_proj.", f".{part}_proj.") for part in "qkv")
                result.append(Link(prefix + theirs, ours, "stack"))
                continue
            theirs = _rename(_OPEN_CLIP, published)
            for ours_part, theirs_part in _OPEN_CLIP_BLOCK.items():
                theirs = theirs.replace(ours_part, theirs_part)
            result.append(Link(prefix + theirs, (name,), "transpose" if theirs == "text_projection" else "same"))
        return result

    return links


def prefixed(layout: Layout, prefix: str) -> Layout:
    """A layout with a prefix before all of the file's names."""
    return lambda names: [Link(prefix + link.theirs, link.ours, link.kind) for link in layout(names)]


UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."


def tower_prefix(family: Family, index: int) -> str:
    """The prefix of a text tower's tensors in an original checkpoint; embedders are numbered like the towers."""
    place = f"conditioner.embedders.{index}." if family.xl else "cond_stage_model."
    return place + ("model." if family.text[index].open_clip else "transformer.")


def original_tower(config: TextEncoderConfig, prefix: str) -> Layout:
    """A text tower in an original checkpoint."""
    return open_clip(prefix) if config.open_clip else prefixed(transformers, prefix)


def original(family: Family) -> dict[str, tuple[str, Layout]]:
    """The prefix and the layout of each component in an original checkpoint."""
    result = {
        "unet": (UNET_PREFIX, original_unet(family.unet, UNET_PREFIX)),
        "vae": (AUTOENCODER_PREFIX, original_autoencoder(family.autoencoder, AUTOENCODER_PREFIX)),
    }
    for index, config in enumerate(family.text):
        prefix = tower_prefix(family, index)
        result[config.component] = (prefix, original_tower(config, prefix))
    return result


# --- further tensors of original checkpoints --------------------------------------------------------------------------


def original_extras(family: Family) -> dict[str, Callable[[], Tensor]]:
    """Tensors of the original modules that ours do not need: buffers, and parameters without effect on images."""
    extras: dict[str, Callable[[], Tensor]] = {}
    for index, config in enumerate(family.text):
        prefix = tower_prefix(family, index)
        if not config.open_clip:
            extras[f"{prefix}text_model.embeddings.position_ids"] = partial(_positions, config.context)
            continue
        extras[f"{prefix}logit_scale"] = partial(torch.full, (), math.log(100))
        if not config.projection:  # SD 2 reads the last but one layer, and its diffusers folder omits the last
            extras[f"{prefix}text_projection"] = partial(torch.eye, config.width)
            for name, shape in _identity_block(config).items():
                extras[f"{prefix}transformer.resblocks.{config.layers}.{name}"] = partial(torch.zeros, shape)
    buffers = _sgm_buffers if family.xl else _ldm_buffers
    for name in buffers(NoiseSchedule(train_steps=2)):
        extras[name] = partial(_buffer, buffers, family.schedule, name)
    if family.xl and family.schedule.prediction_type == "v_prediction":
        extras["v_pred"] = partial(torch.zeros, 0)  # other programs recognise v-prediction by this tensor
        if family.schedule.zero_terminal_snr:
            extras["ztsnr"] = partial(torch.zeros, 0)
    return extras


def extra_infos(family: Family) -> dict[str, TensorInfo]:
    """Types and shapes of `original_extras`."""
    with torch.device("meta"):
        tensors = {name: make() for name, make in original_extras(family).items()}
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _positions(count: int) -> Tensor:
    return torch.arange(count)[None]


def _buffer(buffers: Callable[[NoiseSchedule], dict[str, Tensor]], schedule: NoiseSchedule, name: str) -> Tensor:
    return buffers(schedule)[name]


def _identity_block(config: TextEncoderConfig) -> dict[str, Shape]:
    """Shapes of the parameters of one of OpenCLIP's residual blocks; with zeros the block returns its input."""
    w, h = config.width, config.hidden
    weights = {"attn.in_proj_": (3 * w, w), "attn.out_proj.": (w, w), "mlp.c_fc.": (h, w), "mlp.c_proj.": (w, h)}
    shapes: dict[str, Shape] = {f"{name}weight": shape for name, shape in weights.items()}
    shapes |= {f"{name}bias": shape[:1] for name, shape in weights.items()}
    return shapes | {f"ln_{i}.{kind}": (w,) for i in (1, 2) for kind in ("weight", "bias")}


def _ldm_buffers(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The buffers of CompVis' `DDPM`: Ho et al. 2020 (arXiv 2006.11239), equations 4, 6 and 7, all float32 (steps,)."""
    beta = schedule.betas()
    bar = (1 - beta).cumprod(0)
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    variance = beta * (1 - before) / (1 - bar)
    return {
        name: value.float()
        for name, value in {
            "betas": beta,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - bar).log(),
            "sqrt_recip_alphas_cumprod": bar.rsqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": beta * before.sqrt() / (1 - bar),
            "posterior_mean_coef2": (1 - before) * (1 - beta).sqrt() / (1 - bar),
        }.items()
    }


def _sgm_buffers(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The buffer of generative-models' `DiscreteDenoiser`: noise levels, rising, float32 (steps,)."""
    bar = (1 - schedule.betas()).cumprod(0)
    return {"denoiser.sigmas": ((1 - bar) / bar).float().sqrt()}
