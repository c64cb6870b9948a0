"""Adapters of all kinds in a pipeline whose networks are fused, offloaded, compiled or quantised."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import controls
import image_prompts
import pytest
import tiny
import torch
from adapter_files import adapter, saved
from images import image
from networks import inputs
from rounding import RUN, near
from torch import Tensor, nn

from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.runtime import compilation
from ldm.runtime.merging import merged
from ldm.runtime.offload import Room, by_layers
from ldm.weights.adapters import open_adapter
from pipelines import Pipeline

WAYS = [{}, {"offload": "components"}, {"offload": "layers"}, {"quantize": "int8-weights"}, {"quantize": "int8"}]
SETTINGS: dict[str, Any] = {"steps": 3, "seed": 1, "output": "latents"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a LoRA of its U-Net and text towers, an IP-Adapter for it and an image encoder."""
    root, model = tmp_path_factory.mktemp("tuned"), tiny.model("sdxl", shallow=True)
    model.save_pretrained(root / "model")
    torch.manual_seed(0)
    saved(adapter(model, "kohya-sgm"), root / "style.safetensors")
    image_prompts.saved(root / "ip.safetensors", model.family)
    image_prompts.encoder().save_pretrained(root / "image_encoder")
    image().save(root / "image.png")
    return root


def opened(folder: Path, **options: Any) -> Pipeline:
    return Pipeline(folder / "model", dtype=torch.float32, device="cpu", **options)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_of_running(folder: Path, way: dict[str, Any]) -> None:
    """The same latents as with plain layers, or, with rounded weights, nearly; another call is as before."""
    mix = {folder / "style.safetensors": 0.5}
    plain, pipeline = opened(folder, quick=False), opened(folder, **way)
    before, with_it, after = (
        torch.stack(pipeline("a cat", **SETTINGS, **more).latents) for more in ({}, {"adapters": mix}, {})
    )
    wanted = torch.stack(plain("a cat", adapters=mix, **SETTINGS).latents)
    without = torch.stack(plain("a cat", **SETTINGS).latents)
    assert torch.equal(before, after)
    moved = float((wanted - without).norm())
    assert float((with_it - wanted).norm()) < (0.1 if "quantize" in way else 1e-4) * moved


# --- networks beside the U-Net ----------------------------------------------------------------------------------------


def beside(folder: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a pipeline loads for kinds of adapters, and the settings of calls that use them."""
    adapter = T2IAdapter(T2IAdapterConfig((32, 64, 64), (False,) * 3, factor=16))  # SDXL's, for two levels
    made = {
        "controlnet": controls.controlnet(tiny.family("sdxl", shallow=True)),
        "t2i-adapter": controls.randomised(adapter, 0),
    }
    control = [made[kind] for kind in kinds if kind in made]
    loaded: dict[str, Any] = {"control_models": control} if control else {}
    settings: dict[str, Any] = {"control": [image()] * len(control)} if control else {}
    if "ip-adapter" in kinds:
        loaded["ip_adapter"], settings["image_prompt"] = folder / "ip.safetensors", folder / "image.png"
    return loaded, settings


KINDS = ["controlnet", "t2i-adapter", "ip-adapter"]


@pytest.mark.parametrize("kind", KINDS)
def test_beside_quantised_weights(folder: Path, kind: str) -> None:
    """What they change in the latents is nearly what they change beside plain weights; other calls are as before."""
    options, settings = beside(folder, kind)
    plain, ours = opened(folder, quick=False, **options), opened(folder, quantize="int8", **options)
    wanted, made = (
        [torch.stack(pipeline("a cat", **SETTINGS, **more).latents) for more in ({}, settings, {})]
        for pipeline in (plain, ours)
    )
    assert any(type(parameter) is not nn.Parameter for parameter in ours.model.unet.parameters())
    assert torch.equal(made[0], made[2])
    assert float((made[1] - wanted[1]).norm()) < 0.1 * float((wanted[1] - wanted[0]).norm())


def test_with_compiled_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for compiled code, which is the part that the networks' layers could break, and the same latents."""
    traced: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for name in ("failure", "_blocks"):  # neither what other tests compiled, nor kept for them
        monkeypatch.setattr(compilation, name, getattr(compilation, name).__wrapped__)
    options, settings = beside(folder, *KINDS)
    wanted = torch.stack(opened(folder, quick=False, **options)("a cat", **SETTINGS, **settings).latents)
    pipeline = opened(folder, compile=True, **options)
    traced.clear()
    near(torch.stack(pipeline("a cat", **SETTINGS, **settings).latents), wanted, RUN)
    assert traced
    traced.clear()
    pipeline("a dog", **SETTINGS, **settings)
    assert not traced


# --- where copies with merged weights are -----------------------------------------------------------------------------


def test_merged_copies_are_on_the_device_while_they_compute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU nothing moves; which network is brought tells whose weights would be there."""
    pipeline = opened(folder, offload="components")
    there: dict[int, bool] = {}  # by parameter
    run: list[str] = []

    def bring(room: Room, network: nn.Module) -> None:
        brought(room, network)
        if network in room.guests:
            there.update({id(parameter): False for guest in room.guests for parameter in guest.parameters()})
            there.update({id(parameter): True for parameter in network.parameters()})

    def computes(layer: nn.Module, inputs: Any) -> None:
        assert all(there[id(parameter)] for parameter in layer.parameters(recurse=False))
        run.append(type(layer).__name__)

    plain = list(map(id, (*pipeline.model.unet.parameters(), *pipeline.model.text_encoders.parameters())))
    brought = Room.bring
    monkeypatch.setattr(Room, "bring", bring)
    with torch.nn.modules.module.register_module_forward_pre_hook(computes):
        for weight in (0.5, None, 1.0, 0.5):
            mix = {} if weight is None else {"adapters": {folder / "style.safetensors": weight}}
            pipeline("a cat", **{**SETTINGS, "output": "images"}, **mix)
    assert run
    changed = [pipeline.adapters.models[mix] for mix in pipeline.adapters.models]
    own = {id(p) for model in changed for name in ("unet", "text_encoders") for p in model.networks[name].parameters()}
    assert len(own - set(plain)) > 100 and own - set(plain) <= there.keys()


def test_merged_copies_of_layers_compute_where_the_layers_do(folder: Path) -> None:
    """One at a time, on the device of the network that was offloaded; their weights stay in main memory."""
    model = tiny.model("sdxl", shallow=True)
    found = open_adapter(folder / "style.safetensors", model)
    changes = {name: [(0.5, change)] for name, change in found.changes["unet"].items()}
    by_layers(model.unet, torch.device("meta"))
    other = merged(model.unet, changes)
    layers = [other.get_submodule(name.rpartition(".")[0]) for name in changes]
    assert {layer._hf_hook.execution_device for layer in layers} == {torch.device("meta")}
    weights = [layer._hf_hook.weights_map["weight"] for layer in layers]
    assert {weight.device.type for weight in weights} == {"cpu"}
    x, t, cond = inputs(other, torch.float32)
    made: Tensor = other(x, t, cond)
    assert made.is_meta
