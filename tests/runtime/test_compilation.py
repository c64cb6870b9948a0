"""Compiled blocks give the plain ones' numbers and gradients, and are not compiled anew for what changes in calls."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning
from ldm.runtime import compilation
from ldm.sampling.guidance import Guidance
from ldm.training.gradient_checkpointing import checkpointed
from pipelines import Pipeline
from pipelines.tuning import Tuning


def small() -> LatentDiffusion:
    """Few kinds of block, since each takes seconds to compile."""
    family = tiny.family("sd15")
    unet = replace(family.unet, channels=(32,), depth=(1,), heads=(4,), layers=1)
    autoencoder = replace(family.autoencoder, channels=(16,), attention=(False,))
    return LatentDiffusion.from_family(replace(family, unet=unet, autoencoder=autoencoder))


def test_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.failure.cache_clear()
    plain, compiled = Pipeline(small()), Pipeline(small())
    Tuning(compile=True).apply(compiled.model)
    assert list((tmp_path / "ldm" / "compiled").iterdir())
    compiled.compiled = True

    def check(prompt: str, n: int, steps: int, guidance: Guidance) -> int:
        """Compare, and count what was compiled for it."""
        before = counters["stats"]["unique_graphs"]
        settings = {"width": 8, "height": 8, "n": n, "steps": steps, "guidance": guidance, "seed": 1}
        settings["output"] = "latents"
        made, wanted = (pipeline(prompt, **settings) for pipeline in (compiled, plain))
        for ours, theirs in zip(made.latents, wanted.latents, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        return counters["stats"]["unique_graphs"] - before

    def said() -> list[str]:
        return [record.message.split()[0] for record in caplog.records if record.name.startswith("ldm.")]

    with caplog.at_level(logging.WARNING, logger="ldm"):
        assert check("a fox", 2, 2, Guidance(7.5, interval=(0, 0.5)))  # two images, with guidance and without
    assert said() == ["compiling", "compiled"]
    caplog.clear()
    assert not check("a much longer prompt " * 30, 2, 5, Guidance(3))
    assert not check("a fox", 1, 3, Guidance(2))
    assert not check("a fox", 3, 3, Guidance(1))
    with torch.no_grad():
        for pipeline in (compiled, plain):  # as an adapter that is merged would change them
            for parameter in pipeline.model.unet.parameters():
                parameter.mul_(1.1)
    assert not check("a fox", 2, 3, Guidance(5))
    assert not said()


def test_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("no working compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    compilation.failure.cache_clear()
    with pytest.raises(LdmError, match=r"torch.compile does not work here \(no working compiler\); a CPU needs"):
        Tuning(compile=True).apply(small())
    compilation.failure.cache_clear()


@pytest.mark.parametrize(
    ("part", "backend"),
    [("", "aot_eager_decomp_partition"), ("mid_block.attentions.0.transformer_blocks.0.ff", "inductor")],
)
def test_compiling_changes_no_gradient(part: str, backend: str) -> None:
    """The whole network as it is traced, and the code for one of its parts, since that for all takes a minute."""
    from torch._dynamo.utils import counters

    family = tiny.family("sd15")
    shape = replace(family.unet, channels=(16,), depth=(1,), heads=(2,), layers=1, groups=8)
    model = LatentDiffusion.from_family(replace(family, unet=shape))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, shape.text_dim)
    gradients = []
    for compiled in (False, True):
        unet = copy.deepcopy(model.unet).train()
        checkpointed(unet)
        before = counters["stats"]["unique_graphs"]
        if compiled:
            unet.get_submodule(part).compile(backend=backend)
        unet(x, torch.tensor([500, 3]), Conditioning(text)).square().mean().backward()
        assert (counters["stats"]["unique_graphs"] > before) == compiled
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
