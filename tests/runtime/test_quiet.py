"""Foreign warnings are dropped by their text; everything else of the same libraries is heard."""

from __future__ import annotations

import enum
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import PATIENCE, ROOT

from ldm.runtime.quiet import DROPPED, quiet


@pytest.fixture
def filters() -> Iterator[None]:
    """Loggers as they were before."""
    before = {name: list(logging.getLogger(name).filters) for name, _ in DROPPED}
    yield
    for name, found in before.items():
        logging.getLogger(name).filters = found


@pytest.mark.parametrize(("name", "text"), DROPPED)
def test_only_these_texts_are_dropped(
    filters: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, text: str
) -> None:
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    quiet()
    quiet()
    assert len(logger.filters) == len(set(map(id, logger.filters)))
    with caplog.at_level(logging.WARNING):
        logger.warning("%s: " + text + " …", enum.Enum)
        logger.warning("something else is wrong")
        logging.getLogger("ldm").warning(text)
    assert caplog.messages == ["something else is wrong", text]


def test_training_and_its_plan_print_no_foreign_lines(tmp_path: Path) -> None:
    """With all that is installed here, torchao for one."""
    command = [sys.executable, "-m", "ldm", "plan", str(ROOT / "configs" / "tiny.yaml"), "stages=[base]"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stderr == ""
