"""Adapter files that cannot be used: one line with the place and the remedy, found before anything is merged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapter_files import RANK, adapter, alpha, lora, saved
from safetensors.torch import load_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.adapters import Adapter, open_adapter

TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def sd15() -> LatentDiffusion:
    return tiny.model("sd15")


@pytest.fixture(scope="module")
def sdxl() -> LatentDiffusion:
    return tiny.model("sdxl")


def refused(file: Path, model: LatentDiffusion, *messages: str, **options: Any) -> None:
    with pytest.raises(LdmError) as error:
        open_adapter(file, model, **options)
    for message in (str(file), *messages):
        assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_another_family(tmp_path: Path, sd15: LatentDiffusion, sdxl: LatentDiffusion) -> None:
    """Told by the channels of text, where the file has layers that read text, or by its names."""
    small = saved(adapter(sd15, "kohya"), tmp_path / "sd15.safetensors")
    large = saved(adapter(sdxl, "kohya-sgm"), tmp_path / "sdxl.safetensors")
    refused(
        small, sdxl, "is for another model (its cross-attention reads 32 channels of text)", "the model is like SDXL"
    )
    refused(large, sd15, "(its cross-attention reads 80 channels of text)", "the model is like SD 1.x (32 channels)")
    ends = {"lora_down.weight": torch.zeros(RANK, 768), "lora_up.weight": torch.zeros(320, RANK)}
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    real = saved({f"{stem}.{end}": tensor for end, tensor in ends.items()}, tmp_path / "real.safetensors")
    refused(real, sdxl, "is for SD 1.x (its cross-attention reads 768 channels of text)", "choose an adapter of the")
    two = saved({f"lora_te2_x.{end}": tensor for end, tensor in ends.items()}, tmp_path / "te2.safetensors")
    refused(two, sd15, "is for SDXL; the model is like SD 1.x")
    flux = {f"lora_unet_double_blocks_0_img_attn_proj.{end}": tensor for end, tensor in ends.items()}
    refused(saved(flux, tmp_path / "flux.safetensors"), sdxl, "is for Flux; the model is like SDXL")
    told = {"ss_base_model_version": "sdxl_base_v1-0"}
    other = saved({f"lora_unet_x.{end}": tensor for end, tensor in ends.items()}, tmp_path / "x.safetensors", told)
    refused(other, sd15, "is for SDXL; the model is like SD 1.x")


def test_names_that_match_nothing(tmp_path: Path, sd15: LatentDiffusion, caplog: pytest.LogCaptureFixture) -> None:
    good = adapter(sd15, "kohya")
    more = {f"lora_unet_strange_{n}.{end}": value for n in (1, 2) for end, value in lora(torch.zeros(8, 8)).items()}
    file = saved({**good, **more, "note": torch.zeros(1)}, tmp_path / "a.safetensors")
    refused(
        file, sd15, "5 tensors match nothing in the model: note, lora_unet_strange_1.lora_down.weight", "partial=True"
    )
    with caplog.at_level(logging.WARNING):
        found = open_adapter(file, sd15, partial=True)
    assert "5 tensors match nothing in the model and are left out: note" in caplog.text
    whole = open_adapter(saved(good, tmp_path / "b.safetensors"), sd15)
    assert {name: own.keys() for name, own in found.changes.items()} == {
        n: own.keys() for n, own in whole.changes.items()
    }
    nothing = saved(more, tmp_path / "c.safetensors")
    refused(nothing, sd15, "none of its tensors match a layer of the model", partial=True)


def changed(model: LatentDiffusion, **changes: Tensor | None) -> Tensors:
    """An adapter with other tensors of one layer, by their parts; None: without it."""
    tensors = {name: value for name, value in adapter(model, "kohya").items() if name.startswith(TO_Q)}
    assert len(tensors) == 2
    for part, value in changes.items():
        name = f"{TO_Q}.{part.replace('__', '.')}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


NAN = torch.full((RANK, 64), torch.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_down__weight": None}, f"{TO_Q} has lora_up.weight without lora_down.weight; the file is damaged"),
        ({"lora_up__weight": None}, f"{TO_Q} has lora_down.weight without lora_up.weight"),
        ({"lora_down__weight": None, "lora_up__weight": None, "alpha": alpha(1)}, "has alpha without lora_down.weight"),
        ({"lora_down__weight": torch.zeros(RANK, 65)}, f"fit the model: {TO_Q} [[4, 65], [64, 4]] (weight [64, 64])"),
        ({"lora_down__weight": torch.zeros(RANK + 1, 64)}, "the tensors of 1 layers do not fit the model"),
        ({"lora_up__weight": torch.zeros(64)}, "the tensors of 1 layers do not fit the model"),
        ({"lora_up__weight": torch.zeros(())}, "the tensors of 1 layers do not fit the model"),
        ({"lora_mid__weight": torch.zeros(RANK, RANK, 3, 3)}, "the tensors of 1 layers do not fit the model"),
        ({"alpha": torch.zeros(2)}, "the tensors of 1 layers do not fit the model"),
        ({"dora_scale": torch.zeros(63, 1)}, "the tensors of 1 layers do not fit the model"),
        ({"dora_scale": torch.zeros(())}, "the tensors of 1 layers do not fit the model"),
        ({"diff_b": torch.zeros(64)}, "has no bias"),
        ({"lora_down__weight": NAN}, f"{TO_Q}.lora_down.weight holds 256 numbers that are not finite"),
        ({"alpha": alpha(torch.inf)}, f"{TO_Q}.alpha holds 1 numbers that are not finite"),
        ({"lora_down__weight": torch.zeros(RANK, 64, dtype=torch.int8)}, "holds numbers of type torch.int8"),
        ({"hada_w1_a": torch.zeros(64, RANK)}, "are parts of several kinds of change"),
        ({"lora_A__weight": torch.zeros(RANK, 64)}, "which mean the same; keep one of them"),
        ({"oft_blocks": torch.zeros(4, 4, 4)}, "is an adapter of the kind OFT or BOFT"),
        ({"on_input": torch.zeros(1)}, "is an adapter of the kind (IA)³"),
        ({"a1__weight": torch.zeros(4, 4)}, "is an adapter of the kind GLoRA"),
        ({"lora_B__bias": torch.zeros(64)}, "is an adapter of the kind LoRA with biases of its own"),
    ],
)  # fmt: skip
def test_tensors_of_a_layer(tmp_path: Path, sd15: LatentDiffusion, changes: Any, message: str) -> None:
    refused(saved(changed(sd15, **changes), tmp_path / "a.safetensors"), sd15, message)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight"], "it is a model; give it as one (--model)"),
        (["down_blocks.0.resnets.0.conv1.weight"], "it is a U-Net alone; give it with a model (--component unet=PATH)"),
        (["control_model.input_hint_block.0.weight"], "it is a ControlNet"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "it is an IP-Adapter"),
        (["emb_params"], "it is a textual-inversion embedding"),
        (["text_model.final_layer_norm.weight"], "it is a text encoder alone"),
        (["decoder.conv_in.weight"], "it is an autoencoder alone"),
        (["a", "b"], "its tensors are called a, b"),
        ([], "it is empty"),
    ],
)
def test_other_files(tmp_path: Path, sd15: LatentDiffusion, names: list[str], message: str) -> None:
    file = saved({name: torch.zeros(2) for name in names}, tmp_path / "a.safetensors")
    refused(file, sd15, "is not an adapter", message)


def test_files_that_are_no_tensors(tmp_path: Path, sd15: LatentDiffusion) -> None:
    refused(tmp_path / "none.safetensors", sd15, "does not exist")
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    refused(text, sd15, "a safetensors file is needed")
    whole = saved(adapter(sd15, "kohya"), tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    refused(cut, sd15, "is damaged or cut short")
    torch.save(load_file(whole), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", sd15, "is a pickle, which can run code when it is opened")
    found, wanted = open_adapter(tmp_path / "a.pt", sd15, allow_pickle=True), open_adapter(whole, sd15)
    assert found.changes["unet"].keys() == wanted.changes["unet"].keys()


def test_folders(tmp_path: Path, sd15: LatentDiffusion) -> None:
    refused(tmp_path, sd15, "holds neither adapter_config.json nor pytorch_lora_weights.safetensors")
    sd15.save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", sd15, "is a model's folder, not an adapter; give it as the model")
    (tmp_path / "one").mkdir()
    saved(adapter(sd15, "kohya"), tmp_path / "one" / "x.safetensors")
    assert open_adapter(tmp_path / "one", sd15).name == "one"


def peft_folder(model: LatentDiffusion, folder: Path, **options: Any) -> Path:
    saved(
        adapter(model, "peft", lambda value: lora(value, ("lora_A.weight", "lora_B.weight"))),
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2, **options})
    )
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "is an adapter of peft's kind IA3, which is not read; LORA, LOHA and LOKR are"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base model too"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save set to ['conv_out'] is not read here"),
        ({"bias": "all"}, "bias set to 'all' is not read here"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many'; a number is needed"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern of to_q is None"),
        ({"rank_pattern": [4]}, "rank_pattern is [4]; a JSON object is needed"),
        ({"alpha_pattern": {"to_(q": 4}}, "alpha_pattern of 'to_(q' is no regular expression"),
    ],
)
def test_peft_settings(tmp_path: Path, sd15: LatentDiffusion, options: Any, message: str) -> None:
    refused(peft_folder(sd15, tmp_path / "style", **options), sd15, message)


def test_peft_folder_without_weights(tmp_path: Path, sd15: LatentDiffusion) -> None:
    folder = peft_folder(sd15, tmp_path / "style")
    assert isinstance(open_adapter(folder, sd15), Adapter)
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, sd15, "holds adapter_config.json, but not adapter_model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[1]", "holds a JSON list"), ('{"unet.lora_alpha": "x"}', "'x'")]
)
def test_metadata_of_diffusers(tmp_path: Path, sd15: LatentDiffusion, text: str, message: str) -> None:
    tensors = adapter(sd15, "diffusers", lambda value: lora(value, ("lora_A.weight", "lora_B.weight")))
    file = saved(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    refused(file, sd15, "lora_adapter_metadata", message)


def test_embeddings_beside_the_adapter_are_named(
    tmp_path: Path, sd15: LatentDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    bundled = {f"bundle_emb.{name}.string_to_param.*": torch.zeros(2, 32) for name in ("mood", "light")}
    with caplog.at_level(logging.WARNING):
        found = open_adapter(saved({**adapter(sd15, "kohya"), **bundled}, tmp_path / "a.safetensors"), sd15)
    assert set(found.bundled) == {"mood", "light"}
    assert "holds textual-inversion embeddings too, which are not used: " in caplog.text
