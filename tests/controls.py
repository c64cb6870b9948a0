"""Tiny control models with random weights, and their files in the layouts that exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ldm.families import Family
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.weights import configs, control_models


def randomised(network: nn.Module, seed: int) -> Any:
    """A network none of whose weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.eval().parameters():
        spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data += 0.5
    return network


def controlnet(family: Family, seed: int = 0, **changes: Any) -> ControlNet:
    """A ControlNet for models of a family."""
    own = {name: getattr(family.unet, name) for name in type(family.unet).__dataclass_fields__}
    own |= {"in_channels": family.unet.out_channels, "image_channels": (8, 8, 12, 16)} | changes
    return randomised(ControlNet(ControlNetConfig(**own)), seed)


def t2i_adapter(kind: str, family: Family, seed: int = 0, in_channels: int = 3) -> T2IAdapter:
    """A T2I-Adapter of one of diffusers' kinds."""
    channels, xl = family.unet.channels, kind == "full_adapter_xl"
    channels = (*channels, channels[-1]) if xl else channels
    halves, light = configs.t2i_halves(len(channels), xl), kind == "light_adapter"
    config = T2IAdapterConfig(channels, halves, 2, in_channels, 16 if xl else 8, light)
    return randomised(T2IAdapter(config), seed)


def config_json(network: ControlNet | T2IAdapter) -> dict[str, Any]:
    """diffusers' `config.json`."""
    c = network.config
    if isinstance(c, T2IAdapterConfig):
        kind = "light_adapter" if c.light else "full_adapter_xl" if c.factor == 16 else "full_adapter"
        return {
            "_class_name": "T2IAdapter", "adapter_type": kind, "channels": list(c.channels[: 3 if c.light else None]),
            "downscale_factor": c.factor, "in_channels": c.in_channels, "num_res_blocks": c.layers,
        }  # fmt: skip
    found = configs.write_unet(c)
    for name in ("up_block_types", "out_channels", "sample_size"):
        del found[name]
    return found | {
        "_class_name": "ControlNetModel", "conditioning_channels": 3, "global_pool_conditions": c.pooled,
        "conditioning_embedding_out_channels": list(c.image_channels),
        "controlnet_conditioning_channel_order": "bgr" if c.bgr else "rgb",
    }  # fmt: skip


def folder(network: ControlNet | T2IAdapter, path: Path) -> Path:
    """A diffusers folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_json(network)))
    save_file(network.state_dict(), path / "diffusion_pytorch_model.safetensors")
    return path


def original(network: ControlNet | T2IAdapter, path: Path, prefix: str = "") -> Path:
    """A single file with the authors' names."""
    (_, *others) = control_models.names_of(network.config)
    layout = dict(others)[prefix]
    save_file({link.theirs: network.state_dict()[link.ours[0]] for link in layout(network.state_dict())}, path)
    return path
