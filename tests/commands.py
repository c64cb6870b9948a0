"""The command `ldm`: where it is installed, and run in this process, with a tiny model too."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.cli import main as cli

COMMAND = shutil.which("ldm", path=str(Path(sys.executable).parent)) or "ldm"


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["ldm", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def ldm(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command in an empty folder, with a tiny model, in fp32 on the CPU."""
    monkeypatch.chdir(tmp_path)
    cpu = ["--device", "cpu"]

    def call(*arguments: object, model: str | None = "sd15") -> tuple[int, str, str]:
        named = ["--model", models / model] if model else []
        fixed = {"generate": ["--dtype", "fp32", *cpu, *named], "repro": cpu}.get(str(arguments[0]), [])
        return run(capsys, monkeypatch, arguments[0], *fixed, *arguments[1:])

    return call
