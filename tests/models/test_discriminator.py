"""The discriminator: what each patch sees, that images do not see each other, its first weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ldm.errors import LdmError
from ldm.models.discriminator import Discriminator, DiscriminatorConfig

SMALL = DiscriminatorConfig(channels=16, groups=8)


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_the_size_of_a_patch(layers: int, side: int) -> None:
    """Those of Isola et al. 2017, section 6.2; without norms, which see the whole image."""
    model = Discriminator(replace(SMALL, layers=layers))
    model.norms = nn.ModuleList(nn.Identity() for _ in model.norms)
    x = torch.rand(1, 3, 160, 160, requires_grad=True)
    patches = model(x)
    patches[0, 0, patches.shape[2] // 2, patches.shape[3] // 2].backward()
    rows, columns = x.grad.abs().sum(dim=(0, 1)).nonzero().unbind(dim=1)
    assert rows.max() - rows.min() + 1 == side
    assert columns.max() - columns.min() + 1 == side


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = Discriminator(SMALL)
    x = torch.rand(4, 3, 32, 40)
    together = model(x)
    assert together.shape == (4, 1, 2, 3)
    alone = torch.cat([model(image) for image in x.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert not list(model.buffers())  # nothing that a forward pass would advance


def test_first_weights() -> None:
    model = Discriminator(DiscriminatorConfig(channels=32))
    for conv in (model.conv_in, *model.convs, model.conv_out):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert conv.bias is None or not conv.bias.any()
    assert [conv.out_channels for conv in model.convs] == [64, 128, 256]
    assert [conv.out_channels for conv in Discriminator(replace(SMALL, layers=5)).convs] == [32, 64, 128, 128, 128]


@pytest.mark.parametrize("layers", [1, 3])
def test_the_smallest_image(layers: int) -> None:
    model = Discriminator(replace(SMALL, layers=layers))
    side = model.config.smallest
    assert model(torch.rand(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(LdmError, match=f"at least {side}×{side} pixels; these have {side - 1}×{side}"):
        model(torch.rand(1, 3, side - 1, side))


def test_absurd_configurations_are_refused() -> None:
    with pytest.raises(LdmError, match="layers is 0"):
        replace(SMALL, layers=0)
    with pytest.raises(LdmError, match="30 channels do not divide"):
        replace(SMALL, channels=15)
