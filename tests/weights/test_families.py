"""The families' literals against diffusers' models, and against the configurations as they were published."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.errors import LdmError
from ldm.families import FAMILIES, Family, family_named, recognised
from ldm.models.clip_text import TextEncoderConfig
from ldm.models.tokenizer import END
from ldm.weights import configs
from ldm.weights.components import build

UNET_1: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
UNET_2V = UNET_1 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
NEWER: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
    "use_linear_projection": True,
}
UNET_XL = UNET_1 | NEWER | {
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
UNET_REFINER = UNET_1 | NEWER | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
TEXT_L: dict[str, Any] = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXT_H = TEXT_L | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
TEXT_BIGG = TEXT_L | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
    "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
VAE_1: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_XL = VAE_1 | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
BETAS: dict[str, Any] = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None,
}  # fmt: skip
PNDM = BETAS | {"_class_name": "PNDMScheduler"}
DDIM_V = BETAS | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
EULER = BETAS | {
    "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon",
    "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False,
}  # fmt: skip
PUBLISHED = {
    "sd15": (UNET_1, VAE_1, [TEXT_L], PNDM),
    "sd15-inpaint": (UNET_1 | {"in_channels": 9}, VAE_1, [TEXT_L], PNDM),
    "sd15-edit": (UNET_1 | {"in_channels": 8}, VAE_1, [TEXT_L], PNDM),
    "sd2": (UNET_2V | {"sample_size": 64}, VAE_1, [TEXT_H], PNDM),
    "sd2-v": (UNET_2V, VAE_1 | {"sample_size": 768}, [TEXT_H], DDIM_V),
    "sdxl": (UNET_XL, VAE_XL, [TEXT_L, TEXT_BIGG], EULER),
    "sdxl-refiner": (UNET_REFINER, VAE_XL, [TEXT_BIGG], EULER),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_literals_are_what_was_published(name: str) -> None:
    unet_json, vae_json, text_json, schedule_json = PUBLISHED[name]
    family = FAMILIES[name]
    text = tuple(
        configs.read_text("text", json, "Projection" in json["architectures"][0], END if json is TEXT_L else "!", 49407)
        for json in text_json
    )
    unet = configs.read_unet("unet", unet_json, text[-1].projection)
    schedule = configs.read_schedule("scheduler", schedule_json)
    assert text == family.text
    assert unet == family.unet
    assert configs.read_autoencoder("vae", vae_json) == family.autoencoder
    vae = configs.read_autoencoder("vae", vae_json)
    read = recognised(Family("custom", unet, vae, text, schedule))
    assert (read.name, read.steps, read.guidance, read.preview) == (
        name, family.steps, family.guidance, family.preview,
    )  # fmt: skip
    for field in ("prediction_type", "beta_start", "beta_end", "beta_schedule", "train_steps", "scheduler"):
        assert getattr(schedule, field) == getattr(family.schedule, field)
    assert {k: v for k, v in schedule.options.items() if k in family.schedule.options} == family.schedule.options


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_shapes_equal_diffusers(name: str) -> None:
    """At the real size, on the meta device: for the U-Net, the autoencoder and the text encoders."""
    family = FAMILIES[name]
    with torch.device("meta"):
        ours = build(family).modules()
        theirs: dict[str, torch.nn.Module] = {
            "unet": UNet2DConditionModel.from_config(configs.write_unet(family.unet)),
            "vae": AutoencoderKL.from_config(configs.write_autoencoder(family.autoencoder)),
        }
        for config in family.text:
            kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
            theirs[config.component] = kind(CLIPTextConfig(**configs.write_text(config, 49407)))
    assert ours.keys() == theirs.keys()
    for component, module in theirs.items():
        wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert {key: tuple(value.shape) for key, value in ours[component].state_dict().items()} == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_configurations_survive_being_written_and_read(name: str) -> None:
    family = FAMILIES[name]
    pooled = family.text[-1].projection
    assert configs.read_unet("unet", configs.write_unet(family.unet), pooled) == family.unet
    assert configs.read_autoencoder("vae", configs.write_autoencoder(family.autoencoder)) == family.autoencoder
    assert configs.read_schedule("scheduler", configs.write_schedule(family.schedule)) == family.schedule
    for config in family.text:
        json = configs.write_text(config, 49407)
        assert configs.read_text("text", json, bool(config.projection), config.pad_token, 49407) == config
    configs.check_writable(family)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    sd15, sdxl = FAMILIES["sd15"], FAMILIES["sdxl"]
    for wrong, message in (
        ({"autoencoder": replace(sd15.autoencoder, latent_channels=16)}, "latents of 16 channels, the U-Net reads 4"),
        ({"text": sd15.text * 2}, "text encoders"),
        ({"text": sdxl.text[1:]}, "go together or not at all"),
        ({"unet": replace(sd15.unet, text_dim=1024)}, "the text encoders give 768 channels, the U-Net reads 1024"),
    ):
        with pytest.raises(LdmError, match=message):
            replace(sd15, **wrong)


def test_settings_without_a_place_in_files_are_not_written() -> None:
    sd15 = FAMILIES["sd15"]
    vq = replace(sd15.autoencoder, codebook=16, shift_factor=0.5)
    with pytest.raises(LdmError, match="cannot hold all of its values"):
        configs.check_writable(replace(sd15, autoencoder=vq))
    odd = replace(sd15.schedule, options={"a_strange_option": 1})
    with pytest.raises(LdmError, match="cannot hold all of its values"):
        configs.check_writable(replace(sd15, schedule=odd))


def test_what_families_say_of_themselves() -> None:
    assert {name: (family.task, family.size) for name, family in FAMILIES.items()} == {
        "sd15": ("text", 512), "sd15-inpaint": ("inpaint", 512), "sd15-edit": ("edit", 512),
        "sd2": ("text", 512), "sd2-inpaint": ("inpaint", 512), "sd2-v": ("text", 768),
        "sdxl": ("text", 1024), "sdxl-inpaint": ("inpaint", 1024), "sdxl-edit": ("edit", 1024),
        "sdxl-refiner": ("text", 1024), "emoji": ("text", 96), "emoji-refiner": ("text", 96),
    }  # fmt: skip
    assert [name for name, family in FAMILIES.items() if family.refiner] == ["sdxl-refiner", "emoji-refiner"]
    with pytest.raises(LdmError, match="choose one of: sd15"):
        family_named("sd3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_embedding_dim": 256}, "'time_embedding_dim' is 256; this program only has None"),
        ({"class_embed_type": "timestep"}, "'class_embed_type'"),
        ({"brand_new_option": 1}, "'brand_new_option' is 1; this program does not know that option"),
        ({"attention_type": "gated"}, "'attention_type'"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "down_block_types"),
        ({"down_block_types": [["CrossAttnDownBlock2D"]] * 4}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "must mirror"),
        ({"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, "transformer_layers_per_block"),
        ({"attention_head_dim": "8"}, "must be of type int or list"),
        ({"block_out_channels": []}, "up_block_types"),
        ({"in_channels": True}, "must be of type int"),
        ({"addition_embed_type": "image"}, "only has None and 'text_time'"),
        ({"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 100}, "pooled text"),
        ({"cross_attention_dim": [768, 1024, 768, 768]}, "must be of type int"),
    ],
)
def test_options_that_we_do_not_have_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        configs.read_unet("unet/config.json", UNET_1 | change, 0)


def test_options_of_the_other_components_are_refused_by_name() -> None:
    with pytest.raises(LdmError, match="latents_mean"):
        configs.read_autoencoder("vae", VAE_1 | {"latents_mean": [0.1, 0.2]})
    with pytest.raises(LdmError, match="DownEncoderBlock2D"):
        configs.read_autoencoder("vae", VAE_1 | {"down_block_types": [{}] * 4})
    with pytest.raises(LdmError, match="'gelu_new'"):
        configs.read_text("text", TEXT_L | {"hidden_act": "gelu_new"}, False, END, 49407)
    with pytest.raises(LdmError, match="'rope_theta'"):
        configs.read_text("text", TEXT_L | {"rope_theta": 1}, False, END, 49407)
    with pytest.raises(LdmError, match="'eos_token_id' is 320; the tokenizer ends texts with 49407"):
        configs.read_text("text", TEXT_L | {"eos_token_id": 320}, False, END, 49407)
    with pytest.raises(LdmError, match="'architectures'"):
        configs.read_text("text", TEXT_L | {"architectures": ["T5EncoderModel"]}, False, END, 49407)
    with pytest.raises(LdmError, match="unet/config.json: option '_class_name' is 'Evil'"):
        configs.read_unet("unet/config.json", UNET_1 | {"_class_name": "Evil"}, 0)
    with pytest.raises(LdmError, match="unet/config.json: U-Net: layers is 0"):
        configs.read_unet("unet/config.json", UNET_1 | {"layers_per_block": 0}, 0)
    with pytest.raises(LdmError, match="FlowMatchEulerDiscreteScheduler"):
        configs.read_schedule("scheduler", PNDM | {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    for change in ({"trained_betas": [0.1]}, {"prediction_type": "flow"}, {"beta_start": 2.0}, {"_class_name": ["x"]}):
        with pytest.raises(LdmError):
            configs.read_schedule("scheduler", PNDM | change)
    with pytest.raises(LdmError, match="'beta_start' is missing"):
        configs.read_schedule("scheduler", {k: v for k, v in PNDM.items() if k != "beta_start"})
    with pytest.raises(LdmError, match="layers is 0"):
        TextEncoderConfig(layers=0)
