"""A U-Net that keeps what depends on the conditioning alone gives the same numbers, and leaves the other as it was."""

from __future__ import annotations

import pytest
import tiny
import torch

from ldm.models.layers import TransformerBlock
from ldm.models.unet import Conditioning
from ldm.sampling.prepared import Given, prepared


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "sdxl-refiner", "emoji-refiner"])
def test_the_same_numbers_with_less_work(name: str) -> None:
    unet = tiny.model(name).unet
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
        model = prepared(unet, cond)
        assert calls == len(blocks)
        for t in (999, 500, 3):
            x = torch.randn(2, c.in_channels, 8, 9)
            calls = 0
            made = model(x, torch.tensor(t), cond)
            assert calls == 0
            assert torch.equal(made, unet(x, torch.tensor(t), cond))
    assert not any(isinstance(module, Given) for module in unet.modules())
    assert {key: id(tensor) for key, tensor in unet.state_dict(keep_vars=True).items()} == before
