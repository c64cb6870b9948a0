"""The safety checker of Stable Diffusion: CLIP's vision tower by transformers, and embeddings of unwanted concepts.

An image is flagged if the cosine of its embedding and that of a concept exceeds the concept's own threshold (Rando et
al. 2022, arXiv 2210.04610). If it is close to one of the special concepts, thresholds are lower by 0.01.

B images, C concepts, S special concepts, F channels of the tower, E channels of the embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.errors import LdmError, first_line, listing
from ldm.files import read_json
from ldm.weights.builtin import GIVE_SAFETY_CHECKER, check_named
from ldm.weights.folder import store_of, weight_files
from ldm.weights.hub import fetch
from ldm.weights.image_encoder import prepared

FOLDER = "safety_checker"  # within a model's folder
_TOWER = ("vision_model.vision_model.", "vision_model.")  # of the tower's tensors, by diffusers and by transformers 5
_CARE = 0.01  # by which special concepts lower the thresholds
_DECIMALS = 3  # to which diffusers rounds differences from thresholds
_CONCEPTS = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")
_OPTIONS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip


@dataclass(frozen=True)
class SafetyChecker:
    """A safety checker, in evaluation mode."""

    tower: Any  # transformers' CLIPVisionModel
    projection: Tensor  # (E, F)
    concepts: Tensor  # (C, E)
    thresholds: Tensor  # (C,)
    special: Tensor  # (S, E)
    special_thresholds: Tensor  # (S,)

    def flagged(self, images: Sequence[Image.Image]) -> list[bool]:
        """Whether each image is flagged."""
        size = self.tower.config.image_size
        pixels = torch.stack([prepared(image, size) for image in images])
        return [bool(row) for row in self.excess(pixels.to(self.projection)).amax(1) > 0]

    @torch.inference_mode()
    def excess(self, pixels: Tensor) -> Tensor:
        """How far prepared images (B, 3, S, S) are above the threshold of each concept: (B, C)."""
        embeddings = F.normalize(self.tower(pixels).pooler_output @ self.projection.T)
        special = embeddings @ F.normalize(self.special).T - self.special_thresholds
        care = (special.round(decimals=_DECIMALS) > 0).any(1, keepdim=True)
        found = embeddings @ F.normalize(self.concepts).T - self.thresholds + _CARE * care
        return found.round(decimals=_DECIMALS)


def load_safety_checker(
    source: str | PathLike[str], device: torch.device | str = "cpu", *, allow_pickle: bool = False
) -> SafetyChecker:
    """Load a safety checker in fp32: its folder, a model's folder that has one, or a Hub name.

    Raises:
        LdmError: there is none, or it lacks weights.
    """
    check_named(str(source), GIVE_SAFETY_CHECKER)
    path = Path(source)
    if not path.exists():
        path = fetch(str(source), allow_pickle=allow_pickle, component=FOLDER)
    path = path / FOLDER if (path / FOLDER).is_dir() else path
    if not (path / "config.json").is_file():
        raise LdmError(f"safety {path} is no safety checker's folder: it has no config.json")
    config = read_json(path / "config.json")
    store = store_of(weight_files(path, FOLDER, None, allow_pickle), allow_pickle)
    if not isinstance(config.get("vision_config"), dict) or not set(_CONCEPTS) <= store.infos.keys():
        raise LdmError(f"safety {path} is no safety checker: it has no {', '.join(_CONCEPTS)}")
    tensors = dict(store.read(store.infos, torch.float32, device))
    try:
        tower = _tower(config["vision_config"], tensors).to(device)
        return SafetyChecker(
            tower.eval().requires_grad_(False), tensors["visual_projection.weight"], tensors["concept_embeds"],
            tensors["concept_embeds_weights"], tensors["special_care_embeds"], tensors["special_care_embeds_weights"],
        )  # fmt: skip
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise LdmError(f"safety {path} is no safety checker that can be used: {first_line(error)}") from None


def _tower(options: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """CLIP's vision tower with the weights of a checker.

    Raises:
        LdmError: weights are missing.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel  # takes seconds

    tower = CLIPVisionModel(CLIPVisionConfig(**{name: options[name] for name in _OPTIONS if name in options}))
    prefix = next((one for one in _TOWER if any(name.startswith(one) for name in tensors)), "")
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    lacking = sorted(tower.state_dict().keys() - own.keys())
    if lacking:
        raise LdmError(f"the safety checker lacks {listing(lacking)}")
    tower.load_state_dict({name: own[name] for name in tower.state_dict()})
    return tower
