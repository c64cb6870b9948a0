"""Attention kernels by name, and how one is put into a network.

A kernel is a function `(q, k, v) -> out`: see `ldm.models.attention`.
"""

from __future__ import annotations

import contextlib
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.errors import LdmError
from ldm.models.attention import Kernel, attention_layers, math, sdpa
from ldm.runtime.quiet import quiet


def _only(backend: SDPBackend) -> Kernel:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return kernel


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # xformers wants (B, N, heads, D)
    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from ldm.runtime.kernels.attention import attend

    return attend(q, k, v)


KERNELS: dict[str, tuple[Kernel, str]] = {  # name -> the kernel, what it needs
    "sdpa": (sdpa, "nothing beyond PyTorch"),
    "math": (math, "nothing beyond PyTorch"),
    "cpu": (_cpu, "fp32 or bf16 on a processor with AVX2 or 64-bit Arm's, and a C++ compiler: g++ or clang++"),
    "flash": (_only(SDPBackend.FLASH_ATTENTION), "PyTorch's flash kernel: a GPU in fp16/bf16 and heads of at most 256"),
    "efficient": (_only(SDPBackend.EFFICIENT_ATTENTION), "PyTorch's memory-efficient kernel: a CUDA GPU"),
    "cudnn": (_only(SDPBackend.CUDNN_ATTENTION), "PyTorch with cuDNN 9: a CUDA GPU in fp16/bf16"),
    "xformers": (_xformers, "a CUDA GPU and an xformers built for this PyTorch: pip install -U xformers"),
    "flash-attn": (_flash_attn, "a CUDA GPU in fp16/bf16 and the package flash-attn: pip install flash-attn"),
}


def best_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest kernel's name: "cpu" in fp32 and bf16 on a CPU where it runs, else "sdpa", PyTorch's own choice."""
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        from ldm.runtime.kernels.compiled import usable

        return "cpu" if usable() else "sdpa"
    return "sdpa"


def set_attention(model: nn.Module, name: str, device: torch.device | None = None) -> None:
    """Make every attention layer of `model` use the kernel called `name` (a key of `KERNELS`).

    The kernel is run once on random input of the model's device, dtype and head sizes before anything is changed.
    `device` is where the model will compute, if not where its weights are.

    Raises:
        LdmError: the name is unknown, or the kernel is not installed, does not load, or cannot do this model's shapes.
    """
    if name not in KERNELS:
        raise LdmError(f"attention {name!r} is not known; choose one of: {', '.join(KERNELS)}")
    kernel, needs = KERNELS[name]
    layers = list(attention_layers(model))
    weight = next(model.parameters())
    device = device or weight.device
    for head_dim in sorted({layer.head_dim for layer in layers}):
        problem = _try(kernel, head_dim, device, weight.dtype)
        if problem:
            raise LdmError(
                f"attention {name!r} does not run here with heads of {head_dim} channels in {_plain(weight.dtype)} "
                f"on {device.type} ({problem}); it needs {needs}"
            )
    for layer in layers:
        layer.kernel = kernel


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _try(kernel: Kernel, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel fails on a small input, in a few words, or "" when it agrees with plain attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 16, head_dim, generator=generator).to(device, dtype)
    quiet()  # xformers logs what does not load, and our error says it
    try:
        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            out = kernel(q, k, v)
    except ImportError as error:
        return f"not installed: {error}"
    except Exception as error:  # kernels fail in many ways: RuntimeError, NotImplementedError, ValueError, CUDA errors
        return str(error).strip().splitlines()[0].rstrip(" :.") if str(error).strip() else type(error).__name__
    reference = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    if not torch.allclose(out.float(), reference.float(), atol=2e-2, rtol=2e-2):
        return "its result is wrong"
    return ""
