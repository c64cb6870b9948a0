"""Adapters written in every format: round trips, diffusers' and peft's readers, resizing and extraction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from adapter_files import adapter, alpha, attention, columns, deltas, everything, lora, saved
from safetensors import safe_open
from torch import Tensor

from ldm.errors import LdmError
from ldm.patches.low_rank import Kronecker, LowRank
from ldm.weights.adapters import Adapter, open_adapter
from ldm.weights.adapters.factoring import Kept, Reduction, extracted, factored, resized
from ldm.weights.adapters.names import Place
from ldm.weights.adapters.writing import FORMATS, write_adapter


def close(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=bound, rtol=1e-5) for name in a)


def with_alpha(value: Tensor) -> dict[str, Tensor]:
    return lora(value) | {"alpha": alpha(3.0)}


def dora(value: Tensor) -> dict[str, Tensor]:
    return with_alpha(value) | {"dora_scale": torch.rand(len(value), *(1 for _ in value.shape[1:])) + 0.5}


def loha(value: Tensor) -> dict[str, Tensor]:
    made = {f"hada_w{n}_a": torch.randn(len(value), 2) for n in (1, 2)}
    return made | {f"hada_w{n}_b": torch.randn(2, columns(value)) for n in (1, 2)} | {"alpha": alpha(1.0)}


def lokr(value: Tensor) -> dict[str, Tensor]:
    rows = len(value) // 2
    first = {"lokr_w1": torch.randn(2, 2)} if value.shape[1] % 2 == 0 else {"lokr_w1": torch.randn(2, 1)}
    inner = columns(value) // first["lokr_w1"].shape[1]
    return first | {"lokr_w2_a": torch.randn(rows, 2), "lokr_w2_b": torch.randn(2, inner), "alpha": alpha(1.0)}


def whole(value: Tensor) -> dict[str, Tensor]:
    return {"diff": torch.randn_like(value), "diff_b": torch.randn(len(value))}


def in_unet(place: Place) -> bool:
    return place.component == "unet" and attention(place)


def opened(model: tiny.LatentDiffusion, folder: Path, make=with_alpha, chosen=attention) -> Adapter:  # type: ignore[no-untyped-def]
    naming = "kohya-sgm" if model.family.xl else "kohya"
    file = saved(adapter(model, naming, make, chosen), folder / "style.safetensors", {"ss_output_name": "style"})
    return open_adapter(file, model)


def at(folder: Path, naming: str) -> Path:
    return folder / ("written" if naming == "peft" else "written.safetensors")


@pytest.mark.parametrize("naming", list(FORMATS))
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("make", [with_alpha, dora])
def test_what_is_written_reads_the_same(tmp_path: Path, family: str, naming: str, make) -> None:  # type: ignore[no-untyped-def]
    model = tiny.model(family)
    found = opened(model, tmp_path, make, everything)
    write_adapter(found, model, at(tmp_path, naming), naming)
    again = open_adapter(at(tmp_path, naming), model)
    assert again.kind == found.kind
    assert close(deltas(again, model), deltas(found, model))


@pytest.mark.parametrize("make", [loha, lokr, whole])
def test_other_kinds_are_written_with_kohyas_names_alone(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    model = tiny.model("sd15")
    chosen = in_unet if make is not whole else lambda place: in_unet(place) and "to_out" in place.layer
    found = opened(model, tmp_path, make, chosen)
    write_adapter(found, model, tmp_path / "written.safetensors", "kohya")
    assert close(deltas(open_adapter(tmp_path / "written.safetensors", model), model), deltas(found, model))
    with pytest.raises(LdmError, match=r"style.*cannot hold; write kohya's"):
        write_adapter(found, model, tmp_path / "other.safetensors", "diffusers")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("naming", ["diffusers", "peft"])
def test_dora_in_some_layers_alone(tmp_path: Path, naming: str) -> None:
    """Other readers take the norms of DoRA to be in all layers of a network or in none."""
    model = tiny.model("sd15")
    whole_dora = opened(model, tmp_path, dora)
    unet = dict(whole_dora.changes["unet"])
    name = min(unet)
    unet[name] = unet[name].change  # type: ignore[attr-defined]
    found = replace(whole_dora, changes={**whole_dora.changes, "unet": unet})
    with pytest.raises(LdmError, match=f"unet has layers of DoRA and others .*{name}.*--format kohya"):
        write_adapter(found, model, at(tmp_path, naming), naming)
    write_adapter(found, model, tmp_path / "kohya.safetensors", "kohya")
    assert close(deltas(open_adapter(tmp_path / "kohya.safetensors", model), model), deltas(found, model))
    plain = {name: change.change for name, change in whole_dora.changes["unet"].items()}  # type: ignore[attr-defined]
    by_network = replace(whole_dora, changes={**whole_dora.changes, "unet": plain})
    write_adapter(by_network, model, at(tmp_path, naming), naming)
    assert close(deltas(open_adapter(at(tmp_path, naming), model), model), deltas(by_network, model))


def test_whole_kronecker_factors_keep_their_scale(tmp_path: Path) -> None:
    model = tiny.model("sd15")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    weight = model.unet.get_parameter(name)
    change = Kronecker(torch.randn(2, 2), torch.randn(len(weight) // 2, weight.shape[1] // 2), 0.25)
    found = Adapter("k", Path("k.safetensors"), "LoKr", "kohya", {"unet": {name: change}})
    write_adapter(found, model, tmp_path / "k.safetensors", "kohya")
    assert close(deltas(open_adapter(tmp_path / "k.safetensors", model), model), deltas(found, model))


def test_the_header_says_what_the_web_interfaces_read(tmp_path: Path) -> None:
    model = replace_family(tiny.model("sdxl"), "sdxl")
    write_adapter(opened(model, tmp_path), model, tmp_path / "w.safetensors", "kohya", dtype=torch.float16)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        metadata, name = file.metadata(), next(iter(file.keys()))
        assert file.get_tensor(name).dtype == torch.float16
    assert metadata["ss_output_name"] == "style"  # the file's own is kept
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "3.0")
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def replace_family(model: tiny.LatentDiffusion, name: str) -> tiny.LatentDiffusion:
    return tiny.LatentDiffusion(replace(model.family, name=name), model.networks)


@pytest.mark.parametrize("naming", list(FORMATS))
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_reads_what_is_written(tmp_path: Path, family: str, naming: str) -> None:
    """The U-Net's LoRA, loaded by diffusers or peft and fused, gives the weights that merging here gives."""
    diffusers = pytest.importorskip("diffusers")
    model = tiny.model(family)
    found = opened(model, tmp_path, with_alpha, in_unet)
    write_adapter(found, model, at(tmp_path, naming), naming)
    model.save_pretrained(tmp_path / "model")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    if naming == "peft":
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(theirs, at(tmp_path, naming) / "unet").merge_and_unload()
    else:
        loader = getattr(diffusers, tiny.PIPELINES[family])
        state, alphas, *more = loader.lora_state_dict(
            at(tmp_path, naming), unet_config=theirs.config, return_lora_metadata=True
        )
        loader.load_lora_into_unet(state, network_alphas=alphas, unet=theirs, metadata=more[0] if more else None)
        theirs.fuse_lora()
        theirs.unload_lora()
    expected = {f"unet.{name}": p.detach() for name, p in model.unet.named_parameters()}
    for name, delta in deltas(found, model).items():
        expected[name] = expected[name] + delta
    assert close({f"unet.{name}": p.detach() for name, p in theirs.named_parameters()}, expected, 1e-5)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_factors_are_the_best_of_their_rank() -> None:
    delta = torch.randn(24, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    kept = Kept()
    change = factored(delta, Reduction(rank=5), kept)
    assert change.up.shape == (24, 5, 1, 1)
    assert change.down.shape == (5, 6, 3, 3)
    rest = (delta - change.delta(delta)).square().sum()
    singular = torch.linalg.svdvals(delta.flatten(1)).square()
    assert torch.allclose(rest, singular[5:].sum(), rtol=1e-4)
    assert kept.share == pytest.approx(float(singular[:5].sum() / singular.sum()), rel=1e-5)


def test_energy_takes_the_smallest_rank_that_keeps_it() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0])
    delta = torch.diag(values)
    for share, rank in ((0.7, 1), (64 / 85, 1), (0.8, 2), (0.95, 3), (1.0, 4)):
        assert len(factored(delta, Reduction(energy=share), Kept()).down) == rank
    assert len(factored(delta, Reduction(rank=1, energy=0.99), Kept()).down) == 1


@pytest.mark.parametrize("make", [with_alpha, loha, dora])
def test_a_resize_to_the_full_rank_changes_nothing(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    model = tiny.model("sd15")
    found = opened(model, tmp_path, make, in_unet)
    same, kept = resized(found, model, Reduction(rank=4096))
    assert close(deltas(same, model), deltas(found, model), 1e-4)
    assert kept.share == 1
    _, kept = resized(found, model, Reduction(rank=2))
    assert kept.largest == 2
    assert 0.3 < kept.share < 1


def test_the_difference_of_two_models(tmp_path: Path) -> None:
    """A merged LoRA is found again, to rounding; what no LoRA can hold is counted."""
    base, tuned = tiny.model("sdxl"), tiny.model("sdxl")
    found = opened(base, tmp_path)
    for component, changes in found.changes.items():
        for name, change in changes.items():
            weight = tuned.modules()[component].get_parameter(name)
            weight.data += change.delta(weight.detach())
    tuned.unet.conv_in.bias.data += 1
    changes, kept, left_out = extracted(base, tuned, Reduction(rank=4), lambda: None)
    assert left_out == 1
    assert kept.share > 0.99999
    again = Adapter("d", Path("d"), "LoRA", "kohya", changes)
    assert close(deltas(again, base), deltas(found, base), 1e-5)
    assert all(isinstance(change, LowRank) for own in changes.values() for change in own.values())


def test_layers_called_embeddings(tmp_path: Path) -> None:
    """Linear layers of the U-Net's timestep and size embeddings are factored, tables of token embeddings are not."""
    base, tuned = tiny.model("sdxl"), tiny.model("sdxl")
    layers = [f"{part}_embedding.linear_{n}.weight" for part in ("time", "add") for n in (1, 2)]
    for name in layers:
        weight = tuned.unet.get_parameter(name)
        weight.data += torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
    for name, parameter in tuned.text_encoders.named_parameters():
        if "embedding." in name:
            parameter.data += 1
    changes, kept, left_out = extracted(base, tuned, Reduction(rank=1), lambda: None)
    assert sorted(changes["unet"]) == sorted(layers)
    assert [*changes] == ["unet"]
    assert left_out == 4
    assert kept.share > 0.9999
    write_adapter(Adapter("d", Path("d"), "LoRA", "kohya", changes), base, tmp_path / "d.safetensors", "kohya")
    again = open_adapter(tmp_path / "d.safetensors", base)
    for name in layers:
        change = tuned.unet.get_parameter(name) - base.unet.get_parameter(name)
        assert torch.allclose(again.changes["unet"][name].delta(change), change, atol=1e-5)


def test_models_that_have_no_difference_for_an_adapter() -> None:
    base = tiny.model("sd15")
    with pytest.raises(LdmError, match="the same weights"):
        extracted(base, tiny.model("sd15"), Reduction(rank=4), lambda: None)
    with pytest.raises(LdmError, match=r"differ in shape, first at .*; name two models of one family"):
        extracted(base, tiny.model("sd2"), Reduction(rank=4), lambda: None)
