"""Model folders: round trips, diffusers' eyes, shards, variants, old and new layouts."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import PIPELINES

from ldm.errors import LdmError
from ldm.families import FAMILIES
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.text import TextEncoders
from ldm.models.tokenizer import clip_tokenizer
from ldm.weights.components import Opened
from ldm.weights.sources import open_source
from ldm.weights.tokenizer import write_tokenizer


def unsigned(folder: Path) -> Path:
    """The folder as if someone else had written it: without our manifest."""
    (folder / "ldm_manifest.json").unlink()
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_and_diffusers_opens_it(tmp_path: Path, name: str) -> None:
    model = tiny.model(name, shallow=tiny.is_variant(name))
    model.save_pretrained(tmp_path / "model")
    again = LatentDiffusion.from_pretrained(tmp_path / "model")
    assert tiny.same_weights(model, again)
    assert again.family == model.family
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(pipeline).__name__ == PIPELINES[name]
    for component, module in model.modules().items():
        theirs = getattr(pipeline, component).state_dict()
        ours = module.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert pipeline.scheduler.config.prediction_type == model.schedule.prediction_type


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl-refiner"])
def test_what_diffusers_writes_is_read(tmp_path: Path, name: str) -> None:
    model = tiny.model(name)
    model.save_pretrained(tmp_path / "ours")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    assert (tmp_path / "theirs" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    again = LatentDiffusion.from_pretrained(tmp_path / "theirs")
    assert tiny.same_weights(model, again)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    half = LatentDiffusion.from_pretrained(tmp_path / "fp16", variant="fp16")
    assert {p.dtype for module in half.modules().values() for p in module.parameters()} == {torch.float16}


def test_shards_and_variants_of_ours(tmp_path: Path) -> None:
    model = tiny.model("sdxl", shallow=True)
    model.save_pretrained(tmp_path / "m", dtype=torch.float16, variant="fp16", max_shard_size=500_000)
    unet = tmp_path / "m" / "unet"
    assert (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert all(path.stat().st_size < 600_000 for path in unet.glob("*.safetensors"))
    by_name = LatentDiffusion.from_pretrained(tmp_path / "m", variant="fp16")
    by_itself = LatentDiffusion.from_pretrained(tmp_path / "m")
    assert tiny.same_weights(by_name, by_itself)
    assert tiny.same_weights(by_name, LatentDiffusion.from_pretrained(tmp_path / "m", dtype=torch.float16))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m", variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(pipeline.unet.conv_in.weight, by_name.unet.conv_in.weight)
    with pytest.raises(LdmError, match="no weights of the variant 'bf16'"):
        LatentDiffusion.from_pretrained(tmp_path / "m", variant="bf16")


def test_dtype_is_chosen_when_loading(tmp_path: Path) -> None:
    model = tiny.model("sd15", shallow=True)
    model.save_pretrained(tmp_path / "m")
    half = LatentDiffusion.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    for name, module in half.modules().items():
        for (key, ours), parameter in zip(module.named_parameters(), model.modules()[name].parameters(), strict=True):
            assert torch.equal(ours, parameter.to(torch.bfloat16)), key
            assert not module.training


def test_a_loaded_model_can_be_trained_without_touching_the_file(tmp_path: Path) -> None:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "m")
    model = LatentDiffusion.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.zero_()
    assert tiny.same_weights(LatentDiffusion.from_pretrained(tmp_path / "m"), tiny.model("sd15", shallow=True))


def test_layouts_of_all_ages_are_read(tmp_path: Path) -> None:
    """transformers 5's names, position ids of transformers before 4.31, old attention names, tokenizer files alone."""
    model = tiny.model("sd15", shallow=True)
    model.save_pretrained(tmp_path / "m")
    folder = unsigned(tmp_path / "m")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in text)
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): t
        for key, t in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items()
    }
    save_file(old, folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    for flat in (False, True):
        tensors = {key.removeprefix("text_model.") if flat else key: tensor for key, tensor in text.items()}
        tensors["embeddings.position_ids" if flat else "text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, folder / "text_encoder" / "model.safetensors")
        assert tiny.same_weights(LatentDiffusion.from_pretrained(folder), model)


def test_pickles_are_refused_and_read_on_demand(tmp_path: Path) -> None:
    model = tiny.model("sd15", shallow=True)
    model.save_pretrained(tmp_path / "m")
    folder = unsigned(tmp_path / "m")
    for name, base in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = folder / name / f"{base}.safetensors"
        torch.save(
            load_file(file),
            folder / name / f"{base.replace('model', 'pytorch_model') if base == 'model' else base}.bin",
        )
        file.unlink()
    with pytest.raises(LdmError, match=r"is a pickle, which can run code .*--allow-pickle"):
        LatentDiffusion.from_pretrained(folder)
    assert tiny.same_weights(LatentDiffusion.from_pretrained(folder, allow_pickle=True), model)


def test_components_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, other = tiny.model("sd15", seed=0, shallow=True), tiny.model("sd15", seed=1, shallow=True)
    base.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other.safetensors")
    for source in (
        tmp_path / "other" / "vae",
        Path("other") / "vae",
        tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors",
        tmp_path / "other.safetensors",
    ):
        mixed = LatentDiffusion.from_pretrained(tmp_path / "base", components={"vae": source})
        assert torch.equal(mixed.autoencoder.encoder.conv_in.weight, other.autoencoder.encoder.conv_in.weight)
        assert torch.equal(mixed.unet.conv_in.weight, base.unet.conv_in.weight)
    with pytest.raises(LdmError, match="'text_encoder_2' is not one of this model's"):
        LatentDiffusion.from_pretrained(tmp_path / "base", components={"text_encoder_2": tmp_path / "other" / "vae"})
    with pytest.raises(LdmError, match="tensors do not fit"):
        LatentDiffusion.from_pretrained(
            tmp_path / "base", components={"unet": tmp_path / "other/vae/diffusion_pytorch_model.safetensors"}
        )
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LdmError, match="neither a folder, a file nor a Hub name"):
        LatentDiffusion.from_pretrained(tmp_path / "base", components={"unet": tmp_path / "pipe"})


def test_a_component_by_its_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its repository holds the component's folder alone."""
    base, other = tiny.model("sd15", shallow=True), tiny.model("sd15", shallow=True)
    base.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "other")
    fetched = Mock(return_value=tmp_path / "other" / "vae")
    monkeypatch.setattr("ldm.weights.sources.fetch", fetched)
    mixed = LatentDiffusion.from_pretrained(tmp_path / "base", components={"vae": "someone/fp16-fix"})
    assert torch.equal(mixed.autoencoder.encoder.conv_in.weight, other.autoencoder.encoder.conv_in.weight)
    assert fetched.call_args.args[0] == "someone/fp16-fix" and fetched.call_args.kwargs == {"component": "vae"}


def test_a_replaced_component_is_what_its_own_configuration_says(tmp_path: Path) -> None:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "base")
    for component, changes, message in (
        ("unet", {"norm_eps": 1e-3}, "'norm_eps' is 0.001"),
        ("unet", {"_class_name": "Evil"}, "'_class_name' is 'Evil'"),
        ("text_encoder", {"layer_norm_eps": 0.1}, "'layer_norm_eps' is 0.1"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "'_class_name' is 'AutoencoderTiny'"),
        ("vae", {"latent_channels": 16}, "latents of 16 channels, the U-Net reads 4"),
    ):
        other = tmp_path / "other"
        shutil.copytree(tmp_path / "base" / component, other)
        edit(other / "config.json", **changes)
        with pytest.raises(LdmError, match=message):
            LatentDiffusion.from_pretrained(tmp_path / "base", components={component: other})
        shutil.rmtree(other)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "base" / "unet", other)
    edit(other / "config.json", attention_head_dim=8)
    assert LatentDiffusion.from_pretrained(tmp_path / "base", components={"unet": other}).unet.config.heads == (8,) * 2


def test_a_larger_embedding_keeps_the_end_of_texts(tmp_path: Path) -> None:
    """Vocabularies are padded or resized: the end is where the tokenizer says, for transformers too."""
    real = tiny.family("sdxl", shallow=True)
    text = (real.text[0], replace(real.text[1], vocab_size=1005))
    model = LatentDiffusion.from_family(replace(real, text=text))
    tokenizers = LatentDiffusion.from_family(real).text_encoders.tokenizers
    model.networks["text_encoders"] = TextEncoders(text, tokenizers, pooled=True)
    model.save_pretrained(tmp_path / "m")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        _, _, pooled, _ = pipeline.encode_prompt("a cat", None, "cpu", 1, False)
        torch.testing.assert_close(model.encode_prompt("a cat").pooled, pooled)


def test_files_have_ordinary_modes_and_nothing_is_left_behind(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "m")
    finally:
        os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path: Path) -> None:
    one, two = tiny.model("sd15", 1, shallow=True), tiny.model("sd15", 2, shallow=True)
    target = tmp_path / "m"
    one.save_pretrained(target)
    with pytest.raises(LdmError, match="exists"):
        two.save_pretrained(target)
    assert tiny.same_weights(LatentDiffusion.from_pretrained(target), one)
    two.save_pretrained(target, overwrite=True)
    assert tiny.same_weights(LatentDiffusion.from_pretrained(target), two)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(LdmError, match="not a model folder"):
        two.save_pretrained(photos, overwrite=True)
    assert (photos / "holiday.jpg").read_bytes() == b"precious"
    with pytest.raises(LdmError, match="does not exist; create it first"):
        two.save_pretrained(tmp_path / "no" / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "photos"]


def test_saving_over_its_own_source(tmp_path: Path) -> None:
    """The weights are mapped from the folder that is replaced."""
    model = tiny.model("sd15", shallow=True)
    model.save_pretrained(tmp_path / "m")
    LatentDiffusion.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "m", overwrite=True)
    assert tiny.same_weights(LatentDiffusion.from_pretrained(tmp_path / "m"), model)


def test_an_interrupted_replacement_brings_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tiny.model("sd15", 1, shallow=True), tiny.model("sd15", 2, shallow=True)
    one.save_pretrained(tmp_path / "m")
    for error in (KeyboardInterrupt, OSError):
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.replace", Mock(side_effect=error))
            with pytest.raises((KeyboardInterrupt, LdmError)):
                two.save_pretrained(tmp_path / "m", overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
        assert tiny.same_weights(LatentDiffusion.from_pretrained(tmp_path / "m"), one)


def test_replacing_follows_links_and_spares_strangers(tmp_path: Path) -> None:
    one, two = tiny.model("sd15", 1, shallow=True), tiny.model("sd15", 2, shallow=True)
    one.save_pretrained(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(LdmError, match="exists"):
        two.save_pretrained(tmp_path / "link")
    two.save_pretrained(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert tiny.same_weights(LatentDiffusion.from_pretrained(tmp_path / "real"), two)
    (tmp_path / "real" / "thesis.txt").write_text("precious")
    with pytest.raises(LdmError, match="holds more than a model .thesis.txt."):
        one.save_pretrained(tmp_path / "real", overwrite=True)
    (tmp_path / "dangling").symlink_to("nowhere.safetensors")
    with pytest.raises(LdmError, match="exists"):
        one.save_pretrained(tmp_path / "dangling")


def test_numbers_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    model = tiny.model("sd15", shallow=True)
    model.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(LdmError, match="conv_in.weight has numbers too large for torch.float16"):
        model.save_pretrained(tmp_path / "m", dtype=torch.float16)
    for dtype in (torch.int8, torch.complex64):
        with pytest.raises(LdmError, match="cannot be written as"):
            model.save_pretrained(tmp_path / "m", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(LdmError, match="cannot be written|cannot be read"):
        tiny.model("sd15", shallow=True).save_pretrained(tmp_path / name)
    with pytest.raises(LdmError):
        open_source(tmp_path / name)


@pytest.mark.parametrize("moment", ["unet", "tokenizer", "rename"])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    model = tiny.model("sd15", shallow=True)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if moment == "unet":
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path / "m", progress=interrupt)
    else:
        target = {"tokenizer": "ldm.weights.folder.write_tokenizer", "rename": "pathlib.Path.replace"}[moment]
        monkeypatch.setattr(target, interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(LdmError, match="GB are free"):
        tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "m")
    return unsigned(tmp_path / "m")


def refused(source: Path, message: str) -> None:
    with pytest.raises(LdmError, match=message) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


def test_wrong_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "model_index.json is missing, it is empty")
    refused(tmp_path / "nowhere", "does not exist; give a model folder")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.png").write_bytes(b"x")
    refused(tmp_path / "images", "it holds cat.png")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a JSON list, not an object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"_class_name": "FluxPipeline"}', "'FluxPipeline' is not a pipeline of Stable Diffusion"),
        ('{"_class_name": ["os", "system"]}', "is not a pipeline"),
        ('{"_class_name": "StableDiffusionPipeline"}', "missing; a whole model is needed"),
        ('{"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}', "class 'system' is not supported"),
        ('{"_class_name": "StableDiffusionPipeline", "pwn": ["evil", "Evil"]}', "component 'pwn'"),
    ],
)
def test_wrong_indices(folder: Path, content: str, message: str) -> None:
    (folder / "model_index.json").write_text(content)
    refused(folder, message)


def test_wrong_configurations_and_weights(folder: Path) -> None:
    original = (folder / "unet" / "config.json").read_text()
    edit(folder / "unet" / "config.json", block_out_channels=[32, 128])
    refused(folder, "tensors do not fit the model: .*misshapen")
    edit(folder / "unet" / "config.json", block_out_channels=[10**12] * 2)
    refused(folder, "channels is 1000000000000")
    (folder / "unet" / "config.json").write_text(original)
    edit(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    refused(folder, "'AutoencoderTiny'; AutoencoderKL or VQModel is needed here")
    edit(folder / "vae" / "config.json", _class_name="AutoencoderKL")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "conv_in" not in k} | {"what.is.this": torch.ones(1)}, weights)
    refused(folder, r"2 missing: conv_in.weight, conv_in.bias; 1 unexpected: what.is.this")
    save_file({k: v.to(torch.int32) if k == "conv_in.bias" else v for k, v in tensors.items()}, weights)
    refused(folder, r"1 mistyped: conv_in.bias \(torch.int32\)")
    save_file({f"lora_unet_{k}.lora_down.weight": v for k, v in list(tensors.items())[:9]}, weights)
    refused(folder, "this is a LoRA or another adapter")
    weights.write_text('{"not": "weights"}')
    refused(folder, "is a JSON file; a safetensors file is needed")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, "Git LFS pointer")
    weights.write_bytes(b"")
    refused(folder, "is an empty file")
    weights.unlink()
    refused(folder, "unet has no weights")


def test_statements_that_contradict_each_other(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    for changes, message in (
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler is 'DDIMScheduler', its own configuration says"),
        ({"vae": ["diffusers", "VQModel"]}, "vae is 'VQModel'"),
        ({"_class_name": "StableDiffusionXLPipeline"}, "does not go with a U-Net of this kind"),
        ({"controlnet": ["a", "b", "c"]}, "a library and a class are needed"),
        ({"force_zeros_for_empty_prompt": "yes"}, "true or false is needed"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        refused(folder, message)
    (folder / "model_index.json").write_text(json.dumps(index))
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=32)
    refused(folder, "the text encoder reads 77 tokens, its tokenizer makes 32")


def test_shards_agree_with_their_index(tmp_path: Path) -> None:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "m", max_shard_size=500_000)
    folder = unsigned(tmp_path / "m")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["conv_in.bias"]
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {"more": shard}}))
    refused(folder, "does not agree with its shards on more")
    index.write_text(json.dumps(content))
    shutil.copy(folder / "unet" / shard, folder / "unet" / "diffusion_pytorch_model.safetensors")
    refused(folder, "take one of them away")


@pytest.mark.parametrize(
    "shard", ["../../secret.safetensors", "/etc/passwd", "sub/x.safetensors", 7, ["x"], "gone.safetensors"]
)
def test_shards_lie_in_their_folder(folder: Path, shard: object) -> None:
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "x.safetensors")
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(folder, "is not a plain name|is missing")


def test_tokenizers_that_do_not_belong(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    refused(folder, "tokenizer missing")
    (folder / "tokenizer").mkdir()
    refused(folder, "tokenizer")
    write_tokenizer(clip_tokenizer(), folder / "tokenizer")
    edit(folder / "text_encoder" / "config.json", eos_token_id=2)
    refused(folder, "49408 tokens, the text encoder only 1000")


def test_a_folder_without_permission(folder: Path) -> None:
    if os.geteuid() == 0:
        folder.chmod(0o700)
        folder.parent.chmod(0o755)
        os.seteuid(65534)  # root reads everything: be nobody for a moment
    else:
        folder.chmod(0)
    try:
        refused(folder, "cannot be read: permission denied|cannot be read: Permission denied")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)


def test_opening_loads_nothing(folder: Path) -> None:
    opened = open_source(folder)
    assert isinstance(opened, Opened)
    assert all(p.is_meta for module in opened.components.modules().values() for p in module.parameters())
