"""Networks that take turns in a device's memory make the same images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from networks import distance

from ldm.errors import LdmError
from ldm.runtime.offload import OFFLOAD, WORK, Room, choice, nbytes, room_for
from ldm.weights.components import build
from pipelines import Pipeline
from pipelines.tuning import TunedModel

CPU = torch.device("cpu")


def pipeline(models: Path, name: str, offload: str, **more: Any) -> Pipeline:
    return Pipeline(models / name, device="cpu", dtype=torch.float32, offload=offload, **more)


@pytest.mark.parametrize("offload", ["components", "layers"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd15", {"hires": 1.5, "n": 2}),
        ("sdxl", {"reuse": 2, "merge": 0.5}),
        ("sdxl", {"refiner_at": 0.5}),
        ("sd15-edit", {"image": torch.rand}),
        ("sd15", {"image": torch.rand, "mask": torch.rand}),
    ],
)
def test_the_same_images(models: Path, name: str, settings: dict[str, Any], offload: str) -> None:
    from PIL import Image, ImageChops

    images = {"image": Image.new("RGB", (64, 64), "red"), "mask": Image.new("L", (64, 64), 255)}
    settings = {"seed": 1, "steps": 4, **settings} | {key: images[key] for key in images if key in settings}
    more = {"refiner": models / "sdxl-refiner"} if "refiner_at" in settings else {}
    plain = pipeline(models, name, "none", quick=offload == "components", **more)
    ours = pipeline(models, name, offload, **more)
    assert isinstance(ours.model, TunedModel) and ours.model.room
    room = ours.model.room
    present = []
    for part in (ours.model.unet, ours.model.autoencoder.decoder, *ours.model.text_encoders.towers):
        part.register_forward_pre_hook(lambda *_: present.append(room.present))
    made, wanted = ours("a fox", **settings), plain("a fox", **settings)
    for a, b in zip(made.latents, wanted.latents, strict=True):
        assert distance(a, b) < 1e-5  # steps of a model that stays where it is are recorded, with kernels of their own
    for one, other in zip(made.images, wanted.images, strict=True):
        assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
    others = {ours.model.autoencoder, ours.model.text_encoders}
    unets = {ours.model.unet} if offload == "components" else set()
    assert others | unets <= set(present) and None not in present
    assert ours.model.fingerprint() == plain.model.fingerprint()
    if offload == "layers":
        assert all(parameter.is_meta for parameter in ours.model.unet.parameters())


def test_each_network_goes_when_another_comes() -> None:
    model, moves = tiny.model("sd15", shallow=True), []
    names = {id(model.unet): "unet", id(model.autoencoder): "autoencoder", id(model.text_encoders): "text"}
    for network in (model.unet, model.autoencoder, model.text_encoders):
        network.to = lambda device, network=network: moves.append((names[id(network)], str(device)))  # type: ignore
    room = Room(torch.device("cuda:1"), layers=False)
    room.add(model)
    for network in (
        model.text_encoders,
        model.unet,
        model.unet,
        model.autoencoder,
        tiny.model("sd15", shallow=True).unet,
    ):
        room.bring(network)
    assert moves == [
        ("text", "cuda:1"), ("text", "cpu"), ("unet", "cuda:1"), ("unet", "cpu"), ("autoencoder", "cuda:1"),
    ]  # fmt: skip


def test_what_fits_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        models = [build(tiny.FAMILIES["sdxl"]), build(tiny.FAMILIES["sdxl-refiner"])]
    sizes = nbytes(models, torch.bfloat16)
    assert {name: round(size / 1e9, 1) for name, size in sizes.items()} == {
        "unet0": 5.1, "vae0": 0.2, "text_encoder0": 0.2, "text_encoder_20": 1.4, "unet1": 4.5,
    }  # fmt: skip
    total = sum(sizes.values())
    found = [choice(sizes, free) for free in (total + WORK, total + WORK - 1, sizes["unet0"] + WORK - 1)]
    assert found == ["none", "components", "layers"]
    gpu = torch.device("cuda:0")
    for free, said in ((20e9, None), (9e9, "components"), (5e9, "layers")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 0))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="ldm"):
            room = room_for(models, "auto", gpu, torch.bfloat16)
        messages = [record.getMessage() for record in caplog.records if record.name == "ldm.runtime.offload"]
        if said is None:
            assert room is None and not messages
        else:
            assert room and room.layers == (said == "layers")
            wanted = f"the model has 11.5 GB, of cuda:0 {free / 1e9:.1f} GB are free: {OFFLOAD[said]} (offload={said})"
            assert messages == [wanted]
    assert room_for(models, "auto", CPU, torch.bfloat16) is None


def test_what_cannot_be_done(models: Path, tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="offload 'some' is not known; choose one of: auto, none, components, layers"):
        pipeline(models, "sd15", "some")
    with pytest.raises(LdmError, match="nothing can be compiled or quantised; leave compile and quantize out"):
        pipeline(models, "sd15", "layers", compile=True)
    with pytest.raises(LdmError, match="offloaded layer by layer cannot be written"):
        pipeline(models, "sd15", "layers").model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_quantised_networks_take_turns(models: Path) -> None:
    made, wanted = (
        pipeline(models, "sd15", offload, quantize="int8")("a fox", seed=1, steps=2, output="latents").latents[0]
        for offload in ("components", "none")
    )
    assert torch.equal(made, wanted)


def test_a_network_that_does_not_fit_leaves_all_as_it_was() -> None:
    model = tiny.model("sd15", shallow=True)
    model.unet.to = lambda device: model.unet  # type: ignore[method-assign, assignment, misc]
    room = Room(torch.device("cuda:0"), layers=False)
    room.add(model)
    room.bring(model.unet)
    moves: list[str] = []

    def full(device: Any) -> None:
        moves.append(str(device))
        if len(moves) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.autoencoder.to = full  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        room.bring(model.autoencoder)
    assert moves == ["cuda:0", "cpu"] and room.present is None
    room.bring(model.unet)
    assert room.present is model.unet


def test_nothing_moves_on_the_cpu() -> None:
    """Nor is a weight made anew that is in a kernel's order alone."""
    model = tiny.model("sd15", shallow=True)
    room = Room(CPU, layers=False)
    room.add(model)
    for network in (model.text_encoders, model.unet, model.autoencoder):
        network.to = lambda *_: pytest.fail("a network moves")  # type: ignore
        room.bring(network)
        assert room.present is network


def test_a_loaded_model_stays_as_it_is() -> None:
    for settings in ({"offload": "layers"}, {"compile": True}):
        with pytest.raises(LdmError, match="a model that is loaded already stays as it is; name its source"):
            Pipeline(tiny.model("sd15", shallow=True), **settings)
