"""`tools/fuzz_server.py` in short: some hundred random requests find no defect; and what it looks for is found."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import controls
import pytest
import tiny
import torch

from ldm.server import openai_images
from ldm.server.history import History
from ldm.server.service import Service
from pipelines import Pipeline

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import fuzz_server


def service(history: History | None = None) -> Service:
    model = tiny.model("sd15", shallow=True)
    pipeline = Pipeline(model, dtype=torch.float32, control_models=controls.controlnet(model.family))
    return Service(pipeline, {"control_models": ("net",)}, fuzz_server.LIMITS, history=history)


def test_random_requests() -> None:
    only = ("/v1/jobs", "/v1/images", "/v1/models", "/v1/settings", "/healthz", "/metrics")
    found = fuzz_server.fuzz(service(), (), range(400), threads=2, only=only)
    assert not found.problems, found.problems[:3]
    assert sum(found.statuses.values()) == 400
    for path in ("202 POST /v1/jobs", "200 POST /v1/images/generations", "200 POST /v1/images/variations"):
        assert found.statuses[path]


def test_requests_of_the_page_and_of_webui(tmp_path: Path) -> None:
    """Files are written in the folder of the history alone."""
    history = History(tmp_path / "kept")
    only = ("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/v1/info", "/v1/conditions", "/v1/history", "/page")
    found = fuzz_server.fuzz(service(history), (), range(300), threads=2, only=only)
    history.close()
    assert not found.problems, found.problems[:3]
    for path in ("sdapi/v1/txt2img", "sdapi/v1/img2img", "v1/info", "v1/conditions"):
        assert found.statuses[f"200 POST /{path}"], path
    assert found.statuses["200 GET /v1/history"]


def test_what_must_not_be_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A defect, a file written or deleted, one read outside of the folders, and a connection."""

    def bad(*_: object) -> None:
        (tmp_path / "a").write_text("a")
        (tmp_path / "a").read_text()
        (tmp_path / "a").unlink()
        with socket.socket() as opened:
            opened.connect_ex(("127.0.0.1", 9))
        raise RuntimeError("a defect")

    monkeypatch.setattr(openai_images.ImagesApi, "_check_model", bad)
    found = fuzz_server.fuzz(service(), (), range(20), threads=1)
    for text in ("status 500", "(write)", "(read)", "os.remove", "socket.connect"):
        assert any(text in problem for problem in found.problems), text
