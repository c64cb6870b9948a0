"""Attachments of a run: patches with inputs of their own, each acting in a part of the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from ldm.models.surgery import replaced
from ldm.models.unet import Conditioning, UNet
from ldm.patches import patching
from ldm.patches.patching import Patch
from ldm.runtime.precomputing import PrecomputedOutput, RunInput, precomputed, reads_conditioning
from ldm.sampling.guidance import join
from ldm.sampling.noise import Noise
from pipelines import Pipeline
from pipelines.run import Attached, SamplingRun, acting


class Shifted(nn.Module):
    """A layer to whose result the sum of some inputs of the run is added."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.inputs = nn.ModuleList(RunInput(name) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        for one in self.inputs:
            x = x + one()[:, None, None, None]
        return self.layer(x)


def shift(unet: UNet, names: tuple[str, ...]) -> UNet:
    return replaced(unet, conv_in=Shifted(unet.conv_in, names))


@dataclass(frozen=True)
class Shift:
    """An attachment that shifts the latents which the U-Net reads."""

    amount: float
    begin: float = 0.0
    end: float = 1.0

    def prepare(self, run: SamplingRun) -> Attached:
        name, rows = f"shift.{self.amount}", torch.full((run.shape[0],), self.amount)
        return Attached("shifts", name, {name: (rows, torch.zeros_like(rows))})


@pytest.fixture(autouse=True)
def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "PATCHES", (*patching.PATCHES, Patch("shifts", (), shift)))


def made(attachments: list[Shift], on_inner: Callable[[int], None] | None = None, **settings: Any) -> Tensor:
    """Latents; `on_inner` is called with the number of each step in which the U-Net's middle runs."""
    pipeline, steps = Pipeline(tiny.model("sdxl"), quick=False), []
    if on_inner:
        pipeline.model.unet.mid_block.register_forward_hook(lambda *_: on_inner(len(steps)))
    request = pipeline.request(["a fox", "two dogs"], **{"seed": 1, "steps": 4, "width": 64, "height": 64, **settings})
    noise = Noise(request.seeds, request.rng)
    run = SamplingRun(pipeline.model, request, noise, steps.append, attachments=attachments)
    with torch.inference_mode():
        return run.sample(run.noise.draw(run.shape, run.dtype, run.device), run.plan)


def test_they_act_in_their_part_of_the_steps() -> None:
    parts = [Shift(1, 0, 1), Shift(1, 0.25, 0.8), Shift(1, 0, 0.5), Shift(1, 0.6, 0.7)]
    assert [acting(parts, index, 4) for index in range(4)] == [(0, 2), (0, 1, 2), (0, 1), (0,)]
    plain = made([])
    assert torch.equal(made([Shift(0.5, 0.6, 0.7)]), plain)  # less than a step
    assert torch.equal(made([Shift(0.0)]), plain)
    half, whole = made([Shift(0.5, 0.0, 0.5)]), made([Shift(0.5)])
    assert not torch.allclose(half, plain, atol=1e-3) and not torch.allclose(half, whole, atol=1e-3)
    torch.testing.assert_close(made([Shift(0.25), Shift(0.5, 0, 0.5), Shift(-0.25)]), half, atol=1e-3, rtol=0)


def test_after_a_gap_inner_levels_run_anew() -> None:
    """DeepCache reuses no result from before other attachments acted."""
    ran: list[int] = []
    made([Shift(0.5, 0.25, 0.5)], ran.append, steps=8, reuse=3)
    assert ran == [0, 2, 4, 7]


def test_prompts_and_negative_prompts_have_inputs_of_their_own() -> None:
    """With guidance the negative half stays as it is, so that more guidance changes more."""
    alone = made([Shift(0.5)], guidance=1) - made([], guidance=1)
    guided = made([Shift(0.5)], guidance=4) - made([], guidance=4)
    assert float(guided.abs().mean()) > 1.5 * float(alone.abs().mean())


def test_rows_and_batches_of_conditionings_keep_the_inputs() -> None:
    cond, negative = (Conditioning(torch.randn(2, 3, 4), more={"a": torch.full((2, 1), n)}) for n in (1.0, 2.0))
    assert join(cond, negative).more["a"].flatten().tolist() == [1, 1, 2, 2]
    assert join(cond, negative).rows(slice(1, 3)).more["a"].flatten().tolist() == [1, 2]


def test_inputs_are_precomputed() -> None:
    class Reader(nn.Module):
        """A layer whose part reads an input, as a class or an object may say."""

        def __init__(self) -> None:
            super().__init__()
            self.own, self.part = RunInput("a"), nn.Linear(4, 4)
            self.precomputable = {"part": "b"}

        def forward(self, x: Tensor) -> Tensor:
            return x + self.own()[..., None, None] + self.part(x)[..., None, None]

    unet = tiny.model("sd15").unet
    unet = replaced(unet, conv_in=nn.Sequential(unet.conv_in))
    reader = Reader()
    unet.conv_in.append(reader)
    more = {"a": torch.randn(2, 32), "b": torch.randn(2, 4)}
    cond = Conditioning(torch.randn(2, 9, unet.config.text_dim), more=more)
    with torch.no_grad():
        model = precomputed(unet, cond)
        found = model.conv_in[1]
        assert isinstance(found.own, PrecomputedOutput) and torch.equal(found.own(), more["a"])
        assert isinstance(found.part, PrecomputedOutput) and torch.equal(found.part(), reader.part(more["b"]))
        assert reads_conditioning(unet) and not reads_conditioning(model)
        with pytest.raises(RuntimeError, match="input a is not known before"):
            unet(torch.randn(2, 4, 8, 8), torch.tensor(1), cond)
