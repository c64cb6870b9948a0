"""Adapters in a pipeline: merged for a call, taken out again, found by name; nothing of them shows in other calls."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapter_files
import pytest
import tiny
import torch
from networks import distance
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipelines.adapters
from ldm.cli import evaluate
from ldm.cli.evaluate_options import settings_of, sweep_of
from ldm.errors import LdmError
from ldm.evaluation.plan import EvaluationPlan
from ldm.evaluation.sides import made_images
from ldm.evaluation.workspace import Workspace
from ldm.latent_diffusion import LatentDiffusion
from ldm.runtime.merging import merged
from ldm.weights.adapters import open_adapter
from ldm.weights.adapters.writing import write_adapter
from pipelines import Pipeline
from pipelines.a1111 import from_parameters
from pipelines.adapters import KEPT, autov3, files_in
from pipelines.request import records

SETTINGS: dict[str, Any] = {"steps": 2, "seed": 1, "output": "latents"}


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny.model("sd15", shallow=True)


@pytest.fixture(scope="module")
def folder(model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters `one` and `two`, and `inner/three`, which its metadata calls `third`."""
    root = tmp_path_factory.mktemp("loras")
    about = {"one": None, "two": {"sshs_model_hash": "ab" * 32}, "inner/three": {"ss_output_name": "third"}}
    for seed, (name, metadata) in enumerate(about.items()):
        torch.manual_seed(seed)
        adapter_files.saved(adapter_files.adapter(model, "kohya"), root / f"{name}.safetensors", metadata)
    return root


def made(pipeline: Pipeline, prompt: Any = "a cat", **settings: Any) -> Tensor:
    return torch.stack(pipeline(prompt, **SETTINGS | settings).latents)


def by_hand(file: Path, unet: float, text: float, family: str = "sd15", naming: str = "kohya") -> Pipeline:
    """A pipeline with products of a file's matrices added to the weights, parameter by parameter."""
    other, tensors = tiny.model(family, shallow=True), load_file(file)
    for place, name in adapter_files.written(other, naming).items():
        up, down = (tensors.get(f"{name}.lora_{part}.weight") for part in ("up", "down"))
        if up is not None and down is not None:
            weight = other.modules()[place.component].get_parameter(f"{place.layer}.weight")
            scale = unet if place.component == "unet" else text
            weight.data += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return Pipeline(other)


def test_a_call_with_an_adapter(model: LatentDiffusion, folder: Path) -> None:
    pipeline, before = Pipeline(model), tiny.model("sd15", shallow=True)
    plain = made(pipeline)
    for unet, text in ((0.8, 0.8), (0.8, 0.0), (-0.5, 1.5)):
        mix = {folder / "one.safetensors": {"unet": unet, "text": text}}
        wanted = made(by_hand(folder / "one.safetensors", unet, text))
        found = made(pipeline, adapters=mix)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert (found - plain).abs().max() > 1e-3
    assert tiny.same_weights(model, before) and torch.equal(made(pipeline), plain)


def test_both_text_encoders(tmp_path: Path) -> None:
    model = tiny.model("sdxl", shallow=True)
    file = adapter_files.saved(adapter_files.adapter(model, "kohya-sgm"), tmp_path / "xl.safetensors")
    for unet, text in ((0.0, 0.7), (0.5, 0.5)):
        wanted = made(by_hand(file, unet, text, "sdxl", "kohya-sgm"))
        found = made(Pipeline(model), adapters={file: {"unet": unet, "text": text}})
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert (found - made(Pipeline(model))).abs().max() > 1e-3


def test_twenty_mixes_leave_the_model_as_it_was(model: LatentDiffusion, folder: Path) -> None:
    pipeline, before, draw = Pipeline(model, lora_dir=folder), tiny.model("sd15", shallow=True), random.Random(0)
    plain = made(pipeline)
    for _ in range(20):
        names = draw.sample(["one", "two", "third"], draw.randint(0, 3))
        made(pipeline, adapters={name: draw.uniform(-1, 1) for name in names}, steps=1)
    assert tiny.same_weights(model, before) and torch.equal(made(pipeline), plain)
    assert len(pipeline.adapters.models) <= KEPT


def test_the_adapters_of_all_calls_and_of_one(model: LatentDiffusion, folder: Path) -> None:
    file = folder / "one.safetensors"
    plain, pipeline = Pipeline(model), Pipeline(model, adapters={file: 0.8})
    assert torch.equal(made(pipeline), made(plain, adapters={file: 0.8}))
    assert torch.equal(made(pipeline, adapters={"one": 0.6}), made(plain, adapters=[(str(file), 0.6)]))
    assert torch.equal(made(pipeline, adapters={}), made(plain))
    silent = Pipeline(model, adapters={file: 0})
    assert torch.equal(made(silent), made(plain))
    assert torch.equal(made(silent, adapters={"one": 0.8}), made(pipeline))
    assert torch.equal(made(pipeline, adapters={"one": 0.0}), made(plain))
    assert torch.equal(made(pipeline, "a cat <lora:one:-0.8>"), made(plain))
    assert torch.equal(made(Pipeline(model, adapters=[file])), made(plain, adapters={file: 1}))


def test_a_mix_for_each_prompt(model: LatentDiffusion, folder: Path) -> None:
    pipeline = Pipeline(model, lora_dir=folder)
    mixes = [{"one": 0.8}, {"one": 0.8}, None, {"two": 1, "one": 0.5}]
    request = pipeline.request(["a cat"] * 4, adapters=mixes, steps=2, seed=[1, 2, 3, 4])
    assert list(pipeline.batches(request)) == [range(2), range(2, 3), range(3, 4)]
    together = made(pipeline, ["a cat"] * 4, adapters=mixes, seed=[1, 2, 3, 4])
    for row, mix in enumerate(mixes):
        alone = made(pipeline, adapters=mix or {}, seed=1 + row)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert [record.get("adapters", {}).keys() for record in records(request, model.family)] == [
        {"one"}, {"one"}, set(), {"one", "two"},
    ]  # fmt: skip
    with pytest.raises(LdmError, match="4 mixes for 1 prompts"):
        made(pipeline, adapters=mixes)


def test_prompts_name_adapters(model: LatentDiffusion, folder: Path) -> None:
    pipeline = Pipeline(model, lora_dir=folder)
    both = made(pipeline, adapters={"one": 0.5, "two": {"unet": 0.25, "text": 1}})
    assert torch.equal(made(pipeline, "a cat<lora:one:0.5><lora:two:1:0.25>"), both)
    assert torch.equal(made(pipeline, "a cat<lora:one:0.25><lora:two:1:0.25>", adapters={"one": 0.25}), both)
    third = made(pipeline, adapters={"three": 1})
    for name in ("three", "inner/three", "three.safetensors", "third"):
        assert torch.equal(made(pipeline, f"a cat <lora:{name}>"), third)
    two = pipeline(["a cat <lora:one>", "a cat"], **SETTINGS)
    assert [result["prompt"] for result in two.settings] == ["a cat ", "a cat"]
    assert torch.equal(two.latents[1][None], made(pipeline, seed=2))
    words = Pipeline(model).request("a cat <lora:one>", weights=False)
    assert words.prompts == ("a cat <lora:one>",) and not any(words.mixes)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:tow:1>", "<lora:tow:1>: no adapter is called 'tow' in {folder}; did you mean two?"),
        ("<lora:one:much>", "<lora:one:much> in a prompt: write <lora:NAME:WEIGHT>"),
    ],
)
def test_a_name_that_is_not_known(model: LatentDiffusion, folder: Path, prompt: str, message: str) -> None:
    with pytest.raises(LdmError) as caught:
        Pipeline(model, lora_dir=folder)(["a cat", f"a dog {prompt}"])
    assert message.format(folder=folder) in str(caught.value)


def test_where_adapters_are_looked_for(
    model: LatentDiffusion, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Pipeline(model)
    for given in ({"prompt": "a <lora:one>"}, {"prompt": "a", "adapters": {"one": 1}}):
        with pytest.raises(LdmError, match="no adapter is called 'one'; name the folder of LoRA files"):
            plain.request(**given)
    with pytest.raises(LdmError, match=r"lora_dir '.*nowhere' is not a folder"):
        Pipeline(model, lora_dir=tmp_path / "nowhere")
    with pytest.raises(LdmError, match=r"adapters \{'one': 'much'\}: FILE or FILE:WEIGHT, such as"):
        plain.request("a", adapters={"one": "much"})
    (tmp_path / "a").mkdir()
    for place in (tmp_path / "one.safetensors", tmp_path / "a" / "one.safetensors"):
        place.write_bytes((folder / "one.safetensors").read_bytes())
    doubled = Pipeline(model, lora_dir=tmp_path)
    with pytest.raises(LdmError, match=r"2 adapters are called 'one' \(.*write its path in the folder"):
        doubled.request("a <lora:one>")
    assert doubled.request("a <lora:a/one>").mixes[0][0].file == tmp_path / "a" / "one.safetensors"
    with pytest.raises(LdmError, match="have one name; rename one of them"):
        Pipeline(model, adapters=[tmp_path / "one.safetensors", tmp_path / "a" / "one.safetensors"])
    for prompt in (f"a <lora:{tmp_path / 'one.safetensors'}>", "a <lora:../loras/one>"):  # prompts open no paths
        with pytest.raises(LdmError, match="no adapter is called"):
            doubled.request(prompt)
        settings = from_parameters(f"{prompt}\nSteps: 2, Sampler: Euler")  # nor do those of images by other programs
        with pytest.raises(LdmError, match="no adapter is called"):
            doubled.request(**settings)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "two").write_bytes((folder / "one.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    named = Pipeline(model, lora_dir=folder).request(**from_parameters("a <lora:two:1>\nSteps: 2, Sampler: Euler"))
    assert named.mixes[0][0].file == folder / "two.safetensors"
    both = plain.request("a", adapters=[tmp_path / "one.safetensors", tmp_path / "a" / "one.safetensors"])
    assert len(records(both, model.family)[0]["adapters"]) == 2


def test_an_adapter_is_merged_once_for_many_calls(
    model: LatentDiffusion, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[Any] = []

    def noted(network: Any, changes: Mapping[str, Any]) -> Any:
        merges.append(network)
        return merged(network, changes)

    monkeypatch.setattr(pipelines.adapters, "merged", noted)
    pipeline = Pipeline(model, lora_dir=folder)
    for seed in range(3):
        made(pipeline, adapters={"one": 1}, seed=seed)
        made(pipeline, adapters={"two": 1}, seed=seed)
    assert merges == [model.unet, model.text_encoders] * 2
    made(pipeline, adapters={"one": {"unet": 1, "text": 0}})
    assert merges[4:] == [model.unet]  # text encoders that it leaves alone are the model's own


def test_a_file_that_changes_is_read_again(model: LatentDiffusion, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((folder / "one.safetensors").read_bytes())
    pipeline = Pipeline(model, adapters=file)
    first, request = made(pipeline, adapters={"mine": 1}), pipeline.request("a", adapters={"mine": 1})
    assert torch.equal(first, made(pipeline))
    (record,) = records(request, model.family)
    file.with_name("new").write_bytes((folder / "inner" / "three.safetensors").read_bytes())
    file.with_name("new").replace(file)
    assert torch.equal(
        made(pipeline, adapters={"mine": 1}), made(pipeline, adapters={folder / "inner/three.safetensors": 1})
    )
    with pytest.raises(LdmError, match="is not the file that the image was made with"):
        pipeline.request("a", adapters=record["adapters"])


def test_folders_of_adapters(model: LatentDiffusion, folder: Path, tmp_path: Path) -> None:
    """An adapter in a folder goes by the folder's name, whole, and is read again after a change of a file within."""
    one, two = (open_adapter(folder / f"{name}.safetensors", model) for name in ("one", "two"))
    style, loras = tmp_path / "loras" / "style", tmp_path / "loras"
    loras.mkdir()
    write_adapter(one, model, style, "peft")
    for name, adapter in (("a", one), ("b.v2", two)):
        (loras / "by_diffusers" / name).mkdir(parents=True)
        file = loras / "by_diffusers" / name / "pytorch_lora_weights.safetensors"
        write_adapter(adapter, model, file, "diffusers")
    (loras / "self").symlink_to(loras)
    (loras / "other").symlink_to(folder / "inner")
    (loras / "by_diffusers" / "a" / "epoch3.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    found = [str(file.relative_to(loras)) for file in files_in(loras)]
    assert found == [
        "by_diffusers/a", "by_diffusers/a/epoch3.safetensors", "by_diffusers/b.v2", "style", "other/three.safetensors",
    ]  # fmt: skip
    pipeline = Pipeline(model, lora_dir=loras)
    first = made(pipeline, "a cat<lora:style>")
    assert torch.equal(first, made(pipeline, adapters={folder / "one.safetensors": 1}))
    second = made(pipeline, adapters={folder / "two.safetensors": 1})
    assert torch.equal(made(pipeline, "a cat<lora:b.v2>"), second)
    assert torch.equal(made(pipeline, "a cat<lora:by_diffusers/a>"), first)
    for name in ("unet", "pytorch_lora_weights"):
        with pytest.raises(LdmError, match="no adapter is called"):
            pipeline.request(f"a <lora:{name}>")
    write_adapter(two, model, style, "peft", overwrite=True)
    assert torch.equal(made(pipeline, "a cat<lora:style>"), second)
    alone = Pipeline(model, lora_dir=style)  # the folder itself
    assert torch.equal(made(alone, "a cat<lora:style>"), second)


def test_threads_with_mixes_of_their_own(model: LatentDiffusion, folder: Path) -> None:
    """Four threads, two rounds each, with one mix, another one, both and none."""
    pipeline = Pipeline(model, lora_dir=folder)
    mixes: list[dict[str, float]] = [{}, {"one": 0.8}, {"two": 0.8}, {"one": 0.3, "two": -0.5}]
    alone = [made(pipeline, adapters=mix) for mix in mixes]
    results: dict[tuple[int, int], Tensor] = {}

    def work(index: int) -> None:
        for turn in range(2):
            results[index, turn] = made(pipeline, adapters=mixes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for (index, _), latents in results.items():
        assert torch.equal(latents, alone[index])


def test_an_adapter_made_for_few_steps(
    model: LatentDiffusion, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "lcm-lora-sdv1-5.safetensors"
    file.write_bytes((folder / "one.safetensors").read_bytes())
    pipeline = Pipeline(model, lora_dir=tmp_path)
    request = pipeline.request(["a <lora:lcm-lora-sdv1-5>", "b <lora:lcm-lora-sdv1-5:0.5>"])
    assert (request.steps, request.scheduler, request.guidance.scale) == (4, "lcm", 1.0)
    assert caplog.messages == [f"{file}: LCM, made for 4 steps of lcm and no guidance; these are the defaults"]
    request = pipeline.request("a <lora:lcm-lora-sdv1-5>", steps=8, scheduler="euler")
    assert (request.steps, request.scheduler) == (8, "euler")
    assert pipeline.request(["a <lora:lcm-lora-sdv1-5>", "b"]).steps == model.family.steps


@pytest.mark.parametrize(
    "settings",
    [
        {"hires": 1.5},
        {"image": Image.new("RGB", (64, 64), "red"), "strength": 0.5},
        {"image": Image.new("RGB", (64, 64), "red"), "mask": Image.new("L", (64, 64), 255)},
        {"reuse": 2, "merge": 0.5, "scheduler": "euler"},
    ],
)
def test_every_task_and_pass_uses_it(model: LatentDiffusion, folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "one.safetensors"
    wanted = made(by_hand(file, 1, 1), steps=4, **settings)
    torch.testing.assert_close(made(Pipeline(model), adapters=file, steps=4, **settings), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("offload", ["components", "layers"])
def test_offloaded_networks_take_turns(models: Path, folder: Path, offload: str) -> None:
    loading: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "lora_dir": folder}
    plain = Pipeline(models / "sd15", quick=offload == "components", **loading)
    ours = Pipeline(models / "sd15", offload=offload, **loading)
    for mix in ({"one": 1}, {}, {"two": 0.5}, {"one": 1}):
        assert distance(made(ours, adapters=mix), made(plain, adapters=mix)) < 1e-5
    own = ours.adapters.merged(ours.request("a", adapters={"one": 1}).mixes[0])
    guests = ours.model.room.guests  # type: ignore[attr-defined]
    assert (own.unet in guests) == (offload == "components") and own.text_encoders in guests


def test_the_hash_of_other_programs(folder: Path, tmp_path: Path) -> None:
    content = (folder / "one.safetensors").read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert autov3(folder / "one.safetensors", {}) == hashlib.sha256(body).hexdigest()[:12]
    assert autov3(folder / "two.safetensors", {"sshs_model_hash": "ab" * 32}) == "ab" * 6
    (tmp_path / "x.pt").write_bytes(b"abc")
    assert autov3(tmp_path / "x.pt", {}) == hashlib.sha256(b"abc").hexdigest()[:12]
    assert autov3(tmp_path, {}) == ""


def test_an_evaluation_with_adapters(models: Path, folder: Path) -> None:
    """The same images as the pipeline makes; the digests of files tell apart images of a file that has changed."""
    file = folder / "one.safetensors"
    sweep = dict([sweep_of(f"lora={file}:0.5,{file}:1")])
    plan = EvaluationPlan(metrics=(), sweeps=sweep)
    model = evaluate._model(
        str(models / "sd15"), settings_of([f"lora={file}:0.8", "steps=1", "dtype=fp32"]), "cpu", plan
    )
    assert model.settings["adapter_sha256"] == {"one": hashlib.sha256(file.read_bytes()).hexdigest()}
    pipeline = Pipeline(models / "sd15", device="cpu", dtype=torch.float32)
    for changes, weight in ({}, 0.8), ({"adapters": sweep["adapters"][1]}, 1.0):
        (found,) = model.make(["a cat"], [1], changes)
        (wanted,) = pipeline("a cat", seed=1, steps=1, adapters={file: weight}).images
        assert found.tobytes() == wanted.tobytes()
    by_name = settings_of(["adapters={one: {unet: 1, text: 0}}", f"lora_dir={folder}"])
    named = evaluate._model(str(models / "sd15"), by_name, "cpu", EvaluationPlan(metrics=()))
    assert named.settings["adapter_sha256"].keys() == {"one"}
    with pytest.raises(LdmError, match=r"--sweep 'lora=a:much': write KEY=VALUE"):
        sweep_of("lora=a:much")


def test_an_evaluation_makes_images_again_when_a_file_has_changed(models: Path, folder: Path, tmp_path: Path) -> None:
    """Files behind the same paths: an embedding, and an adapter that a prompt names."""
    plan = EvaluationPlan(metrics=(), prompts=["a cat <lora:mine>", "a dog"], batch=2)
    learned, mine = tmp_path / "bad.safetensors", tmp_path / "loras" / "mine.safetensors"
    mine.parent.mkdir()
    width = tiny.model("sd15", shallow=True).text_encoders.configs[0].width

    def folders(seed: int, file: str) -> int:
        save_file({"emb_params": torch.randn(1, width, generator=torch.Generator().manual_seed(seed))}, learned)
        mine.write_bytes((folder / f"{file}.safetensors").read_bytes())
        settings = settings_of([f"embeddings={learned}", f"lora_dir={mine.parent}", "steps=1", "dtype=fp32"])
        model = evaluate._model(str(models / "sd15"), settings, "cpu", plan)
        made_images(model, "A", {}, plan.prompts or (), plan, Workspace(tmp_path / "out"))
        return len([*(tmp_path / "out" / "images").iterdir()])

    assert [folders(0, "one"), folders(0, "one"), folders(1, "one"), folders(0, "two")] == [1, 1, 2, 3]
