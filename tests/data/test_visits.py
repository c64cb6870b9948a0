"""How often an image comes, what its loss weighs, and how the tags of its caption change from visit to visit."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from images import make_tar, place_image, png, saved_dataset

from ldm.data.cache import build_latents
from ldm.data.folder_rules import FolderRule, FolderRules
from ldm.data.framing import Framing
from ldm.data.image_set import ImageSet
from ldm.data.loader import Batch, Loader, once
from ldm.data.plan import BatchPlan
from ldm.data.sources import open_images, open_stream
from ldm.data.streams import StreamPlan
from ldm.data.tags import Tags
from ldm.errors import LdmError

SMALL = Framing(size=32, step=8, flip=True, crops=1)
IMAGE = png(place_image(48, 40))


def folder(root: Path, *names: str, rows: list[dict[str, object]] | None = None) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)
    if rows:
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def opened(root: Path, rules: FolderRules | None = None, captions: str = "optional", trigger: str = "") -> ImageSet:
    return open_images(
        str(root), root.parent / "cache", captions=captions, rules=rules or FolderRules(), trigger=trigger
    )


def visits_of(batches: Iterable[Batch]) -> list[tuple[str, int]]:
    return [row for batch in batches for row in zip(batch.keys, batch.epochs, strict=True)]


def weights(images: ImageSet) -> dict[str, float]:
    return {images.key(row): round(images.example(row).weight, 6) for row in range(len(images))}


# --- repeats and weights ----------------------------------------------------------------------------------------------


def test_an_image_comes_as_often_as_it_should_and_never_the_same(tmp_path: Path) -> None:
    """By columns and by folders, which multiply; noise, crop and flip of each visit are its own."""
    rows = [{"file_name": "dog/a.png", "text": "a", "repeats": 3}, {"file_name": "dog/b.png", "text": "b"}]
    root = folder(tmp_path / "data", "dog/a.png", "dog/b.png", "c.png", "d.png", rows=rows)
    images = opened(root, FolderRules({"dog": FolderRule(repeats=2)}))
    plan = BatchPlan(images, SMALL, 5, seed=0)
    assert len(plan) == 4 and "4 images in 1 buckets, 10 visits in an epoch" in str(plan)
    visits = visits_of(islice(Loader(plan), 6))
    assert len(set(visits)) == 30
    for first in (0, 10, 20):
        assert Counter(key for key, _ in visits[first : first + 10]) == {
            "dog/a.png": 6, "dog/b.png": 2, "c.png": 1, "d.png": 1,
        }  # fmt: skip
    assert sorted(epoch for key, epoch in visits if key == "dog/a.png") == list(range(18))
    later = visits_of(islice(Loader(plan, start=3), 3))
    assert later == visits[15:]
    halves = [islice(Loader(BatchPlan(images, SMALL, 4, 0), rank=rank, world=2), 5) for rank in (0, 1)]
    whole = visits_of(batch for pair in zip(*halves, strict=True) for batch in pair)
    assert whole == visits_of(islice(Loader(BatchPlan(images, SMALL, 4, 0)), 5))
    assert sum(len(batch.keys) for batch in once(plan, 2, 0, 1, "cpu")) == 4  # held-out images come once
    assert build_latents(tmp_path / "latents", plan, "vae", lambda pixels: (pixels, pixels)) == 8  # and cached ones


def test_weights_by_columns_and_folders(tmp_path: Path) -> None:
    rows = [{"file_name": "dog/old/a.png", "loss_weight": 0.5}, {"file_name": "c.png", "loss_weight": "2"}]
    root = folder(tmp_path / "data", "dog/old/a.png", "dog/b.png", "c.png", "d.png", rows=rows)
    rules = FolderRules({"dog": FolderRule(weight=4), "dog/old": FolderRule(weight=3)})
    expected = {"c.png": 2.0, "d.png": 1.0, "dog/b.png": 4.0, "dog/old/a.png": 1.5}
    assert weights(opened(root, rules)) == expected
    for batch in islice(Loader(BatchPlan(opened(root, rules), SMALL, 4, seed=0)), 2):
        assert batch.weights.tolist() == [expected[key] for key in batch.keys]


def test_columns_of_shards_and_datasets(tmp_path: Path) -> None:
    import datasets

    record = json.dumps({"text": "a", "loss_weight": 0.25, "repeats": 2}).encode()
    make_tar(tmp_path / "a.tar", {"a.png": IMAGE, "a.json": record, "b.png": IMAGE, "b.txt": b"b"})
    shards = opened(tmp_path / "a.tar")
    assert weights(shards) == {"a.png": 0.25, "b.png": 1.0} and shards.repeats().tolist() == [2, 1]
    whole = datasets.load_from_disk(saved_dataset(tmp_path / "saved", 2))
    whole.add_column("loss_weight", [0.5, 1.5]).add_column("repeats", [1, 3]).save_to_disk(str(tmp_path / "more"))
    found = opened(tmp_path / "more")
    assert weights(found) == {"000.png": 0.5, "001.png": 1.5} and found.repeats().tolist() == [1, 3]


def test_a_stream_says_that_it_does_not_repeat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"{n}.png": IMAGE for n in range(4)} | {f"{n}.json": b'{"text": "a", "repeats": 2}' for n in range(4)}
    make_tar(tmp_path / "a.tar", dict(sorted(files.items())))
    plan = StreamPlan(open_stream(str(tmp_path / "a.tar")), SMALL, 2, 0, tmp_path / "c", tags=Tags(shuffle=True))
    with caplog.at_level(logging.WARNING):
        keys = [key for batch in islice(Loader(plan), 2) for key in batch.keys]
    assert sorted(keys) == [f"{n}.png" for n in range(4)] and caplog.text.count("repeats are not read of a stream") == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"loss_weight": "much"}, "its loss_weight is 'much'; a number is needed"),
        ({"loss_weight": -1}, "its loss_weight is -1; a number from 0 to 1000 is needed"),
        ({"repeats": 0}, "its repeats is 0; a whole number from 1 to 10000 is needed"),
        ({"repeats": float("inf")}, "its repeats is inf; a whole number from 1 to 10000 is needed"),
        ({"repeats": 10**400}, f"its repeats is 1{'0' * 79}; a number is needed"),
        ({"repeats": 2.7}, "its repeats is 2.7; a whole number from 1 to 10000 is needed"),
    ],
)
def test_numbers_that_make_no_sense(tmp_path: Path, row: dict[str, object], message: str) -> None:
    root = folder(tmp_path / "data", "a.png", "b.png", rows=[{"file_name": "a.png", **row}])
    assert opened(root).skipped.reasons == {"a.png": message}


def test_numbers_in_several_rows_of_an_image(tmp_path: Path) -> None:
    rows = [
        {"file_name": name, "text": text, **numbers}
        for name, text, numbers in (
            ("a.png", "a", {}), ("a.png", "b", {"repeats": "10.0", "loss_weight": 0.5}),
            ("b.png", "a", {"repeats": 2}), ("b.png", "b", {"repeats": 3}),
        )
    ]  # fmt: skip
    images = opened(folder(tmp_path / "data", "a.png", "b.png", rows=rows))
    assert images.example(0).captions == ("a", "b")
    assert weights(images) == {"a.png": 0.5} and images.repeats().tolist() == [10]
    assert images.skipped.reasons == {"b.png": "its repeats is 2 in one row and 3 in another; keep one"}


def test_folders_whose_numbers_cannot_be_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "data", "10000_dog/a.png", "raw/b.png", "raw/old/c.png", "d.png")
    with caplog.at_level(logging.WARNING):
        assert opened(root, FolderRules(numbered=True)).repeats().tolist() == [10000, 1, 1, 1]
    assert "data: 3 images in no folder with a number (at the top, raw) come once in an epoch" in caplog.text
    folder(root, "0_cat/e.png")
    with pytest.raises(LdmError, match=r"the folder 0_cat says that its images come 0 times in an epoch, and 1"):
        opened(root, FolderRules(numbered=True))


def test_numbered_folders_are_read_when_that_is_said(tmp_path: Path) -> None:
    """As kohya's programs read them: repeats, and the caption of images without one; by default, mere names."""
    root = folder(tmp_path / "data", "10_sks dog/a.png", "10_sks dog/b.png", "1_dog/c.png", "more/d.png")
    (root / "10_sks dog" / "b.txt").write_text("asleep")
    assert opened(root).repeats().tolist() == [1, 1, 1, 1]
    with pytest.raises(LdmError, match=r"3 of 4 images have no caption"):
        opened(root, captions="required")
    with pytest.raises(LdmError, match=r"1 of 4 images have no caption \(more/d.png\)"):
        opened(root, FolderRules(numbered=True), captions="required")
    rules = FolderRules({"more": FolderRule(caption="more")}, numbered=True)
    images = opened(root, rules, captions="required")
    said = {images.key(row): images.example(row).captions for row in range(4)}
    assert said == {
        "10_sks dog/a.png": ("sks dog",), "10_sks dog/b.png": ("asleep",), "1_dog/c.png": ("dog",),
        "more/d.png": ("more",),
    }  # fmt: skip
    assert images.repeats().tolist() == [10, 10, 1, 1]
    assert images.captions() == ["asleep", "dog", "more", "sks dog"]
    begun = opened(root, rules, trigger="sks dog")
    assert begun.captions() == ["sks dog", "sks dog, asleep", "sks dog, dog", "sks dog, more"]
    assert begun.all_captions() == [["sks dog"], ["sks dog, asleep"], ["sks dog, dog"], ["sks dog, more"]]


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "dog/a.png", "dog/old/b.png")
    with pytest.raises(LdmError, match=r"data has no images in the folder dogs; did you mean dog\?"):
        opened(root, FolderRules({"dogs": FolderRule(2)}))
    with pytest.raises(LdmError, match=r"data has no folder with a number, such as 10_dog; it has dog, dog/old; leave"):
        opened(root, FolderRules(numbered=True))
    assert opened(root, FolderRules({"dog": FolderRule(2)})).repeats().tolist() == [2, 2]


# --- tags -------------------------------------------------------------------------------------------------------------


def test_tags_are_shuffled_behind_those_that_are_kept() -> None:
    caption, tags = "sks dog, best, a, b, c, d, e", Tags(shuffle=True, keep=1, trigger="sks dog")
    seen = [tags.of(caption, 0, "x.png", epoch) for epoch in range(40)]
    assert all(text.startswith("sks dog, best, ") and sorted(text) == sorted(caption) for text in seen)
    assert len(set(seen)) > 30
    assert seen == [tags.of(caption, 0, "x.png", epoch) for epoch in range(40)]
    assert seen != [tags.of(caption, 1, "x.png", epoch) for epoch in range(40)]
    first = Counter(text.split(", ")[2] for text in seen)
    assert set(first) == set("abcde") and max(first.values()) < 20


def test_tags_are_left_out() -> None:
    tags = Tags(drop=0.25, keep=1, trigger="sks")
    caption = "first, a, photo of sks, b"
    seen = [tags.of(caption, 0, "x.png", epoch).split(", ") for epoch in range(400)]
    for text in seen:
        assert text[0] == "first" and "photo of sks" in text and text == sorted(text, key=caption.find)
    assert np.mean(["a" in text for text in seen]) == pytest.approx(0.75, abs=0.07)
    assert Tags(drop=0.99).of("a, b", 0, "x.png", 0) == ""
    assert Tags(drop=0.99, trigger="sks").of("masks, sks dog", 0, "x.png", 0) == "sks dog"


@pytest.mark.parametrize("caption", ["", "one sentence without commas", " a,b ,, c "])
def test_captions_stay_as_they_are_unless_tags_change(caption: str) -> None:
    assert Tags(keep=1, trigger="a").of(caption, 0, "x.png", 0) == caption
    assert set(Tags(shuffle=True).of(caption, 0, "x.png", 0).split(", ")) <= {"", caption, "a", "b", "c"}


def test_a_plan_changes_the_captions_of_its_visits(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "a.png")
    (root / "a.txt").write_text("a, b, c, d, e, f")
    plan = BatchPlan(opened(root), SMALL, 2, seed=0, tags=Tags(shuffle=True))
    said = [caption for batch in islice(Loader(plan), 10) for caption in batch.captions]
    assert len(set(said)) > 15 and {"".join(sorted(text)) for text in said} == {"".join(sorted("a, b, c, d, e, f"))}
