"""The patches of a U-Net, in the order in which they are applied.

Each file of this folder holds one patch: a function `(network, value) -> network` that gives back another network on
the same weights and leaves its argument as it was. To add one, write its file and its row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.models.unet import UNet
from ldm.patches.controlnet import add_controlnets
from ldm.patches.deepcache import reuse_inner_levels
from ldm.patches.guidance_embedding import embed_guidance
from ldm.patches.image_prompt import read_images
from ldm.patches.perturbed_attention import perturb_attention
from ldm.patches.t2i_adapter import add_features
from ldm.patches.token_merging import merge_tokens


@dataclass(frozen=True)
class Patch:
    """One change of a network's result."""

    name: str  # of the setting that turns it on
    off: Any  # the value that leaves the network as it is
    apply: Callable[[UNet, Any], UNet]


# Each patch is given the network that the ones before it have made. Those that look for layers at their places in the
# U-Net come before those that wrap whole levels; perturbed attention depends on guidance's batch and comes last.
PATCHES = (
    Patch("embedded_guidance", None, embed_guidance),
    Patch("image_prompts", (), read_images),
    Patch("merge", 0, merge_tokens),
    Patch("t2i_adapters", (), add_features),
    Patch("controlnets", (), add_controlnets),  # before DeepCache, which skips inner levels with their residuals
    Patch("reuse", 1, reuse_inner_levels),
    Patch("perturbed_groups", 0, perturb_attention),
)


def patched(unet: UNet, values: Mapping[str, Any]) -> UNet:
    """The U-Net with the patches that `values` ask for by name; other names are ignored."""
    for patch in PATCHES:
        value = values.get(patch.name, patch.off)
        if value != patch.off:
            unet = patch.apply(unet, value)
    return unet
