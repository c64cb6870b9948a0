"""Linear layers with weights of 8 bits, by the library torchao: for making images, not for training.

Those of a U-Net's transformer blocks, attention and feed-forward: 85 % of the weights of SDXL, 28 % of SD 1.5. All else
stays as it is. The first and the last layer, and those of the embedding of time and size, are small, and their errors
reach every pixel; the projections around the blocks are convolutions in SD 1, and convolutions are not for these types.

C channels, R rows of a weight: the channels that a layer makes
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, first_line
from ldm.models.layers import TransformerBlock
from ldm.runtime.kernels.processor import can

QUANTIZED = {  # name -> what is rounded
    "int8": "weights to 8-bit integers with a scale a row; activations likewise, token by token, as they come",
    "int8-weights": "weights alone, likewise",
    "fp8": "weights and activations to floating-point numbers of 8 bits (e4m3), scaled likewise: a newer GPU, in bf16",
}
WIDTH = 16  # what the widths of a layer must be multiples of, for the products of 8-bit numbers on a GPU


def quantize(model: nn.Module, name: str) -> int:
    """Replace the weights of a U-Net's linear layers in transformer blocks; how many layers they were.

    `name` is a key of `QUANTIZED`. A scale is what the largest number of its row needs (Dettmers et al. 2022,
    arXiv 2208.07339, section 3.1). Layers whose widths are no multiples of 16 are passed over, as are those with a row
    of zeros, which has no scale; released models have widths that fit.

    Raises:
        LdmError: the name is unknown, torchao is missing, it does not run here, or there is no weight to be replaced.
    """
    weight = next(model.parameters())
    config = check_quantize(name, weight.device, weight.dtype)
    chosen = [
        layer
        for block in model.modules()
        if isinstance(block, TransformerBlock)
        for layer in block.modules()
        if isinstance(layer, nn.Linear) and _suits(layer.weight)
    ]
    if not chosen:
        raise LdmError(f"quantize {name!r}: no layer is left to do it to; is the model quantised already?")
    for layer in chosen:
        _replace_weight(layer, config)
    return len(chosen)


def _suits(weight: Tensor) -> bool:
    """Whether a weight (R, C) is plain, of widths that fit, and without a row of zeros."""
    plain = type(weight) is nn.Parameter
    return plain and all(side % WIDTH == 0 for side in weight.shape) and bool(weight.any(dim=1).all())


def check_quantize(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """torchao's configuration, once a small layer of that device and dtype has been tried.

    Raises:
        LdmError: the name is unknown, torchao is missing, or it does not run here.
    """
    if name not in QUANTIZED:
        raise LdmError(f"quantize {name!r} is not known; choose one of: {', '.join(QUANTIZED)}")
    plain = str(dtype).removeprefix("torch.")
    if name == "fp8":
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        if capability < (8, 9):
            here = f"one of {capability[0]}.{capability[1]}" if device.type == "cuda" else device.type
            raise LdmError(f"quantize 'fp8' needs a GPU of compute capability 8.9 or more, not {here}; try 'int8'")
        if dtype != torch.bfloat16:
            raise LdmError(f"quantize 'fp8' works in bfloat16, not in {plain}; choose that dtype (dtype=, --dtype)")
    config = _config(name, device)
    if problem := _try(config, device, dtype):
        raise LdmError(f"quantize {name!r} does not run here in {plain} on {device.type} ({problem}); leave it out")
    return config


def _config(name: str, device: torch.device) -> Any:
    warns = logging.getLogger("torch.utils._pytree")  # of how torchao registers enums, which is not the user's concern
    level = warns.level
    warns.setLevel(logging.ERROR)
    try:
        from torchao import quantization as ao
        from torchao.utils import should_reduce_range
    except ImportError as error:
        reason = first_line(error)
        raise LdmError(f"quantize {name!r} needs the package torchao ({reason}): pip install -U torchao") from None
    finally:
        warns.setLevel(level)
    if name == "int8-weights":
        return ao.Int8WeightOnlyConfig(set_inductor_config=False)
    if name == "int8":
        # products of all 8 bits overflow on processors without VNNI, and where it is not to be used
        reduced = should_reduce_range(device) or (device.type == "cpu" and not can("avx512_vnni", "avx_vnni"))
        return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=reduced)
    # tokens may be zeros: SDXL's empty negative prompt; without a bound their scale would be zero too
    return ao.Float8DynamicActivationFloat8WeightConfig(
        granularity=ao.PerRow(), activation_value_lb=1e-12, set_inductor_config=False
    )


def _replace_weight(layer: nn.Linear, config: Any) -> None:
    """Put a quantised weight in the place of a layer's (R, C)."""
    from torchao.quantization import quantize_

    quantize_(layer, config)


def _try(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Why a small layer fails, in a few words, or "" when it agrees with a plain one."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2, 64, 64, generator=generator).to(device, dtype)
    x[0] = 0
    layer = nn.Linear(64, 64, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    wanted = F.linear(x, weight).float()
    try:
        _replace_weight(layer, config)
        with torch.inference_mode():
            found: Tensor = layer(x[None])[0].float()
    except Exception as error:  # as kernels of attention do, these fail in many ways
        return first_line(error)
    return "" if (found - wanted).norm() < 0.1 * wanted.norm() else "its result is wrong"
