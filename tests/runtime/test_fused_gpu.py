"""Fused layers for GPUs, without one: in the place of a network's own, and their kernels interpreted and compiled."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from launched import PATIENCE
from networks import DTYPES, adapted, cast, circular, device, distance, formula, hooked, inputs
from torch import Tensor, nn

from ldm.models.layers import GEGLU, ResnetBlock
from ldm.runtime import fused_gpu
from ldm.runtime.fused import LAST, FusedResnetBlock
from ldm.runtime.fused_gpu import TritonGEGLU, TritonGroupNorm, fuse, works
from pipelines.tuning import Tuning

__all__ = ["device"]  # a fixture
HERE = Path(__file__).parents[1]


@pytest.fixture
def stand_in(device: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """PyTorch in the place of kernels; of each norm, whether it had an offset and SiLU."""
    seen: list[tuple[bool, bool]] = []

    def group_norm(norm: nn.GroupNorm, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        seen.append((offset is not None, silu))
        return formula(norm, x, offset, silu).to(x.dtype)

    def geglu(x: Tensor, bias: Tensor) -> Tensor:
        value, gate = (x.double() + bias).chunk(2, dim=-1)
        return (value * F.gelu(gate)).to(x.dtype)

    kernels = ModuleType("stand_in")
    kernels.__dict__.update(group_norm=group_norm, geglu=geglu)
    monkeypatch.setattr(fused_gpu, "kernels", lambda: kernels)
    assert all(works(torch.device("cpu"), dtype) for dtype in DTYPES)
    seen.clear()
    return seen


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_unet_and_an_autoencoder(stand_in: Any, name: str, dtype: torch.dtype) -> None:
    model = tiny.model(name)
    for part, call in ((model.unet, denoised), (model.autoencoder, decoded)):
        exact = copy.deepcopy(part).double()
        part.to(dtype)
        quick = copy.deepcopy(part)
        fuse(quick)
        kinds = {type(module) for module in quick.modules()}
        assert {TritonGroupNorm, FusedResnetBlock} <= kinds and not kinds & {nn.GroupNorm, ResnetBlock, GEGLU}
        names = [name for name, _ in quick.named_parameters()]
        assert names == [name for name, _ in part.named_parameters()]
        weights = [module.weight for module in quick.modules() if isinstance(module, nn.Conv2d)]
        assert all(weight.is_contiguous(memory_format=LAST) for weight in weights)
        found, plain, wanted = call(quick, dtype), call(part, dtype), call(exact, torch.float64)
        if dtype == torch.float32:
            assert distance(found, plain) < 1e-5
        else:
            assert distance(found, wanted) < 1.1 * distance(plain, wanted)


def denoised(unet: Any, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    x, t, cond = inputs(unet, torch.float32, 17, 16)
    with torch.inference_mode():
        return unet(x.to(dtype), t, cast(cond, dtype))


def decoded(autoencoder: Any, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return autoencoder.decode(torch.randn(1, autoencoder.config.latent_channels, 5, 6).to(dtype))


def test_one_call_of_the_kernel_for_each_norm(stand_in: list[tuple[bool, bool]]) -> None:
    """The embedding's offset and SiLU go along."""
    unet = tiny.model("sdxl").unet
    fuse(unet)
    denoised(unet, torch.float32)
    blocks = sum(isinstance(module, ResnetBlock) for module in unet.modules())
    assert stand_in.count((True, True)) == stand_in.count((False, True)) == blocks
    assert len(stand_in) == sum(isinstance(module, nn.GroupNorm) for module in unet.modules())


@pytest.mark.parametrize("change", [circular, hooked, adapted])
def test_what_others_change_counts(stand_in: Any, change: Any) -> None:
    plain = tiny.model("sd15").unet
    quick = copy.deepcopy(plain)
    fuse(quick)
    for unet in (plain, quick):
        change(unet)
    assert distance(denoised(quick, torch.float32), denoised(plain, torch.float32)) < 1e-5


def test_gradients_and_other_types(stand_in: list[tuple[bool, bool]]) -> None:
    """There the layers are plain."""
    plain = tiny.model("sd15").unet
    quick = copy.deepcopy(plain)
    fuse(quick)
    x, t, cond = inputs(plain, torch.float32)
    for unet in (plain, quick):
        unet(x, t, cond).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), quick.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and distance(other.grad, one.grad) < 1e-4, name
    quick.double()
    assert distance(denoised(quick, torch.float64), denoised(plain, torch.float32)) < 1e-5
    assert not stand_in


def test_they_stay_plain_on_a_cpu() -> None:
    unet = tiny.model("sd15").unet
    fuse(unet)
    assert {nn.GroupNorm, ResnetBlock, GEGLU} <= {type(module) for module in unet.modules()}


@pytest.mark.parametrize("fault", [ImportError("no module named triton"), RuntimeError("ptxas fails"), None])
def test_where_the_kernels_fail(
    device: None, fault: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers stay plain, and one line says why; `None` is a kernel that gives wrong numbers."""

    def broken(*arguments: Any) -> ModuleType:
        if fault is not None:
            raise fault
        wrong = ModuleType("wrong")
        wrong.group_norm = lambda norm, x, *_, **__: norm(x) + 1  # type: ignore[attr-defined]
        wrong.geglu = lambda x, bias: x[..., ::2]  # type: ignore[attr-defined]
        return wrong

    monkeypatch.setattr(fused_gpu, "kernels", broken)
    model = tiny.model("sd15")
    state = torch.get_rng_state()
    fuse(model.unet)
    fuse(model.autoencoder)
    for part in (model.unet, model.autoencoder):
        assert not any(isinstance(module, (TritonGroupNorm, TritonGEGLU)) for module in part.modules())
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("fused layers are not used: ")
    assert "wrong" in caplog.text if fault is None else str(fault) in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_tuned_by_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of fused layers is offered both networks."""
    seen: list[nn.Module] = []
    monkeypatch.setattr(fused_gpu, "fuse", lambda network, device: seen.append(network))
    model = tiny.model("sd15")
    Tuning().apply(model)
    assert seen == [model.unet, model.autoencoder]
    Tuning(fused=False).apply(model)
    assert len(seen) == 2


# --- kernels ----------------------------------------------------------------------------------------------------------


def alone(*arguments: str, **environment: str) -> None:
    """A process that must succeed."""
    pytest.importorskip("triton")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, *arguments], env=ours | environment, cwd=HERE.parent, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_in_the_interpreter() -> None:
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("older interpreters may not go with numpy 2.4: 3.6 cannot loop up to a number in a tensor")
    tests = str(HERE / "interpreted_kernels.py")
    options = ["-q", "-p", "no:cacheprovider", "--noconftest"]  # whose imports take seconds
    alone("-m", "pytest", *options, tests, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def test_they_compile(tmp_path: Path) -> None:
    """For a GPU that need not be there: the interpreter takes what the compiler does not."""
    paths = [str(HERE), str(HERE / "runtime")]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_fused_gpu; test_fused_gpu.compiled()"
    alone("-c", code, TRITON_CACHE_DIR=str(tmp_path))


def compiled() -> None:
    """Compile each kernel for bf16 and 320 channels in 32 groups; numbers are read and written 16 bytes at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ldm.runtime.kernels import triton_layers as ours

    fixed = {**ours.shared(320, 32)._asdict(), "silu": True, "tile_k": ours.CHUNKS}
    rows = {"tile_r": ours.ROWS, "tile_c": ours.COLUMNS}
    types = {"means": "*fp32", "squares": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("x", "offset", "weight", "bias", "out"), "*bf16")
    for kernel, sizes, options in (
        (ours._whole, fixed, ours.WARPS), (ours._chunk_moments, fixed, ours.WARPS),
        (ours._chunk_normalised, fixed, ours.WARPS), (ours._geglu, rows, ours.FEWER),
    ):  # fmt: skip
        names = [parameter.name for parameter in kernel.params]
        constants = {(i,): sizes[name] for i, name in enumerate(names) if name in sizes}
        signature = {name: "constexpr" if name in sizes else types.get(name, "i32") for name in names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or name == "channels"
        }
        source = ASTSource(kernel, signature, constants, aligned)
        text = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
        assert "ld.global.v4.b32" in text, kernel
        assert "st.global.v4.b32" in text or kernel is ours._chunk_moments, kernel
