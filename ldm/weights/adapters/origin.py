"""The origin of an adapter's file: the models that it is for; and files of kinds that are not read, or no adapters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ldm.families import Family
from ldm.weights.adapters.layers import split
from ldm.weights.tensors import TensorInfo

FOREIGN_KINDS = {  # endings of names -> kind
    "oft_blocks": "OFT or BOFT", "oft_diag": "OFT", "oft_R.weight": "OFT", "oft_r": "OFT", "oft_s": "OFT",
    "boft_R": "BOFT", "boft_s": "BOFT",
    "on_input": "(IA)³", "ia3_l": "(IA)³",
    "a1.weight": "GLoRA", "a2.weight": "GLoRA", "b1.weight": "GLoRA", "b2.weight": "GLoRA", "bm.weight": "GLoRA",
    "lambda_layer": "T-LoRA", "vera_lambda_b": "VeRA", "vera_lambda_d": "VeRA", "fourierft_spectrum": "FourierFT",
    "hra_u": "HRA", "vblora_logits_A": "VB-LoRA", "vblora_logits_B": "VB-LoRA", "bone_block": "Bone",
    "miss_block": "MiSS", "lora_E": "AdaLoRA", "lora_B.bias": "LoRA with biases of its own",
}  # fmt: skip
_FOREIGN_MODELS = {  # beginnings of names -> the model
    "lora_unet_double_blocks": "Flux", "lora_unet_single_blocks": "Flux", "diffusion_model.double_blocks": "Flux",
    "transformer.single_transformer_blocks": "Flux", "transformer.transformer_blocks": "Flux or SD 3",
    "lora_transformer_": "Flux or SD 3", "lora_unet_joint_blocks": "SD 3", "diffusion_model.joint_blocks": "SD 3",
    "lora_te3_": "SD 3", "diffusion_model.blocks": "a video model", "lora_prior_": "a prior",
    "lora_unet_down_blocks_0_motion_modules": "AnimateDiff",
}  # fmt: skip
_FILES = {  # beginnings of names -> what the file is, and where it is to be given
    "model.diffusion_model.": "a model; give it as one (--model)",
    "first_stage_model.": "a model or its autoencoder; give it as one (--model, --component vae=PATH)",
    "lora_controlnet": "a Control-LoRA, which is not supported",
    "control_model.": "a ControlNet; give it as one (--control-model)",
    "controlnet_cond_embedding.": "a ControlNet; give it as one (--control-model)",
    "controlnet_": "a ControlNet; give it as one (--control-model)",
    "input_hint_block.": "a ControlNet; give it as one (--control-model)",
    "image_proj": "an IP-Adapter; give it as one (--ip-adapter)",
    "ip_adapter": "an IP-Adapter; give it as one (--ip-adapter)",
    "adapter.body.": "a T2I-Adapter; give it as one (--control-model)",
    "body.": "a T2I-Adapter; give it as one (--control-model)",
    "string_to_": "a textual-inversion embedding; give it as one (--embedding)",
    "emb_params": "a textual-inversion embedding; give it as one (--embedding)",
    "clip_l": "a textual-inversion embedding; give it as one (--embedding)",
    "clip_g": "a textual-inversion embedding; give it as one (--embedding)",
    "down_blocks.": "a U-Net alone; give it with a model (--component unet=PATH)",
    "input_blocks.": "a U-Net alone; give it with a model (--component unet=PATH)",
    "conv_in.": "a U-Net alone; give it with a model (--component unet=PATH)",
    "encoder.": "an autoencoder or a text encoder alone; give it with a model (--component NAME=PATH)",
    "decoder.": "an autoencoder alone; give it with a model (--component vae=PATH)",
    "text_model.": "a text encoder alone; give it with a model (--component text_encoder=PATH)",
    "transformer.resblocks.": "a text encoder alone; give it with a model (--component text_encoder=PATH)",
}
WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL's refiner"}  # channels of text -> family
_TO_TEXT = re.compile(r".*attn2[._](?:processor[._])?to_[kv](?:_lora)?\.(.+)")  # layers that read text
_COLUMNS = {"down": 1, "hada_w1_b": 1, "diff": 1}  # parts whose axis is the layer's input
_ARCHITECTURES = {
    "sd_v1": "SD 1.x", "sd_v2": "SD 2.x", "sdxl": "SDXL", "sd3": "SD 3", "flux": "Flux",
    "stable-diffusion-v1": "SD 1.x", "stable-diffusion-v2": "SD 2.x",
    "stable-diffusion-xl-v1-refiner": "SDXL's refiner", "stable-diffusion-xl": "SDXL", "stable-diffusion-3": "SD 3",
}  # fmt: skip


def foreign_kind(name: str) -> str:
    """The kind of adapter that is not read and has tensors of that name, or ""."""
    return next((kind for ending, kind in FOREIGN_KINDS.items() if name.endswith(f".{ending}")), "")


def other_file(names: Iterable[str]) -> str:
    """The kind of a file that is no adapter, by the names of its tensors, in words; "" if it is not known."""
    names = list(names)
    return next((f"it is {what}" for start, what in _FILES.items() if any(n.startswith(start) for n in names)), "")


def text_width(infos: Mapping[str, TensorInfo]) -> int | None:
    """Channels of the text that an adapter's cross-attention reads; None if its tensors do not tell."""
    found: dict[str, int] = {}
    for name, info in infos.items():
        if "attn2" in name and _TO_TEXT.fullmatch(name) and len(info.shape) >= 2:
            _, part = split(name)
            found[part] = info.shape[1]
    kron = [found.get("lokr_w1"), found.get("lokr_w2", found.get("lokr_w2_b"))]
    if None not in kron:
        return kron[0] * kron[1]  # type: ignore[operator]
    return next((found[part] for part in _COLUMNS if part in found), None)


def base_family(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str:
    """The models that an adapter was made for, such as "SDXL", by shapes, names and metadata; "" if nothing tells."""
    for start, model in _FOREIGN_MODELS.items():
        if any(name.startswith(start) for name in infos):
            return model
    width = text_width(infos)
    if width in WIDTHS:
        return WIDTHS[width]
    if any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in infos):
        return "SDXL"
    if any(re.search(r"transformer_blocks[._][2-9]", name) for name in infos):
        return "SDXL"
    stated = (metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", ""))
    return next((f for start, f in _ARCHITECTURES.items() if any(s.lower().startswith(start) for s in stated)), "")


def own_model(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str:
    """The stated name of the model, where its text has other channels than all released families'; else ""."""
    return metadata.get("ss_sd_model_name", "") if text_width(infos) not in (None, *WIDTHS) else ""


def family_word(family: Family) -> str:
    """A model's family in the words of `base_family`; "" for others."""
    if family.xl:
        return "SDXL's refiner" if family.refiner else "SDXL"
    return "SD 2.x" if family.text[0].open_clip else "SD 1.x"


def mismatch(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], family: Family) -> str:
    """The reason for which an adapter belongs to other models than this, in words; "" if there is none."""
    made_for, width, reads = base_family(infos, metadata), text_width(infos), family.unet.text_dim
    if width not in (None, reads):
        named = made_for if width in WIDTHS else "another model"
        return f"is for {named} (its cross-attention reads {width} channels of text); the model is {_model(family)}"
    if made_for and made_for != family_word(family):
        return f"is for {made_for}; the model is {_model(family)}"
    return ""


def _model(family: Family) -> str:
    custom = f"like {family_word(family)}" if family.name == "custom" else family.name
    return f"{custom} ({family.unet.text_dim} channels)"


def embeddings(names: Collection[str]) -> tuple[str, ...]:
    """The textual-inversion embeddings that an adapter's file holds too: LyCORIS' `bundle_emb`."""
    return tuple(dict.fromkeys(name.split(".")[1] for name in names if name.startswith("bundle_emb.")))
