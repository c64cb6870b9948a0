"""Adapters of every kind against the programs that define them: LyCORIS, peft and diffusers, and against formulas."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapter_files import RANK, adapter, alpha, lora, saved
from networks import inputs
from rounding import RUN, near
from torch import Tensor, nn

from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import UNet
from ldm.runtime.merging import merged
from ldm.weights.adapters import Adapter, open_adapter
from ldm.weights.adapters.names import Place, written

FAMILY = "sd15"
LAYERS = {  # layers of all shapes: linear, wide linear, 1×1, 3×3, with stride
    "linear": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "wide": "down_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "1×1": "mid_block.attentions.0.proj_in",
    "3×3": "up_blocks.2.resnets.1.conv1",
    "stride": "down_blocks.0.downsamplers.0.conv",
}


def merged_with(network: nn.Module, adapter: Adapter, component: str = "unet", weight: float = 1.0) -> Any:
    return merged(network, {name: [(weight, change)] for name, change in adapter.changes[component].items()})


def randomised(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim:
            parameter.data = torch.randn_like(parameter) / 4


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("locon.LoConModule", {}),
    "LoRA Tucker": ("locon.LoConModule", {"use_tucker": True}),
    "DoRA": ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "DoRA, norms over outputs": ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "rank-stabilised": ("locon.LoConModule", {"rs_lora": True}),
    "LoHa": ("loha.LohaModule", {}),
    "LoHa Tucker": ("loha.LohaModule", {"use_tucker": True}),
    "LoKr": ("lokr.LokrModule", {"decompose_both": True, "factor": 8, "lora_dim": 2}),
    "LoKr, one whole": ("lokr.LokrModule", {"factor": 4}),
    "LoKr, both whole": ("lokr.LokrModule", {"full_matrix": True}),
    "LoKr with DoRA": ("lokr.LokrModule", {"weight_decompose": True, "factor": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris(tmp_path: Path, kind: str) -> None:
    """Its layers' outputs: its merged weights have the scale of LoHa and LoKr twice."""
    pytest.importorskip("lycoris")
    from importlib import import_module

    where, options = KINDS[kind]
    module, _, name = where.partition(".")
    made = getattr(import_module(f"lycoris.modules.{module}"), name)
    model = tiny.model(FAMILY)
    names = written(model, "kohya")
    tensors, theirs = {}, {}
    for layer in LAYERS.values():
        base = model.unet.get_submodule(layer)
        stem = names[Place("unet", layer)]
        theirs[layer] = made(stem, base, 1.0, **{"lora_dim": RANK, "alpha": 3.0, **options})
        randomised(theirs[layer])
        if getattr(theirs[layer], "wd", False):
            theirs[layer].dora_scale.data = theirs[layer].dora_scale.abs() + 0.5
        tensors |= {f"{stem}.{part}": value.detach() for part, value in theirs[layer].state_dict().items()}
    found = open_adapter(saved(tensors, tmp_path / "a.safetensors"), model)
    assert found.kind.split(",")[0].split(" ")[0] in kind.replace("rank-stabilised", "LoRA")
    other = merged_with(model.unet, found)
    for layer, module_of_theirs in theirs.items():
        ours = other.get_submodule(layer)
        x = (
            torch.randn(2, 9, ours.in_features)
            if isinstance(ours, nn.Linear)
            else torch.randn(2, ours.in_channels, 7, 7)
        )
        module_of_theirs.org_forward = model.unet.get_submodule(layer).forward
        with torch.no_grad():
            wanted = module_of_theirs(x)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(ours(x), wanted, rtol=1e-6, atol=2e-6 * scale)


# --- peft -------------------------------------------------------------------------------------------------------------

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "downsamplers.0.conv"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"lora_alpha": 3}),
    "rank-stabilised": ("LoraConfig", {"lora_alpha": 3, "use_rslora": True}),
    "patterns": (
        "LoraConfig",
        {
            "lora_alpha": 3,
            "rank_pattern": {"to_q": 2, "mid_block.*proj_in": 3},
            "alpha_pattern": {"to_q": 5, "down_blocks.0.*to_k": 7},
        },
    ),
    "DoRA": ("LoraConfig", {"lora_alpha": 3, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"alpha": 3}),
    "LoHa Tucker": ("LoHaConfig", {"alpha": 3, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"alpha": 3, "decompose_both": True, "r": 2}),
    "LoKr Tucker": ("LoKrConfig", {"alpha": 3, "use_effective_conv2d": True, "r": 2}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    name, options = CONFIGS[kind]
    model = tiny.model(FAMILY)
    theirs = peft.get_peft_model(
        tiny.model(FAMILY).unet, getattr(peft, name)(**{"r": RANK, "target_modules": LINEAR, **options})
    )
    base = dict(model.unet.named_parameters())
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) / 4
            parameter.data = parameter.abs() + 0.1 if "magnitude" in key else noise
    theirs.save_pretrained(tmp_path / "style")
    found = open_adapter(tmp_path / "style", model)
    assert (found.name, found.layout, list(found.changes)) == ("style", "peft", ["unet"])
    ours = merged_with(model.unet, found)
    with torch.no_grad():
        wanted = theirs.merge_and_unload()
    changed = 0
    for key, value in wanted.named_parameters():
        torch.testing.assert_close(ours.get_parameter(key), value, rtol=1e-6, atol=1e-6 * float(value.abs().max() + 1))
        changed += not torch.equal(value, base[key])
    assert changed == len(found.changes["unet"]) > 50


def test_peft_of_a_text_tower(tmp_path: Path) -> None:
    """The folder's name says which of SDXL's towers is meant; without it the shapes do."""
    peft = pytest.importorskip("peft")
    model = tiny.model("sdxl")
    for folder in ("text_encoder_2", "any"):
        tower = tiny.model("sdxl").modules()["text_encoder_2"]
        theirs = peft.get_peft_model(tower, peft.LoraConfig(r=RANK, target_modules=["q_proj"], init_lora_weights=False))
        theirs.save_pretrained(tmp_path / folder)
        found = open_adapter(tmp_path / folder, model)
        assert list(found.changes) == ["text_encoder_2"] and len(found.changes["text_encoder_2"]) == 3
    both = tmp_path / "both"
    (tmp_path / "text_encoder_2").rename(both / "text_encoder_2") if both.mkdir() is None else None
    assert list(open_adapter(both, model).changes) == ["text_encoder_2"]


# --- diffusers --------------------------------------------------------------------------------------------------------


def pipeline_of(model: LatentDiffusion, family: str, folder: Path) -> Any:
    diffusers = pytest.importorskip("diffusers")
    model.save_pretrained(folder)
    return getattr(diffusers, tiny.PIPELINES[family]).from_pretrained(folder)


def fused_by_diffusers(pipeline: Any, file: Path) -> Any:
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline


@pytest.mark.parametrize("naming", ["kohya-sgm", "kohya", "diffusers"])
def test_diffusers_reads_the_same(tmp_path: Path, naming: str) -> None:
    """In SDXL, whose first text tower diffusers 0.42 cannot change; with one alpha, since it scales others wrongly."""
    model = tiny.model("sdxl")

    def chosen(place: Place) -> bool:
        return "attn" in place.layer and place.component != "text_encoder"

    def make(value: Tensor) -> dict[str, Tensor]:
        if naming == "diffusers":
            return lora(value, ("lora_A.weight", "lora_B.weight"))
        return {**lora(value), "alpha": alpha(2)}

    file = saved(adapter(model, naming, make, chosen), tmp_path / "style.safetensors")
    found = open_adapter(file, model)
    theirs = fused_by_diffusers(pipeline_of(model, "sdxl", tmp_path / "model"), file)
    x, t, cond = inputs(model.unet, torch.float32)
    ours: UNet = merged_with(model.unet, found)
    with torch.no_grad():
        extra = {"text_embeds": cond.pooled, "time_ids": cond.size}
        wanted = theirs.unet(x, t, cond.text, added_cond_kwargs=extra).sample
        near(ours(x, t, cond), wanted, RUN)
        assert not torch.allclose(model.unet(x, t, cond), wanted, rtol=1e-2, atol=1e-2)
    for key, value in theirs.unet.named_parameters():
        torch.testing.assert_close(ours.get_parameter(key), value, rtol=1e-6, atol=1e-6)
    tower = merged_with(model.modules()["text_encoder_2"], found, "text_encoder_2")
    for key, value in theirs.text_encoder_2.named_parameters():
        torch.testing.assert_close(tower.get_parameter(key), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metadata", [True, False])
def test_written_by_diffusers(tmp_path: Path, metadata: bool) -> None:
    """Ranks and alphas are in the metadata; without it alpha is the rank."""
    peft = pytest.importorskip("peft")
    model = tiny.model("sdxl")
    theirs = pipeline_of(model, "sdxl", tmp_path / "model")
    options = {"alpha_pattern": {"to_q": 5}, "rank_pattern": {"to_k": 2}, "use_dora": True} if metadata else {}
    config = peft.LoraConfig(r=RANK, lora_alpha=3 if metadata else RANK, target_modules=LINEAR[:4], **options)
    theirs.unet.add_adapter(config)
    randomised_adapters(theirs.unet)
    state = peft.get_peft_model_state_dict(theirs.unet)
    more = {"unet_lora_adapter_metadata": config.to_dict()} if metadata else {}
    theirs.save_lora_weights(tmp_path / "style", unet_lora_layers=state, **more)
    found = open_adapter(tmp_path / "style", model)
    assert (found.name, found.kind, found.layout) == ("style", "DoRA" if metadata else "LoRA", "diffusers")
    x, t, cond = inputs(model.unet, torch.float32)
    with torch.no_grad():
        wanted = theirs.unet(x, t, cond.text, added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.size})
        near(merged_with(model.unet, found)(x, t, cond), wanted.sample, RUN)


def randomised_adapters(unet: nn.Module) -> None:
    for key, parameter in unet.named_parameters():
        if "lora_" in key and "magnitude" not in key:
            parameter.data = torch.randn_like(parameter) / 8
