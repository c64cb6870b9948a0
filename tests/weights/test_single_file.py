"""Original single files: names against those of the original repositories, round trips, recognition."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PIPELINES
from tokenizers import AddedToken

from ldm.errors import LdmError
from ldm.families import FAMILIES, Family
from ldm.files import DIGEST
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.tokenizer import Tokenizer
from ldm.weights import layouts
from ldm.weights.components import build
from ldm.weights.sources import open_source
from ldm.weights.tensors import DTYPES, NAMES, open_store

KEYS = Path(__file__).parents[1] / "recorded"
RECORDED = ("sd15", "sd15-inpaint", "sd2", "sdxl", "sdxl-inpaint", "sdxl-refiner")  # sd2-v is the same as sd2


def recorded(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of the original repository's modules: see data/README.md."""
    lines = gzip.decompress((KEYS / f"{name}.txt.gz").read_bytes()).decode().splitlines()
    rows = [line.split(" ") for line in lines]
    return {
        key: (dtype, () if shape == "-" else tuple(map(int, shape.split("x")))) for key, shape, dtype in rows
    }  # fmt: skip


def written(family: Family) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of the single file that we would write of a real family."""
    with torch.device("meta"):
        modules = build(family).modules()
    result = {}
    for name, (_, layout) in layouts.original(family).items():
        shapes = {key: tuple(parameter.shape) for key, parameter in modules[name].named_parameters()}
        result |= {link.theirs: ("float32", link.shape(shapes)) for link in layout(shapes)}
    for name, info in layouts.extra_infos(family).items():
        result[name] = (str(info.dtype).removeprefix("torch."), info.shape)
    return result


@pytest.mark.parametrize("name", RECORDED)
def test_names_and_shapes_are_those_of_the_original_modules(name: str) -> None:
    assert written(FAMILIES[name]) == recorded(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_through_both_layouts(tmp_path: Path, name: str) -> None:
    model = tiny.model(name, shallow=tiny.is_variant(name))
    model.save_pretrained(tmp_path / "a")
    LatentDiffusion.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b.safetensors")
    LatentDiffusion.from_pretrained(tmp_path / "b.safetensors").save_pretrained(tmp_path / "c")
    again = LatentDiffusion.from_pretrained(tmp_path / "c")
    assert tiny.same_weights(model, again)
    assert again.family == model.family
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "c" / path.relative_to(tmp_path / "a")).read_bytes(), path


@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_opens_a_written_file(tmp_path: Path, name: str) -> None:
    model = tiny.model(name, shallow=tiny.is_variant(name))
    model.save_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "one.safetensors")
    pipeline = getattr(diffusers, PIPELINES[name]).from_single_file(
        tmp_path / "one.safetensors", config=str(tmp_path / "folder"), local_files_only=True
    )
    for component, module in model.modules().items():
        theirs = getattr(pipeline, component).state_dict()
        assert all(torch.equal(theirs[key], value) for key, value in module.state_dict().items())


Tensors = dict[str, tuple[str, tuple[int, ...]]]  # their types and shapes by name


def sparse(
    path: Path, family: str, dtype: str = "F16", metadata: dict[str, str] | None = None, without: str = "", **more: Any
) -> Path:
    """A file with the names and shapes of the original checkpoint of a family, without those that begin so."""
    names = recorded("sd2" if family == "sd2-v" else family)
    kept = {name: tensor for name, tensor in names.items() if not without or not re.match(without, name)}
    return sparse_file(path, kept | more, dtype, metadata)


def sparse_file(path: Path, tensors: Tensors, dtype: str = "F16", metadata: dict[str, str] | None = None) -> Path:
    """A file with these names and shapes; its gigabytes of zeros take no room."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (kind, shape) in tensors.items():
        stored = dtype if kind == "float32" else NAMES[getattr(torch, kind)]
        start, end = end, end + DTYPES[stored].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("name", ["sd15", "sd15-inpaint", "sdxl", "sdxl-inpaint", "sdxl-refiner"])
def test_released_files_are_recognised_by_names_and_shapes(tmp_path: Path, name: str) -> None:
    opened = open_source(sparse(tmp_path / "model.ckpt.safetensors", name))
    assert opened.family == FAMILIES[name]


def test_a_real_file_is_mapped_without_being_copied(tmp_path: Path) -> None:
    model = LatentDiffusion.from_pretrained(sparse(tmp_path / "sdxl", "sdxl"))
    assert sum(p.numel() for p in model.unet.parameters()) == 2_567_463_684
    assert model.unet.conv_in.weight.dtype == torch.float16


def test_sd2_does_not_say_what_it_predicts(tmp_path: Path) -> None:
    path = sparse(tmp_path / "v2.safetensors", "sd2")
    with pytest.raises(LdmError, match=r"may be sd2 or sd2-v: .* name it \(family=, --family\)"):
        open_source(path)
    assert open_source(path, family="sd2-v").family == FAMILIES["sd2-v"]
    assert open_source(path, family="sd2").family == FAMILIES["sd2"]
    with pytest.raises(LdmError, match="holds tensors that a sd15 model does not have"):
        open_source(path, family="sd15")
    with pytest.raises(LdmError, match="not known"):
        open_source(path, family="sd7")
    told = sparse(tmp_path / "told.safetensors", "sd2", metadata={"modelspec.prediction_type": "v"})
    assert open_source(told).family.name == "sd2-v"
    with pytest.raises(LdmError, match="its metadata says v_prediction, the family sd2 says epsilon"):
        open_source(told, family="sd2")
    flow = sparse(tmp_path / "flow.safetensors", "sdxl", metadata={"modelspec.prediction_type": "rf"})
    with pytest.raises(LdmError, match="modelspec.prediction_type 'rf' is not known"):
        open_source(flow)


def test_a_configuration_beside_the_file_is_read_without_its_targets(tmp_path: Path) -> None:
    path = sparse(tmp_path / "v2.safetensors", "sd2")
    beside = tmp_path / "v2.yaml"
    beside.write_text(
        "model:\n  target: os.system\n  params:\n    parameterization: v\n    linear_start: 0.001\n"
        "    linear_end: 0.01\n    timesteps: 1000\n    scale_factor: 0.5\n    unet_config: {target: evil.Module}\n"
    )
    family = open_source(path).family
    assert family.name == "sd2-v"
    assert (family.schedule.beta_start, family.schedule.beta_end) == (0.001, 0.01)
    assert family.autoencoder.scaling_factor == 0.5
    for content, message in (
        ("model:\n  params:\n    linear_start: 0.00085\n", None),
        ("!!python/object/apply:os.system ['true']", "not plain YAML"),
        ("model: [1, 2]", "no model.params"),
        ("a: &a [*a]", "no model.params"),
        ("model: {params: {parameterization: w}}", "parameterization 'w'"),
        ("model: {params: {linear_start: much}}", "not a number"),
        ("\x00", "not plain YAML"),
        ("x: 2020-99-99", "not plain YAML"),
        ("x: !!int abc", "not plain YAML"),
        ("x: !!timestamp foo", "not plain YAML"),
        ("model: {params: {beta_schedule: cosine}}", "beta_schedule is 'cosine'"),
        ("model: {params: {denoiser_config: {params: {scaling_config: {target: a.EDMScaling}}}}}", "names no scaling"),
    ):
        beside.write_text(content)
        if message is None:
            assert open_source(path).family.name == "sd2"
        else:
            with pytest.raises(LdmError, match=message):
                open_source(path)


def test_marks_of_v_prediction_in_sdxl(tmp_path: Path) -> None:
    path = sparse(tmp_path / "xl.safetensors", "sdxl", v_pred=("float32", (0,)), ztsnr=("float32", (0,)))
    family = open_source(path).family
    assert (family.name, family.schedule.prediction_type, family.schedule.zero_terminal_snr) == (
        "custom", "v_prediction", True,
    )  # fmt: skip
    with pytest.raises(LdmError, match="its tensor v_pred says v_prediction, the family sdxl says epsilon"):
        open_source(path, family="sdxl")
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: eps}}")
    with pytest.raises(LdmError, match="they contradict each other"):
        open_source(path)
    path.with_suffix(".yaml").write_text(
        "model: {params: {denoiser_config: {params: {scaling_config: {target: sgm.modules.VScaling}}}}}"
    )
    assert open_source(path).family == family
    edm = sparse(tmp_path / "edm.safetensors", "sdxl", edm_mean=("float32", (1, 4, 1, 1)))
    with pytest.raises(LdmError, match="EDM"):
        open_source(edm)


def test_leftovers_of_training_are_passed_over_and_strangers_are_not(tmp_path: Path) -> None:
    ema = {"model_ema.diffusion_modelout2bias": ("float32", (4,)), "model_ema.decay": ("float32", ())}
    opened = open_source(sparse(tmp_path / "a.safetensors", "sd15", **ema))
    assert "model_ema" in opened.ignored
    stranger = {"control_model.out.2.bias": ("float32", (4,))}
    with pytest.raises(LdmError, match=r"does not have: control_model.out.2.bias \(a ControlNet\); use a file of the"):
        open_source(sparse(tmp_path / "b.safetensors", "sd15", **stranger))
    inside = {"model.diffusion_model.out.3.bias": ("float32", (4,))}
    with pytest.raises(LdmError, match=r"1 unexpected: model.diffusion_model.out.3.bias"):
        open_source(sparse(tmp_path / "c.safetensors", "sd15", **inside))


def part(family: str, prefix: str) -> Tensors:
    """The tensors of an original checkpoint whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in recorded(family).items() if name.startswith(prefix)}


def test_components_from_elsewhere_fill_what_a_file_lacks(tmp_path: Path) -> None:
    vae = sparse_file(tmp_path / "vae.safetensors", part("sd15", "first_stage_model."))
    text = sparse_file(tmp_path / "text.safetensors", part("sd15", "cond_stage_model.transformer."))
    whole = sparse(tmp_path / "whole.safetensors", "sd15")
    bare = sparse(tmp_path / "bare.safetensors", "sd15", without="first_stage_model")
    alone = sparse(tmp_path / "alone.safetensors", "sd15", without="(?!model.diffusion_model)")
    xl = sparse(tmp_path / "xl.safetensors", "sdxl", without="conditioner")
    for source, given in (
        (bare, {"vae": vae}), (bare, {"vae": whole}), (alone, {"vae": vae, "text_encoder": text}),
        (alone, {"vae": whole, "text_encoder": whole}),
    ):  # fmt: skip
        opened = open_source(source, components=given)
        assert opened.family == FAMILIES["sd15"]
        assert opened.parts["vae"].store.files == [given["vae"]]
    for source, given, message in (
        (bare, {}, r"bare.safetensors holds no autoencoder; name one \(--component vae=PATH, or components=\)"),
        (bare, {"text_encoder": text}, r"holds no autoencoder; name one \(--component vae=PATH"),
        (alone, {}, r"is a U-Net alone; name the others \(--component vae=PATH --component text_encoder=PATH, or comp"),
        (alone, {"vae": vae}, r"holds no text encoder; name one \(--component text_encoder=PATH"),
        (xl, {}, r"no text encoder and no text encoder 2; name the others \(--component text_encoder=PATH --component"),
        (bare, {"image_encoder": vae}, "holds no autoencoder"),
        (whole, {"image_encoder": vae}, "'image_encoder' is not one of this model's: unet, vae, text_encoder"),
        (whole, {"vae": text}, "248 missing: .*; take this component from another file .--component vae=PATH"),
    ):
        with pytest.raises(LdmError, match=message):
            open_source(source, components=given)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_weights_from_elsewhere_are_those_of_the_whole_file(tmp_path: Path, name: str) -> None:
    model = tiny.model(name)
    model.save_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "whole.safetensors")
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != DIGEST}
    unet = {name: t for name, t in load_file(tmp_path / "whole.safetensors").items() if name.startswith("model.")}
    save_file(unet, tmp_path / "unet.safetensors", metadata)
    others = model.modules().keys() - {"unet"}
    for places in ({other: f"folder/{other}" for other in others}, dict.fromkeys(others, "whole.safetensors")):
        given = {other: tmp_path / place for other, place in places.items()}
        again = LatentDiffusion.from_pretrained(tmp_path / "unet.safetensors", components=given)
        assert tiny.same_weights(model, again)
        assert again.family == model.family


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sd15", "cond_stage_model.logit_scale"),
        ("sd15", "cond_stage_model.text_projection"),
        ("sd15", "cond_stage_model.transformer.logit_scale"),
        ("sd15", "cond_stage_model.transformer.text_projection.weight"),
        ("sd15", "cond_stage_model.transformer.vision_model.post_layernorm.bias"),
        ("sd15", "first_stage_model.loss.logvar"),
        ("sd15", "first_stage_model.model_ema.decay"),
        ("sd15", "first_stage_model.model_ema.num_updates"),
        ("sdxl", "conditioner.embedders.0.logit_scale"),
        ("sdxl", "conditioner.embedders.0.transformer.text_projection.weight"),
    ],
)
def test_leftovers_of_components_are_passed_over_and_listed(tmp_path: Path, family: str, name: str) -> None:
    opened = open_source(sparse(tmp_path / "a.safetensors", family, **{name: ("float32", (4,))}))
    assert opened.family == FAMILIES[family]
    assert any(name in line for line in opened.ignored)


def test_a_whole_clip_model_is_a_text_encoder(tmp_path: Path) -> None:
    """As transformers and open_clip save them, with the image tower."""
    model = sparse(tmp_path / "model.safetensors", "sdxl")
    ours = part("sdxl", "conditioner.embedders.0.transformer.")
    beside = ["text_projection.weight", "logit_scale", "vision_model.encoder.x", "visual_projection.weight"]
    large = part("sdxl", "conditioner.embedders.1.model.")
    given = {
        "text_encoder": sparse_file(tmp_path / "l.safetensors", ours | dict.fromkeys(beside, ("float32", (4,)))),
        "text_encoder_2": sparse_file(tmp_path / "g.safetensors", large | {"visual.proj": ("float32", (4, 4))}),
    }
    opened = open_source(model, components=given)
    assert set(beside) < set(opened.parts["text_encoder"].unused)
    assert "visual.proj" in opened.parts["text_encoder_2"].unused and "logit_scale" in str(opened.ignored)


@pytest.mark.parametrize("stated", ["", " ", "None", "none", "null"])
def test_a_prediction_type_that_says_nothing(tmp_path: Path, stated: str) -> None:
    path = sparse(tmp_path / "x.safetensors", "sd15", metadata={"modelspec.prediction_type": stated})
    assert open_source(path).family == FAMILIES["sd15"]
    two = sparse(tmp_path / "v2.safetensors", "sd2", metadata={"modelspec.prediction_type": stated})
    with pytest.raises(LdmError, match="may be sd2 or sd2-v"):
        open_source(two)


def test_extras_hold_what_the_original_modules_compute(tmp_path: Path) -> None:
    """Betas as CompVis' code makes them (its published first and last), the unused last block of SD 2 as identity."""
    tiny.model("sd2").save_pretrained(tmp_path / "sd2.safetensors")
    tensors = load_file(tmp_path / "sd2.safetensors")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(tensors["betas"], betas.float())
    torch.testing.assert_close(tensors["alphas_cumprod"], bar.float())
    torch.testing.assert_close(tensors["sqrt_recipm1_alphas_cumprod"], (1 / bar - 1).sqrt().float())
    assert tensors["posterior_log_variance_clipped"].isfinite().all()
    assert not tensors["cond_stage_model.model.transformer.resblocks.3.mlp.c_proj.weight"].any()
    tiny.model("sdxl").save_pretrained(tmp_path / "xl.safetensors", dtype=torch.float16)
    tensors = load_file(tmp_path / "xl.safetensors")
    assert tensors["denoiser.sigmas"].dtype == torch.float32
    torch.testing.assert_close(tensors["denoiser.sigmas"], ((1 - bar) / bar).sqrt().float())
    assert 14.6 < tensors["denoiser.sigmas"][-1] < 14.7


def test_metadata_for_other_programs(tmp_path: Path) -> None:
    tiny.model("sd2-v").save_pretrained(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.prediction_type"] == "v"


def test_a_pickle_checkpoint(tmp_path: Path) -> None:
    model = tiny.model("sd15")
    model.save_pretrained(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    for new_format in (True, False):
        torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=new_format)
        with pytest.raises(LdmError, match="is a pickle, which can run code"):
            open_source(tmp_path / "m.ckpt")
        with pytest.raises(LdmError, match="belongs to no known family"):  # read, but tiny
            open_source(tmp_path / "m.ckpt", allow_pickle=True)
    torch.save({"state_dict": {"x": torch.eye(2).to_sparse()}}, tmp_path / "sparse.ckpt")
    with pytest.raises(LdmError, match="sparse or meta tensors, which are not supported: x"):
        open_source(tmp_path / "sparse.ckpt", allow_pickle=True)
    torch.save({"state_dict": [1]}, tmp_path / "odd.ckpt")
    with pytest.raises(LdmError, match="no dictionary of tensors"):
        open_source(tmp_path / "odd.ckpt", allow_pickle=True)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(LdmError, match="no dictionary of tensors"):
        open_source(tmp_path / "list.ckpt", allow_pickle=True)
    (tmp_path / "zip.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(LdmError, match="restricted unpickler"):
        open_source(tmp_path / "zip.ckpt", allow_pickle=True)


class Foreign:
    """A class as Lightning's callbacks, which must not be imported or made when a file names it."""

    made = 0

    def __init__(self) -> None:
        self.best = {"score": 1.0}

    def __setstate__(self, state: object) -> None:
        type(self).made += 1

    def __reduce__(self) -> Any:
        return Foreign, (), {"best": self}


class ForeignDict(dict[str, Any]):
    """As Lightning's `AttributeDict`."""


class ForeignList(list[Any]):
    pass


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("entry", ["state_dict", "model", "module", None])
def test_objects_of_training_programs_are_passed_over(tmp_path: Path, entry: str | None, new_format: bool) -> None:
    tensors = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(1)}
    objects = {
        "callbacks": {Foreign: Foreign(), Path: {"path": Path("x")}}, "epoch": 3,
        "hyper_parameters": ForeignDict(lr=1.0, inner=ForeignDict(x=ForeignList([1, 2]))),
        "score": np.float64(1.0), "call": getattr,
    }  # fmt: skip
    content = {**objects, **(tensors if entry is None else {entry: tensors})}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=new_format)
    Foreign.made, known = 0, set(torch.serialization.get_safe_globals())
    store = open_store(tmp_path / "m.ckpt", allow_pickle=True)
    assert store.infos.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in store.read(tensors, None, "cpu"))
    assert store.passed_over == sorted(objects)
    assert Foreign.made == 0
    assert set(torch.serialization.get_safe_globals()) == known


def test_pickles_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": torch.ones(1)}, "hook": os.system}, tmp_path / "evil.ckpt")
    with pytest.raises(LdmError, match=r"unsupported GLOBAL (posix|nt).system .*use the .safetensors file") as caught:
        open_store(tmp_path / "evil.ckpt", allow_pickle=True)
    assert "[1m" not in str(caught.value) and "two options" not in str(caught.value)
    torch.save({"ema": {"x": torch.ones(1)}, "epoch": 1}, tmp_path / "ema.ckpt")
    with pytest.raises(LdmError, match="no dictionary of tensors; ema in it are such: save one of them alone"):
        open_store(tmp_path / "ema.ckpt", allow_pickle=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "it is a LoRA"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a diffusers U-Net"),
        (["encoder.conv_in.weight"], "an autoencoder alone"),
        (["positional_embedding", "transformer.resblocks.0.ln_1.bias"], "an OpenCLIP text encoder alone"),
        (["emb_params"], "it is an embedding of textual inversion"),
        (["something"], "its tensors are called something"),
        ([], "it holds no tensors"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "belongs to no known family"),
    ],
)
def test_other_files_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(LdmError, match=message):
        open_source(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b'{"a": 1}', "a JSON file"),
        (b"<!doctype html>", "a web page"),
        (b"GGUF\x03\x00", "a GGUF file"),
        (b"hello world, this is no model", "a text file"),
        (bytes(64), "not a safetensors file"),
        ((1000).to_bytes(8, "little") + b'{"a":', "damaged or cut short"),
        ((2**31).to_bytes(8, "little") + b"{", "damaged or cut short"),
        ((2).to_bytes(8, "little") + b"{}" + b"x", "damaged or cut short"),
    ],
)
def test_types_are_told_by_content(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(LdmError, match=message):
        open_source(tmp_path / "x.safetensors")


def test_a_file_that_says_what_it_is_is_believed(tmp_path: Path) -> None:
    tiny.model("sd15").save_pretrained(tmp_path / "m.safetensors")
    with pytest.raises(LdmError, match="says that it is custom, not sd2"):
        open_source(tmp_path / "m.safetensors", family="sd2")
    with pytest.raises(LdmError, match="has no variants"):
        open_source(tmp_path / "m.safetensors", variant="fp16")
    with pytest.raises(LdmError, match="which has no revision='x'"):
        open_source(tmp_path / "m.safetensors", revision="x")


def test_devices_and_types_that_are_not_there(tmp_path: Path) -> None:
    tiny.model("sd15").save_pretrained(tmp_path / "m.safetensors")
    for device in ("banana", "cuda:99"):
        with pytest.raises(LdmError, match=f"device {device} cannot be used here"):
            LatentDiffusion.from_pretrained(tmp_path / "m.safetensors", device=device)
    opened = open_source(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").rename(tmp_path / "gone.safetensors")
    with pytest.raises(LdmError, match="could be opened, but not read"):
        opened.load()
    (tmp_path / "gone.safetensors").rename(tmp_path / "m.safetensors")
    with pytest.raises(LdmError, match="cannot be loaded as torch.int8"):
        LatentDiffusion.from_pretrained(tmp_path / "m.safetensors", dtype=torch.int8)


def test_a_single_file_cannot_hold_a_strange_tokenizer(tmp_path: Path) -> None:
    model = tiny.model("sd15")
    vocabulary = model.text_encoders.tokenizers[0].vocabulary()
    model.text_encoders.tokenizers = (Tokenizer(vocabulary, [], added=[AddedToken("<my-dog>")]),)
    with pytest.raises(LdmError, match="write a folder instead"):
        model.save_pretrained(tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_fp8_needs_a_dtype_to_compute_in(tmp_path: Path) -> None:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "whole.safetensors")
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != DIGEST}
    path = tmp_path / "fp8.safetensors"
    save_file(
        {name: t.to(torch.float8_e4m3fn) for name, t in load_file(tmp_path / "whole.safetensors").items()},
        path,
        metadata,
    )
    with pytest.raises(LdmError, match="name a dtype to compute in"):
        LatentDiffusion.from_pretrained(path)
    assert LatentDiffusion.from_pretrained(path, dtype=torch.bfloat16).unet.conv_in.weight.dtype == torch.bfloat16
