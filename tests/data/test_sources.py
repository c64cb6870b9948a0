"""Captioned images from every source, and what is wrong with them said in one line."""

from __future__ import annotations

import csv
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from images import BAD, make_folder, make_shards, make_tar, odd_files, place_image, png, samples, saved_dataset
from PIL import Image

from ldm.data.framing import Framing
from ldm.data.image_set import ImageSet
from ldm.data.sources import open_images, open_stream
from ldm.data.streams import StreamPlan
from ldm.errors import LdmError
from ldm.images import load_image


def contents(images: ImageSet) -> list[tuple[object, ...]]:
    """Keys, captions, sizes and pixels of all images."""
    examples = [images.example(index) for index in range(len(images))]
    return [(e.key, e.captions, e.width, e.height, images.read(i).tobytes()) for i, e in enumerate(examples)]


def test_a_folder_shards_and_a_dataset_hold_the_same(tmp_path: Path) -> None:
    folder = contents(open_images(str(make_folder(tmp_path / "images", 12)), tmp_path / "cache"))
    assert [row[0] for row in folder] == [f"{n:03}.png" for n in range(12)]
    assert folder[4][1:4] == (("image 4", "the same, number 4"), 130, 70)
    pattern = make_shards(tmp_path / "tar", 12)
    assert contents(open_images(pattern, tmp_path / "cache")) == folder
    assert contents(open_images(f"{tmp_path}/tar/*.tar", tmp_path / "cache")) == folder
    assert contents(open_images(saved_dataset(tmp_path / "saved", 12), tmp_path / "cache")) == folder


def test_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.load_from_disk(saved_dataset(tmp_path / "saved", 6)).to_parquet(tmp_path / "a.parquet")
    images = open_images(str(tmp_path / "a.parquet"), tmp_path / "cache")
    assert contents(images) == contents(open_images(str(make_folder(tmp_path / "images", 6)), tmp_path / "cache"))


def test_parquet_files_that_do_not_say_what_is_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    rows = [{"photo": {"bytes": image, "path": None}, "prompt": "x"} for image, _ in samples(3).values()]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    images = open_images(str(tmp_path / "a.parquet"), tmp_path / "cache")
    assert [images.example(i).key for i in range(3)] == ["000000000", "000000001", "000000002"]
    assert images.read(1).size == (96, 64) and images.example(1).captions == ("x",)


def test_an_image_set_can_be_sent_to_another_process(tmp_path: Path) -> None:
    images = open_images(make_shards(tmp_path / "tar", 5), tmp_path / "cache")
    sent = pickle.dumps(images)
    assert len(sent) < 2000 and contents(pickle.loads(sent)) == contents(images)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_in_a_metadata_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/1.png", "a/b/2.png"):
        (tmp_path / name).write_bytes(png(place_image(16, 16)))
    rows: list[dict[str, object]] = [
        {"file_name": "1.png", "text": "eins, ä", "score": 5.5},
        {"file_name": "b/2.png", "text": "two", "score": None},
        {"file_name": "1.png", "text": "one", "score": 5.5},
    ]
    with (tmp_path / "a" / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            rows[1]["text"] = ["two", " ", "zwei"]
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    images = open_images(str(tmp_path / "a"), tmp_path / "cache")
    one, two = images.example(0), images.example(1)
    assert (one.key, one.captions, one.score) == ("1.png", ("eins, ä", "one"), 5.5)
    assert (two.key, two.captions, two.score) == ("b/2.png", ("two", "zwei") if kind == "jsonl" else ("two",), None)
    os.remove(tmp_path / "a" / "1.png")  # noqa: PTH107
    with pytest.raises(LdmError, match=r"lists 1.png, which is not there; remove it"):
        open_images(str(tmp_path / "a"), tmp_path / "cache")


def test_scores_in_a_metadata_file_and_captions_beside_the_images(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 2)
    (root / "metadata.csv").write_text("file_name,aesthetic_score\n000.png,4.5\n", encoding="utf-8")
    images = open_images(str(root), tmp_path / "cache")
    assert [images.example(index).score for index in (0, 1)] == [4.5, None]
    assert images.example(0).captions == ("image 0", "the same, number 0")
    (root / "000.txt").write_text("changed", encoding="utf-8")
    assert open_images(str(root), tmp_path / "cache").example(0).captions == ("changed",)


def test_captions_in_json_beside_an_image_in_a_shard(tmp_path: Path) -> None:
    image = png(place_image(16, 16))
    files = {"./x/1.png": image, "./x/1.json": b'{"caption": ["a", "b"], "aesthetic_score": 6}'}
    files |= {"./x/2.json": b'{"text": "c"}', "./x/2.png": image}
    images = open_images(str(make_tar(tmp_path / "s.tar", files)), tmp_path / "cache")
    assert [images.example(i).captions for i in range(2)] == [("a", "b"), ("c",)]
    assert images.example(0).key == "x/1.png" and images.example(0).score == 6


def test_the_index_opens_what_has_changed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ldm.data.image_set

    opened: list[str] = []

    def counted(source: object, entry: ldm.data.image_set.Entry) -> dict[str, object]:
        opened.append(entry.key)
        return look(source, entry)  # type: ignore[arg-type]

    look = ldm.data.image_set._look
    monkeypatch.setattr("ldm.data.image_set._look", counted)
    root = make_folder(tmp_path / "images", 6)
    pattern = make_shards(tmp_path / "tar", 6)

    def start() -> list[str]:
        opened.clear()
        for source in (str(root), pattern):
            images = open_images(source, tmp_path / "cache")
        assert len(images) == 6
        return sorted(opened)

    assert len(start()) == 12
    assert start() == []
    (root / "001.txt").write_text("changed", encoding="utf-8")
    (root / "004.png").write_bytes(png(place_image(32, 24)))
    assert start() == ["001.png", "004.png"]
    images = open_images(str(root), tmp_path / "cache")
    assert images.example(1).captions == ("changed",) and images.example(4).width == 32
    shard = tmp_path / "tar" / "0001.tar"
    shard.write_bytes(shard.read_bytes())
    assert start() == [f"{number:03}.png" for number in range(2, 6)]
    for index in (tmp_path / "cache").glob("index-*.arrow"):
        index.write_bytes(index.read_bytes()[:-9])
    assert len(start()) == 12  # a damaged index is made anew


def test_images_of_one_name_are_all_kept(tmp_path: Path) -> None:
    files = [{"a.png": png(place_image(16, 8 + n)), "a.txt": b"x", "b.png": png(place_image(8, 8)), "b.txt": b"y"}
             for n in range(3)]  # fmt: skip
    for number, some in enumerate(files):
        make_tar(tmp_path / f"{number}.tar", some)
    images = open_images(f"{tmp_path}/*.tar", tmp_path / "cache")
    found = {images.example(i).key: images.example(i).height for i in range(len(images))}
    assert found == {"a.png": 8, "a.png#2": 9, "a.png#3": 10, "b.png": 8, "b.png#2": 8, "b.png#3": 8}


# --- images -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_image_is_read(tmp_path: Path) -> None:
    files = odd_files()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    images = open_images(str(tmp_path), tmp_path / "cache", captions="optional")
    assert len(images) == len(files) and not images.skipped.reasons
    read = {images.example(i).key: images.read(i) for i in range(len(images))}
    assert all(image.mode == "RGB" for image in read.values())
    assert read["turned.jpg"].size == read["turned.png"].size == (16, 24)
    assert read["turned.png"].getpixel((15, 3)) == (3, 0, 128)
    assert read["clear.png"].getpixel((5, 5)) == (255, 255, 255)
    assert read["deep.png"].getpixel((5, 5)) == read["deep.pgm"].getpixel((5, 5)) == (156, 156, 156)
    for name in ("print.jpg", "moving.gif", "really-a-jpeg.png"):
        assert np.abs(np.subtract(read[name].getpixel((5, 5)), (255, 0, 0))).max() < 5, name


def huge_png(width: int, height: int) -> bytes:
    """A PNG of 169 megapixels whose pixels nobody should decode."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "images", 5)
    bomb = tmp_path / "images" / "bomb.png"
    bomb.write_bytes(huge_png(13_000, 13_000))
    assert bomb.stat().st_size < 25_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    images = open_images(str(tmp_path / "images"), tmp_path / "cache", captions="optional")
    assert len(images) == 5
    assert images.skipped.reasons == {"bomb.png": "the file has 13000×13000 pixels; at most 100,000,000 are read"}
    with pytest.raises(LdmError, match="bomb.png has 13000×13000 pixels"):
        load_image(bomb)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_skipped_and_listed(tmp_path: Path, name: str) -> None:
    root = make_folder(tmp_path / "images", 3)
    (root / name).write_bytes(BAD[name][0])
    images = open_images(str(root), tmp_path / "cache", captions="optional")
    assert len(images) == 3 and list(images.skipped.reasons) == [name]
    assert images.skipped.path.read_text(encoding="utf-8").startswith(f"{name}\t")
    assert BAD[name][1] in images.skipped.path.read_text(encoding="utf-8")


def test_too_many_bad_images_are_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 20)
    for number in range(5):
        (root / f"bad-{number}.png").write_bytes(b"no image")
    with pytest.raises(
        LdmError, match=r"5 of 25 images cannot be used: bad-0.png \(.*and 2 more; all are listed in"
    ) as e:
        open_images(str(root), tmp_path / "cache", captions="optional")
    path = Path(str(e.value).split("listed in ")[1].split(";")[0])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5


def test_captions_that_are_missing_or_no_text(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 4)
    (root / "001.txt").unlink()
    (root / "002.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(LdmError, match=r"2 of 4 images have no caption \(001.png, 002.png\); write them"):
        open_images(str(root), tmp_path / "cache")
    images = open_images(str(root), tmp_path / "cache", captions="optional")
    assert images.example(1).captions == () and "" in images.captions()
    (root / "001.txt").write_bytes("\ufeffeinst".encode())  # as Windows' editor writes it
    (root / "002.txt").write_bytes("für".encode("latin-1"))
    images = open_images(str(root), tmp_path / "cache")
    assert images.example(1).captions == ("einst",)
    assert list(images.skipped.reasons.items()) == [
        ("002.png", "its caption is not UTF-8 (byte 0xfc at 1); convert it")
    ]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """File names are bytes."""
    name = os.fsencode(tmp_path) + b"/f\xfcr.png"
    with open(name, "wb") as file:  # noqa: PTH123
        file.write(png(place_image(16, 16)))
    with open(name[:-3] + b"txt", "w") as text:  # noqa: PTH123
        text.write("a caption")
    images = open_images(str(tmp_path), tmp_path / "cache")
    assert images.example(0).key == "f\udcfcr.png" and images.read(0).size == (16, 16)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere does not exist; give a folder"),
        ("*.tar", "no shard matches"),
        ("gone.tar", "gone.tar cannot be read: No such file"),
        ("https://example.org/{00..10}.tar", "is remote: its images come in one order only; use it as a stream"),
        ("empty", "empty holds no image that can be used"),
        ("one", "one holds no image that can be used: all 1 are skipped, see"),
        ("cut.tar", "cut.tar is (cut short or )?damaged"),
        ("packed.tar", "compressed, which forbids"),
        ("rows", "rows/metadata.jsonl, row 2 has no file_name"),
        ("json", "json/metadata.jsonl cannot be read after row 1"),
    ],
)
def test_sources_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    import gzip

    monkeypatch.chdir(tmp_path)
    for name in ("empty", "one", "rows", "json"):
        Path(name).mkdir()
    Path("one/a.png").write_bytes(b"no image")
    for name, second in (("rows", "{}"), ("json", "{")):
        Path(name, "a.png").write_bytes(png(place_image(16, 16)))
        Path(name, "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + second, encoding="utf-8")
    whole = make_tar(tmp_path / "whole", {"a.png": png(place_image(16, 16)), "a.txt": b"x"}).read_bytes()
    if source == "packed.tar":
        Path("packed.tar").write_bytes(gzip.compress(whole))
    elif source == "cut.tar":
        Path("cut.tar").write_bytes(whole[:512])
    with pytest.raises(LdmError, match=message):
        open_images(source, tmp_path / "cache")


@pytest.mark.parametrize("end", [100, 512, 1024, 1536, 2048])
def test_a_shard_that_is_cut_short_anywhere_is_noticed(tmp_path: Path, end: int) -> None:
    path = make_tar(tmp_path / "s.tar", {"a.png": png(Image.new("RGB", (16, 16))), "a.txt": b"x"})
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(LdmError, match=r"s.tar is (damaged|cut short)"):
        open_images(str(path), tmp_path / "cache")


def test_a_dataset_without_images_or_captions(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"words": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(LdmError, match=r"has no column of images; it has: words"):
        open_images(str(tmp_path / "text"), tmp_path / "cache")
    saved = saved_dataset(tmp_path / "saved", 3, text="alt")
    with pytest.raises(LdmError, match=r"3 of 3 images have no caption"):
        open_images(saved, tmp_path / "cache")
    assert open_images(saved, tmp_path / "cache", caption_column="alt").example(0).captions[0] == "image 0"
    with pytest.raises(LdmError, match=r"has no column 'alto'; it has: image, alt, key"):
        open_images(saved, tmp_path / "cache", caption_column="alto")


def test_folders_and_settings_that_cannot_be_used(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 1)
    with pytest.raises(LdmError, match=r"the folder .*000.txt/cache cannot be made: Not a directory"):
        open_images(str(root), root / "000.txt" / "cache")
    with pytest.raises(LdmError, match="captions: 'maybe' is not known; choose required or optional"):
        open_images(str(root), tmp_path / "cache", captions="maybe")


def test_what_is_not_read_of_a_stream_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Repeats, and images beside an image."""
    members: dict[str, bytes] = {}
    for name, (image, text) in samples(4).items():
        record = json.dumps({"text": text, "repeats": 3}).encode()
        members |= {f"{name}.png": image, f"{name}.mask.png": image, f"{name}.json": record}
    make_tar(tmp_path / "shard.tar", members)
    plan = StreamPlan(open_stream(str(tmp_path / "shard.tar")), Framing(size=32, step=8), 2, 0, tmp_path)
    next(iter(plan.items(0)))
    assert [line.partition("true: ")[2] for line in caplog.messages] == [
        ".mask.png beside it is not read of a stream",
        "repeats are not read of a stream: each image comes once in an epoch",
    ]


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="cannot be streamed; give tar shards"):
        open_stream(str(make_folder(tmp_path / "images", 1)))


def test_importing_is_quick() -> None:
    """The libraries for datasets and streams come when they are needed."""
    code = "import sys, ldm.data.loader, ldm.data.sources; assert not {'datasets', 'webdataset'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
