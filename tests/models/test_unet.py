"""The U-Net against diffusers' on the same weights and input."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.models.unet import Conditioning, UNet, UNetConfig
from ldm.weights.configs import write_unet


def reference(unet: UNet) -> UNet2DConditionModel:
    """diffusers' U-Net with the same weights."""
    model = UNet2DConditionModel.from_config(write_unet(unet.config)).eval()
    model.load_state_dict(unet.state_dict())
    return model.to(next(unet.parameters()).dtype)


def inputs(config: UNetConfig, height: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, config.in_channels, height, width)
    text, pooled = torch.randn(2, 77, config.text_dim), torch.randn(2, config.pooled_dim)
    size = torch.randint(0, 1024, (2, config.size_ids)).float()
    return x.to(dtype), torch.tensor([3, 981]), text.to(dtype), pooled.to(dtype), size


def run_both(unet: UNet, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, t, text, pooled, size = inputs(unet.config, height, width, next(unet.parameters()).dtype)
    extra = {"text_embeds": pooled, "time_ids": size} if unet.config.pooled_dim else None
    cond = Conditioning(text, pooled, size) if unet.config.pooled_dim else Conditioning(text)
    with torch.no_grad():
        return unet(x, t, cond), reference(unet)(x, t, text, added_cond_kwargs=extra).sample


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 22)])
def test_equals_diffusers(name: str, height: int, width: int) -> None:
    ours, theirs = run_both(tiny.model(name).unet, height, width)
    assert ours.shape == (2, FAMILIES[name].unet.out_channels, height, width)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "sdxl-refiner"])
def test_bf16_is_no_further_from_fp32_than_diffusers(name: str) -> None:
    unet = tiny.model(name).unet
    torch.manual_seed(1)
    exact, _ = run_both(unet, 16, 16)
    torch.manual_seed(1)
    ours, theirs = run_both(unet.to(torch.bfloat16), 16, 16)
    own_error, their_error = ((out.float() - exact).abs().mean() for out in (ours, theirs))
    assert own_error <= 1.1 * their_error


def test_one_timestep_serves_the_whole_batch() -> None:
    unet = tiny.model("sd15").unet
    x, cond = torch.randn(2, 4, 8, 8), Conditioning(torch.randn(2, 77, unet.config.text_dim))
    with torch.no_grad():
        assert torch.equal(unet(x, torch.tensor(7), cond), unet(x, torch.tensor([7, 7]), cond))


def test_size_conditioning_matters_and_is_demanded() -> None:
    unet = tiny.model("sdxl").unet
    x, t, text, pooled, size = inputs(unet.config, 8, 8, torch.float32)
    with torch.no_grad():
        small = unet(x, t, Conditioning(text, pooled, size))
        large = unet(x, t, Conditioning(text, pooled, size + 64))
    assert (small - large).abs().max() > 1e-4
    with pytest.raises(LdmError, match=r"needs pooled text \(B, 40\) and 6 time ids"):
        unet(x, t, Conditioning(text))
    with pytest.raises(LdmError, match="time ids"):
        unet(x, t, Conditioning(text, pooled, size[:, :5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (320, 640)}, "one entry for each level"),
        ({"channels": (10**9,) * 4}, "channels is 1000000000"),
        ({"layers": 10**9}, "layers is 1000000000"),
        ({"heads": (7, 7, 7, 7)}, "do not divide"),
        ({"text_dim": 768.0}, "text_dim is 768.0"),
        ({"pooled_dim": 1280}, "go together"),
    ],
)
def test_absurd_configurations_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        UNetConfig(**change)  # type: ignore[arg-type]
