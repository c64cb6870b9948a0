"""Files of textual inversion: every format, and what is wrong with a file."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.errors import LdmError
from ldm.weights.embeddings import embedding_files, fitted, open_embedding

SD15, SDXL, REFINER = (tiny.family(name).text for name in ("sd15", "sdxl", "sdxl-refiner"))
L, G = SDXL[0].width, SDXL[1].width
VECTORS = torch.randn(3, L, generator=torch.Generator().manual_seed(0))
WIDER = torch.randn(3, G, generator=torch.Generator().manual_seed(1))
A1111 = {"string_to_token": {"*": 265}, "name": "Inside", "step": 9, "sd_checkpoint": None, "sd_checkpoint_name": None}


class Foreign:
    """A class that PyTorch does not know."""


@pytest.mark.parametrize(
    ("name", "content", "names", "layout"),
    [
        ("style.pt", {**A1111, "string_to_param": {"*": VECTORS}}, ("style", "Inside"), "AUTOMATIC1111"),
        ("inside.pt", {**A1111, "string_to_param": {"*": VECTORS}}, ("inside",), "AUTOMATIC1111"),
        ("old.pt", {"string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)})}, ("old",), "AUTOMATIC1111"),
        ("more.pt", {**A1111, "string_to_param": {"*": VECTORS}, "more": Foreign()}, ("more", "Inside"),
         "AUTOMATIC1111"),
        ("style.safetensors", {"emb_params": VECTORS}, ("style",), "AUTOMATIC1111"),
        ("learned_embeds.bin", {"<cat>": nn.Parameter(VECTORS)}, ("<cat>",), "diffusers"),
        ("learned_embeds-steps-500.safetensors", {"<cat>": VECTORS}, ("<cat>",), "diffusers"),
        ("cat.safetensors", {"<cat>": VECTORS}, ("cat", "<cat>"), "diffusers"),
        ("l.safetensors", {"clip_l": VECTORS}, ("l",), "SDXL"),
    ],
)  # fmt: skip
def test_every_format(tmp_path: Path, name: str, content: Any, names: tuple[str, ...], layout: str) -> None:
    file = tmp_path / name
    torch.save(content, file) if file.suffix != ".safetensors" else save_file(content, file)
    found = open_embedding(file, allow_pickle=True)
    assert (found.names, found.layout) == (names, layout)
    assert found.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    word = fitted(found, SD15)
    assert word.names == names and len(word.vectors) == 1 and torch.equal(word.vectors[0], VECTORS)


def test_a_single_vector(tmp_path: Path) -> None:
    save_file({"<cat>": VECTORS[0].half()}, tmp_path / "cat.safetensors")
    assert fitted(open_embedding(tmp_path / "cat.safetensors"), SD15).vectors[0].shape == (1, L)


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_sdxls_pair(tmp_path: Path, keys: tuple[str, str]) -> None:
    save_file(dict(zip(keys, (VECTORS, WIDER), strict=True)), tmp_path / "pair.safetensors")
    found = open_embedding(tmp_path / "pair.safetensors")
    both, last = fitted(found, SDXL), fitted(found, REFINER)
    assert [rows.shape for rows in both.vectors] == [(3, L), (3, G)]
    assert torch.equal(last.vectors[0], WIDER)
    with pytest.raises(LdmError, match="is for text encoders with 32 and 48 channels, the model's have 32 channels"):
        fitted(found, SD15)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"emb_params": torch.tensor([[1.0, float("nan")]])}, "emb_params holds numbers that are not finite"),
        ({"emb_params": torch.ones(2, 2, dtype=torch.int64)}, "emb_params is [2, 2], torch.int64; vectors (N, W)"),
        ({"emb_params": torch.ones(1, 2, 2)}, "emb_params is [1, 2, 2]"),
        ({"emb_params": torch.ones(0, 2)}, "emb_params is [0, 2]"),
        ({"clip_l": torch.ones(2, 2), "clip_g": torch.ones(1, 3)}, "have different numbers of vectors: "),
        ({"clip_l": torch.ones(2, 2), "more": torch.ones(1, 3)}, "is no embedding: it holds 2 tensors (clip_l, more)"),
        ({f"unet.{i}": torch.ones(2) for i in range(9)}, "is no embedding: it holds 9 tensors (unet.0, unet.1, unet.2"),
    ],
)
def test_a_file_that_is_no_embedding(tmp_path: Path, content: dict[str, torch.Tensor], message: str) -> None:
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(LdmError) as error:
        open_embedding(tmp_path / "x.safetensors")
    assert message in str(error.value)


def test_a_pickle_must_be_allowed_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({**A1111, "string_to_param": {"*": VECTORS}}, tmp_path / "x.pt")
    with pytest.raises(LdmError, match="x.pt is a pickle"):
        open_embedding(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(LdmError, match="y.pt"):
        open_embedding(tmp_path / "y.pt", allow_pickle=True)
    with pytest.raises(LdmError, match="z.pt cannot be read"):
        open_embedding(tmp_path / "z.pt")


def test_an_embedding_of_another_family_is_refused(tmp_path: Path) -> None:
    real = [replace(SD15[0], width=768), replace(SDXL[1], width=1280)]
    for name, content in (("one", {"x": torch.ones(1, 1024)}), ("two", {"clip_l": torch.ones(80, 768)})):
        save_file(content, tmp_path / f"{name}.safetensors")
    with pytest.raises(LdmError, match=r"1024 channels \(SD 2.x\), the model's have 768 and 1280 channels \(SDXL\)"):
        fitted(open_embedding(tmp_path / "one.safetensors"), real)
    with pytest.raises(LdmError, match="has 80 vectors; a text has at most 75 tokens"):
        fitted(open_embedding(tmp_path / "two.safetensors"), real[:1])


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.pt", "a.safetensors", "more/c.BIN", "note.txt", "b.preview.png"):
        (tmp_path / name).touch()
    assert [file.name for file in embedding_files(tmp_path)] == ["a.safetensors", "b.pt", "c.BIN"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "again").symlink_to(tmp_path / "linked")
    (tmp_path / "linked" / "d.pt").touch()
    (tmp_path / "more" / "elsewhere").symlink_to(tmp_path / "linked")
    assert [file.name for file in embedding_files(tmp_path / "more")] == ["c.BIN", "d.pt"]
