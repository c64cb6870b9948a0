"""The number of threads and their waiting policy."""

from __future__ import annotations

import os
import subprocess
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
        ({}, 8, threads.SPINS),
        ({}, 3, threads.SPINS | {"OMP_NUM_THREADS": "3"}),
        ({"LOCAL_WORLD_SIZE": "4"}, 8, threads.SPINS | {"OMP_NUM_THREADS": "2"}),
        ({"LOCAL_WORLD_SIZE": "16"}, 8, threads.SPINS | {"OMP_NUM_THREADS": "1"}),
        ({"OMP_WAIT_POLICY": "active"}, 8, {}),
        ({"GOMP_SPINCOUNT": "7"}, 8, {}),
        ({"OMP_NUM_THREADS": "5"}, 3, threads.SPINS),
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


@pytest.mark.parametrize(
    ("imports", "expected"), [("pipelines", "GOMP_SPINCOUNT=1000, KMP_BLOCKTIME=1"), ("torch", "OpenMP's own")]
)
def test_the_package_sets_it_before_torch_is_loaded(imports: str, expected: str) -> None:
    given = {name: value for name, value in os.environ.items() if name not in {threads.POLICY, *threads.SPINS}}
    script = f"import {imports}; from ldm.threads import waiting; import torch; print(waiting())"
    ran = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == expected
