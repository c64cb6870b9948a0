"""Batches: their size numbers describe their pixels, and they are the same however they are loaded."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder, make_shards, place_image, png, samples, saved_dataset
from PIL import Image

from ldm.data.framing import Framing
from ldm.data.image_set import ImageSet
from ldm.data.loader import Batch, Loader, once
from ldm.data.plan import BatchPlan
from ldm.data.sources import open_images, open_stream
from ldm.data.streams import StreamPlan
from ldm.errors import LdmError

SMALL = Framing(size=64, step=8, flip=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """23 images in five sizes."""
    root = tmp_path_factory.mktemp("data")
    return open_images(str(make_folder(root / "images", 23)), root / "cache")


def rows(batches: Iterable[Batch]) -> list[tuple[object, ...]]:
    """Every row of some batches, in order."""
    return [
        (key, epoch, caption, batch.pixels[i].numpy().tobytes(), *batch.size[i].tolist())
        for batch in batches
        for i, (key, epoch, caption) in enumerate(zip(batch.keys, batch.epochs, batch.captions, strict=True))
        if batch.pixels is not None
    ]


@pytest.mark.parametrize("framing", [SMALL, Framing(size=64, buckets=False, flip=True), Framing(size=32, step=8)])
def test_the_size_numbers_describe_the_pixels(tmp_path: Path, framing: Framing) -> None:
    """Red is x and green is y in the image; each pixel of the batch must show where the numbers say it comes from."""
    (tmp_path / "images").mkdir()
    for width, height in ((200, 100), (100, 220), (128, 128), (64, 64), (250, 249)):
        (tmp_path / "images" / f"{width}x{height}.png").write_bytes(png(place_image(width, height)))
    plan = BatchPlan(open_images(str(tmp_path / "images"), tmp_path / "c", captions="optional"), framing, 5, seed=0)
    flips = 0
    for batch in islice(Loader(plan), 12):
        assert batch.pixels is not None and batch.pixels.is_contiguous() and batch.pixels.dtype == torch.float32
        for pixels, numbers, key in zip(batch.pixels, batch.size, batch.keys, strict=True):
            height, width, top, left, target_height, target_width = numbers.tolist()
            assert key == f"{int(width)}x{int(height)}.png"
            assert pixels.shape == (3, target_height, target_width)
            scale = max(target_width / width, target_height / height)
            colours = (pixels + 1) * 127.5
            flip = bool(colours[0, :, 0].mean() > colours[0, :, -1].mean())
            flips += flip
            x = (torch.arange(target_width) + left + 0.5) / round(width * scale) * width - 0.5
            if flip:  # coordinates are those of the mirrored image
                x = width - 1 - x
            y = (torch.arange(target_height) + top + 0.5) / round(height * scale) * height - 0.5
            inside = slice(4, -4)  # the filter overshoots at the image's edges
            assert (colours[0].mean(0) - x)[inside].abs().max() < 1
            assert (colours[1].mean(1) - y)[inside].abs().max() < 1
    assert flips > 5 if framing.flip else flips == 0


def test_pixels_span_the_range(images: ImageSet) -> None:
    batch = next(iter(Loader(BatchPlan(images, SMALL, 4, seed=0))))
    assert batch.pixels is not None and batch.pixels.min() >= -1 and batch.pixels.max() <= 1
    assert batch.pixels.min() < -0.99 and batch.pixels.max() > 0.99
    assert batch.scores.shape == (4,) and batch.scores.isnan().all() and batch.size.dtype == torch.float32


def test_batches_are_the_same_however_they_are_loaded(images: ImageSet) -> None:
    """Workers, ranks, micro-batches, a start anywhere, the global random state: none of them matters."""
    plan = BatchPlan(images, SMALL, 4, seed=3)
    expected = rows(islice(Loader(plan), 9))
    assert len({row[:2] for row in expected}) == 36
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for start in (0, 1, 5):
        for workers in (0, 2):
            loaded = islice(Loader(plan, start=start, workers=workers), 9 - start)
            assert rows(loaded) == expected[4 * start :]
    for world, micro in ((2, 1), (1, 2), (2, 2), (4, 1)):
        loaders = [Loader(plan, rank=rank, world=world, micro_batches=micro) for rank in range(world)]
        parts = [list(islice(loader, 9 * micro)) for loader in loaders]
        together = [part[number] for number in range(9 * micro) for part in parts]
        assert rows(together) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_works_in_spawned_processes(images: ImageSet) -> None:
    plan = BatchPlan(images, SMALL, 4, seed=3)
    expected = rows(islice(Loader(plan), 2))
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        assert rows(islice(Loader(plan, workers=1), 2)) == expected
    finally:
        torch.multiprocessing.set_start_method("fork", force=True)


def test_sources_of_the_same_images_give_the_same_batches(images: ImageSet, tmp_path: Path) -> None:
    expected = rows(islice(Loader(BatchPlan(images, SMALL, 4, seed=0)), 8))
    for source in (make_shards(tmp_path / "tar", 23), saved_dataset(tmp_path / "saved", 23)):
        found = open_images(source, tmp_path / "cache")
        assert rows(islice(Loader(BatchPlan(found, SMALL, 4, seed=0)), 8)) == expected


def test_captions_and_crops_differ_between_epochs(images: ImageSet) -> None:
    plan = BatchPlan(images, Framing(size=32, step=8, flip=True), 1, seed=0)
    visits: dict[str, list[tuple[object, ...]]] = {}
    for row in rows(islice(Loader(plan), plan.first_step(8))):
        visits.setdefault(str(row[0]), []).append((row[2], row[3]))
    for key, seen in visits.items():
        assert len(seen) == 8
        assert {caption for caption, _ in seen} <= {f"image {int(key[:3])}", f"the same, number {int(key[:3])}"}
    assert np.mean([len({caption for caption, _ in seen}) == 2 for seen in visits.values()]) > 0.9
    assert np.mean([len({pixels for _, pixels in seen}) >= 2 for seen in visits.values()]) > 0.9


def test_a_jpeg_is_decoded_smaller_but_its_size_stays_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large photograph: nearly the same pixels, the true original size; turned ones too."""
    (tmp_path / "images").mkdir()
    x, y = np.meshgrid(np.arange(1201), np.arange(803))
    waves = [np.sin(x / 31) * np.sin(y / 17), np.cos(x / 71 + y / 37), np.sin(x * y / 9000)]
    photo = Image.fromarray((np.stack(waves, axis=2) * 100 + 128).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "images" / "straight.jpg", quality=95)
    photo.crop((0, 0, 1200, 800)).save(tmp_path / "images" / "turned.jpg", quality=95, exif=exif)
    photo.save(tmp_path / "images" / "odd.jpg", quality=95, exif=exif)  # would be shifted by a part of a pixel
    found = open_images(str(tmp_path / "images"), tmp_path / "c", captions="optional")
    assert [found.read(index, 160).size for index in range(3)] == [(803, 1201), (301, 201), (200, 300)]
    plan = BatchPlan(found, Framing(size=96, step=8), 1, seed=0)
    fast = {batch.keys[0]: batch for batch in islice(Loader(plan), 3)}
    monkeypatch.setattr("ldm.data.loader.decoded_side", lambda frame: 0)
    original = {"odd.jpg": [1201, 803], "straight.jpg": [803, 1201], "turned.jpg": [1200, 800]}
    for batch in islice(Loader(plan), 3):
        quick = fast[batch.keys[0]]
        assert torch.equal(batch.size, quick.size) and batch.size[0, :2].tolist() == original[batch.keys[0]]
        assert batch.pixels is not None and quick.pixels is not None
        assert (batch.pixels - quick.pixels).abs().mean() * 127.5 < 1
        assert torch.equal(batch.pixels, quick.pixels) == (batch.keys == ["odd.jpg"])


def damage(root: Path, names: Iterable[str]) -> None:
    """Files whose headers are good and whose pixels are not."""
    for name in names:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_replaced_and_listed(tmp_path: Path, workers: int) -> None:
    root = make_folder(tmp_path / "images", 30)
    damage(root, ["003.png", "010.png"])
    plan = BatchPlan(open_images(str(root), tmp_path / "cache"), SMALL, 6, seed=0)
    loader = Loader(plan, workers=workers)
    seen = list(islice(loader, 5))
    assert sorted(loader.skipped.reasons) == ["003.png", "010.png"]
    assert all(len(batch.keys) == 6 and not {"003.png", "010.png"} & set(batch.keys) for batch in seen)
    listed = loader.skipped.path.read_text(encoding="utf-8")
    assert "003.png\tthe file cannot be read as an image: it is no image, or damaged\n" in listed
    halves = [Loader(plan, rank=rank, world=2) for rank in (0, 1)]
    parts = zip(*(islice(half, 5) for half in halves), strict=True)
    assert rows(batch for pair in parts for batch in pair) == rows(seen)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_images_are_an_error(tmp_path: Path, workers: int) -> None:
    root = make_folder(tmp_path / "images", 30)
    damage(root, [f"{number:03}.png" for number in (0, 1, 2, 3, 4, 10, 11, 12)])
    plan = BatchPlan(open_images(str(root), tmp_path / "cache"), SMALL, 6, seed=0)
    with pytest.raises(
        LdmError, match=r"[5-8] of \d+ images cannot be used: .* all are listed in .*skipped-0.txt; mend"
    ):
        list(islice(Loader(plan, workers=workers), 50))


@pytest.mark.parametrize("workers", [0, 1])
def test_when_no_image_of_a_bucket_is_left(tmp_path: Path, workers: int) -> None:
    root = make_folder(tmp_path / "images", 1)
    found = open_images(str(root), tmp_path / "cache")
    (root / "000.png").unlink()
    with pytest.raises(LdmError, match="nor its replacements can be read: 000.png: it cannot be read: No such file"):
        next(iter(Loader(BatchPlan(found, SMALL, 2, seed=0), workers=workers)))


def test_an_image_that_changed_its_size_meanwhile_is_damaged(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 6)
    found = open_images(str(root), tmp_path / "cache")
    (root / "000.png").write_bytes(png(place_image(50, 90)))
    with pytest.raises(LdmError, match="it has 50×90 pixels, not 64×64 as its header said"):
        found.read(0)


def test_a_batch_that_does_not_divide(images: ImageSet) -> None:
    with pytest.raises(LdmError, match="a batch of 4 does not divide among 3 processes and 1 micro-batches"):
        Loader(BatchPlan(images, SMALL, 4, seed=0), world=3)
    with pytest.raises(LdmError, match="rank is 2; it must be a whole number from 0 to 1"):
        Loader(BatchPlan(images, SMALL, 4, seed=0), world=2, rank=2)


def test_workers_that_end(images: ImageSet) -> None:
    """They pass over signals to all processes; one that is killed is named, in one line."""
    loader = iter(Loader(BatchPlan(images, SMALL, 4, seed=0), workers=1))
    next(loader)
    (worker,) = multiprocessing.active_children()
    assert worker.pid
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    for _ in range(5):
        next(loader)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(LdmError, match=r"a process that loads images ended \(DataLoader worker .*lower data.workers"):
        for _ in range(50):
            next(loader)


@pytest.mark.parametrize("world", [1, 2])
def test_every_image_once(tmp_path: Path, world: int) -> None:
    """For validation: the last batch of a bucket is as small as it comes."""
    root = make_folder(tmp_path / "images", 23)
    damage(root, ["004.png"])
    plan = BatchPlan(open_images(str(root), tmp_path / "cache"), SMALL, 64, seed=0)
    batches = [batch for rank in range(world) for batch in once(plan, 3, rank, world, "cpu")]
    assert max(len(batch.keys) for batch in batches) == 3
    seen = rows(batches)
    assert sorted(str(row[0]) for row in seen) == [f"{n:03}.png" for n in range(23) if n != 4]
    first = {row[0]: row for row in rows(islice(Loader(BatchPlan(plan.images, SMALL, 1, seed=0)), 23)) if row[1] == 0}
    assert all(first[row[0]] == row for row in seen if row[0] in first) and len(first) > 15
    listed = [line for file in (tmp_path / "cache").glob("skipped-*.txt") for line in file.read_text().splitlines()]
    assert {line.split("\t")[0] for line in listed} == {"004.png"}


# --- streams ----------------------------------------------------------------------------------------------------------


def stream_sources(root: Path, count: int) -> list[tuple[str, int]]:
    """Shards as files and through a command, and a saved dataset."""
    pattern = make_shards(root / "tar", count)
    return [(pattern, 8), (f"pipe:cat {pattern}", 8), (saved_dataset(root / "saved", count), 1000)]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_stream_has_every_image_once_in_each_epoch_in_a_fixed_order(tmp_path: Path, kind: int) -> None:
    source, buffer = stream_sources(tmp_path, 23)[kind]

    def plan() -> StreamPlan:
        return StreamPlan(open_stream(source), SMALL, 2, seed=5, folder=tmp_path / "cache", buffer=buffer)

    expected = rows(islice(Loader(plan()), 40))
    visits = [row[:2] for row in expected]
    assert len(set(visits)) == len(visits)
    first = {key for key, epoch in visits if epoch == 0}
    assert first == {f"{number:03}.png" for number in range(23)}
    assert [key for key, _ in visits] != sorted(key for key, _ in visits)
    assert rows(islice(Loader(plan(), start=7, workers=1), 4)) == expected[14:22]
    halves = [islice(Loader(plan(), rank=rank, world=2), 9) for rank in (0, 1)]
    assert rows(batch for pair in zip(*halves, strict=True) for batch in pair) == expected[:18]
    assert {str(row[2]).split()[0] for row in expected} == {"image", "the"}


def test_a_stream_skips_what_cannot_be_used(tmp_path: Path) -> None:
    from images import make_tar

    files: dict[str, bytes] = {}
    for name, (image, caption) in samples(30).items():
        files |= {f"{name}.png": image, f"{name}.txt": caption.encode()}
    files["007.png"] = b"no image"
    files["011.txt"] = b" "
    files["013.png"] = files["013.png"][: len(files["013.png"]) // 2]
    source = str(make_tar(tmp_path / "s.tar", files))
    plan = StreamPlan(open_stream(source), SMALL, 2, seed=0, folder=tmp_path / "cache", buffer=4)
    loader = Loader(plan)
    seen = {key for batch in islice(loader, 25) for key in batch.keys}
    assert seen == {f"{number:03}.png" for number in range(30)} - {"007.png", "011.png", "013.png"}
    assert list(loader.skipped.reasons) == ["013.png"]
    listed = (tmp_path / "cache" / "skipped-stream-0.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == ["007.png", "011.png"]


def test_a_stream_that_breaks_off_or_is_empty(tmp_path: Path) -> None:
    def load(source: str, framing: Framing = SMALL) -> None:
        next(iter(Loader(StreamPlan(open_stream(source), framing, 2, seed=0, folder=tmp_path / "cache"))))

    with pytest.raises(LdmError, match=r"gone.tar cannot be read: No such file or directory"):
        load(str(tmp_path / "gone.tar"))
    with pytest.raises(LdmError, match=r"the stream broke off"):
        load("pipe:false .tar")
    pattern = make_shards(tmp_path / "tar", 6)
    with pytest.raises(LdmError, match="holds no image that can be used; 6 are too small"):
        load(pattern, Framing(size=512))


def test_batches_move(images: ImageSet) -> None:
    batch = next(iter(Loader(BatchPlan(images, SMALL, 4, seed=0)))).to("meta")
    assert batch.pixels is not None and batch.moments is None
    assert {tensor.device.type for tensor in (batch.pixels, batch.size, batch.scores)} == {"meta"}
