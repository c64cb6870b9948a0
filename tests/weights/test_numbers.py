"""Numbers of weights without digests: what a sample shows on loading, what `verify_source` shows of all."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_damage import damage, flip, outcome
from torch import Tensor

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.sources import open_source, verify_source
from ldm.weights.tensors import Store

UNET = "unet/diffusion_pytorch_model.safetensors"


def without_digests(folder: Path) -> Path:
    """The folder as diffusers would write it."""
    (folder / "ldm_manifest.json").unlink()
    for file in folder.rglob("*.safetensors"):
        save_file(load_file(file), file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without digests."""
    folder = tmp_path_factory.mktemp("foreign") / "m"
    tiny.model("sdxl", shallow=True).save_pretrained(folder)
    return without_digests(folder)


def changed(foreign: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model with other weights of its U-Net."""
    shutil.copytree(foreign, folder)
    tensors = load_file(folder / UNET)
    change(tensors)
    save_file(tensors, folder / UNET)
    return folder


@pytest.mark.parametrize("number", [float("nan"), float("-inf"), 1e12])
@pytest.mark.parametrize("place", [0, -1])
def test_a_wrong_number_at_an_end_of_a_tensor_is_not_loaded(
    foreign: Path, tmp_path: Path, number: float, place: int
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["mid_block.resnets.0.conv1.weight"].view(-1)[place] = number

    folder = changed(foreign, tmp_path / "m", change)
    with pytest.raises(LdmError, match=r"safetensors: mid_block.resnets.0.conv1.weight holds the number .* fetch or"):
        LatentDiffusion.from_pretrained(folder, verify=False)
    pickle = tmp_path / "pickle"
    shutil.copytree(folder, pickle)
    torch.save(load_file(pickle / UNET), (pickle / UNET).with_suffix(".bin"))
    (pickle / UNET).unlink()
    with pytest.raises(LdmError, match=r"bin: mid_block.resnets.0.conv1.weight holds the number"):
        LatentDiffusion.from_pretrained(pickle, allow_pickle=True)


def test_a_part_of_a_file_that_was_never_written_is_not_loaded(foreign: Path, tmp_path: Path) -> None:
    shutil.copytree(foreign, tmp_path / "m")
    file = tmp_path / "m" / UNET
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(LdmError, match="hold nothing but zeros, as unwritten parts do"):
        LatentDiffusion.from_pretrained(tmp_path / "m")


def test_a_wrong_number_within_a_tensor_is_found_by_verification(foreign: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["mid_block.resnets.0.conv1.weight"].view(-1)[1000] = 1e12

    opened = open_source(changed(foreign, tmp_path / "m", change))
    with pytest.raises(LdmError, match="mid_block.resnets.0.conv1.weight holds the number 1e\\+12"):
        verify_source(opened)


def test_verification_says_what_it_cannot_know_and_what_is_unusual(foreign: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["mid_block.resnets.0.conv1.weight"].view(-1)[1000] = 2000
        tensors["mid_block.resnets.0.norm1.weight"].zero_()

    folder = changed(foreign, tmp_path / "m", change)
    lines = verify_source(open_source(folder))
    text = "\n".join(lines)
    assert "0 of 4 weight files carry a digest" in text
    assert "4 weight files have no digest: whether their numbers are those of their author cannot be known" in text
    assert sum(line.endswith(UNET) and len(line.split()[0]) == 64 for line in lines) == 1
    assert "1 tensors hold nothing but zeros, which is unusual: mid_block.resnets.0.norm1.weight" in text
    assert "hold a number far from their others, which is unusual: mid_block.resnets.0.conv1.weight (2000)" in text


def test_verification_compares_numbers_with_the_family_and_the_tokenizer_with_clip(tmp_path: Path) -> None:
    shutil.copytree(Path(open_source("emoji").source), tmp_path / "m")
    (tmp_path / "m" / "ldm_manifest.json").unlink()
    for name, key, value in (
        ("vae/config.json", "scaling_factor", 0.5),
        ("scheduler/scheduler_config.json", "beta_end", 0.03),
    ):
        file = tmp_path / "m" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    text = "\n".join(verify_source(open_source(tmp_path / "m")))
    assert "autoencoder: scaling_factor is 0.5, of emoji " in text
    assert "noise schedule: beta_end is 0.03, of emoji " in text


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("vae/config.json", "scaling_factor", 1e5),
        ("vae/config.json", "scaling_factor", float("nan")),
        ("vae/config.json", "shift_factor", 1e5),
        ("scheduler/scheduler_config.json", "beta_end", 1.5),
        ("scheduler/scheduler_config.json", "steps_offset", 10**30),
        ("scheduler/scheduler_config.json", "timestep_spacing", "x" * 1000),
        ("scheduler/scheduler_config.json", "use_karras_sigmas", 0.5),
        ("scheduler/scheduler_config.json", "sigma_max", -1),
    ],
)
def test_numbers_in_configurations_have_bounds(
    foreign: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    shutil.copytree(foreign, tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(LdmError, match=path.name):
        LatentDiffusion.from_pretrained(tmp_path / "m")


def test_damage_that_loads_is_of_kinds_that_cannot_be_known(tmp_path: Path, foreign: Path) -> None:
    """Other numbers of usual size in weights, in configurations or in the tokenizer's texts."""
    shutil.copytree(foreign, tmp_path / "other")
    for file in (tmp_path / "other").rglob("*.safetensors"):
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    reference = LatentDiffusion.from_pretrained(foreign)
    wrong = []
    for seed in range(40):
        copy = tmp_path / str(seed)
        shutil.copytree(foreign, copy)
        what = damage(copy, tmp_path / "other", random.Random(seed))
        if outcome(copy, reference) == "wrong":
            wrong.append(what)
        shutil.rmtree(copy)
    kinds = ("flip data", "swap", "zero", "foreign file", "dtype", "edit json", "flip text", "nan")
    assert all(what.startswith(kinds) for what in wrong), wrong
    assert len(wrong) < 14, wrong


def test_a_sample_reads_a_small_part_of_a_file(foreign: Path) -> None:
    store = Store([foreign / UNET])
    samples = list(store.sample(store.infos, 4))
    assert sum(len(sample.numbers) for sample in samples) <= 12 * len(store.infos)
    whole = load_file(foreign / UNET)
    for sample in samples:
        begin = 0
        for name, end in zip(sample.names, sample.ends.tolist(), strict=True):
            flat = whole[name].reshape(-1)
            assert torch.equal(sample.numbers[begin : begin + 4], flat[:4])
            assert torch.equal(sample.numbers[end - 4 : end], flat[-4:])
            begin = end


def test_flipped_bits_of_fp16_are_told_apart_by_their_size(foreign: Path, tmp_path: Path) -> None:
    shutil.copytree(foreign, tmp_path / "m")
    flip(tmp_path / "m" / UNET, random.Random(3), 0.6, 0.9)
    lines = verify_source(open_source(tmp_path / "m"))
    assert any("have no digest" in line for line in lines)
