"""Our own kernels, and those of other processors, beside the formula on all shapes; and how ours cannot be had."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from networks import distance, runs
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.attention import Kernel, attention_layers, sdpa
from ldm.models.attention import math as by_formula
from ldm.runtime.attention import best_attention
from ldm.runtime.kernels import compiled
from ldm.runtime.kernels.attention import attend
from ldm.runtime.kernels.compiled import library, usable
from pipelines import Pipeline

KERNELS = [  # with their types: ours, and those of processors on which ours cannot be compiled
    pytest.param(attend, torch.bfloat16, marks=runs, id="bf16"),
    pytest.param(attend, torch.float32, marks=runs, id="fp32"),
    pytest.param(sdpa, torch.float32, id="sdpa"),
    pytest.param(by_formula, torch.float32, id="math"),
]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing compiled or found yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (library, usable, compiled._compiler):
        function.cache_clear()
    yield tmp_path / "ldm" / "kernels"
    for function in (library, usable, compiled._compiler):
        function.cache_clear()


def heads(batch: int, count: int, tokens: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As a layer gives them: channels of all heads side by side."""
    return torch.randn(batch, tokens, count * channels).to(dtype).unflatten(-1, (count, channels)).transpose(1, 2)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("channels", [2, 8, 32, 40, 64, 80, 112, 160, 512])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 3), (7, 77), (96, 16), (97, 256), (200, 257), (144, 600)])
def test_it_is_the_formula(kernel: Kernel, dtype: torch.dtype, channels: int, queries: int, keys: int) -> None:
    """No further from it than PyTorch's kernel in bf16 (and a fifth), and in fp32 equal, whatever the sizes."""
    count = 1 if channels == 512 else 3
    q, k, v = (heads(2, count, tokens, channels, dtype) for tokens in (queries, keys, keys))
    for scale in (1, 8):  # flat and sharp softmax
        exact = formula(scale * q, k, v)
        found = distance(kernel(scale * q, k, v), exact)
        if dtype == torch.float32:
            assert found < 1e-5
        else:
            theirs = torch.nn.functional.scaled_dot_product_attention(scale * q, k, v)
            assert found <= 1.2 * distance(theirs, exact) + 1e-4


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_extreme_scores_and_layouts(kernel: Kernel, dtype: torch.dtype) -> None:
    q, k, v = (heads(1, 2, tokens, 16, dtype) for tokens in (50, 300, 300))
    k[:, :, 7] = 1000 * q[:, :, 3]  # one key far above all others
    exact = formula(q, k, v)
    found = kernel(q, k, v)
    assert torch.isfinite(found).all()
    assert distance(found, exact) < 0.01
    contiguous = [tensor.contiguous() for tensor in (q, k, v)]
    turned = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (q, k, v)]
    for others in (contiguous, turned):
        if dtype == torch.float32:
            torch.testing.assert_close(kernel(*others), found, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(kernel(*others), found)
    assert torch.isnan(kernel(q, k, v * math.nan)).all()


@runs
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(2, 3, 500, 40), heads(2, 3, 400, 40), heads(2, 3, 400, 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = attend(q, k, v)
    for threads in (2, 3, 50):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(attend(q, k, v), alone)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(other, alone) for other in pool.map(lambda _: attend(q, k, v), range(8)))
    process = os.fork()
    if process == 0:
        monkeypatch.undo()
        torch.set_num_threads(1)  # as PyTorch's workers do: OpenMP's threads are gone
        os._exit(0 if torch.equal(attend(q, k, v), alone) else 1)
    assert os.waitpid(process, 0)[1] == 0


def test_gradients_are_pytorchs() -> None:
    q, k, v = (heads(1, 2, 20, 8).float().requires_grad_() for _ in range(3))
    attend(q, k, v).sum().backward()
    assert q.grad is not None
    with torch.no_grad(), pytest.raises(LdmError, match=r"for fp32 and bf16 on the CPU, not for torch.float64 on cpu"):
        attend(q.double(), k.double(), v.double())


@pytest.mark.parametrize("able", [pytest.param(True, marks=runs), False], ids=["ours", "other"])
def test_a_pipeline_takes_it_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    """Where it runs; on other processors it is PyTorch's own."""
    monkeypatch.setattr(compiled, "usable", lambda: able)
    tiny.model("sd15").save_pretrained(tmp_path / "model")
    for dtype in (torch.bfloat16, torch.float32):
        assert best_attention(torch.device("cpu"), dtype) == ("cpu" if able else "sdpa")
        model = Pipeline(tmp_path / "model", device="cpu", dtype=dtype).model
        kernels = {
            layer.kernel.__name__ for part in (model.unet, model.autoencoder) for layer in attention_layers(part)
        }
        assert kernels == {"_cpu" if able else "sdpa"}


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that gives what was compiled before."""
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{library()._name}" "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


@runs
def test_it_is_compiled_once(copied: None, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
    library.cache_clear()
    monkeypatch.setattr(compiled.subprocess, "run", lambda *_, **__: pytest.fail("it is compiled again"))
    library()


@runs
def test_a_cache_that_cannot_be_written(copied: None, fresh: Path) -> None:
    fresh.parent.mkdir()
    fresh.write_text("a file in the way")
    assert library().attend_float32


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not usable()
    assert best_attention(torch.device("cpu"), torch.bfloat16) == "sdpa"
    with pytest.raises(LdmError, match=r"no C\+\+ compiler is found: install g\+\+"):
        library()


@runs
def test_a_file_that_cannot_be_loaded(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one of another machine, in a folder that both share."""

    def of_another_machine(command: list[str], path: Path) -> Path:
        path.parent.mkdir(parents=True)
        path.write_text("of another machine")
        return path

    monkeypatch.setattr(compiled, "_compiled", of_another_machine)
    assert not usable()
    (path,) = fresh.iterdir()
    assert f"{path} cannot be loaded" in caplog.text and "XDG_CACHE_HOME" in caplog.text


def test_other_systems(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.sys, "platform", "win32")
    assert not usable()


@runs
def test_shapes_that_do_not_belong_together() -> None:
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 6)
    with torch.no_grad(), pytest.raises(RuntimeError):
        attend(q, k, k)


def test_a_compiler_that_fails(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'error: no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(LdmError, match="cannot compile .*kernels: error: no such flag"):
        library()
    assert not list(fresh.iterdir())
