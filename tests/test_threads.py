"""The number of threads."""

from __future__ import annotations

import sys

import pytest

from ldm import threads


@pytest.fixture
def before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(threads, "quota", lambda: 8)


@pytest.mark.usefixtures("before_torch")
@pytest.mark.parametrize(
    ("given", "quota", "added"),
    [
        ({}, 8, {}),
        ({}, 3, {"OMP_NUM_THREADS": "3"}),
        ({"LOCAL_WORLD_SIZE": "4"}, 8, {"OMP_NUM_THREADS": "2"}),
        ({"LOCAL_WORLD_SIZE": "16"}, 8, {"OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "5"}, 3, {}),
    ],
)
def test_what_is_set(given: dict[str, str], quota: int, added: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "quota", lambda: quota)
    environment = dict(given)
    threads.settle(environment)
    assert environment == given | added


def test_nothing_is_set_once_torch_is_there() -> None:
    environment: dict[str, str] = {}
    threads.settle(environment)
    assert not environment
