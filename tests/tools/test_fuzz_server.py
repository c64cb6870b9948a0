"""`tools/fuzz_server.py` in short: some hundred random requests find no defect; and what it looks for is found."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import tiny
import torch

from ldm.server import openai_images
from ldm.server.service import Service
from pipelines import Pipeline

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import fuzz_server


def service() -> Service:
    return Service(Pipeline(tiny.model("sd15", shallow=True), dtype=torch.float32), {}, fuzz_server.LIMITS)


def test_random_requests() -> None:
    found = fuzz_server.fuzz(service(), (), range(400), threads=2)
    assert not found.problems, found.problems[:3]
    assert sum(found.statuses.values()) == 400
    for path in ("202 POST /v1/jobs", "200 POST /v1/images/generations", "200 POST /v1/images/edits"):
        assert found.statuses[path]


def test_what_must_not_be_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A defect, a file written, one read outside of the folders, and a connection."""

    def bad(*_: object) -> None:
        (tmp_path / "a").write_text("a")
        (tmp_path / "a").read_text()
        with socket.socket() as opened:
            opened.connect_ex(("127.0.0.1", 9))
        raise RuntimeError("a defect")

    monkeypatch.setattr(openai_images.ImagesApi, "_check_model", bad)
    found = fuzz_server.fuzz(service(), (), range(20), threads=1)
    for text in ("status 500", "(write)", "(read)", "socket.connect"):
        assert any(text in problem for problem in found.problems), text
