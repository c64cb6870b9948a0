"""The history of a server: in one transaction, searched, paged, deleted, shortened, found again, killed, damaged."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run
from launched import aged, killed
from PIL import Image
from starlette.testclient import TestClient

from ldm.errors import LdmError
from ldm.images import png_bytes
from ldm.server.api import make_app
from ldm.server.history import IMAGES, TABLE, History, HistoryError
from ldm.server.limits import Limits
from ldm.server.service import Service
from pipelines import Pipeline

SMALL: dict[str, Any] = {"prompt": "a Fox", "width": 64, "height": 64, "steps": 2, "seed": 1, "keep": True}


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    found = History(tmp_path / "kept")
    yield found
    found.close()


def record(prompt: str, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "negative": None, "seed": seed, **more}


def files(history: History) -> list[Path]:
    return [path for path in (history.folder / IMAGES).rglob("*") if path.is_file()]


def test_words_find_prompts_adapters_and_seeds(history: History) -> None:
    for number, prompt in enumerate(["Ein Füchslein", "a red fox", "100% of a dog"]):
        history.add(b"png", record(prompt, 2**63 - 1 - number, adapters={"Style": {}} if number else {}))

    def found(words: str) -> list[str]:
        return [kept.record["prompt"] for kept in history.find(words)[0]]

    assert found("") == ["100% of a dog", "a red fox", "Ein Füchslein"]
    assert found("FÜCHS") == ["Ein Füchslein"] and found("fox red") == ["a red fox"] and found("fox dog") == []
    assert found("%") == ["100% of a dog"] and found("_") == [] and found("'; --") == []
    history.add(b"png", record("zebra", adapters={"\udcff.safetensors": {}}))  # the name of a file that is not UTF-8
    assert found("zebra") == ["zebra"]
    assert found("style") == ["100% of a dog", "a red fox"] and found(str(2**63 - 2)) == ["a red fox"]


def test_pages(history: History) -> None:
    numbers = [history.add(b"png", record(str(number))) for number in range(5)]
    first, total = history.find(count=2)
    assert total == 5 and [kept.id for kept in first] == numbers[:2:-1]
    second, _ = history.find(before=first[-1].id, count=2)
    assert history.find(before=10**30, count=-1)[0][0].id == numbers[-1] and history.find(before=-(10**30))[0] == []
    assert history.image(10**30) is None and not history.delete(10**30)
    assert [kept.id for kept in second] == numbers[2:0:-1]


def test_an_image_survives_and_is_deleted_with_its_file(history: History) -> None:
    number = history.add(b"png", record("a fox"))
    again = History(history.folder)
    assert again.image(number) == b"png" and again.delete(number) and not again.delete(number)
    assert again.image(number) is None and not files(again) and again.add(b"new", record("b")) > number
    assert history.folder.stat().st_mode & 0o077 == 0
    again.close()


def test_neither_a_row_nor_a_file_alone(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LdmError, match="No space left"):
        history.add(b"png", record("a fox"))
    assert history.find() == ([], 0) and not files(history)
    monkeypatch.undo()
    with sqlite3.connect(history.folder / TABLE) as table:
        table.execute("CREATE TRIGGER none BEFORE INSERT ON images BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(LdmError, match="the history is damaged: no"):
        history.add(b"png", record("a fox"))
    assert not files(history)


# --- a limit ----------------------------------------------------------------------------------------------------------


def prompts(history: History) -> list[str]:
    """Of all images, the oldest first; each has its file."""
    kept, total = history.find()
    assert total == len(kept) and all(history.image(one.id) for one in kept)
    return [one.record["prompt"] for one in reversed(kept)]


def test_the_oldest_leave(tmp_path: Path) -> None:
    history = History(tmp_path, 3)
    strange = tmp_path / IMAGES / "aa" / f"{'a' * 32}.png"  # not of the history
    strange.parent.mkdir()
    strange.touch()
    for number in range(5):
        history.add(b"png", record(str(number)))
    assert prompts(history) == ["2", "3", "4"] and len(files(history)) == 4 and strange.exists()
    history.delete(history.find()[0][0].id)
    history.close()
    for most, left in ((None, ["2", "3"]), (1, ["3"])):
        again = History(tmp_path, most)
        assert prompts(again) == left
        again.close()
    assert len(files(history)) == 2 and strange.exists()


@pytest.mark.parametrize(("moment", "left"), [("unlink", ["1", "2"]), ("write_bytes", ["0", "1"])])
def test_killed_while_an_image_leaves(moment: str, left: list[str], tmp_path: Path) -> None:
    """Rows and files agree, whether the transaction was done or not, and what is left of files is removed later."""
    history = History(tmp_path, 2)
    for number in range(2):
        history.add(b"png", record(str(number)))

    def kill(path: Path, *_: Any, **__: Any) -> None:
        if moment == "write_bytes" or path.suffix == ".png":
            os.kill(os.getpid(), signal.SIGKILL)

    def add() -> None:
        setattr(Path, moment, kill)
        history.add(b"png", record("2"))

    killed(add)
    assert prompts(history) == left
    aged(tmp_path / IMAGES)
    again = History(tmp_path, 2)
    assert prompts(again) == left and len(files(again)) == 2
    for one in (history, again):
        one.close()


def test_a_file_that_cannot_be_removed_is_removed_later(
    history: History, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    number = history.add(b"png", record("a fox"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    assert history.delete(number) and "cannot be removed: Operation not permitted" in caplog.text
    assert history.find() == ([], 0) and files(history)
    monkeypatch.undo()
    history.add(b"new", record("a dog"))
    assert prompts(history) == ["a dog"] and len(files(history)) == 1


# --- damage -----------------------------------------------------------------------------------------------------------


def test_damage_is_one_line(tmp_path: Path, history: History) -> None:
    number = history.add(b"png", record("a fox"))
    for path in files(history):
        path.unlink()
    with pytest.raises(LdmError, match=f"the file of image {number} of the history cannot be read: No such file"):
        history.image(number)
    with sqlite3.connect(history.folder / TABLE) as table:
        table.execute("UPDATE images SET file = '../../secret'")
    with pytest.raises(LdmError, match="names no file of its folder"):
        history.image(number)
    (history.folder / TABLE).write_bytes(b"no database at all" * 100)
    for use in (history.find, lambda: History(history.folder), lambda: history.image(1)):
        with pytest.raises(HistoryError, match=r"the history is damaged: .*; restore history.sqlite"):
            use()
    (tmp_path / "file").touch()
    with pytest.raises(LdmError, match="cannot be written"):
        History(tmp_path / "file")
    later = tmp_path / "later"
    later.mkdir()
    with sqlite3.connect(later / TABLE) as table:
        table.execute("PRAGMA user_version = 9")
    with pytest.raises(LdmError, match="a later version"):
        History(later)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "page"])
def test_images_outlive_their_table(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged one stays as it is; without it, or if nothing is left of it, the images are listed anew."""
    history, table = History(tmp_path), tmp_path / TABLE
    for number in range(20):
        one = record(f"{number} " + "fox " * 100, number)
        history.add(png_bytes(Image.new("RGB", (8, 8)), one), one)
    history.close()
    with sqlite3.connect(table) as rows:
        for number, name in rows.execute("SELECT id, file FROM images"):
            os.utime(tmp_path / IMAGES / name[:2] / f"{name}.png", (number, number))
    before = history.find()[0]
    whole = table.read_bytes()
    spoiled = {
        "garbage": os.urandom(len(whole)), "truncated": whole[: len(whole) // 2], "empty": b"",
        "page": whole[:8192] + bytes(4096) + whole[12288:],
    }[damage]  # fmt: skip
    table.write_bytes(spoiled)
    if damage != "empty":
        with pytest.raises(HistoryError, match=r"the history is damaged: .*; restore history.sqlite .*, or move"):
            History(tmp_path)
        assert table.read_bytes() == spoiled
        table.rename(tmp_path / "damaged.sqlite")
    again = History(tmp_path)
    found, total = again.find()
    assert total == 20 and "its 20 images are listed anew" in caplog.text
    assert [(one.id, one.record) for one in found] == [(one.id, one.record) for one in before]
    assert again.add(b"png", record("new")) == 21
    again.close()


def test_what_cannot_be_read_is_listed(history: History) -> None:
    """A damaged row, or the damaged file of an image whose row is lost, hides no other image."""
    for _ in range(2):
        history.add(b"no PNG", record("a fox"))
    with sqlite3.connect(history.folder / TABLE) as table:
        table.execute("UPDATE images SET record = '{\"prompt' WHERE id = 1")
    assert [one.record for one in history.find()[0]] == [record("a fox"), {}]
    (history.folder / TABLE).unlink()
    again = History(history.folder)
    assert [one.record for one in again.find()[0]] == [{}, {}] and again.image(1) == b"no PNG"
    again.close()


def test_the_command_says_it_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.server.service.log_to_stderr", lambda: None)  # the log is that of the tests
    monkeypatch.setattr("ldm.server.engine.loaded", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / TABLE).write_bytes(b"x" * 5000)
    code, out, err = run(capsys, monkeypatch, "serve", "--history", tmp_path, "--port", "0")
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("ldm: the history is damaged: ")
    assert (tmp_path / TABLE).read_bytes() == b"x" * 5000
    code, out, err = run(capsys, monkeypatch, "serve", "--history-most", "5")
    assert (code, out) == (1, "") and err == "ldm: --history-most is for a history: name its folder, too (--history)\n"


# --- a server ---------------------------------------------------------------------------------------------------------


def test_only_jobs_that_ask_are_kept(tmp_path: Path) -> None:
    history = History(tmp_path)
    service = Service(Pipeline(tiny.model("sd15", shallow=True), dtype=torch.float32), {}, Limits(), history=history)
    try:
        with TestClient(make_app(service), base_url="http://127.0.0.1") as client:
            assert client.get("/v1/about").json()["history"] is True
            service.accept({**SMALL, "keep": False}).result(60)
            service.accept({**SMALL, "n": 2}).result(60)
            end = time.monotonic() + 30
            while (found := client.get("/v1/history", params={"text": "FOX"}).json())["total"] < 2:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert found["total"] == 2 and [one["settings"]["seed"] for one in found["images"]] == [2, 1]
            one = found["images"][0]
            assert client.get(one["url"]).content.startswith(b"\x89PNG") and one["settings"]["prompt"] == "a Fox"
            place = f"/v1/history/{one['id']}"
            for path in files(history):
                path.unlink()
            gone = client.get(one["url"])
            assert gone.status_code == 410 and "cannot be read" in gone.json()["error"]["message"]
            assert client.delete(place).status_code == 204 and client.delete(place).status_code == 404
            assert client.get(one["url"]).status_code == 404 and client.get("/v1/history/x/image").status_code == 404
            (tmp_path / TABLE).write_bytes(b"x" * 5000)
            for path in ("/v1/history", one["url"]):
                damaged = client.get(path)
                assert damaged.status_code == 503 and "the history is damaged" in damaged.json()["error"]["message"]
            assert client.delete(place).status_code == 503 and client.get("/healthz").status_code == 200
            job = service.accept(SMALL)
            job.result(60)
            while not job.notes:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert job.notes == ["image 0 could not be kept in the history; the log says why"]
    finally:
        service.engine.close(0)
        history.close()
