"""The commands of docs/serving.md run, against a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import uvicorn
from modules import ROOT
from PIL import Image

from ldm.server.api import make_app
from ldm.server.limits import Limits
from ldm.server.service import Service
from ldm.server.serving import listening
from pipelines import Pipeline

DOC = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", DOC, flags=re.S)


@pytest.fixture
def address() -> Iterator[str]:
    service = Service(Pipeline(tiny.model("sdxl", shallow=True), dtype=torch.float32), {}, Limits())
    opened = listening("127.0.0.1", 0)
    config = uvicorn.Config(make_app(service), log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    service.engine.close(0)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_commands(address: str, tmp_path: Path) -> None:
    found: dict[str, str] = {"id": ""}
    for block in BLOCKS:
        for command in block.replace("\\\n", " ").strip().splitlines():
            command = re.sub('"seed": 1|"steps": 20', '"steps": 2, "size": "64"', command)
            command = command.replace("http://127.0.0.1:7860", address).replace("ID", found["id"])
            said = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=True, timeout=60).stdout
            if said.startswith(b"{"):
                found = json.loads(said)
                assert found.get("state") in ("waiting", "running", "done"), (command, found)
            if said.startswith(b"event: "):
                assert b'"state": "done"' in said
    assert found["state"] == "done"  # before it was to be cancelled
    assert Image.open(tmp_path / "octopus.png").size == Image.open(tmp_path / "fox.png").size == (64, 64)
