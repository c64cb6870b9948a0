"""Models and adapters for few steps, recognised by their names, and their settings as defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run

from ldm.weights.few_step import made_for
from pipelines import Pipeline


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("sd_xl_turbo_1.0_fp16.safetensors", ("Turbo", 1, "euler-a", "trailing", 1.0, 0.0)),
        ("stabilityai/sdxl-turbo", ("Turbo", 1, "euler-a", "trailing", 1.0, 0.0)),
        ("stabilityai/sd-turbo", ("Turbo", 1, "euler", "trailing", 1.0, 0.0)),
        ("sdxl_lightning_4step.safetensors", ("Lightning", 4, "euler", "trailing", 1.0, 0.0)),
        ("x/sdxl_lightning_8step_lora.safetensors", ("Lightning", 8, "euler", "trailing", 1.0, 0.0)),
        ("Hyper-SDXL-1step-lora.safetensors", ("Hyper-SD", 1, "tcd", "default", 1.0, 1.0)),
        ("Hyper-SD15-4steps-lora.safetensors", ("Hyper-SD", 4, "ddim", "trailing", 1.0, 0.0)),
        ("Hyper-SDXL-12steps-CFG-lora.safetensors", ("Hyper-SD", 12, "ddim", "trailing", 5.0, 0.0)),
        ("TCD-SDXL-LoRA/pytorch_lora_weights.safetensors", ("TCD", 4, "tcd", "default", 1.0, 0.3)),
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", ("LCM", 4, "lcm", "default", 1.0, 0.0)),
        ("LCM_LoRA_Weights_SD15.safetensors", ("LCM", 4, "lcm", "default", 1.0, 0.0)),
        ("lcm-sdxl/unet/diffusion_pytorch_model.fp16.safetensors", ("LCM", 4, "lcm", "default", 1.0, 0.0)),
    ],
)
def test_names_of_released_files(path: str, wanted: tuple[Any, ...]) -> None:
    few = made_for(path)
    assert few is not None
    assert (few.name, few.steps, few.scheduler, few.spacing, few.guidance, few.eta) == wanted


@pytest.mark.parametrize(
    "path",
    [
        "sd_xl_base_1.0.safetensors", "turbo/v1-5-pruned.safetensors", "dreamshaperXL_turboDPMSDE.safetensors",
        "lightning_style.safetensors", "hyperreal.safetensors", "model.safetensors",
        "Hyper-SDXL-1step-Unet.safetensors", "/", ".", "palcmyra.safetensors",
    ],
)  # fmt: skip
def test_other_names(path: str) -> None:
    assert made_for(path) is None


def test_metadata() -> None:
    assert made_for("mine.safetensors", {"modelspec.title": "SDXL Lightning 2step"}).steps == 2  # type: ignore[union-attr]
    assert made_for("mine.safetensors", {"modelspec.title": "a style"}) is None


def test_one_step_of_lightning_predicts_clean_latents() -> None:
    assert made_for("sdxl_lightning_1step_x0.safetensors").prediction_type == "sample"  # type: ignore[union-attr]


def test_defaults_of_a_file(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said in one line, recorded in full, and given settings replace them."""
    model = tiny.model("sdxl")
    model.save_pretrained(tmp_path / "sdxl_lightning_2step.safetensors")
    pipeline = Pipeline(tmp_path / "sdxl_lightning_2step.safetensors", dtype=torch.float32, device="cpu")
    assert "Lightning, made for 2 steps of euler (trailing) and no guidance; these are the defaults" in caplog.text
    shown = run(capsys, monkeypatch, "info", tmp_path / "sdxl_lightning_2step.safetensors")[1]
    assert "few steps" in shown and "made for 2 steps of euler" in shown
    made = pipeline("a cat", seed=1, output="latents")
    explicit = {"steps": 2, "scheduler": "euler", "spacing": "trailing", "guidance": 1.0}
    plain = Pipeline(model)("a cat", seed=1, output="latents", **explicit)
    torch.testing.assert_close(made.latents[0], plain.latents[0], atol=1e-4, rtol=1e-3)
    record = made.settings[0]
    assert {name: record[name] for name in ("steps", "scheduler", "spacing")} | {
        "guidance": record["guidance"]["scale"]
    } == explicit
    record = pipeline("a cat", seed=1, steps=3, scheduler="lcm", output="latents").settings[0]
    assert (record["steps"], record["scheduler"], record["spacing"]) == (3, "lcm", "default")


def test_a_component_and_a_folder(tmp_path: Path) -> None:
    model = tiny.model("sdxl")
    model.save_pretrained(tmp_path / "sdxl")
    model.save_pretrained(tmp_path / "sd_xl_turbo_1.0.safetensors")
    unet = tmp_path / "sdxl_lightning_4step_unet.safetensors"
    (tmp_path / "sdxl/unet/diffusion_pytorch_model.safetensors").rename(unet)
    whole = Pipeline(tmp_path / "sd_xl_turbo_1.0.safetensors", dtype=torch.float32, device="cpu").model.family
    assert whole.few_step
    assert (whole.few_step.name, whole.name) == ("Turbo", model.family.name)
    mixed = Pipeline(tmp_path / "sd_xl_turbo_1.0.safetensors", components={"unet": unet}, device="cpu").model.family
    assert mixed.few_step
    assert mixed.few_step.name == "Lightning"
    lcm = tiny.model("sd15")
    lcm.family = replace(lcm.family, schedule=replace(lcm.family.schedule, scheduler="LCMScheduler"))
    lcm.save_pretrained(tmp_path / "mine")
    assert Pipeline(tmp_path / "mine", device="cpu").model.family.few_step.scheduler == "lcm"  # type: ignore[union-attr]
