"""The safety checker: diffusers' decisions on the same weights, both layouts, and folders that will not do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safety
import torch
from safetensors.torch import load_file, save_file
from watermarks import noise

from ldm.errors import LdmError
from ldm.weights.image_encoder import prepared
from ldm.weights.safety_checker import load_safety_checker

IMAGES = [noise(seed, 48) for seed in range(24)]


@pytest.mark.parametrize("special", [-2.0, 0.1, 2.0])
def test_decisions_are_those_of_diffusers(special: float, tmp_path: Path) -> None:
    """With thresholds around the similarities, and special concepts near all images, some and none."""
    theirs = safety.checker()
    pixels = torch.stack([prepared(image, 32) for image in IMAGES])
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(theirs.visual_projection(theirs.vision_model(pixels)[1]))
        similar = embeddings @ torch.nn.functional.normalize(theirs.concept_embeds).T
        theirs.concept_embeds_weights.copy_(similar.amax(0) - 0.002)
        theirs.special_care_embeds_weights.fill_(special)
        _, wanted = theirs(pixels, [np.zeros(1)] * len(IMAGES))
    theirs.save_pretrained(tmp_path)
    ours = load_safety_checker(tmp_path)
    assert ours.flagged(IMAGES) == wanted
    assert any(wanted)
    expected = similar - theirs.concept_embeds_weights + 0.01 * (special < -1)
    if special != 0.1:
        torch.testing.assert_close(ours.excess(pixels), expected, atol=6e-4, rtol=0)
    assert special != 2.0 or not all(wanted)


def test_published_names_and_a_folder_within_a_model(tmp_path: Path) -> None:
    folder = safety.saved(tmp_path / "model" / "safety_checker", 0.1)
    plain = load_safety_checker(folder)
    file = folder / "model.safetensors"
    tensors = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(name.startswith("vision_model.vision_model.") for name in tensors)
    ids = {"vision_model.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(tensors | ids, file)
    published = load_safety_checker(tmp_path / "model")
    pixels = torch.stack([prepared(image, 32) for image in IMAGES[:4]])
    assert torch.equal(published.excess(pixels), plain.excess(pixels))


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = safety.saved(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    del tensors["concept_embeds"]
    save_file(tensors, other / "model.safetensors")
    lacking = safety.saved(tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["vision_model.post_layernorm.weight"]
    save_file(tensors, lacking / "model.safetensors")
    for place, message in (
        ("nowhere", "does not exist; give a safety checker's folder"),
        ("empty", "it has no config.json"),
        ("other", "is no safety checker: it has no concept_embeds"),
        ("lacking", "lacks post_layernorm.weight"),
    ):
        with pytest.raises(LdmError, match=message) as caught:
            load_safety_checker(tmp_path / place)
        assert "\n" not in str(caught.value)
