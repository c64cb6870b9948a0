"""The bundle: networks by name, and gradients where the caller wants them."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from ldm.latent_diffusion import LatentDiffusion
from ldm.runtime.offload import Room
from pipelines.run import decode


def test_networks_are_held_by_name_and_others_can_join() -> None:
    model = tiny.model("sdxl")
    assert list(model.networks) == ["unet", "autoencoder", "text_encoders"]
    assert list(model.modules()) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert [model.unet, model.autoencoder, model.text_encoders] == list(model.networks.values())
    encoder = nn.Linear(2, 2)
    more = LatentDiffusion(model.family, model.networks | {"image_encoder": encoder})
    assert more.modules() == model.modules() | {"image_encoder": encoder}
    assert more.fingerprint() != model.fingerprint() == LatentDiffusion.of(model).fingerprint()
    room = Room(torch.device("cpu"), layers=False)
    room.add(more)
    assert set(room.guests) == set(more.networks.values())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl-refiner"])
def test_a_family_says_what_it_is(name: str) -> None:
    model = tiny.model(name)
    assert model.family.xl == name.startswith("sdxl")
    assert model.family.refiner == (name == "sdxl-refiner")
    assert (model.encode_prompt("a cat").pooled is not None) == model.family.xl


def test_gradients_are_the_callers_choice() -> None:
    model = tiny.model("sdxl")
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    decode(model, latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert model.encode_prompt("a cat").text.requires_grad
    with torch.no_grad():
        assert not model.encode_prompt("a cat").text.requires_grad
        assert not decode(model, latents).requires_grad
