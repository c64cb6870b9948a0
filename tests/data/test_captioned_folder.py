"""Folders of images as people bring them: links, metadata files of other programs, names that nearly match."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from images import ADOBE, GREEN, encoded, make_folder, make_tar, near, place_image, png, saved_dataset
from PIL import Image

from ldm.data.image_set import ImageSet
from ldm.data.sources import open_images
from ldm.errors import LdmError

IMAGE = png(place_image(16, 16))


def folder(root: Path, *names: str) -> Path:
    """A folder of images with these names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)
    return root


def opened(root: Path, captions: str = "optional", **options: str) -> ImageSet:
    return open_images(str(root), root.parent / "cache", captions=captions, **options)


def captions(images: ImageSet) -> dict[str, tuple[str, ...]]:
    return {images.key(index): images.example(index).captions for index in range(len(images))}


# --- metadata files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "a.png,red, green, blue",
            r"metadata.csv, row 1 has 4 fields, but there are 2 columns \(file_name, text",
        ),
        ("a.png,x\nb.png", r"row 2 has 1 fields, but there are 2 columns"),
        ('a.png,"red\nb.png,blue', r"metadata.csv cannot be read after row 0: unexpected end of data"),
        ('a.png,"red" and blue', r"metadata.csv cannot be read after row 0: ',' expected"),
    ],
)
def test_a_row_whose_fields_do_not_match_is_an_error(tmp_path: Path, rows: str, message: str) -> None:
    root = folder(tmp_path / "data", "a.png", "b.png")
    (root / "metadata.csv").write_text(f"file_name,text\n{rows}\n", encoding="utf-8")
    with pytest.raises(LdmError, match=message):
        opened(root)


def test_commas_in_quotation_marks_and_blank_rows(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "a.png", "b.png")
    (root / "metadata.csv").write_text(
        '\nfile_name,text\r\na.png,"red, ""x"", blue"\r\n\r\nb.png,a "b" c\r\n'.lstrip("\n")
    )
    assert captions(opened(root)) == {"a.png": ('red, "x", blue',), "b.png": ('a "b" c',)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("file_name;text", "has no column file_name; its columns, separated by commas, are file_name;text"),
        ("file_name,text,text", "has several columns text; rename or remove all but one"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, header: str, message: str) -> None:
    root = folder(tmp_path / "data", "a.png")
    (root / "metadata.csv").write_text(f"{header}\na.png;x\n")
    with pytest.raises(LdmError, match=message):
        opened(root)


@pytest.mark.parametrize("column", ["text", "caption", "captions", "prompt"])
def test_captions_have_the_names_that_datasets_give_them(tmp_path: Path, column: str) -> None:
    root = folder(tmp_path / "data", "a.png", "b.png")
    rows = [{"file_name": "a.png", column: ["A", "B"]}, {"file_name": "b.png", column: "C", "label": 3}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(opened(root, "required")) == {"a.png": ("A", "B"), "b.png": ("C",)}


def test_a_named_column_of_captions(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "a.png")
    (root / "metadata.csv").write_text("file_name,text,alt\na.png,one,two\n")
    assert captions(opened(root)) == {"a.png": ("one",)}
    assert captions(opened(root, caption_column="alt")) == {"a.png": ("two",)}
    assert captions(opened(root)) == {"a.png": ("one",)}
    with pytest.raises(LdmError, match="has no column 'altt' for captions: its metadata has file_name, text, alt"):
        opened(root, caption_column="altt")
    (root / "metadata.csv").unlink()
    with pytest.raises(LdmError, match=r"no column 'alt' for captions: it has no metadata.jsonl or metadata.csv"):
        opened(root, caption_column="alt")


def test_columns_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "data", "a.png")
    (root / "metadata.jsonl").write_text('{"file_name": "a.png", "description": "A"}')
    told = "1 of 1 images have no caption (a.png); the metadata has the columns file_name, description: name the one of"
    with pytest.raises(LdmError) as error:
        opened(root, "required")
    assert told in str(error.value)
    assert str(error.value).endswith("write them, set trigger (words for all images), or set captions: optional")
    with caplog.at_level(logging.WARNING):
        assert captions(opened(root)) == {"a.png": ()}
    assert told in caplog.text


def test_files_beside_images_that_are_not_read_are_told(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "a.png", "b.PNG", "c.png")
    (root / "b.TXT").write_text("B")
    (root / "a.caption").write_text("A")
    (root / "captions.json").write_text("{}")
    (root / "notes.md").write_text("not a caption")
    message = r"2 of 3 images have no caption \(a.png, c.png\); captions .* not from a.caption, captions.json; or"
    with pytest.raises(LdmError, match=message):
        opened(root, "required")
    assert captions(opened(root)) == {"a.png": (), "b.PNG": ("B",), "c.png": ()}


def test_no_image_at_all(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "a.psd", "b.psd", "c.svg")
    with pytest.raises(LdmError, match=r"holds no image that can be used: its files end in .psd, .svg"):
        opened(root)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_as_other_systems_write_them(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "sub/a.png", "b.png", unicodedata.normalize("NFD", "é.png"))
    names = ["sub\\a.png", str(root / "b.png"), "é.png"]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": n}) for n in names))
    assert sorted(c[0] for c in captions(opened(root, "required")).values()) == sorted(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A.png", "lists A.png, which is not there, but a.png is; change the name in the list"),
        ("c.png", "lists c.png, which is not there; remove it from the list"),
        ("C:\\data\\a.png", r"lists C:\\data\\a.png, which is not in .*data; give names relative to the metadata file"),
        ("/nowhere/a.png", "lists /nowhere/a.png, which is not in .*data; give names relative"),
        ("../x.png", "lists ../x.png, which is not in .*data; give names relative"),
        (".a.png", "lists .a.png, whose name starts with a dot, so that it is ignored"),
    ],
)
def test_names_that_do_not_match(tmp_path: Path, name: str, message: str) -> None:
    root = folder(tmp_path / "data", "a.png", ".a.png", "../x.png")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(LdmError, match=message):
        opened(root)


def test_listed_files_are_images_whatever_their_suffix(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "0a1b", "b.png")
    (root / "c.svg").write_text("<svg/>")
    names = ["0a1b", "b.png", "c.svg"]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": n}) for n in names))
    images = opened(root, "required")
    assert captions(images) == {"0a1b": ("0a1b",), "b.png": ("b.png",)}
    assert images.skipped.reasons == {"c.svg": "the file cannot be read as an image: it is no image, or damaged"}


# --- links ------------------------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_without_going_round_in_circles(tmp_path: Path) -> None:
    elsewhere = folder(tmp_path / "real", "x.png", "deep/y.png")
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    root = folder(tmp_path / "data", "own.png")
    (root / "sub").symlink_to(elsewhere)
    (root / "self").symlink_to(root)
    (root / "sub" / "x.txt").write_text("X")
    assert captions(opened(root)) == {"own.png": (), "sub/deep/y.png": (), "sub/x.png": ("X",)}
    (root / "own.png").unlink()
    assert len(opened(root)) == 2


def test_links_to_nothing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "data", "a.png", "b.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "sub").symlink_to(tmp_path / "unmounted")
    (root / "b.txt").symlink_to(tmp_path / "nowhere.txt")
    images = opened(root)
    assert captions(images) == {"a.png": ()}
    absent = "it cannot be read: No such file or directory"
    assert images.skipped.reasons == {"b.png": absent, "gone.png": absent}
    assert f"the link {root}/sub leads to nothing" in caplog.text


# --- other sources, and the index -------------------------------------------------------------------------------------


def test_the_named_key_of_captions_in_shards(tmp_path: Path) -> None:
    files = {"1.png": IMAGE, "1.json": b'{"alt": "A", "text": "T"}', "1.txt": b"beside"}
    path = make_tar(tmp_path / "s.tar", files)
    assert captions(open_images(str(path), tmp_path / "cache")) == {"1.png": ("beside",)}
    assert captions(open_images(str(path), tmp_path / "cache", caption_column="alt")) == {"1.png": ("A",)}
    with pytest.raises(LdmError, match="holds no image that can be used: all 1 are skipped"):
        open_images(str(path), tmp_path / "cache", caption_column="no")


def test_what_shards_and_datasets_hold_instead_of_captions(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "s.tar", {"1.png": IMAGE, "1.cls": b"3"})
    with pytest.raises(LdmError, match=r"the samples hold .cls; captions are read from .txt, and in .json"):
        open_images(str(path), tmp_path / "cache")
    with pytest.raises(LdmError, match="the dataset has the columns image, alt, key: name the one of"):
        open_images(saved_dataset(tmp_path / "saved", 3, text="alt"), tmp_path / "cache")


def test_training_images_are_in_srgb_and_cached_as_such(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "b.png")
    before = opened(root).all_stamps()
    (root / "a.png").write_bytes(encoded(Image.new("RGB", (16, 16), GREEN), "PNG", icc_profile=ADOBE))
    images = opened(root)
    assert near(images.read(0), (0, 181, 64)) and near(images.read(0, least=8), (0, 181, 64))
    with_profile, without = images.all_stamps()
    status = (root / "a.png").stat()
    assert with_profile != f"{status.st_size}:{status.st_mtime_ns}" and [without] == before


def test_an_index_by_an_earlier_reading_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ldm.data.image_set

    root = make_folder(tmp_path / "data", 2)
    opened(root)
    looked: list[str] = []
    look = ldm.data.image_set._look

    def counted(source: object, entry: ldm.data.image_set.Entry) -> dict[str, object]:
        looked.append(entry.key)
        return look(source, entry)  # type: ignore[arg-type]

    monkeypatch.setattr("ldm.data.image_set._look", counted)
    opened(root)
    assert not looked
    schema = ldm.data.image_set._SCHEMA
    monkeypatch.setattr(ldm.data.image_set, "_SCHEMA", pa.schema(schema, metadata={"reading": "later"}))
    opened(root)
    assert looked == ["000.png", "001.png"]


# --- what is not used -------------------------------------------------------------------------------------------------


def test_files_that_are_not_used_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "data", "a.png", "b.png", "b.jpg", "d.png")
    for name, text in {"a.txt": "A", "b.txt": "B", "gone.txt": "G", "x/old.txt": "O", "a.psd": "", "b.mp4": ""}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "other"}')
    red = Image.new("RGB", (16, 16), "red")
    (root / "c.gif").write_bytes(encoded(Image.new("RGB", (16, 16)), "GIF", save_all=True, append_images=[red]))
    for _ in range(2):  # the second time from the index
        with caplog.at_level(logging.WARNING):
            images = opened(root)
        lines = [record.getMessage().removeprefix(f"{root}: ") for record in caplog.records]
        assert lines[-5:] == [
            "2 .txt files have no image of their name: gone.txt, x/old.txt",
            "1 .txt files are not read, because the metadata lists captions: a.txt",
            "1 .txt files are captions of several images of the same name: b.txt",
            "2 other files are not read, by ending: 1 .mp4, 1 .psd",
            "1 images (c.gif): of an animation or of several pages the first alone is used",
        ]
        caplog.clear()
    assert captions(images)["a.png"] == ("other",)


def test_what_shards_hold_and_is_not_used_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"0.png": IMAGE, "0.txt": b"zero", "0.cls": b"3", "1.txt": b"one", ".hidden": b"x"}
    make_tar(tmp_path / "a.tar", files)
    with caplog.at_level(logging.WARNING):
        open_images(str(tmp_path / "a.tar"), tmp_path / "cache")
    assert "files in the shards are not read: 1 .cls" in caplog.text
    assert "1 samples of the shards have captions and no image" in caplog.text
    assert "1 files in the shards start with a dot" in caplog.text


def test_trigger_words_begin_each_caption(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "a.png", "b.png", "c.png")
    (root / "a.txt").write_text("a dog on a sofa")
    (root / "b.txt").write_text("a photo of sks dog")
    images = opened(root, "required", trigger="sks dog")
    told = {"a.png": ("sks dog, a dog on a sofa",), "b.png": ("a photo of sks dog",), "c.png": ("sks dog",)}
    assert captions(images) == told
    assert images.captions() == sorted(text for (text,) in told.values())
    assert images.all_captions() == [list(texts) for texts in told.values()]


def test_trigger_words_within_other_words_do_not_count(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "a.png", "b.png")
    (root / "a.txt").write_text("people with masks")
    (root / "b.txt").write_text("a cat (sks), asleep")
    told = {"a.png": ("sks, people with masks",), "b.png": ("a cat (sks), asleep",)}
    assert captions(opened(root, trigger="sks")) == told
