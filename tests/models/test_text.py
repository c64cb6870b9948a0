"""Text encoders against transformers, diffusers' pipelines and open_clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.errors import LdmError
from ldm.families import OPENCLIP_BIGG, OPENCLIP_H
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.clip_text import TextEncoderConfig, TextLayer, build_tower
from ldm.models.text import TextEncoders
from ldm.weights.configs import write_text

PROMPTS = [
    "a photo of a cat",
    "",
    "A  Painting\tof THE sea, by Hokusai; it's 3 o'clock & we'll go!!",
    "naïve café – 東京 🙂 <|endoftext|> ½ ﬁ İstanbul",
    "word " * 200,
]


def reference(tower: torch.nn.Module, config: TextEncoderConfig, end_id: int) -> Any:
    """transformers' class with the same weights."""
    kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    theirs = kind(CLIPTextConfig(**write_text(config, end_id)))
    theirs.load_state_dict(tower.state_dict())
    return theirs.eval()


def scattered(config: TextEncoderConfig, end_id: int = 999) -> Any:
    """A tower none of whose weights is at a special value."""
    tower = build_tower(config, end_id)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tower


@pytest.mark.parametrize("projection", [0, 40])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_towers_equal_transformers(activation: str, projection: int) -> None:
    """Behind every layer, and at the first end of each text, wherever that is."""
    config = replace(tiny.tower(TextEncoderConfig()), activation=activation, projection=projection, layers=4)
    tower = scattered(config)
    theirs = reference(tower, config, 999)
    for length in (1, 20, 77):
        ids = torch.randint(0, 998, (5, length))
        ids[0, length // 2 :] = 999
        ids[1, -1] = 999
        ids[2, 0] = 999
        ids[3, length // 3] = ids[3, -1] = 999
        with torch.no_grad():
            expected = theirs(ids, output_hidden_states=True)
            states = tower(ids, *range(5))
            pooled = tower.end(states[-1], ids)
        for ours, other in zip(states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)
        end = expected.text_embeds if projection else expected.pooler_output
        torch.testing.assert_close(pooled, end, atol=1e-5, rtol=0)
        if not projection:
            normed = tower.final_layer_norm(states[-1])
            torch.testing.assert_close(normed, expected.last_hidden_state, atol=1e-5, rtol=0)


def test_gradients_equal_transformers() -> None:
    config = tiny.tower(OPENCLIP_BIGG)
    tower = scattered(config)
    theirs = reference(tower, config, 999)
    ids = torch.randint(0, 1000, (3, 77))
    ids[:, 40:] = 999
    (last,) = tower(ids, config.layers)
    tower.end(last, ids).square().sum().backward()
    theirs(ids).text_embeds.square().sum().backward()
    for (name, ours), other in zip(tower.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl-refiner"])
def test_layers_that_nothing_depends_on_do_not_run(name: str, clip_skip: int) -> None:
    encoders = tiny.model(name).text_encoders
    runs = []
    for tower in encoders.towers:
        ran: list[torch.nn.Module] = []
        for module in tower.modules():
            if isinstance(module, TextLayer):
                module.register_forward_hook(lambda module, *_, ran=ran: ran.append(module))
        runs.append(ran)
    encoders(["a cat"], clip_skip)
    wanted = {"sd15": [3 - clip_skip], "sdxl": [2 - clip_skip, 3], "sdxl-refiner": [3]}
    assert [len(ran) for ran in runs] == wanted[name]


@pytest.mark.parametrize("real", [TextEncoderConfig(), OPENCLIP_BIGG], ids=["without projection", "with"])
def test_initial_weights_are_distributed_as_those_of_transformers(real: TextEncoderConfig) -> None:
    config = replace(tiny.tower(real), width=128, hidden=512)
    tower = build_tower(config, 999)
    kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    theirs = kind(CLIPTextConfig(**write_text(config, 999)))
    for (name, ours), other in zip(tower.named_parameters(), theirs.parameters(), strict=True):
        assert ours.mean().item() == pytest.approx(other.mean().item(), abs=0.1 * other.std().item() + 1e-8), name
        assert ours.std().item() == pytest.approx(other.std().item(), rel=0.05, abs=1e-8), name


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_sd_equals_diffusers(tmp_path: Path, name: str) -> None:
    model = tiny.model(name)
    model.save_pretrained(tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
        ours = model.encode_prompt(PROMPTS)
    torch.testing.assert_close(ours.text, theirs, atol=1e-5, rtol=0)
    assert ours.pooled is None
    assert ours.size is None


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_sdxl_equals_diffusers(tmp_path: Path, clip_skip: int) -> None:
    model = tiny.model("sdxl")
    model.save_pretrained(tmp_path / "model")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    skip = clip_skip or None  # diffusers: None for no skip
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, "cpu", 1, False, clip_skip=skip)
        ours = model.encode_prompt(PROMPTS, clip_skip=clip_skip)
    torch.testing.assert_close(ours.text, text, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=0)
    assert ours.size.tolist() == [[64, 64, 0, 0, 64, 64]] * len(PROMPTS)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_leaves_out_the_last_layers(clip_skip: int) -> None:
    """Against a tower that never had those layers."""
    whole = tiny.model("sd15").text_encoders
    config = tiny.tower(TextEncoderConfig())
    cut = TextEncoders([replace(config, layers=config.layers - clip_skip)], whole.tokenizers, pooled=False)
    cut.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(whole(PROMPTS, clip_skip).text, cut.eval()(PROMPTS).text, atol=1e-5, rtol=0)


def test_prompts_that_are_no_text() -> None:
    model = tiny.model("sdxl")
    for prompt, message in (
        ("\ud800", "half a character"),
        ([None], "a text is needed"),
        ([], "at least one text"),
        (None, "at least one text"),
    ):
        with pytest.raises(LdmError, match=message):
            model.encode_prompt(prompt)  # type: ignore[arg-type]
    with pytest.raises(LdmError, match="all of them numbers"):
        model.encode_prompt("a", size=[float("nan")] * 6)


@pytest.mark.parametrize("clip_skip", [-1, 3, 100, "1"])
def test_absurd_clip_skip_is_refused(clip_skip: int) -> None:
    with pytest.raises(LdmError, match="choose from 0 to 2"):
        tiny.model("sd15").encode_prompt("a", clip_skip=clip_skip)


def test_refiner_has_five_size_ids() -> None:
    model = tiny.model("sdxl-refiner")
    assert model.encode_prompt("a").size.tolist() == [[64, 64, 0, 0, 6]]
    with pytest.raises(LdmError, match="takes 5 time ids"):
        model.encode_prompt("a", size=[1, 2, 3, 4, 5, 6])
    with pytest.raises(LdmError, match="takes 0 time ids"):
        tiny.model("sd15").encode_prompt("a", size=[1, 2])


@pytest.mark.parametrize(
    ("name", "component", "real"),
    [("sd2", "text_encoder", OPENCLIP_H), ("sdxl", "text_encoder_2", OPENCLIP_BIGG)],
)
def test_open_clip_weights_in_its_own_layout(
    tmp_path: Path, name: str, component: str, real: TextEncoderConfig
) -> None:
    """A small OpenCLIP model, saved as open_clip saves it, gives through our encoders what open_clip computes."""
    config = next(c for c in tiny.family(name).text if c.open_clip)
    layers = config.layers + (not config.projection)  # SD 2 drops the last
    clip = open_clip.CLIP(
        embed_dim=config.projection or 24,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        text_cfg={
            "context_length": 77, "vocab_size": config.vocab_size, "width": config.width, "heads": config.heads,
            "layers": layers, "mlp_ratio": config.hidden / config.width,
        },
    ).eval()  # fmt: skip
    assert real.open_clip
    for parameter in clip.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "open_clip.safetensors")
    tiny.model(name).save_pretrained(tmp_path / "model")
    ours = LatentDiffusion.from_pretrained(
        tmp_path / "model", components={component: tmp_path / "open_clip.safetensors"}
    )
    index = [c.component for c in ours.family.text].index(component)
    ids = ours.text_encoders.tokenize(PROMPTS)[index]
    with torch.no_grad():
        cond = ours.encode_prompt(PROMPTS)
        hidden = clip.token_embedding(ids) + clip.positional_embedding
        for block in clip.transformer.resblocks[:-1]:
            hidden = block(hidden, attn_mask=clip.attn_mask)
        if config.projection:
            torch.testing.assert_close(cond.text[..., -config.width :], hidden, atol=1e-5, rtol=0)
            torch.testing.assert_close(cond.pooled, clip.encode_text(ids), atol=1e-5, rtol=0)
        else:
            torch.testing.assert_close(cond.text, clip.ln_final(hidden), atol=1e-5, rtol=0)
