"""Text encoders and tokenizers against transformers, diffusers' pipelines and open_clip."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from ldm.errors import LdmError
from ldm.families import OPENCLIP_BIGG, OPENCLIP_H
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.text import TextEncoderConfig, TextEncoders
from ldm.models.tokenizer import END, clip_tokenizer
from ldm.weights.folder import read_tokenizer, write_tokenizer

PROMPTS = [
    "a photo of a cat",
    "",
    "A  Painting\tof THE sea, by Hokusai; it's 3 o'clock & we'll go!!",
    "naïve café – 東京 🙂 <|endoftext|> ½ ﬁ İstanbul",
    "word " * 200,
]


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pad_token", "pad_id"), [(END, 49407), ("!", 0)])
def test_tokenizer_equals_transformers_from_published_files(tmp_path: Path, pad_token: str, pad_id: int) -> None:
    """`vocab.json`, `merges.txt` and `tokenizer_config.json`, as published folders hold them, give the same tokens."""
    ours = clip_tokenizer(pad_token)
    assert len(ours) == 49408
    write_tokenizer(ours, tmp_path)
    assert (tmp_path / "merges.txt").read_text().splitlines()[1] == "i n"
    (tmp_path / "tokenizer.json").unlink()
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        arguments = {"padding": "max_length", "truncation": True, "max_length": 77}
        assert ours(prompt, **arguments).input_ids == theirs(prompt, **arguments).input_ids
    assert ours("cat", padding="max_length", max_length=77).input_ids == [49406, 2368, 49407] + [pad_id] * 74


def test_tokenizer_equals_open_clip_where_the_rules_agree() -> None:
    reference = open_clip.get_tokenizer("ViT-H-14")
    ours = clip_tokenizer("!")
    for prompt in ("a photo of a cat", "it's 3 o'clock, we'll go", "naïve café 東京"):
        ids = ours(prompt, padding="max_length", truncation=True, max_length=77).input_ids
        assert ids == reference(prompt)[0].tolist()


def test_small_vocabularies_are_the_first_merges_of_the_large_one() -> None:
    small, large = clip_tokenizer(vocab_size=1000), clip_tokenizer()
    assert len(small) == 1000
    ids = small("a photo of a cat").input_ids
    assert (ids[0], ids[-1]) == (998, 999)
    assert small.decode(ids[1:-1]) == large.decode(large("a photo of a cat").input_ids[1:-1]) == "a photo of a cat"
    with pytest.raises(LdmError, match="514"):
        clip_tokenizer(vocab_size=513)


def test_missing_tokenizer_files_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="tokenizer"):
        read_tokenizer(tmp_path)


# --- encoders ---------------------------------------------------------------------------------------------------------


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
    cut = TextEncoders([tiny.tower(TextEncoderConfig())], whole.tokenizers, pooled=False)
    cut.load_state_dict(whole.state_dict())
    encoder = cut.towers[0].encoder
    encoder.layers = encoder.layers[: len(encoder.layers) - clip_skip]
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
    with pytest.raises(LdmError, match="takes 5 size ids"):
        model.encode_prompt("a", size=[1, 2, 3, 4, 5, 6])
    with pytest.raises(LdmError, match="takes 0 size ids"):
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
