"""A U-Net with precomputed outputs gives the same numbers, and leaves the U-Net that it was made from as it was."""

from __future__ import annotations

import pytest
import tiny
import torch
from rounding import NETWORK, near

from ldm.models.layers import ResnetBlock, TransformerBlock
from ldm.models.unet import Conditioning
from ldm.runtime.precomputing import AHEAD, PrecomputedOutput, TimeTable, precomputed, reads_conditioning


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "sdxl-refiner", "emoji-refiner"])
def test_the_same_numbers_with_less_work(name: str) -> None:
    unet = tiny.model(name, shallow=True).unet
    before = {key: id(tensor) for key, tensor in unet.state_dict(keep_vars=True).items()}
    c = unet.config
    size = torch.randn(2, c.size_ids) if c.size_ids else None
    cond = Conditioning(torch.randn(2, 9, c.text_dim), torch.randn(2, c.pooled_dim) if c.pooled_dim else None, size)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    blocks = [module for module in unet.modules() if isinstance(module, TransformerBlock)]
    for block in blocks:
        block.attn2.to_k.register_forward_hook(count)
    with torch.no_grad():
        model = precomputed(unet, cond)
        assert calls == len(blocks)
        assert not reads_conditioning(model)
        for t in (999, 500, 3):
            x = torch.randn(2, c.in_channels, 8, 9)
            calls = 0
            made = model(x, torch.tensor(t), cond)
            assert calls == 0
            assert torch.equal(made, unet(x, torch.tensor(t), cond))
    assert reads_conditioning(unet) == bool(blocks or c.pooled_dim)
    assert not any(isinstance(module, PrecomputedOutput) for module in unet.modules())
    assert {key: id(tensor) for key, tensor in unet.state_dict(keep_vars=True).items()} == before


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_time_is_computed_once_for_many_steps(name: str) -> None:
    unet = tiny.model(name, shallow=True).unet
    c = unet.config
    size = torch.randn(2, c.size_ids) if c.size_ids else None
    cond = Conditioning(torch.randn(2, 9, c.text_dim), torch.randn(2, c.pooled_dim) if c.pooled_dim else None, size)
    calls: list[str] = []
    for key, module in unet.named_modules():
        if key.endswith(("time_emb_proj", "time_embedding")):
            module.register_forward_hook(lambda *_, key=key: calls.append(key))  # type: ignore[misc]
    blocks = sum(isinstance(module, ResnetBlock) for module in unet.modules())
    times = [999.0 - 3 * step for step in range(AHEAD + 2)]
    with torch.inference_mode():
        table = TimeTable(precomputed(unet, cond), cond, [times[0], *times])  # some schedulers ask twice
        for number, time in enumerate([*times, 0.5, times[5]]):  # one that was not named, and back
            x = torch.randn(2, c.in_channels, 8, 9)
            wanted = unet(x, torch.tensor(time), cond)
            calls.clear()
            table.set(time)
            made = table.unet(x, torch.tensor(time), cond)
            assert len(calls) == (1 + blocks if number in (0, AHEAD, len(times), len(times) + 1) else 0)
            near(made, wanted, NETWORK)
