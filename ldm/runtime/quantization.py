"""Linear layers with 8-bit weights, by the library torchao: for making images, not for training.

The layers of a U-Net's transformer blocks are quantised: 85 % of the weights of SDXL, 28 % of SD 1.5. All others stay
as they are. The first and the last layer, and the embeddings of timestep and time ids, are small, and their errors
reach every pixel; the projections around the blocks are convolutions in SD 1, which these types do not support.

C channels, R rows of a weight: the output channels of a layer
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, first_line
from ldm.models.layers import TransformerBlock
from ldm.runtime.kernels.processor import can
from ldm.runtime.quiet import quiet

QUANTIZED = {  # name -> what is rounded
    "int8": "weights to 8-bit integers with a scale for each row, activations with a scale for each token",
    "int8-weights": "weights alone to 8-bit integers, with a scale for each row",
    "fp8": "weights and activations to 8-bit floating-point numbers (e4m3), scaled as in int8: a newer GPU, in bf16",
}
WIDTH = 16  # the widths of a layer must be multiples of it, for 8-bit products on a GPU


def quantize(model: nn.Module, name: str) -> int:
    """Quantise the linear layers in a U-Net's transformer blocks, in place, and return how many they are.

    `name` is a key of `QUANTIZED`. The scale of a row follows from its largest number (Dettmers et al. 2022,
    arXiv 2208.07339, section 3.1). Layers whose widths are no multiples of 16 are left out, as are those with a row of
    zeros, which has no scale; released models have widths that fit.

    Raises:
        LdmError: the name is unknown, torchao is missing or does not run here, or no layer can be quantised.
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
        raise LdmError(f"quantize {name!r}: no layer can be quantised; is the model quantised already?")
    for layer in chosen:
        _replace_weight(layer, config)
    return len(chosen)


def _suits(weight: Tensor) -> bool:
    """Whether a weight (R, C) is not quantised yet, has widths that fit, and no row of zeros."""
    plain = type(weight) is nn.Parameter
    return plain and all(side % WIDTH == 0 for side in weight.shape) and bool(weight.any(dim=1).all())


def check_quantize(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """torchao's configuration, after a test with a small layer on that device and in that dtype.

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
    quiet()
    try:
        from torchao import quantization as ao
        from torchao.utils import should_reduce_range
    except ImportError as error:
        reason = first_line(error)
        raise LdmError(f"quantize {name!r} needs the package torchao ({reason}): pip install -U torchao") from None
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
    """Replace a layer's weight (R, C) by a quantised one."""
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
    except Exception as error:  # these kernels fail in many ways
        return first_line(error)
    return "" if (found - wanted).norm() < 0.1 * wanted.norm() else "its result is wrong"
