"""The history of a server: in one transaction, searched, paged, deleted, found again, and damaged."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from starlette.testclient import TestClient

from ldm.errors import LdmError
from ldm.server.api import make_app
from ldm.server.history import IMAGES, TABLE, History
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
    assert found("style") == ["100% of a dog", "a red fox"] and found(str(2**63 - 2)) == ["a red fox"]


def test_pages(history: History) -> None:
    numbers = [history.add(b"png", record(str(number))) for number in range(5)]
    first, total = history.find(count=2)
    assert total == 5 and [kept.id for kept in first] == numbers[:2:-1]
    second, _ = history.find(before=first[-1].id, count=2)
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
        with pytest.raises(LdmError, match=r"the history is damaged: .*; restore history.sqlite"):
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
            damaged = client.get("/v1/history")
            assert damaged.status_code == 400 and "the history is damaged" in damaged.json()["error"]["message"]
    finally:
        service.engine.close(0)
        history.close()
