"""Caches: the same batches with and without, whole after a kill at any time, never stale."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder, place_image, png
from launched import PATIENCE
from safetensors import safe_open
from torch import Tensor

from ldm.data import cache
from ldm.data.cache import Latents, Texts, build_latents, build_texts
from ldm.data.framing import Framing
from ldm.data.loader import Loader
from ldm.data.plan import BatchPlan
from ldm.data.sources import open_images
from ldm.errors import LdmError

FIXED = Framing(size=64, step=8, crops=2, flip=True)


def identity(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """An autoencoder whose latents are the pixels, with a deviation of 0.5."""
    return pixels, torch.full_like(pixels, 0.5)


def plan(root: Path, count: int = 12, framing: Framing = FIXED, seed: int = 0) -> BatchPlan:
    folder = root / "images" if (root / "images").exists() else make_folder(root / "images", count)
    return BatchPlan(open_images(str(folder), root / "cache"), framing, 3, seed)


def shards(root: Path) -> list[Path]:
    return sorted((root / "cache").glob("latents-*/*.safetensors"))


def rows_in(root: Path) -> int:
    return sum(len(safe_open(shard, "pt").get_tensor("names")) for shard in shards(root))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("framing", [FIXED, Framing(size=64, step=8, crop="center")])
def test_a_cached_run_sees_the_same_batches(tmp_path: Path, framing: Framing, workers: int) -> None:
    """Samples, captions, order, coordinates and, through an autoencoder that changes nothing, pixels; for any seed."""
    todo = 12 * (4 if framing.flip else 1)
    assert build_latents(tmp_path / "cache", plan(tmp_path, framing=framing), "vae", identity, workers=workers) == todo
    for seed in (0, 1):
        order = plan(tmp_path, framing=framing, seed=seed)
        latents = Latents(tmp_path / "cache", order, "vae")
        with_cache = Loader(order, latents=latents, workers=workers)
        for a, b in zip(islice(with_cache, 16), Loader(order), strict=False):
            assert (a.keys, a.epochs, a.captions) == (b.keys, b.epochs, b.captions)
            assert torch.equal(a.size, b.size) and a.pixels is None
            assert a.moments is not None and b.pixels is not None
            mean, deviation = a.moments.chunk(2, dim=1)
            assert torch.equal(mean, b.pixels) and bool((deviation == 0.5).all())


def test_different_visits_show_different_crops(tmp_path: Path) -> None:
    order = plan(tmp_path, count=2)
    build_latents(tmp_path / "cache", order, "vae", identity)
    batches = islice(Loader(order, latents=Latents(tmp_path / "cache", order, "vae")), 30)
    assert len({batch.moments[0].numpy().tobytes() for batch in batches if batch.moments is not None}) > 4


def test_more_crops_are_added_to_what_is_there(tmp_path: Path) -> None:
    """Neither the number of crops, nor the flip, nor the seed or batch is what a row depends on."""
    first = plan(tmp_path, framing=replace(FIXED, crops=1, flip=False))
    assert build_latents(tmp_path / "cache", first, "vae", identity) == 12
    assert build_latents(tmp_path / "cache", plan(tmp_path, framing=replace(FIXED, flip=False)), "vae", identity) == 12
    assert build_latents(tmp_path / "cache", plan(tmp_path, seed=3), "vae", identity) == 24
    assert build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity) == 0
    assert build_latents(tmp_path / "cache", plan(tmp_path, framing=replace(FIXED, size=72)), "vae", identity) == 48


def test_a_changed_image_is_noticed_and_encoded_again(tmp_path: Path) -> None:
    build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity)
    (tmp_path / "images" / "000.png").write_bytes(png(place_image(64, 64)))
    (tmp_path / "images" / "001.txt").write_text("a new caption", encoding="utf-8")
    changed = plan(tmp_path)
    with pytest.raises(
        LdmError, match=r"lacks 1 images, such as 000.png: they are new, have changed, or the build did"
    ):
        Latents(tmp_path / "cache", changed, "vae")
    assert build_latents(tmp_path / "cache", changed, "vae", identity) == 4
    moments, numbers = Latents(tmp_path / "cache", changed, "vae").read(0, 0, False)
    pixels = torch.from_numpy(np.array(place_image(64, 64))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(moments[:3], pixels) and numbers == (64, 64, 0, 0, 64, 64)


def test_another_autoencoder_or_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match=r"cache holds no latents with these settings; build the cache first"):
        Latents(tmp_path / "cache", plan(tmp_path), "vae")
    build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity)
    with pytest.raises(
        LdmError, match=r"no latents with these settings \(the existing cache differs in its autoencoder\)"
    ):
        Latents(tmp_path / "cache", plan(tmp_path), "another vae")
    with pytest.raises(LdmError, match=r"the existing cache differs in its size and aspect"):
        Latents(tmp_path / "cache", plan(tmp_path, framing=replace(FIXED, size=32, aspect=2.0)), "vae")
    with pytest.raises(LdmError, match="a new crop at each visit cannot be cached; set crops to 1 or more"):
        build_latents(tmp_path / "cache", plan(tmp_path, framing=replace(FIXED, crops=0)), "vae", identity)


class StopError(Exception):
    """Something that stops a build."""


def failing(calls: int) -> cache.Encode:
    """An autoencoder that fails after so many calls."""
    left = iter(range(calls))

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        if next(left, None) is None:
            raise StopError
        return identity(pixels)

    return encode


def test_a_build_that_stops_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD", 3 * 2 * 64 * 64 * 3 * 4)  # three or so rows
    with pytest.raises(StopError):
        build_latents(tmp_path / "cache", plan(tmp_path), "vae", failing(5), batch=3)
    assert shards(tmp_path)
    built = rows_in(tmp_path)
    assert 3 <= built < 48
    assert build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity, batch=3) == 48 - built
    Latents(tmp_path / "cache", plan(tmp_path), "vae")


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_cache as here
here.cache.SHARD = 1
write, count = here.cache.write_safetensors, iter(range(4))

def write_half(path, outputs, metadata):
    write(path, outputs, metadata)
    if next(count, None) is None:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

here.cache.write_safetensors = write_half
here.build_latents(Path(sys.argv[1]) / "cache", here.plan(Path(sys.argv[1])), "vae", here.identity, batch=3)
"""


def test_a_build_that_is_killed_while_it_writes_goes_on(tmp_path: Path) -> None:
    plan(tmp_path)
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(here), str(here.parent), str(here.parent.parent)],
        timeout=PATIENCE,
    )
    assert child.returncode == -signal.SIGKILL and len(shards(tmp_path)) == 4
    built = rows_in(tmp_path)
    (left,) = shards(tmp_path)[0].parent.glob(".*.part")
    os.utime(left, (1, 1))
    assert build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity) == 48 - built > 30
    order = plan(tmp_path)
    with_cache = Loader(order, latents=Latents(tmp_path / "cache", order, "vae"))
    for a, b in zip(islice(with_cache, 8), Loader(order), strict=False):
        assert a.moments is not None and b.pixels is not None and torch.equal(a.moments[:, :3], b.pixels)
    assert not left.exists()


def test_processes_build_disjoint_parts(tmp_path: Path) -> None:
    counts = [
        build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity, rank=rank, world=3) for rank in range(3)
    ]
    assert sum(counts) == 48 and all(0 < count < 48 for count in counts)
    Latents(tmp_path / "cache", plan(tmp_path), "vae")


def test_a_part_that_another_process_has_just_finished(tmp_path: Path) -> None:
    """It was listed, and is gone when its age is looked at, as what a dangling link names."""
    build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity)
    (shards(tmp_path)[0].parent / ".gone.part").symlink_to("finished")
    assert build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity) == 0


def test_a_damaged_image_is_replaced_as_without_a_cache(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 30)
    bad = tmp_path / "images" / "002.png"
    bad.write_bytes(bad.read_bytes()[:4000])
    order = plan(tmp_path)
    assert build_latents(tmp_path / "cache", order, "vae", identity) == 116
    assert build_latents(tmp_path / "cache", order, "vae", identity) == 0
    loaders = Loader(order, latents=Latents(tmp_path / "cache", order, "vae")), Loader(order)
    for a, b in zip(*(islice(loader, 10) for loader in loaders), strict=True):
        assert a.keys == b.keys and "002.png" not in a.keys
    assert loaders[0].skipped.reasons == loaders[1].skipped.reasons != {}


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def overflowing(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels * torch.tensor(1e38) * 100, pixels

    with pytest.raises(LdmError, match=r"the latents of 0\d\d.png are not finite; encode in bf16 or fp32"):
        build_latents(tmp_path / "cache", plan(tmp_path), "vae", overflowing)
    assert not shards(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    build_latents(tmp_path / "cache", plan(tmp_path), "vae", identity)
    shard = shards(tmp_path)[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(LdmError, match=rf"{shard.name} is damaged or cut short"):
        Latents(tmp_path / "cache", plan(tmp_path), "vae")


def test_latents_keep_their_dtype_on_disk(tmp_path: Path) -> None:
    build_latents(tmp_path / "cache", plan(tmp_path), "vae", lambda x: (x.bfloat16(), x.bfloat16()))
    with safe_open(shards(tmp_path)[0], "pt") as file:
        assert file.get_tensor("moments").dtype == torch.bfloat16
    assert Latents(tmp_path / "cache", plan(tmp_path), "vae").read(0, 0, False)[0].dtype == torch.float32


# --- texts ------------------------------------------------------------------------------------------------------------


def encode_texts(captions: list[str]) -> dict[str, Tensor]:
    """The length of a caption, in two shapes."""
    lengths = torch.tensor([float(len(caption)) for caption in captions])
    return {"text": lengths[:, None, None].expand(-1, 4, 3), "pooled": lengths[:, None].expand(-1, 2).half()}


def test_texts(tmp_path: Path) -> None:
    images = plan(tmp_path).images
    assert build_texts(tmp_path / "cache", images.captions(), "clip", encode_texts, batch=5) == 25
    assert build_texts(tmp_path / "cache", images.captions(), "clip", encode_texts) == 0
    assert build_texts(tmp_path / "cache", ["", "more"], "clip", encode_texts) == 1
    found = Texts(tmp_path / "cache", "clip").read(["image 3", "", "image 11", "image 3"])
    assert found["text"].shape == (4, 4, 3) and found["pooled"].dtype == torch.float16
    assert found["text"][:, 0, 0].tolist() == found["pooled"][:, 1].tolist() == [7, 0, 8, 7]
    with pytest.raises(LdmError, match="lacks the caption 'who'; build the cache again"):
        Texts(tmp_path / "cache", "clip").read(["who"])
    with pytest.raises(LdmError, match="the existing cache differs in its text encoders"):
        Texts(tmp_path / "cache", "another")


def test_texts_stop_and_go_on_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD", 1)
    captions = [f"caption {number}" for number in range(40)]

    def some() -> Iterator[int]:
        for rank in range(2):
            yield build_texts(tmp_path, captions, "clip", encode_texts, batch=3, rank=rank, world=2)

    left = iter(range(4))

    def failing_texts(captions: list[str]) -> dict[str, Tensor]:
        if next(left, None) is None:
            raise StopError
        return encode_texts(captions)

    with pytest.raises(StopError):
        build_texts(tmp_path, captions, "clip", failing_texts, batch=3)
    assert sum(some()) == 41 - 12
    assert Texts(tmp_path, "clip").read(captions)["text"].shape == (40, 4, 3)


def test_texts_of_different_lengths_do_not_mix(tmp_path: Path) -> None:
    def by_length(captions: list[str]) -> dict[str, Tensor]:
        return {"text": torch.zeros(len(captions), 1 + len(captions[0]), 2)}

    build_texts(tmp_path, ["a", "bc"], "clip", by_length, batch=1)
    assert Texts(tmp_path, "clip").read(["bc"])["text"].shape == (1, 3, 2)
    with pytest.raises(LdmError, match="holds texts of different lengths; encode all of them at one length"):
        Texts(tmp_path, "clip").read(["a", "bc"])
