"""Buckets, crops and the order of batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from images import make_folder
from PIL import Image

from ldm.data.framing import Frame, Framing, choose_buckets, fixed_frame, render, visit_frame
from ldm.data.image_set import ImageSet
from ldm.data.plan import BatchPlan, split
from ldm.data.sources import open_images
from ldm.errors import LdmError

SMALL = Framing(size=64, step=8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """23 images in five sizes."""
    root = tmp_path_factory.mktemp("data")
    return open_images(str(make_folder(root / "images", 23)), root / "cache")


# --- buckets and crops ------------------------------------------------------------------------------------------------


def test_the_buckets_of_size_1024() -> None:
    sides = Framing().sides()
    assert {(512, 2048), (704, 1344), (832, 1216), (1024, 1024), (1152, 896), (1536, 640)} <= set(sides)
    assert all((height, width) in sides for width, height in sides)
    assert all(width % 64 == height % 64 == 0 and 0.9 <= width * height / 1024**2 <= 1 for width, height in sides)
    assert min(w / h for w, h in sides) == 1 / 4 and max(w / h for w, h in sides) == 4
    assert Framing(buckets=False).sides() == [(1024, 1024)]
    assert Framing(size=64, step=64).sides() == [(64, 64)]


def test_an_image_goes_to_the_bucket_of_nearest_aspect() -> None:
    framing = Framing()
    sides = framing.sides()
    widths, heights = np.array([1000, 3000, 333, 100, 9000]), np.array([1000, 2000, 1000, 1600, 1000])
    chosen, enlarged = choose_buckets(framing, widths, heights)
    for width, height, bucket, factor in zip(widths, heights, chosen, enlarged, strict=True):
        nearest = min(sides, key=lambda pair: abs(np.log(pair[0] / pair[1] * height / width)))
        assert sides[bucket] == nearest
        assert factor == max(nearest[0] / width, nearest[1] / height)


@pytest.mark.parametrize("original", [(64, 64), (200, 100), (97, 301), (65, 63), (1000, 10)])
@pytest.mark.parametrize("crop", ["random", "center"])
def test_a_frame_lies_within_the_resized_image(original: tuple[int, int], crop: str) -> None:
    framing = Framing(size=64, step=8, crop=crop, flip=True)
    bucket, _ = choose_buckets(framing, *(np.array([side]) for side in original))
    sides = framing.sides()[int(bucket[0])]
    frames = [visit_frame(framing, 0, "a", epoch, original, sides) for epoch in range(50)]
    for frame in frames:
        for axis in (0, 1):
            assert 0 <= frame.corner[axis] <= frame.resized[axis] - sides[axis]
        assert any(frame.resized[axis] == sides[axis] for axis in (0, 1))
        top, left = frame.numbers[2:4]
        assert 0 <= left <= frame.resized[0] - sides[0] and top == frame.corner[1]
    assert {frame.flip for frame in frames} == {False, True}
    assert len({frame.corner for frame in frames}) > 1 if crop == "random" and original == (1000, 10) else True


def test_fixed_crops_are_the_same_for_every_seed() -> None:
    framing = Framing(size=64, step=8, crops=3, flip=True)
    shown = [visit_frame(framing, seed, "a", epoch, (300, 200), (64, 64)) for seed in range(3) for epoch in range(20)]
    fixed = [fixed_frame(framing, "a", k, flip, (300, 200), (64, 64)) for k in range(3) for flip in (False, True)]
    assert set(shown) == set(fixed)


def test_only_what_is_shown_is_resized() -> None:
    """The crop of the resized image is what PIL gives when it resizes all of it."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (90, 140, 3), dtype=np.uint8))
    frame = Frame((140, 90), (100, 64), (21, 0), (64, 64), True)
    whole = image.resize((100, 64), Image.Resampling.BICUBIC).crop((21, 0, 85, 64))
    difference = render(image, frame).astype(int) - np.asarray(whole)[:, ::-1]
    assert np.abs(difference).max() <= 1
    same = Frame((140, 90), (140, 90), (21, 7), (64, 64), False)
    assert np.array_equal(render(image, same), np.asarray(image)[7:71, 21:85])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "size 100 must be a multiple of step 64"),
        ({"step": 12, "size": 120}, "step 12, itself a multiple of 8"),
        ({"size": 0}, "size is 0; it must be a whole number from 64"),
        ({"aspect": 0.5}, "aspect is 0.5; it must be from 1"),
        ({"upscale": 0.5}, r"upscale is 0.5; it must be from 1 \(never enlarge\)"),
        ({"crop": "middle"}, "crop 'middle' is not known; choose random or center"),
        ({"crop": "center", "crops": 2}, "one crop at its center, not 2"),
        ({"crops": -1}, "crops is -1"),
    ],
)
def test_framings_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        Framing(**options)  # type: ignore[arg-type]


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 4, 16, 64])
def test_every_image_is_visited_once_in_each_epoch(images: ImageSet, batch: int) -> None:
    """In the long run exactly, at any time up to the batches that buckets owe; no visit is repeated or left out."""
    plan = BatchPlan(images, SMALL, batch, seed=1)
    epochs = 2 * batch  # after a multiple of `batch` epochs no bucket owes anything
    visits = Counter()
    for step in range(plan.first_step(epochs)):
        item = plan.item(step)
        assert len(item.visits) == batch and {v.image for v in item.visits} <= set(plan.buckets[item.sides])
        visits.update((visit.image, visit.epoch) for visit in item.visits)
    assert visits == {(image, epoch): 1 for image in range(23) for epoch in range(epochs)}


def test_no_visit_comes_before_its_epoch(images: ImageSet) -> None:
    plan = BatchPlan(images, SMALL, 4, seed=1)
    for step in range(40):
        epoch = plan.epoch(step)
        assert plan.first_step(epoch) <= step < plan.first_step(epoch + 1)
        assert max(visit.epoch for visit in plan.item(step).visits) <= epoch


def test_the_order_depends_on_the_seed_the_epoch_and_nothing_else(images: ImageSet) -> None:
    plan, same, other = (BatchPlan(images, SMALL, 4, seed) for seed in (1, 1, 2))
    forward = [plan.item(step) for step in range(20)]
    assert [same.item(step) for step in reversed(range(20))] == forward[::-1]
    assert [item for item, _ in zip(same.items(7), range(13), strict=False)] == forward[7:]
    assert [other.item(step) for step in range(20)] != forward
    sides = [[plan.item(step).sides for step in range(plan.first_step(e), plan.first_step(e + 1))] for e in range(8)]
    assert len({tuple(order) for order in sides}) > 4  # batches of all buckets are shuffled anew in each epoch


def test_spares_are_of_the_same_bucket(images: ImageSet) -> None:
    plan = BatchPlan(images, SMALL, 4, seed=0)
    for item in (plan.item(step) for step in range(10)):
        assert item.spares and {spare.image for spare in item.spares} <= set(plan.buckets[item.sides].tolist())


def test_an_image_is_a_set(tmp_path: Path) -> None:
    """With one image a batch holds visits of several epochs."""
    one = open_images(str(make_folder(tmp_path / "images", 1)), tmp_path / "cache")
    plan = BatchPlan(one, SMALL, 4, seed=0)
    assert [[visit.epoch for visit in plan.item(step).visits] for step in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_small_images_are_left_out_and_counted(images: ImageSet) -> None:
    plan = BatchPlan(images, Framing(size=72, step=8, upscale=1.0), 4, seed=0)
    assert len(plan) + len(plan.left_out) == 23 and len(plan.left_out) > 0
    for index in plan.left_out:
        example = images.example(int(index))
        assert min(example.width, example.height) < 80
    assert f"{len(plan.left_out)} are too small (upscale 1.0) and left out" in str(plan)
    with pytest.raises(
        LdmError, match=r"all 23 images are too small for size 512; choose a smaller size, or an upscale"
    ):
        BatchPlan(images, Framing(size=512), 4, seed=0)


def test_what_is_held_out_stays_when_images_come(images: ImageSet, tmp_path: Path) -> None:
    fewer = open_images(str(make_folder(tmp_path / "images", 15)), tmp_path / "cache")
    held = [{some.key(int(index)) for index in split(some, 0.3)[1]} for some in (fewer, images)]
    assert held[0] == {key for key in held[1] if int(key[:3]) < 15} and 0 < len(held[0]) < 15
    train, validation = split(images, 5)
    assert len(validation) == 5 and sorted([*train, *validation]) == list(range(23))
    assert {images.key(int(i)) for i in split(images, 4)[1]} < {images.key(int(i)) for i in validation}
    assert len(split(images, 0)[1]) == 0
    plan = BatchPlan(images, SMALL, 4, seed=0, samples=train)
    assert set(np.concatenate(list(plan.buckets.values()))) == set(train)
    for wrong in (-1, 23, 100):
        with pytest.raises(LdmError, match=f"holding out {wrong} of 23 images leaves none"):
            split(images, wrong)
