"""`ldm adapter`: the command, from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from adapter_files import adapter, alpha, lora, saved
from commands import run
from safetensors.torch import load_file
from torch import Tensor

from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.adapters import open_adapter

METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_tag_frequency": json.dumps({"10_fox": {"fox": 20, "snow": 5}, "reg": {"fox": 1}}),
    "ss_num_epochs": "12",
}


def with_alpha(value: Tensor) -> dict[str, Tensor]:
    return lora(value) | {"alpha": alpha(2.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, one of a model trained from it, and a LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny.model("sdxl", shallow=True)
    model.save_pretrained(folder / "model")
    saved(adapter(model, "kohya-sgm", with_alpha), folder / "style.safetensors", METADATA)
    found = open_adapter(folder / "style.safetensors", model)
    for component, changes in found.changes.items():
        for name, change in changes.items():
            weight = model.modules()[component].get_parameter(name)
            weight.data += 0.5 * change.delta(weight.detach())
    model.save_pretrained(folder / "tuned")
    return folder


def state(source: Path) -> dict[str, Tensor]:
    model = LatentDiffusion.from_pretrained(source)
    return {f"{c}.{name}": p.detach() for c, m in model.modules().items() for name, p in m.named_parameters()}


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    code, out, _ = run(capsys, monkeypatch, "adapter", "info", folder / "style.safetensors", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["kind"], found["rank"], found["alpha"]) == ("LoRA", "4", "2.0")
    assert found["base"] == "SDXL"
    assert found["trigger_words"] == "fox, snow"
    assert found["training"]["ss_num_epochs"] == "12"
    code, out, _ = run(capsys, monkeypatch, "adapter", "info", folder / "style.safetensors")
    assert code == 0
    assert "trigger words" in out


def test_an_adapter_of_a_model_of_its_own_shape_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The built-in model's text has fewer channels than any released one's."""
    _, out, _ = run(capsys, monkeypatch, "adapter", "info", "contrast", "--json")
    assert json.loads(out)["base"] == "emoji, like SDXL"
    code, out, _ = run(capsys, monkeypatch, "adapter", "convert", "contrast", tmp_path / "peft", "--format", "peft")
    assert code == 0
    assert (tmp_path / "peft").is_dir()


def test_a_merge_is_the_model_trained_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    lora_file = f"{folder / 'style.safetensors'}:0.5"
    code, _, err = run(
        capsys, monkeypatch, "adapter", "merge", folder / "model", tmp_path / "merged", "--lora", lora_file
    )  # fmt: skip
    assert (code, err) == (0, "")
    merged, tuned = state(tmp_path / "merged"), state(folder / "tuned")
    assert all(torch.allclose(merged[name], tuned[name], atol=1e-6) for name in tuned)
    assert not torch.equal(
        merged["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"],
        state(folder / "model")["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"],
    )


def test_extract_resize_convert(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    out, small, other = (tmp_path / name for name in ("out.safetensors", "small.safetensors", "other.safetensors"))
    where = ("--model", folder / "model")
    code, _, err = run(
        capsys, monkeypatch, "adapter", "extract", folder / "model", folder / "tuned", out,
        "--rank", 4, "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0
    assert "rank 4 keeps 100.00% of the energy" in err
    code, _, err = run(capsys, monkeypatch, "adapter", "resize", out, small, "--rank", 2, *where)
    assert code == 0
    assert "rank 2 keeps" in err
    code, _, err = run(capsys, monkeypatch, "adapter", "convert", small, other, "--format", "diffusers", *where)
    assert (code, err) == (0, "")
    model = LatentDiffusion.from_pretrained(folder / "model")
    before, after = open_adapter(small, model), open_adapter(other, model)
    assert (before.layout, after.layout) == ("kohya-sgm", "diffusers")
    for component, changes in before.changes.items():
        for name, change in changes.items():
            weight = model.modules()[component].get_parameter(name).detach()
            assert torch.allclose(change.delta(weight), after.changes[component][name].delta(weight), atol=1e-6)


def test_what_fits_of_an_adapter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """The option that the error recommends is one of each command that reads adapters."""
    file, model = tmp_path / "more.safetensors", folder / "model"
    saved(load_file(folder / "style.safetensors") | {"lora_unet_gone.lora_up.weight": torch.ones(2, 2)}, file)
    for number, arguments in enumerate(
        (["merge", model, "DEST", "--lora", file], ["resize", file, "DEST", "--rank", 2, "--model", model],
         ["convert", file, "DEST", "--format", "diffusers", "--model", model])
    ):  # fmt: skip
        dest = tmp_path / f"{number}.safetensors"
        given = [dest if one == "DEST" else one for one in arguments]
        code, _, err = run(capsys, monkeypatch, "adapter", *given)
        assert (code, "--partial-adapters" in err, dest.exists()) == (1, True, False)
        caplog.clear()
        assert run(capsys, monkeypatch, "adapter", *given, "--partial-adapters")[0] == 0
        assert "1 tensors match nothing in the model and are left out: lora_unet_gone" in caplog.text
        assert dest.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "missing.safetensors"], "missing.safetensors does not exist"),
        (["info", "model"], "is a model's folder, not an adapter"),
        (["resize", "style.safetensors", "o.safetensors"], "name a rank (--rank 16)"),
        (["resize", "style.safetensors", "o.safetensors", "--rank", "0"], "--rank 0: a whole number from 1"),
        (["resize", "style.safetensors", "o.safetensors", "--energy", "nan"], "--energy nan: a number above 0"),
        (
            ["convert", "style.safetensors", "o.safetensors", "--format", "a1111"],
            "choose one of: kohya, diffusers, peft",
        ),
        (["convert", "style.safetensors", "o", "--format", "kohya"], "a name that ends in .safetensors is needed"),
        (["convert", "style.safetensors", "o.safetensors", "--format", "peft"], "a folder is needed"),
        (["convert", "style.safetensors", "style.safetensors", "--format", "diffusers"], "exists; "),
        (["convert", "style.safetensors", "o.safetensors", "--format", "kohya"], "is for another model"),  # a tiny one
        (["extract", "model", "model", "o.safetensors", "--rank", "4"], "the same weights"),
        (["merge", "model", "o", "--lora", "style.safetensors:x"], "FILE, FILE:WEIGHT"),
        (["merge", "model", "o", "--lora", "gone.safetensors"], "gone.safetensors does not exist"),
        (["merge", "missing", "o", "--lora", "style.safetensors"], "missing does not exist"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    for name in ("model", "style.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, monkeypatch, "adapter", *arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"model", "style.safetensors"}
