"""Control models in use: depth, several passes, fused layers, recorded steps, records, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import controls
import pytest
import tiny
import torch
from commands import run
from images import image
from PIL import Image
from rounding import RUN, near
from safetensors.torch import load_file
from torch import Tensor

from ldm.cli.generate import Options, make_jobs
from ldm.conditions.table import condition
from ldm.errors import LdmError
from ldm.images import read_settings
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.controlnet import ControlNet
from ldm.models.layers import CrossAttention
from ldm.runtime.graphs import RecordedUNet, Recordings, Step
from ldm.sampling.guidance import Guidance
from pipelines import Pipeline
from pipelines.control import controls_of
from pipelines.groups import checked_groups

SD15, SDXL = (tiny.family(name, shallow=True) for name in ("sd15", "sdxl"))
SMALL: dict[str, Any] = {"seed": 1, "steps": 4, "width": 64, "height": 64, "output": "latents", "guidance": 4.0}


def controlled(name: str, count: int = 1, **options: Any) -> Pipeline:
    networks = [controls.controlnet(tiny.family(name, shallow=True), seed) for seed in range(count)]
    return Pipeline(tiny.model(name, shallow=True), control_models=networks, **{"quick": False, **options})


def made(pipeline: Pipeline, **settings: Any) -> Tensor:
    return torch.stack(pipeline(["a fox", "two dogs"], **{**SMALL, **settings}).latents)


def test_the_base_stays_as_it_is_and_a_scale_of_zero_changes_nothing() -> None:
    pipeline = controlled("sdxl", 2)
    plain = made(pipeline)
    found = made(pipeline, control=[image(0), image(1)])
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(made(pipeline), plain)
    near(made(pipeline, control=[image(0), image(1)], control_scale=0), plain, RUN)
    one = made(pipeline, control=[image(0), image(1)], control_scale=(1, 0))
    near(made(controlled("sdxl"), control=image(0)), one, RUN)


def test_condition_images_are_made_of_an_image() -> None:
    """At the size of the result; by the model with the kind's name, wherever it stands."""
    networks = [controls.controlnet(SD15, seed) for seed in range(2)]
    pipeline = Pipeline(
        tiny.model("sd15", shallow=True), control_models={"gray": networks[0], "canny": networks[1]}, quick=False
    )
    photo = image(0, 96, 96)
    found = made(pipeline, control={"canny": photo, "gray": photo})
    small = photo.resize((64, 64), Image.Resampling.LANCZOS)
    prepared = [condition(kind, small) for kind in ("gray", "canny")]
    near(made(controlled("sd15", 2), control=prepared), found, RUN)


def test_which_model_an_image_goes_to(caplog: pytest.LogCaptureFixture) -> None:
    """By kind where models have names, by number where they have none."""
    family = SD15
    first, second = (controls.controlnet(family, seed) for seed in range(2))
    named, listed, alone = (
        Pipeline(tiny.model("sd15", shallow=True), control_models=models, quick=False)
        for models in ({"canny": first, "depth": second}, [first, second], first)
    )

    def networks(pipeline: Pipeline, control: Any) -> list[Any]:
        request = pipeline.request("a fox", control=control, width=64, height=64)
        return [one.network for one in controls_of(request, pipeline.control_models)]

    assert networks(named, {"canny": image()}) == [first]
    assert networks(named, {"image": image(), "canny": image()}) == [second, first]  # the one that is left
    assert networks(alone, {"gray": image(), "canny": image()}) == [first, first]
    assert networks(listed, {"gray": image(), "canny": image()}) == [first, second]
    assert not caplog.records
    assert networks(listed, {"canny": image()}) == [first]
    assert "2 control models for 1 condition images: the last ones are not used" in caplog.text
    for kinds, wrong in ((("depth", "gray"), "gray"), (("image",), "image"), (("canny", "depth", "image"), "image")):
        with pytest.raises(LdmError, match=f"no control model is named {wrong}; there are canny, depth: choose"):
            networks(named, {kind: image() for kind in kinds})


def test_scales_fall_with_depth() -> None:
    pipeline = controlled("sd15")
    request = pipeline.request("a fox", control=image(), control_scale=0.8, control_fall=0.825, width=64)
    (one,) = controls_of(request, pipeline.control_models)
    wanted = [0.8 * 0.825 ** (12 - number) for number in range(13)]  # ControlNet's own, in guess mode
    torch.testing.assert_close(one.scales(13), torch.tensor(wanted))
    request = pipeline.request("a fox", control=image(), guess=True, width=64)
    (one,) = controls_of(request, pipeline.control_models)
    torch.testing.assert_close(one.scales(13), torch.logspace(-1, 0, 13))
    shallow, whole, plain = (made(pipeline, **more) for more in (
        {"control": image(), "control_fall": 0.1}, {"control": image()}, {}))  # fmt: skip
    assert 0 < float((shallow - plain).abs().mean()) < float((whole - plain).abs().mean())


def test_a_condition_image_is_resized_for_each_pass(caplog: pytest.LogCaptureFixture) -> None:
    """And gives its size if no other is asked for."""
    pipeline = controlled("sd15")
    found = made(pipeline, control=image(0, 96, 48), hires=1.5)
    assert found.shape == (2, 4, 12, 12)
    assert "control image: its image of 96×48 is resized to 64×64" in caplog.text
    assert not torch.allclose(found, made(pipeline, hires=1.5), atol=1e-2)
    (latents,) = pipeline("a fox", control=image(0, 100, 48), steps=1, output="latents").latents
    assert latents.shape == (4, 6, 12)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("more", [{"reuse": 2}, {"merge": 0.5}, {"guidance": Guidance(3, perturbed=2)}], ids=str)
def test_with_other_patches(name: str, more: dict[str, Any]) -> None:
    """Each changes the image, and a control model of no scale changes nothing."""
    pipeline = controlled(name)
    plain, found = made(pipeline, **more), made(pipeline, control=image(), **more)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert not torch.allclose(found, made(pipeline, control=image()), atol=1e-2)
    near(made(pipeline, control=image(), control_scale=0, **more), plain, RUN)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_fused_layers_give_the_same(name: str) -> None:
    fast = Pipeline(tiny.model(name, shallow=True), control_models=controls.controlnet(tiny.family(name, shallow=True)))
    assert type(fast.control_models["0"].conv_in) is not torch.nn.Conv2d
    near(made(fast, control=image()), made(controlled(name), control=image()), 2 * RUN)


def test_what_does_not_change_is_computed_once_a_run() -> None:
    """The text's keys, the time and the condition image, in the ControlNet too."""
    pipeline = controlled("sdxl")
    network = pipeline.control_models["0"]
    assert isinstance(network, ControlNet)
    calls: list[str] = []
    layers = [layer.to_k for layer in network.modules() if isinstance(layer, CrossAttention)]
    for layer in (*layers, network.time_embedding, network.add_embedding, network.controlnet_cond_embedding):
        layer.register_forward_hook(lambda layer, *_: calls.append(type(layer).__name__))
    made(pipeline, control=image())
    assert sorted(calls) == sorted(["Linear"] * len(layers) + ["TimeEmbedding", "SizeEmbedding", "ImageEmbedding"])


class Recorder:
    """Replays a step as a graph does: it reads what lies in the same places, and writes to the same one."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, step: Step) -> Step:
        self.made += 1
        out = step().clone()
        return lambda: out.copy_(step())


def recorded(model: LatentDiffusion, recorder: Recorder) -> LatentDiffusion:
    model.unet.recordings = Recordings(model.unet, recorder)  # type: ignore[assignment]
    model.unet.__class__ = RecordedUNet
    return model


def test_recorded_steps_give_the_same() -> None:
    """One recording serves all prompts, images and scales; other control models have others."""
    recorder, family = Recorder(), SD15
    networks = [controls.controlnet(family), controls.t2i_adapter("full_adapter", family)]
    ours = Pipeline(recorded(tiny.model("sd15", shallow=True), recorder), control_models=networks, quick=False)
    plain = Pipeline(tiny.model("sd15", shallow=True), control_models=networks, quick=False)
    for settings, count in (
        ({"control": [image(0), image(1)]}, 1),
        ({"control": [image(2), image(3)], "control_scale": 0.3, "guess": True, "seed": 9}, 0),
        ({"control": image(2)}, 1),
        ({}, 1),
        ({"control": image(3), "control_end": 0.5}, 0),  # with and without are recorded
        ({"control": [image(0), image(1)], "guidance": 1.0}, 1),
        ({"control": [image(2), image(3)], "guidance": 1.0, "control_scale": 0.3}, 0),
    ):
        before = recorder.made
        assert torch.equal(made(ours, **settings), made(plain, **settings)), settings
        assert recorder.made - before == count, settings


@pytest.mark.parametrize("offload", ["components", "layers"])
def test_offloaded_models_give_the_same(offload: str, models: Path) -> None:
    def networks() -> list[Any]:
        family = SD15
        return [controls.controlnet(family), controls.t2i_adapter("full_adapter", family)]

    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "quick": False}
    plain = Pipeline(models / "sd15", control_models=networks(), **options)
    ours = Pipeline(models / "sd15", control_models=networks(), offload=offload, **options)
    two = [image(0), image(1)]
    assert torch.equal(made(ours, control=two), made(plain, control=two))
    net = ours.control_models["0"]
    assert all(parameter.is_meta for parameter in net.parameters()) == (offload == "layers")


def test_bad_input_is_said_in_one_line(tmp_path: Path) -> None:
    def problem(pipeline: Pipeline, **settings: Any) -> str:
        with pytest.raises(LdmError) as caught:
            made(pipeline, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    one, two, none = controlled("sd15"), controlled("sd15", 2), Pipeline(tiny.model("sd15", shallow=True))
    assert "no control models for 1 condition images" in problem(none, control=image())
    assert "2 control models for 3 condition images" in problem(two, control=[image()] * 3)
    assert "the kind 'imge' of condition images does not exist; did you mean image?" in problem(
        one, control={"imge": image()}
    )
    assert "does not exist" in problem(one, control=f"image={tmp_path / 'nowhere.png'}")
    (tmp_path / "text.png").write_text("no image")
    assert "text.png" in problem(one, control=str(tmp_path / "text.png"))
    assert "control 5: KIND=FILE" in problem(one, control=5)
    assert "control_scale (1, 2): one number, or one for each of the 1" in problem(
        one, control=image(), control_scale=(1, 2)
    )
    assert "control_scale 'big': a number from 0 to 10" in problem(one, control=image(), control_scale="big")
    assert "give a mask" in problem(one, control={"inpaint": image()})
    for part in ({"control_begin": 0.6, "control_end": 0.5}, {"control_begin": 0.9}, {"control_end": (0.2, 1.0)}):
        assert "no whole step of 4 lies between them" in problem(two, control=[image()] * 2, **part)
    edit = Pipeline(
        tiny.model("sd15-edit", shallow=True),
        control_models=controls.controlnet(tiny.family("sd15-edit", shallow=True)),
        quick=False,
    )
    assert "leave control out" in problem(edit, control=image(), image=image())
    with pytest.raises(LdmError, match="is a ControlNet for .*; the model is"):
        Pipeline(tiny.model("sd15", shallow=True), control_models=controls.controlnet(SDXL))
    xl = controls.t2i_adapter("full_adapter_xl", SDXL)
    large = Pipeline(tiny.model("sdxl"), control_models=xl, quick=False)
    assert "needs sides that are multiples of 16, not 72×64" in problem(large, control=image(), width=72)
    assert "needs sides that are multiples of 16, not 72×72" in problem(large, control=image(), hires=1.125)
    theirs = torch.nn.Conv2d(1, 1, 1)
    for models, message in (
        (5, "control_models 5: a file, folder or name"),
        (theirs, "control model 0: a Conv2d is neither a path nor a ControlNet or T2IAdapter of ldm"),
        ({"canny": 5}, "control model canny: a int is neither a path"),
    ):
        with pytest.raises(LdmError, match=message):
            Pipeline(tiny.model("sd15", shallow=True), controlnet=models)


def test_condition_images_of_a_list_are_in_memory_only_while_they_are_used(tmp_path: Path) -> None:
    lines = []
    for number in range(2):
        image(number).save(tmp_path / f"{number}.png")
        lines.append({"prompt": "a cat", "control": {"gray": str(tmp_path / f"{number}.png")}, "seed": number})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs = list(make_jobs(Options([], {}, {}, prompts_file=str(tmp_path / "p.jsonl"))))
    pipeline = controlled("sd15")
    groups = list(checked_groups(pipeline, {"steps": 1, "width": 64, "height": 64}, jobs))
    for seed, group in enumerate(groups):
        (result,) = pipeline.make(group.whole(), output="latents")
        wanted = pipeline("a cat", control={"gray": image(seed)}, seed=seed, steps=1, output="latents")
        assert torch.equal(result.latents[0], wanted.latents[0])
    assert not any("given" in one.__dict__ or one.made for group in groups for one in group.request.control)


def as_pickles(folder: Path) -> Path:
    """A folder whose weights are pickles."""
    (folder / "ldm_manifest.json").unlink(missing_ok=True)
    for path in folder.rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    return folder


def test_pickles_beside_a_model_are_read_where_they_are_allowed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control models' and the refiner's, in a run and in its plan."""
    monkeypatch.chdir(tmp_path)
    image().save("a.png")
    net = as_pickles(controls.folder(controls.controlnet(SDXL), tmp_path / "net"))
    refiner = as_pickles(shutil.copytree(models / "sdxl-refiner", tmp_path / "refiner"))
    options = ["a cat", "--model", models / "sdxl", "--device", "cpu", "--dtype", "fp32", "--steps", "4", "--seed", "1"]
    for beside in (["--control-model", net, "--control", "image=a.png"], ["--refiner", refiner, "--size", "64x64"]):
        for dry in ([], ["--dry-run"]):
            assert "--allow-pickle" in run(capsys, monkeypatch, "generate", *options, *beside, *dry)[2]
            code, _, err = run(capsys, monkeypatch, "generate", *options, *beside, *dry, "--allow-pickle")
            assert code == 0, err


def test_from_the_shell_into_records_and_back(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net, adapter = (
        controls.controlnet(SD15),
        controls.t2i_adapter("full_adapter", SD15),
    )
    controls.folder(net, tmp_path / "net")
    controls.original(adapter, tmp_path / "adapter.safetensors")
    image(0).save("a.png")
    image(1).save("b.png")
    options = ["--model", models / "sd15", "--device", "cpu", "--dtype", "fp32", "--steps", "2", "--seed", "1"]
    options += ["--control-model", "net", "--control-model", "adapter.safetensors"]
    given = [
        "--control",
        "image=a.png",
        "--control",
        "gray=b.png",
        "--control-scale",
        "0.5,0.7",
        "--control-end",
        "0.5",
    ]
    code, out, err = run(capsys, monkeypatch, "generate", "a cat", "--json", *options, *given)
    assert code == 0, err
    record = json.loads(out)
    assert [one["path"] for one in record["control"]] == ["a.png", "b.png"]
    assert record["control_scale"] == [0.5, 0.7] and "control_begin" in record
    assert record["control_models"] == [str(tmp_path / "net"), str(tmp_path / "adapter.safetensors")]
    assert run(capsys, monkeypatch, "repro", record["path"], "--device", "cpu")[1].startswith("identical")
    code, out, err = run(capsys, monkeypatch, "generate", "a cat", "--dry-run", *options, *given)
    assert code == 0 and json.loads(out)["settings"]["control"][0]["kind"] == "image", err
    Path("p.jsonl").write_text(json.dumps({"prompt": "a cat", "control": ["a.png", {"gray": "b.png"}], "seed": 1}))
    code, out, err = run(capsys, monkeypatch, "generate", "--prompts", "p.jsonl", "--json", *options)
    assert code == 0 and [one["path"] for one in json.loads(out)["control"]] == ["a.png", "b.png"], err
    image(5).save("a.png")
    assert "a.png has changed since" in run(capsys, monkeypatch, "repro", record["path"], "--device", "cpu")[2]
    image(0).save("moved.png")
    again = ["repro", record["path"], "--device", "cpu", "--control", "moved.png", "--control", "b.png"]
    assert run(capsys, monkeypatch, *again)[1].startswith("identical")
    assert "was made with 2 condition images; name each" in run(capsys, monkeypatch, *again[:-2])[2]
    found, _ = read_settings(Path(record["path"]))
    assert found is not None and found["control"] == record["control"]
