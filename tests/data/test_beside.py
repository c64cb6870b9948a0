"""Images beside images: framed exactly as they are, from every source, with and without a cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder, make_tar, place_image, png, samples
from PIL import Image
from torch import Tensor

from ldm.conditions.table import KINDS, condition
from ldm.data.cache import Latents, build_latents
from ldm.data.framing import Framing
from ldm.data.image_set import ImageSet
from ldm.data.loader import Batch, Loader, once
from ldm.data.masks import RULES
from ldm.data.places import MADE
from ldm.data.plan import BatchPlan
from ldm.data.sources import open_images
from ldm.errors import LdmError

FRAMING = Framing(size=64, step=8, flip=True)
SIZES = {"a.png": (96, 64), "b.png": (64, 96), "c.png": (100, 90), "d.png": (64, 64), "e.png": (97, 64)}


def folder(root: Path, scale: int = 1, suffix: str = "png", names: tuple[str, ...] = tuple(SIZES)) -> Path:
    """Images whose colours are their coordinates; with `scale`, the same ones larger."""
    root.mkdir(parents=True)
    for name in names:
        width, height = SIZES[name]
        image = place_image(width, height).resize((scale * width, scale * height), Image.Resampling.BICUBIC)
        image.save(root / f"{name.removesuffix('.png')}.{suffix}")
    return root


def opened(root: Path, beside: Mapping[str, str], source: str | Path = "") -> ImageSet:
    return open_images(str(source or root / "images"), root / "cache", captions="optional", beside=beside)


def batches(images: ImageSet, count: int = 8, seed: int = 0, framing: Framing = FRAMING) -> list[Batch]:
    return list(islice(Loader(BatchPlan(images, framing, 2, seed)), count))


def test_an_image_beside_its_copy_is_framed_as_it_is(tmp_path: Path) -> None:
    """Buckets, random crops and flips; also of the held-out images, and from worker processes."""
    folder(tmp_path / "images")
    copies = str(folder(tmp_path / "images" / "copies"))
    images = opened(tmp_path, {"before": copies, "condition": copies, "mask": copies})
    assert len(images) == 5  # a folder of images beside others is none of images, though it lies inside
    plan = BatchPlan(images, FRAMING, 2, seed=0)
    seen = [*batches(images), *islice(Loader(plan, workers=1), 2), *once(plan, 2, 0, 1, "cpu")]
    for batch in seen:
        assert batch.pixels is not None
        height, width = batch.pixels.shape[2:]
        assert torch.equal(batch.beside["before"], batch.pixels)
        torch.testing.assert_close(batch.beside["condition"], (batch.pixels + 1) / 2)
        assert batch.beside["mask"].shape == (len(batch.keys), 1, height, width)
        luma = (batch.beside["condition"] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        assert (batch.beside["mask"] - luma).abs().max() < 0.01
    parts = seen[0].parts(2)
    assert [len(part.beside["mask"]) for part in parts] == [1, 1]


def test_an_image_of_another_size_is_resized_to_its_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path / "images")
    with caplog.at_level(logging.WARNING):
        images = opened(tmp_path, {"before": str(folder(tmp_path / "large", scale=3))})
    told = [line for line in caplog.messages if "another size" in line]
    assert len(told) == 1 and "5 of 5 images have a before of another size (a.png has 96×64 pixels, " in told[0]
    assert "aspect" not in told[0]
    for batch in batches(images):
        assert batch.pixels is not None
        assert (batch.beside["before"] - batch.pixels)[..., 4:-4, 4:-4].abs().max() < 3 / 127.5


def test_every_source_has_images_beside_its_own(tmp_path: Path) -> None:
    """A second folder, a column of a folder's metadata, members of shards, a column of a dataset."""
    import datasets

    files = {name: (image, text) for name, (image, text) in samples(6).items()}
    masks = {name: png(Image.fromarray(np.full((40, 40), 40 * n, np.uint8))) for n, name in enumerate(files)}
    make_folder(tmp_path / "images", 6)
    for root in (tmp_path / "masks", make_folder(tmp_path / "listed", 6) / "inside"):
        root.mkdir()
        for name, data in masks.items():
            (root / f"{name}.png").write_bytes(data)
    lines = [{"file_name": f"{name}.png", "mask": f"inside/{name}.png"} for name in files]
    (tmp_path / "listed" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    members = {}
    for name, (image, text) in files.items():
        members |= {f"{name}.mask.png": masks[name], f"{name}.png": image, f"{name}.txt": text.encode()}
    make_tar(tmp_path / "shard.tar", members)
    rows = [
        {
            "mask": {"bytes": masks[name], "path": None}, "image": {"bytes": image, "path": None},
            "text": text.splitlines(), "key": f"{name}.png",
        }
        for name, (image, text) in files.items()
    ]  # fmt: skip
    made = datasets.Dataset.from_list(rows)
    for column in ("image", "mask"):
        made = made.cast_column(column, datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))

    found = []
    for source, place in (
        ("images", str(tmp_path / "masks")), ("listed", "mask"), ("shard.tar", "mask"), ("saved", "mask"),
    ):  # fmt: skip
        images = opened(tmp_path, {"mask": place}, tmp_path / source)
        found.append(batches(images, 4))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert one.keys == other.keys and one.captions == other.captions
            assert torch.equal(one.beside["mask"], other.beside["mask"])
    whole = open_images(str(tmp_path / "saved"), tmp_path / "cache", image_column="image")
    assert whole.sizes()[0].max() > 40 == opened(tmp_path, {}, tmp_path / "saved").sizes()[0].max()
    with pytest.raises(LdmError, match="image_column image: .*shard.tar is no dataset with columns of images; leave"):
        open_images(str(tmp_path / "shard.tar"), tmp_path / "cache", image_column="image")
    for batch in found[0]:
        values = [40 * int(key[:3]) / 255 for key in batch.keys]
        assert batch.beside["mask"].flatten(1).mean(1).tolist() == pytest.approx(values, abs=1e-6)


def test_a_cache_of_latents_leaves_images_beside_as_they_are(tmp_path: Path) -> None:
    framing = Framing(size=64, step=8, crops=2, flip=True)
    images = opened(folder(tmp_path / "images").parent, {"condition": "canny", "before": str(folder(tmp_path / "b"))})
    plan = BatchPlan(images, framing, 2, seed=0)

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, torch.ones_like(pixels)

    build_latents(tmp_path / "cache", plan, "vae", encode)
    latents = Latents(tmp_path / "cache", plan, "vae")
    for cached, plain in zip(islice(Loader(plan, latents=latents), 8), islice(Loader(plan), 8), strict=True):
        assert cached.pixels is None and cached.keys == plain.keys
        for name in ("condition", "before"):
            assert torch.equal(cached.beside[name], plain.beside[name])


def test_condition_images_are_made_of_the_framed_image(tmp_path: Path) -> None:
    for batch in batches(opened(folder(tmp_path / "images").parent, {"condition": "blur"}), 3):
        assert batch.pixels is not None
        for pixels, made in zip(batch.pixels, batch.beside["condition"], strict=True):
            shown = Image.fromarray(((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
            wanted = torch.from_numpy(np.array(condition("blur", shown))).permute(2, 0, 1) / 255
            torch.testing.assert_close(made, wanted)


def test_masks_of_alpha_channels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An image's own alpha channel, framed as it is; and in a mask, transparent means black."""
    root = tmp_path / "images"
    root.mkdir()
    for name, size in SIZES.items():
        image = place_image(*size).convert("RGBA")
        image.putalpha(place_image(*size).getchannel("R"))
        image.save(root / name)
    folder(tmp_path / "plain")
    images = opened(tmp_path, {"mask": "alpha", "before": str(tmp_path / "plain")})
    for batch in batches(images, 4):
        assert torch.equal(batch.beside["mask"], (batch.beside["before"][:, :1] + 1) / 2)
    with pytest.raises(LdmError, match=r"plain: no image has an alpha channel for its mask"):
        opened(tmp_path, {"mask": "alpha"}, tmp_path / "plain")
    place_image(64, 64).save(root / "more.png")
    with caplog.at_level(logging.WARNING):
        opened(tmp_path, {"mask": "alpha"})
    assert "1 of 6 images have no alpha channel: their masks are white everywhere" in caplog.text
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 64))
    (tmp_path / "masks").mkdir()
    for name in SIZES:
        mask.save(tmp_path / "masks" / name)
    (root / "more.png").unlink()
    for batch in batches(opened(tmp_path, {"mask": str(tmp_path / "masks")}), 4):
        assert 0.2 < float(batch.beside["mask"].mean()) < 0.8


@pytest.mark.parametrize("rule", ["boxes", "strokes", "random"])
def test_masks_are_drawn_for_each_visit(tmp_path: Path, rule: str) -> None:
    """They depend on the seed, the image and the epoch alone, and are neither empty nor grey."""
    images = opened(folder(tmp_path / "images").parent, {"mask": rule})
    first, again, other = (batches(images, 20, seed) for seed in (0, 0, 1))
    masks = [mask for batch in first for mask in batch.beside["mask"]]
    assert all(torch.equal(a.beside["mask"], b.beside["mask"]) for a, b in zip(first, again, strict=True))
    assert {mask.numpy().tobytes() for mask in masks}.isdisjoint(
        mask.numpy().tobytes() for batch in other for mask in batch.beside["mask"] if mask.mean() < 1
    )
    assert {float(value) for mask in masks for value in mask.unique()} == {0.0, 1.0}
    parts = np.array([float(mask.mean()) for mask in masks])
    assert parts.min() > 0 and (0.1 < (parts == 1).mean() < 0.45 if rule == "random" else parts.max() < 1)


def test_the_names_of_what_is_made_are_those_of_its_makers() -> None:
    assert MADE["mask"] == ("alpha", *RULES)
    assert ("image", *MADE["condition"]) == tuple(name for name, kind in KINDS.items() if not kind.model)


def test_images_that_have_none_beside_them(tmp_path: Path) -> None:
    folder(tmp_path / "images")
    few = folder(tmp_path / "few", names=("a.png", "b.png", "c.png"))
    with pytest.raises(LdmError, match=r"2 of 5 images have no mask in .*few \(d.png, e.png\); add them, or take"):
        opened(tmp_path, {"mask": str(few)})
    (few / "d.png").write_bytes(b"none")
    with pytest.raises(LdmError, match=r"2 of 5 .* \(d.png, e.png\); 1 there cannot be read, see .*; add them"):
        opened(tmp_path, {"mask": str(few)})
    for name in ("d.webp", "d.jpg", "e.png"):
        place_image(*SIZES[f"{name[0]}.png"]).save(few / name)
    (few / "d.png").unlink()
    with pytest.raises(LdmError, match=r"d.png has several images of its name in .*few \(d.jpg, d.webp\); keep one"):
        opened(tmp_path, {"mask": str(few)})
    (few / "d.jpg").unlink()
    assert len(opened(tmp_path, {"mask": str(few)})) == 5


def test_columns_that_name_nothing(tmp_path: Path) -> None:
    root = folder(tmp_path / "images")
    with pytest.raises(LdmError, match=r"images has no column 'masks': it has no metadata.jsonl or metadata.csv"):
        opened(tmp_path, {"mask": "masks"})
    rows = [{"file_name": name, "mask": "a.png" if name == "b.png" else None} for name in SIZES]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(LdmError, match=r"images has no column 'masks': its metadata has file_name, mask"):
        opened(tmp_path, {"mask": "masks"})
    with pytest.raises(LdmError, match=r"4 of 5 images have no mask in the column mask of .*images \(a.png, c.png"):
        opened(tmp_path, {"mask": "mask"})
    with pytest.raises(LdmError, match=r"no/masks does not exist; give a folder, a column of the data, or one"):
        opened(tmp_path, {"mask": "no/masks"})


def test_a_companion_that_is_damaged_makes_its_image_unusable(tmp_path: Path) -> None:
    folder(tmp_path / "images")
    masks = folder(tmp_path / "masks")
    images = opened(tmp_path, {"mask": str(masks)})
    data = (masks / "a.png").read_bytes()
    (masks / "a.png").write_bytes(data[: len(data) // 2])
    loader = Loader(BatchPlan(images, Framing(size=64, step=64, aspect=1, upscale=2), 2, seed=0))
    keys = [key for batch in islice(loader, 5) for key in batch.keys]
    assert "a.png" not in keys and "a.png, its mask: the file cannot be read" in loader.skipped.reasons["a.png"]
