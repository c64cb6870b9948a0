"""IP-Adapter: projections, cross-attention with image tokens, and files, against diffusers' on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import image_prompts
import pytest
import tiny
import torch
from rounding import NETWORK, near
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.unet import Conditioning, UNet
from ldm.patches.image_prompt import ImageTokens
from ldm.patches.patching import patched
from ldm.runtime.fused_cpu import fuse
from ldm.runtime.precomputing import precomputed, reads_conditioning
from ldm.weights.configs import write_unet
from ldm.weights.image_prompt import open_image_prompt

TIME = torch.tensor(500)


def reference(unet: UNet, *states: dict[str, Tensor]) -> Any:
    """diffusers' U-Net with the same weights and these IP-Adapters."""
    model = diffusers.UNet2DConditionModel.from_config(write_unet(unet.config)).eval()
    model.load_state_dict(unet.state_dict())
    model._load_ip_adapter_weights([image_prompts.groups(state) for state in states], low_cpu_mem_usage=False)
    return model


def conditioning(unet: UNet) -> Conditioning:
    c = unet.config
    pooled, size = (torch.randn(2, c.pooled_dim), torch.rand(2, 6)) if c.pooled_dim else (None, None)
    return Conditioning(torch.randn(2, 9, c.text_dim), pooled, size)


def theirs(model: Any, x: Tensor, cond: Conditioning, features: list[Tensor], **more: Any) -> Tensor:
    added = {"image_embeds": features, "text_embeds": cond.pooled, "time_ids": cond.size}
    return model(x, TIME, cond.text, added_cond_kwargs=added, **more).sample


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_one_image(name: str, kind: str, tmp_path: Path) -> None:
    """From its file: tokens, and a pass of the U-Net with keys and values precomputed."""
    model = tiny.model(name)
    state = image_prompts.saved(tmp_path / "ip.safetensors", model.family, kind)
    adapter = open_image_prompt(tmp_path / "ip.safetensors", model.family).load()
    unet, other = model.unet, reference(model.unet, state)
    shape = (2, image_prompts.PROJECTED) if kind == "base" else (2, image_prompts.PATCHES, image_prompts.WIDTH)
    features, x, cond = torch.randn(shape), torch.randn(2, 4, 8, 8), conditioning(unet)
    with torch.no_grad():
        tokens = adapter.projection(features)
        near(tokens, other.encoder_hid_proj([features[:, None]])[0][:, 0], NETWORK)
        for layer in (layer for layer in other.attn_processors.values() if hasattr(layer, "scale")):
            layer.scale = [0.7]
        wanted = theirs(other, x, cond, [features[:, None]])
        prompt = ImageTokens("one", adapter)
        inputs = {prompt.tokens: tokens, prompt.weights(0): torch.full((2, 1, 1), 0.7)}
        reading = patched(unet, {"image_prompts": (prompt,)})
        assert reads_conditioning(reading)
        ready = precomputed(reading, replace(cond, more=inputs))
        assert not reads_conditioning(ready)
        near(ready(x, TIME, cond), wanted, NETWORK)
        plain = unet(x, TIME, cond)
        assert not torch.allclose(wanted, plain, atol=1e-3)
        fuse(unet)
        ready = precomputed(patched(unet, {"image_prompts": (prompt,)}), replace(cond, more=inputs))
        near(ready(x, TIME, cond), wanted, 10 * NETWORK)


def test_pickles_and_diffusers_names(tmp_path: Path) -> None:
    family = tiny.family("sd15")
    state = image_prompts.saved(tmp_path / "ip.safetensors", family, "plus")
    torch.save(image_prompts.groups(state), tmp_path / "ip.bin")
    with pytest.raises(LdmError, match="is a pickle"):
        open_image_prompt(tmp_path / "ip.bin", family)
    made = image_prompts.adapter(family, "plus")
    own = {
        f"image_proj.{name.removeprefix('projection.')}": tensor.detach()
        for name, tensor in made.named_parameters()
        if name.startswith("projection.")
    }
    save_file(own | {name: state[name] for name in state if name.startswith("ip_")}, tmp_path / "theirs.safetensors")
    wanted = made.state_dict()
    for file in ("ip.safetensors", "ip.bin", "theirs.safetensors"):
        found = open_image_prompt(tmp_path / file, family, allow_pickle=True).load().state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    family, xl = tiny.family("sd15"), tiny.family("sdxl")
    state = image_prompts.saved(tmp_path / "ip.safetensors", family)

    def refused(pattern: str, changes: dict[str, Tensor | None], base: dict[str, Tensor] = state) -> None:
        changed = {name: tensor for name, tensor in (base | changes).items() if tensor is not None}
        save_file(changed, tmp_path / "other.safetensors")
        with pytest.raises(LdmError, match=pattern):
            open_image_prompt(tmp_path / "other.safetensors", family).load()

    with pytest.raises(LdmError, match="made for another model .text of 32 channels., and the model is custom .80"):
        open_image_prompt(tmp_path / "ip.safetensors", xl)
    key = "ip_adapter.1.to_k_ip.weight"
    refused("1 missing: ip_adapter.1.to_k_ip.weight", {key: None})
    refused("1 unexpected: ip_adapter.2.to_k_ip.weight", {"ip_adapter.2.to_k_ip.weight": state[key].clone()})
    refused("misshapen", {key: torch.zeros(3, 32)})
    refused("not finite", {key: torch.full_like(state[key], float("nan"))})
    refused("FaceID", {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(4, 4)})
    refused("FaceID", {"image_proj.proj.0.weight": torch.zeros(4, 4)})
    refused("is no IP-Adapter.*it is a LoRA", {}, {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)})
    refused("it is an image encoder", {}, {"vision_model.x": torch.zeros(4, 4)})
    with pytest.raises(LdmError, match="does not exist"):
        open_image_prompt(tmp_path / "none.safetensors", family)
    with pytest.raises(LdmError, match="is no file"):
        open_image_prompt(tmp_path, family)
