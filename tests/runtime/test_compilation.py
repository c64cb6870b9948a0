"""Compiled blocks give the plain ones' numbers, and are not compiled again for what changes from call to call."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.runtime import compilation
from ldm.sampling.guidance import Guidance
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
        settings = {"width": 8, "height": 8, "n": n, "batch": 2, "steps": steps, "guidance": guidance, "seed": 1}
        made, wanted = (pipeline(prompt, **settings) for pipeline in (compiled, plain))
        for ours, theirs in zip(made.latents, wanted.latents, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        return counters["stats"]["unique_graphs"] - before

    def said() -> list[str]:
        return [record.message.split()[0] for record in caplog.records if record.name.startswith("ldm.")]

    with caplog.at_level(logging.WARNING, logger="ldm"):
        assert check("a fox", 3, 2, Guidance(7.5, interval=(0, 0.5)))  # two images and one, with guidance and without
    assert said() == ["compiling", "compiled"] * 2
    caplog.clear()
    assert not check("a much longer prompt " * 30, 2, 5, Guidance(3))
    assert not check("a fox", 1, 3, Guidance(1))
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
