"""Control models written: what is read again is the same, and configurations are diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import controls
import diffusers
import pytest
import tiny
import torch

from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.models.controlnet import ControlNet
from ldm.models.t2i_adapter import T2IAdapter
from ldm.weights import configs
from ldm.weights.control_models import fits, open_control_model, t2i_config
from ldm.weights.control_writing import write_control_file, write_control_folder
from ldm.weights.tensors import LINEAGE, read_header

KINDS = [
    ("sd15", "controlnet"), ("sdxl", "controlnet"), ("sd15", "full_adapter"), ("sd15", "light_adapter"),
    ("sdxl", "full_adapter_xl"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_both_ways(name: str, kind: str, tmp_path: Path) -> None:
    family = tiny.family(name)
    network = controls.controlnet(family) if kind == "controlnet" else controls.t2i_adapter(kind, family)
    write_control_folder(network, tmp_path / "folder", lineage="{}")
    write_control_file(network, tmp_path / "one.safetensors")
    write = configs.write_controlnet if isinstance(network, ControlNet) else configs.write_t2i_adapter
    written: dict[str, Any] = write(network.config)  # type: ignore[arg-type]
    assert written == controls.config_json(network)
    for path in (tmp_path / "folder", tmp_path / "one.safetensors"):
        found = open_control_model(path, family).load().state_dict()
        assert found.keys() == network.state_dict().keys()
        assert all(torch.equal(found[key], weight) for key, weight in network.state_dict().items())
    assert read_header(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")[1][LINEAGE] == "{}"
    theirs = diffusers.ControlNetModel if isinstance(network, ControlNet) else diffusers.T2IAdapter
    loaded = theirs.from_pretrained(tmp_path / "folder").state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in network.state_dict().items())


def test_nothing_else_is_replaced(tmp_path: Path) -> None:
    network = controls.t2i_adapter("full_adapter", tiny.family("sd15"))
    write_control_folder(network, tmp_path / "folder", torch.float16)
    with pytest.raises(LdmError, match="exists"):
        write_control_folder(network, tmp_path / "folder")
    write_control_folder(network, tmp_path / "folder", overwrite=True)
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(LdmError, match=r"holds more than a control model \(notes.txt\), so it is not replaced"):
        write_control_folder(network, tmp_path / "folder", overwrite=True)


@pytest.mark.parametrize(
    ("name", "channels", "factor"),
    [("sd15", (320, 640, 1280, 1280), 8), ("sd2", (320, 640, 1280, 1280), 8), ("sdxl", (320, 640, 1280, 1280), 16)],
)
def test_a_new_t2i_adapter_has_the_shape_of_published_ones(name: str, channels: tuple[int, ...], factor: int) -> None:
    config = t2i_config(FAMILIES[name])
    assert (config.channels, config.factor, config.light) == (channels, factor, False)
    assert fits(config, FAMILIES[name])
    configs.write_t2i_adapter(config)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_small_new_t2i_adapter_is_known_by_its_tensors(name: str, tmp_path: Path) -> None:
    family = tiny.family(name)
    network = T2IAdapter(t2i_config(family, in_channels=1, layers=1))
    write_control_file(network, tmp_path / "one.safetensors")
    assert open_control_model(tmp_path / "one.safetensors", family).network.config == network.config
