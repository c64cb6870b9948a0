"""Adapter files: every format's names, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from adapter_files import RANK, adapter, alpha, deltas, lora, saved
from torch import Tensor

from ldm.patches.low_rank import LowRank
from ldm.weights.adapters import open_adapter
from ldm.weights.adapters.names import NAMINGS, Place


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("naming", list(NAMINGS))
@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl", "sdxl-refiner"])
def test_names_of_every_format(tmp_path: Path, family: str, naming: str) -> None:
    model = tiny.model(family)
    one = len(model.family.text) == 1 or naming in ("diffusers", "kohya", "kohya-sgm", "ComfyUI")

    def chosen(place: Place) -> bool:  # names without the component mean one tower alone
        return one or place.component != "text_encoder"

    found = open_adapter(saved(adapter(model, naming, chosen=chosen), tmp_path / "style.safetensors"), model)
    assert (found.name, found.kind, found.layout) == ("style", "LoRA", naming)
    assert len(found.digest) == 64
    for component, network in model.modules().items():
        there = {name for name, p in network.named_parameters() if name.endswith(".weight") and p.ndim > 1} - {
            f"{start}embeddings.{which}_embedding.weight"
            for start in ("", "text_model.")
            for which in ("token", "position")
        }
        if component != "vae" and (one or component != "text_encoder"):
            assert found.changes[component].keys() == there


def renamed(tensors: dict[str, Tensor], **rules: str) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        for old, new in rules.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def test_endings_and_names_of_diffusers_through_the_years(tmp_path: Path) -> None:
    model = tiny.model("sdxl")
    torch.manual_seed(0)
    today = adapter(model, "diffusers", lambda value: lora(value, ("lora_A.weight", "lora_B.weight")))
    wanted = deltas(open_adapter(saved(today, tmp_path / "today.safetensors"), model), model)
    sides = (("A", "down"), ("B", "up"))
    parts = {f".to_{part}.": f".processor.to_{part}" for part in "qkv"} | {".to_out.0.": ".processor.to_out"}
    parts |= {f".{part}_proj.": f".to_{part}" for part in ("q", "k", "v", "out")}
    rules = {
        "2023": {"lora_A": "lora.down", "lora_B": "lora.up"},
        "towers": {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"},
        "named": {"lora_A": "lora_A.default", "lora_B": "lora_B.default_0"},
        "processors": {f"{new}lora_{a}": f"{old}_lora.{b}" for new, old in parts.items() for a, b in sides},
    }
    for name, rule in rules.items():
        old = renamed(today, **rule)
        assert old.keys() != today.keys()
        assert same(deltas(open_adapter(saved(old, tmp_path / f"{name}.safetensors"), model), model), wanted)


def test_scale_is_alpha_by_rank(tmp_path: Path) -> None:
    model = tiny.model("sd15")
    tensors = adapter(model, "kohya", lambda value: {**lora(value), "alpha": alpha(1)})
    found = open_adapter(saved(tensors, tmp_path / "a.safetensors"), model)
    scales = {c.scale for changes in found.changes.values() for c in changes.values() if isinstance(c, LowRank)}
    assert scales == {1 / RANK}
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}
    found = open_adapter(saved(without, tmp_path / "b.safetensors"), model)
    assert {c.scale for c in found.changes["unet"].values() if isinstance(c, LowRank)} == {1.0}


def test_differences_of_weights_biases_and_norms(tmp_path: Path) -> None:
    model = tiny.model("sd15")
    stem, norm = "lora_unet_conv_in", "lora_unet_mid_block_attentions_0_norm"
    tensors = {
        f"{stem}.diff": torch.randn(32, 4, 3, 3), f"{stem}.diff_b": torch.randn(32),
        f"{norm}.w_norm": torch.randn(64), f"{norm}.b_norm": torch.randn(64),
    }  # fmt: skip
    found = open_adapter(saved(tensors, tmp_path / "a.safetensors"), model)
    assert (found.kind, found.layout) == ("difference", "kohya")
    made = deltas(found, model)
    layers = {"diff": "conv_in.weight", "diff_b": "conv_in.bias"}
    layers |= {"w_norm": "mid_block.attentions.0.norm.weight", "b_norm": "mid_block.attentions.0.norm.bias"}
    wanted = {f"unet.{layers[name.split('.')[1]]}": value for name, value in tensors.items()}
    assert same(made, wanted)


def test_embeddings_of_peft(tmp_path: Path) -> None:
    """Their factors are transposed."""
    model = tiny.model("sd15")
    a, b = torch.randn(RANK, 1000), torch.randn(32, RANK)
    stem = "text_encoder.text_model.embeddings.token_embedding"
    tensors = {f"{stem}.lora_embedding_A": a, f"{stem}.lora_embedding_B": b}
    made = deltas(open_adapter(saved(tensors, tmp_path / "a.safetensors"), model), model)
    torch.testing.assert_close(made["text_encoder.embeddings.token_embedding.weight"], (b @ a).T)


def test_original_files_of_half_precision_and_numbers_of_other_types(tmp_path: Path) -> None:
    """Tensors stay in the file's type; alphas may be whole numbers or have one axis."""
    model = tiny.model("sdxl")
    for kind, number in ((torch.float16, torch.tensor([2])), (torch.bfloat16, torch.tensor(2.0, dtype=torch.bfloat16))):
        tensors = adapter(model, "kohya-sgm", lambda value, number=number: {**lora(value), "alpha": number.clone()})
        tensors = {name: value if "alpha" in name else value.to(kind) for name, value in tensors.items()}
        changes = open_adapter(saved(tensors, tmp_path / "a.safetensors"), model).changes
        found = [change for own in changes.values() for change in own.values() if isinstance(change, LowRank)]
        assert {(change.up.dtype, change.scale) for change in found} == {(kind, 0.5)}
