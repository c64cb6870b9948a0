"""U-Nets that read their guidance scale (LCM), against diffusers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from accelerate import Accelerator
from rounding import RUN, near

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import Conditioning
from ldm.patches.patching import patched
from ldm.training.stages.denoiser import DenoiserSection, DenoiserStage
from ldm.weights.configs import write_unet
from pipelines import Pipeline

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def distilled(name: str) -> LatentDiffusion:
    family = tiny.family(name)
    schedule = replace(family.schedule, scheduler="LCMScheduler", options={"original_inference_steps": 50})
    family = replace(family, unet=replace(family.unet, guidance_dim=16), schedule=schedule)
    return LatentDiffusion.from_family(family)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_one_pass(name: str) -> None:
    unet = distilled(name).unet.eval()
    theirs = diffusers.UNet2DConditionModel.from_config(write_unet(unet.config)).eval()
    theirs.load_state_dict(unet.state_dict())
    c = unet.config
    x, text, time = torch.randn(2, 4, 8, 8), torch.randn(2, 9, c.text_dim), torch.tensor([3, 981])
    pooled, size = (torch.randn(2, c.pooled_dim), torch.rand(2, 6)) if c.pooled_dim else (None, None)
    embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    for scale in (1.0, 2.5, 8.5):
        guidance = embed(None, torch.tensor([scale - 1] * 2), c.guidance_dim)
        with torch.no_grad():
            ours = patched(unet, {"embedded_guidance": scale})(x, time, Conditioning(text, pooled, size))
            wanted = theirs(
                x, time, text, timestep_cond=guidance, added_cond_kwargs={"text_embeds": pooled, "time_ids": size}
            ).sample
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert unet.time_embedding.scale == 1.0


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_run_from_a_folder_and_from_a_file(name: str, tmp_path: Path) -> None:
    """Four steps of LCM, without a pass for the negative prompt; another scale gives another image."""
    model = distilled(name)
    model.save_pretrained(tmp_path / "folder")
    kind = "StableDiffusionXLPipeline" if name == "sdxl" else "StableDiffusionPipeline"
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "folder")
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(
        "a cat", num_inference_steps=4, guidance_scale=8.5, generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images  # fmt: skip
    pipeline = Pipeline(tmp_path / "folder", dtype=torch.float32, device="cpu", quick=False)
    made = pipeline("a cat", seed=3, rng="diffusers", output="latents")
    near(torch.stack(made.latents), wanted, RUN)
    record = made.settings[0]
    assert (record["steps"], record["scheduler"], record["guidance"]["scale"]) == (4, "lcm", 8.5)
    other = pipeline("a cat", seed=3, rng="diffusers", output="latents", guidance=2.0)
    assert not torch.allclose(other.latents[0], made.latents[0], atol=1e-3)


def test_original_names() -> None:
    """ComfyUI's name of the tensor, through a single file at its real size on the meta device."""
    from ldm.families import FAMILIES
    from ldm.models.unet import UNet
    from ldm.weights.layouts import original_unet

    config = replace(FAMILIES["sd15"].unet, guidance_dim=256)
    with torch.device("meta"):
        names = [name for name, _ in UNet(config).named_parameters()]
    theirs = {link.theirs for link in original_unet(config, "model.diffusion_model.")(names)}
    assert "model.diffusion_model.time_embed.cond_proj.weight" in theirs
    assert len(theirs) == len(names)


def test_a_negative_prompt_has_no_effect_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline(distilled("sd15"))
    plain, told = (
        pipeline("a cat", seed=3, steps=2, scheduler="lcm", guidance=4.0, output="latents", **more).latents[0]
        for more in ({}, {"negative": "bad"})
    )
    assert torch.equal(plain, told)
    assert "the negative prompt has no effect" in caplog.text


def test_training_starts_from_another_model() -> None:
    with pytest.raises(LdmError, match="base: the U-Net of custom was distilled for few steps"):
        DenoiserStage("base", DenoiserSection(), distilled("sd15"), Accelerator(cpu=True), 0)
