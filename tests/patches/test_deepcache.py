"""DeepCache: the inner levels of a U-Net run in one call of several."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from ldm.errors import LdmError
from ldm.models.unet import Conditioning
from ldm.patches.deepcache import reuse_inner_levels
from ldm.sampling.guidance import Guidance
from pipelines import Pipeline


@pytest.mark.parametrize("name", ["sd15", "sdxl", "emoji"])
def test_inner_levels_run_in_one_call_of_three(name: str) -> None:
    """A call in which they run is the plain U-Net's; in the others only the outermost level and its skips count."""
    unet = tiny.model(name).unet
    c = unet.config
    size = torch.randn(2, c.size_ids) if c.size_ids else None
    cond = Conditioning(torch.randn(2, 9, c.text_dim), torch.randn(2, c.pooled_dim) if c.pooled_dim else None, size)
    model, runs = reuse_inner_levels(unet, 3), 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    unet.mid_block.register_forward_hook(count)
    with torch.no_grad():
        inputs = [torch.randn(2, c.in_channels, 8, 6) for _ in range(5)]
        made = [model(x, torch.tensor(500), cond) for x in inputs]
        assert runs == 2
        plain = [unet(x, torch.tensor(500), cond) for x in inputs]
        same = [torch.equal(a, b) for a, b in zip(made, plain, strict=True)]
        assert same == [True, False, False, True, False]
        again = reuse_inner_levels(unet, 3)
        again(inputs[0], torch.tensor(500), cond)
        assert torch.equal(again(inputs[0], torch.tensor(500), cond), plain[0])  # nothing has changed in there
        runs = 0
        model(inputs[0][:1], torch.tensor(500), cond.rows(slice(1)))  # another batch: nothing fits it
        assert runs == 1


def test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, calls = Pipeline(tiny.model("sd15")), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    pipeline.model.unet.mid_block.register_forward_hook(count)

    def make(**settings: Any) -> torch.Tensor:
        nonlocal calls
        calls = 0
        result = pipeline("a fox", seed=1, steps=6, scheduler="euler", output="latents", **settings)
        assert result.settings[0]["reuse"] == settings.get("reuse", 1)
        return result.latents[0]

    plain = make()
    assert calls == 6
    assert torch.equal(make(reuse=1), plain)
    assert not torch.equal(make(reuse=2), plain)
    assert calls == 3
    half = Guidance(5.0, interval=(0.0, 0.5))
    make(reuse=3, guidance=half)
    assert calls == 2  # once for each part of the run, whose batches differ


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "often", 10**6])
def test_absurd_numbers(value: Any) -> None:
    with pytest.raises(LdmError, match=r"reuse .*: a whole number from 1 \(never\) to 1000 is needed"):
        Pipeline(tiny.model("sd15"))("a fox", steps=2, reuse=value)
