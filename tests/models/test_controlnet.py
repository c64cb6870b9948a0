"""ControlNets and T2I-Adapters against diffusers' on the same weights."""

from __future__ import annotations

from typing import Any

import controls
import diffusers
import pytest
import tiny
import torch
from networks import inputs
from rounding import NETWORK, near

from ldm.errors import LdmError
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapterConfig


def theirs(network: Any) -> Any:
    """diffusers' network with the same weights."""
    json = controls.config_json(network)
    made = getattr(diffusers, json.pop("_class_name"))(**json)
    made.load_state_dict(network.state_dict())
    return made.eval()


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("changes", [{}, {"bgr": True, "pooled": True}], ids=["plain", "shuffle"])
def test_residuals_are_those_of_diffusers(name: str, changes: dict[str, Any]) -> None:
    network = controls.controlnet(tiny.family(name), **changes)
    x, t, cond = inputs(network, torch.float32, 8, 12)  # type: ignore[arg-type]
    image = torch.rand(2, 3, 64, 96)
    more = {"text_embeds": cond.pooled, "time_ids": cond.size} if cond.pooled is not None else None
    with torch.no_grad():
        found = network(x, t, cond, network.embed_image(image))
        down, middle = theirs(network)(
            x, t, encoder_hidden_states=cond.text, controlnet_cond=image, added_cond_kwargs=more, return_dict=False
        )
    assert len(found) == len(network.config.skips) + 1
    for one, wanted in zip(found, [*down, middle], strict=True):
        near(one, wanted, NETWORK)


@pytest.mark.parametrize(
    ("name", "kind", "in_channels"),
    [
        ("sd15", "full_adapter", 3),
        ("sd15", "light_adapter", 3),
        ("sdxl", "full_adapter_xl", 3),
        ("sd15", "full_adapter", 1),
    ],
)
def test_features_are_those_of_diffusers(name: str, kind: str, in_channels: int) -> None:
    network = controls.t2i_adapter(kind, tiny.family(name), in_channels=in_channels)
    image = torch.rand(2, in_channels, 96, 48)
    with torch.no_grad():
        found, wanted = network(image), theirs(network)(image)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        near(one, other, NETWORK)


def test_training_begins_with_no_residuals() -> None:
    network = ControlNet(controls.controlnet(tiny.family("sd15")).config)
    x, t, cond = inputs(network, torch.float32)  # type: ignore[arg-type]
    assert not any(bool(r.any()) for r in network(x, t, cond, network.embed_image(torch.rand(2, 3, 128, 128))))


def test_shapes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(LdmError, match=r"image_channels \(\): 1 to 8 numbers"):
        ControlNetConfig(image_channels=())
    with pytest.raises(LdmError, match="need one entry for each map"):
        T2IAdapterConfig(channels=(320, 640))
    with pytest.raises(LdmError, match="in_channels 2: 1 or 3"):
        T2IAdapterConfig(in_channels=2)
