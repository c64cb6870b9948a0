"""How a model is made quick on its device: layers, kernels, compiling, weights of 8 bits; and the device and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldm.errors import LdmError
from ldm.kernels.processor import can
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.attention import best_attention, set_attention
from ldm.sampling import on_cpu, on_gpu
from ldm.sampling.compilation import compile_blocks
from ldm.sampling.graphs import record_steps
from ldm.sampling.quantized import check_quantize, quantize


@dataclass(frozen=True)
class Tuning:
    """What `Pipeline` says of these."""

    attention: str = "auto"
    quick: bool = True
    compile: bool = False
    quantize: str | None = None

    def load(
        self, source: Any, device: torch.device, dtype: torch.dtype | None, options: Mapping[str, Any]
    ) -> LatentDiffusion:
        """A model from a source, tuned; one that is loaded already, as it is.

        Raises:
            LdmError: it cannot be loaded, or tuned like that.
        """
        if isinstance(source, LatentDiffusion):
            if self.quantize is not None:
                raise LdmError(
                    f"quantize {self.quantize!r}: a model that is loaded already stays as it is; name its source"
                )
            return source
        dtype = dtype or default_dtype(device)
        if self.quantize is not None:
            check_quantize(self.quantize, device, dtype)
        model = LatentDiffusion.from_pretrained(source, dtype=dtype, device=device, **options)
        half = next(model.autoencoder.parameters()).dtype == torch.float16
        if half and model.family.unet.pooled_dim and model.family.autoencoder.force_upcast:
            model.autoencoder.float()  # SDXL's own overflows in fp16
        return self.apply(model)

    def apply(self, model: LatentDiffusion) -> LatentDiffusion:
        """A model on its device, tuned in place; with quantised weights, another around the same networks.

        Raises:
            LdmError: a kernel does not run here, or nothing can be compiled or quantised.
        """
        weight = next(model.unet.parameters())
        for network in (model.unet, model.autoencoder):
            if self.compile:
                compile_blocks(network)
            elif self.quick:
                on_cpu.quicken(network)
                on_gpu.quicken(network)
        name = self.attention
        if name == "auto":
            name = "sdpa" if self.compile else best_attention(weight.device, weight.dtype)
        if name != "sdpa":
            set_attention(model.unet, name)
        if name == "avx512":
            set_attention(model.autoencoder, name)
        if self.quantize is not None:
            model = Quantized(model, self.quantize)
        if self.compile and weight.device.type == "cuda":
            record_steps(model.unet)
        return model


class Quantized(LatentDiffusion):
    """A model whose U-Net has quantised weights, known by those that it was loaded with."""

    def __init__(self, model: LatentDiffusion, name: str) -> None:
        """Quantise the U-Net of a model; `name` is one of `ldm.sampling.quantized.QUANTIZED`.

        Raises:
            LdmError: it cannot be done here.
        """
        super().__init__(model.family, model.unet, model.autoencoder, model.text_encoders)
        self.known_by = model.fingerprint()
        quantize(model.unet, name)

    def fingerprint(self) -> str:
        """That of the weights as they were loaded."""
        return self.known_by


def device_named(name: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        LdmError: there is none.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        raise LdmError(f"device {name!r} is not known; choose cuda, mps or cpu") from None


def default_device() -> str:
    """The best device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device: torch.device) -> torch.dtype:
    """What a device is good at: bf16 where it computes in it, else fp16 on a GPU and fp32 on a CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if can("avx512_bf16", "amx_bf16") else torch.float32
