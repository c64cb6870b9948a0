"""The commands and programs of docs/serving.md run, against a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from modules import ROOT
from PIL import Image

from ldm.server.limits import Limits
from ldm.server.service import Service
from ldm.server.serving import in_thread
from pipelines import Pipeline

DOC = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", DOC, flags=re.S)
BLOCKS = re.findall(r"```sh\n(.*?)```", DOC, flags=re.S)


@pytest.fixture
def address() -> Iterator[str]:
    service = Service(Pipeline(tiny.model("sdxl", shallow=True), dtype=torch.float32), {}, Limits())
    with in_thread(service) as found:
        yield found


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


def test_programs(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("photo.png")
    Image.new("RGBA", (64, 64)).save("clear-is-new.png")
    Image.new("L", (64, 64), 255).save("white-is-new.png")
    assert PYTHON
    for block in PYTHON:
        block = block.replace("http://127.0.0.1:7860", address).replace('"512x512"', '"64x64"').replace(": 512", ": 64")
        exec(block.replace('"steps": 20', '"steps": 2').replace('"steps": 30', '"steps": 2'), {})
    assert Image.open("fox.png").size == Image.open("red-fox.webp").size == Image.open("red-fox.png").size == (64, 64)
