"""The command `ldm`: where it is installed, and run in this process."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

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
