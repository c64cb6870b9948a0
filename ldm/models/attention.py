"""Every attention of the U-Net, the autoencoder and their siblings goes through one of these kernels.

A kernel is a function `(q, k, v) -> out` on tensors (B, heads, N, D): softmax(q kᵀ / √D) v, without mask or drop-out.
Each attention layer holds its kernel as an attribute, and `set_attention` puts another one in from outside, so that no
forward pass ever asks which one is in use.

B batch, N query tokens, M key tokens, D channels of one head
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.errors import LdmError

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice among its kernels."""
    return F.scaled_dot_product_attention(q, k, v)


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula as it is written, all weights in memory. On a CPU the fastest way to train on short sequences."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1).to(v.dtype) @ v


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


def _avx512(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from ldm.kernels.attention import attend

    return attend(q, k, v)


KERNELS: dict[str, tuple[Kernel, str]] = {  # name -> the kernel, what it needs
    "sdpa": (sdpa, "nothing beyond PyTorch"),
    "math": (math, "nothing beyond PyTorch"),
    "avx512": (_avx512, "bf16 on a processor with AVX-512 BF16, and a C++ compiler: g++ or clang++"),
    "flash": (_only(SDPBackend.FLASH_ATTENTION), "PyTorch's flash kernel: a GPU in fp16/bf16 and heads of at most 256"),
    "efficient": (_only(SDPBackend.EFFICIENT_ATTENTION), "PyTorch's memory-efficient kernel: a CUDA GPU"),
    "cudnn": (_only(SDPBackend.CUDNN_ATTENTION), "PyTorch with cuDNN 9: a CUDA GPU in fp16/bf16"),
    "xformers": (_xformers, "a CUDA GPU and an xformers built for this PyTorch: pip install -U xformers"),
    "flash-attn": (_flash_attn, "a CUDA GPU in fp16/bf16 and the package flash-attn: pip install flash-attn"),
}


class AttentionLayer(nn.Module):
    """What `set_attention` looks for: a layer with `heads` heads of `dim / heads` channels and a `kernel`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.kernel: Kernel = sdpa

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Split (B, N, heads·D) into heads, run the kernel, join again: (B, N, heads·D)."""
        q, k, v = (x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return self.kernel(q, k, v).transpose(1, 2).flatten(2)


def attention_layers(model: nn.Module) -> Iterator[AttentionLayer]:
    """All attention layers of a model, in order of their names."""
    return (module for module in model.modules() if isinstance(module, AttentionLayer))


def best_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The kernel to make pictures with: ours on the CPU in bf16 where it runs, else PyTorch's own choice."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        from ldm.kernels.compiled import usable

        return "avx512" if usable() else "sdpa"
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
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it reports what does not load; so do we, in one line
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
