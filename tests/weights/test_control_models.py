"""Control models as files: every layout gives the same network, and what does not fit is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import controls
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ldm import families
from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.models.controlnet import ControlNet
from ldm.models.t2i_adapter import T2IAdapter
from ldm.weights.control_models import fits, open_control_model


def same(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "sd15-inpaint"])
def test_a_controlnet_in_every_layout(name: str, tmp_path: Path) -> None:
    family = tiny.family(name)
    wanted = controls.controlnet(family, bgr=True)
    found = open_control_model(controls.folder(wanted, tmp_path / "folder"), family).load()
    assert same(found, wanted) and found.config == replace(wanted.config, sample_size=64)
    wanted = controls.controlnet(family)
    save_file(wanted.state_dict(), tmp_path / "diffusers.safetensors")
    paths = [tmp_path / "diffusers.safetensors", controls.original(wanted, tmp_path / "bare.safetensors")]
    paths.append(controls.original(wanted, tmp_path / "named.safetensors", "control_model."))
    whole = {**load_file(paths[-1]), "model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(1000)}
    save_file(whole, tmp_path / "whole.safetensors")
    torch.save({"state_dict": whole}, tmp_path / "nested.pth")
    for path in [*paths, tmp_path / "whole.safetensors", tmp_path / "nested.pth"]:
        opened = open_control_model(path, family, allow_pickle=path.suffix == ".pth")
        assert all(parameter.is_meta for parameter in opened.network.parameters())
        found = opened.load(torch.float32)
        assert same(found, wanted) and found.config == wanted.config, path
    assert next(open_control_model(paths[0], family).load(torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "kind"), [("sd15", "full_adapter"), ("sd15", "light_adapter"), ("sdxl", "full_adapter_xl")]
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_a_t2i_adapter_in_every_layout(name: str, kind: str, in_channels: int, tmp_path: Path) -> None:
    family = tiny.family(name)
    wanted = controls.t2i_adapter(kind, family, in_channels=in_channels)
    save_file(wanted.state_dict(), tmp_path / "diffusers.safetensors")
    paths = [controls.folder(wanted, tmp_path / "folder"), tmp_path / "diffusers.safetensors"]
    for path in [*paths, controls.original(wanted, tmp_path / "original.safetensors")]:
        found = open_control_model(path, family).load()
        assert isinstance(found, T2IAdapter) and same(found, wanted) and found.config == wanted.config, path


def test_released_shapes_belong_to_their_families() -> None:
    for name, fitting in (("sd15", ["sd15", "sd15-inpaint", "sd15-edit"]), ("sd2", ["sd2", "sd2-inpaint", "sd2-v"])):
        config = controls.ControlNetConfig(**vars(FAMILIES[name].unet))
        assert [other for other, family in FAMILIES.items() if fits(config, family)] == fitting
    full, light = (controls.T2IAdapterConfig(light=light) for light in (False, True))
    large = controls.T2IAdapterConfig(halves=(False, False, True, False), factor=16)
    for adapter, yes, no in ((full, "sd15", "sdxl"), (light, "sd15", "sdxl"), (large, "sdxl", "sd15")):
        assert fits(adapter, FAMILIES[yes]) and not fits(adapter, FAMILIES[no])


def test_a_control_model_of_another_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says for which families it was made, whatever its layout."""
    known = {name: replace(tiny.family(name), name=name) for name in ("sd15", "sdxl")}
    for place in (families, controls.control_models):
        monkeypatch.setattr(place, "FAMILIES", known)
    net, adapter = controls.controlnet(known["sd15"]), controls.t2i_adapter("full_adapter", known["sd15"])
    paths = [controls.folder(net, tmp_path / "a"), controls.original(net, tmp_path / "a.safetensors")]
    paths += [controls.folder(adapter, tmp_path / "b"), controls.original(adapter, tmp_path / "b.safetensors")]
    for path in paths:
        with pytest.raises(LdmError, match=r"is a (ControlNet|T2I-Adapter) for sd15; the model is sdxl: take one"):
            open_control_model(path, known["sdxl"])
    with pytest.raises(LdmError, match=r"for sd15; the model is of a family of its own, with \(32, 64\) channels"):
        open_control_model(paths[0], replace(known["sdxl"], name="custom", unet=replace(
            known["sdxl"].unet, channels=(32, 64), depth=(0, 1), heads=(4, 4))))  # fmt: skip


def test_what_is_no_control_model(tmp_path: Path) -> None:
    family, one = tiny.family("sd15"), torch.zeros(2, 2)

    def problem(tensors: dict[str, Any] | Path, **options: Any) -> str:
        path = tmp_path / "file.safetensors"
        if isinstance(tensors, dict):
            save_file(tensors, path)
        with pytest.raises(LdmError) as caught:
            open_control_model(path if isinstance(tensors, dict) else tensors, family, **options).load()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is a LoRA or the like, which goes to adapters=" in problem({"lora_unet_x.lora_up.weight": one})
    assert "is a model, which goes to source" in problem({"model.diffusion_model.out.2.weight": one})
    assert "is a model, which goes to source" in problem({"conv_out.weight": one})
    assert "is a ControlNet Union" in problem({"task_embedding": one})
    assert "is a Control-LoRA" in problem({"lora_controlnet": one})
    assert "is an IP-Adapter" in problem({"ip_adapter.1.to_k_ip.weight": one})
    assert "holds neither's tensors" in problem({"x": one})
    assert "of no known T2I-Adapter" in problem({"body.0.block1.weight": one})
    assert "does not exist; give a control model's folder" in problem(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in problem(tmp_path / "empty")

    net = controls.controlnet(family)
    state = dict(net.state_dict())
    broken = dict(state)
    del broken["controlnet_down_blocks.3.weight"]
    assert "missing: controlnet_down_blocks.3.weight" in problem(broken)
    assert "unexpected: more" in problem({**state, "more": one})
    assert "conv_in.bias holds numbers that are not finite" in problem(
        {**state, "conv_in.bias": torch.full((32,), torch.nan)}
    )
    torch.save(state, tmp_path / "file.pth")
    assert "is a pickle" in problem(tmp_path / "file.pth")
    folder = controls.folder(net, tmp_path / "union")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "ControlNetUnionModel"}))
    assert "ControlNetModel is needed here" in problem(folder)
    (folder / "config.json").write_text(json.dumps({**config, "sparkle": 1}))
    assert "does not know that option" in problem(folder)


def test_shuffle_is_told_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = controls.controlnet(tiny.family("sd15"))
    found = open_control_model(controls.original(wanted, tmp_path / "v11e_shuffle.safetensors"), tiny.family("sd15"))
    assert isinstance(found.network, ControlNet) and found.network.config.pooled
    assert "averaged over the image" in caplog.text
