"""Damage of every kind to what we wrote: each load either fails with one line or gives exactly what was written."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.sources import open_source, verify_source

ROUNDS = 60
UNET = "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of the same shape as folders and as single files."""
    root = tmp_path_factory.mktemp("written")
    for name, seed in (("one", 0), ("two", 1)):
        model = tiny.model("sdxl", seed, shallow=True)
        model.save_pretrained(root / name, max_shard_size=4_000_000)
        model.save_pretrained(root / f"{name}.safetensors")
    return {path.name: path for path in root.iterdir()}


def flip(path: Path, rng: random.Random, low: float, high: float) -> None:
    """Flip one bit somewhere in a part of the file."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(int(low * len(data)), max(int(high * len(data)), 1))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    length = int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, rng, 0, (8 + length) / size)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def grow(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def rewrite(path: Path, rng: random.Random, how: str) -> None:
    """Change tensors with safetensors' own tools, as a careless script would."""
    tensors = load_file(path)
    names = sorted(tensors)
    name = rng.choice(names)
    if how == "swap":
        same = [other for other in names if tensors[other].shape == tensors[name].shape and other != name]
        other = rng.choice(same or names)
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    elif how == "zero":
        tensors[name] = torch.zeros_like(tensors[name])
    elif how == "drop":
        del tensors[name]
    elif how == "nan":
        tensors[name].view(-1)[0] = float("nan")
    else:
        tensors[name] = tensors[name].to(rng.choice([torch.float16, torch.float64, torch.int32]))
    save_file(tensors, path)


def edit(path: Path, rng: random.Random) -> None:
    """Change one value of a JSON file."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return truncate(path, rng)
    key = rng.choice(sorted(content))
    content[key] = rng.choice([None, -1, 10**30, "x" * 1000, [], {}, [[]], True, 0.5, {"a": [1]}, float("nan")])
    path.write_text(json.dumps(content))
    return None


def damage(folder: Path, other: Path, rng: random.Random) -> str:
    """One random kind of damage; what it was."""
    weights = sorted(folder.rglob("*.safetensors"))
    texts = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".txt"))
    target = rng.choice(weights)
    kind = rng.choice(
        ["truncate", "grow", "flip header", "flip data", "swap", "zero", "drop", "nan", "dtype", "foreign file",
         "edit json", "edit json", "flip text", "truncate text", "remove", "garbage", "exchange files"]
    )  # fmt: skip
    match kind:
        case "truncate":
            truncate(target, rng)
        case "grow":
            grow(target, rng)
        case "flip header":
            flip_header(target, rng)
        case "flip data":
            flip(target, rng, 0.5, 1)
        case "foreign file":
            shutil.copy(other / target.relative_to(folder), target)
        case "edit json":
            target = rng.choice([path for path in texts if path.suffix == ".json"])
            edit(target, rng)
        case "flip text":
            target = rng.choice(texts)
            flip(target, rng, 0, 1)
        case "truncate text":
            target = rng.choice(texts)
            truncate(target, rng)
        case "remove":
            target = rng.choice(weights + texts)
            target.unlink()
        case "garbage":
            target.write_bytes(rng.randbytes(rng.randrange(1, 10_000)))
        case "exchange files":
            second = rng.choice(weights)
            first, last = target.read_bytes(), second.read_bytes()
            target.write_bytes(last)
            second.write_bytes(first)
        case _:
            rewrite(target, rng, kind)
    return f"{kind} of {target.relative_to(folder)}"


def outcome(source: Path, reference: LatentDiffusion, verify: bool = True) -> str:
    """Whether a load is "refused", "harmless" or, the defect, "wrong"."""
    try:
        model = LatentDiffusion.from_pretrained(source, verify=verify)
    except LdmError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return "refused"
    same = tiny.same_weights(model, reference) and model.family == reference.family
    tokens = [t.vocabulary() for t in model.text_encoders.tokenizers]
    same = same and tokens == [t.vocabulary() for t in reference.text_encoders.tokenizers]
    same = same and all(
        torch.equal(a, b)
        for a, b in zip(
            model.text_encoders.tokenize(["a cat!"]), reference.text_encoders.tokenize(["a cat!"]), strict=True
        )
    )
    return "harmless" if same else "wrong"


def test_no_damage_to_a_folder_loads_silently(tmp_path: Path, written: dict[str, Path]) -> None:
    reference = LatentDiffusion.from_pretrained(written["one"])
    outcomes: dict[str, list[str]] = {"refused": [], "harmless": [], "wrong": []}
    for seed in range(ROUNDS):
        copy = tmp_path / str(seed)
        shutil.copytree(written["one"], copy)
        what = damage(copy, written["two"], random.Random(seed))
        outcomes[outcome(copy, reference)].append(what)
        shutil.rmtree(copy)
    assert outcomes["wrong"] == []
    # exchanging a file with itself, a bit of white space, or removing the manifest changes nothing
    assert len(outcomes["refused"]) > 0.9 * ROUNDS, outcomes["harmless"]


def test_without_digests_damage_does_load_silently(tmp_path: Path, written: dict[str, Path]) -> None:
    """So the test above would notice if digests were not checked."""
    reference = LatentDiffusion.from_pretrained(written["one"])
    copy = tmp_path / "copy"
    shutil.copytree(written["one"], copy)
    flip(next((copy / "unet").glob("*.safetensors")), random.Random(0), 0.9, 1)
    assert outcome(copy, reference) == "refused"
    assert outcome(copy, reference, verify=False) == "wrong"


def test_no_damage_to_a_single_file_loads_silently(tmp_path: Path, written: dict[str, Path]) -> None:
    reference = LatentDiffusion.from_pretrained(written["one.safetensors"])
    copy = tmp_path / "copy.safetensors"
    outcomes: dict[str, list[str]] = {"refused": [], "harmless": [], "wrong": []}
    for seed in range(60):
        rng = random.Random(seed)
        shutil.copy(written["one.safetensors"], copy)
        kind = seed % 4
        [truncate, grow, flip_header, lambda path, r: flip(path, r, 0.2, 1)][kind](copy, rng)
        outcomes[outcome(copy, reference)].append(f"{kind} with seed {seed}")
    assert outcomes["wrong"] == []
    assert len(outcomes["refused"]) >= 58, outcomes["harmless"]


def test_the_remedy_for_a_wanted_change_is_said_and_works(tmp_path: Path, written: dict[str, Path]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written["one"], copy)
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.2}))
    with pytest.raises(LdmError, match=r"vae/config.json has changed .* if the change is wanted, delete .*manifest"):
        LatentDiffusion.from_pretrained(copy)
    assert LatentDiffusion.from_pretrained(copy, verify=False).family.autoencoder.scaling_factor == 0.2
    (copy / "ldm_manifest.json").unlink()
    assert LatentDiffusion.from_pretrained(copy).family.autoencoder.scaling_factor == 0.2


def test_files_that_came_later_are_noticed(tmp_path: Path, written: dict[str, Path]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written["one"], copy)
    tiny.model("sdxl", 1, shallow=True).save_pretrained(tmp_path / "half", variant="fp16")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        shutil.copy(file, copy / file.parent.name)
    with pytest.raises(LdmError, match=f"{UNET}.* did not come with this model"):
        LatentDiffusion.from_pretrained(copy, variant="fp16")


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../../x.json", "./model_index.json", "unet/../model_index.json", "", "unet//config.json"]
)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path: Path, written: dict[str, Path], name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written["one"], copy)
    manifest = copy / "ldm_manifest.json"
    content = json.loads(manifest.read_text())
    content["sha256"][name] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(LdmError, match="is damaged, or of another format"):
        LatentDiffusion.from_pretrained(copy)
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(LdmError, match="cannot be read"):
        LatentDiffusion.from_pretrained(copy)


def test_verification_reads_the_manifest(tmp_path: Path, written: dict[str, Path]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written["one"], copy)
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    opened = open_source(copy, verify=False)
    with pytest.raises(LdmError, match="vae/config.json has changed"):
        verify_source(opened)
