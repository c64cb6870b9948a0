"""Images that are saved while the model makes the next ones: their order, a limit, errors and interruptions."""

from __future__ import annotations

import threading

import pytest

from ldm.cli import saving
from ldm.cli.saving import Saver

PATIENCE = 60  # seconds


def nothing() -> None:
    pass


def test_the_model_goes_on_while_an_image_is_saved() -> None:
    """And images are told of in their order, whichever is saved first."""
    second_is_saved, told = threading.Event(), []

    def first() -> None:
        assert second_is_saved.wait(PATIENCE)

    with Saver() as saver:
        saver.save(1, first, lambda: told.append("first"))
        saver.save(1, second_is_saved.set, lambda: told.append("second"))
        saver.save(1, nothing, lambda: told.append("third"))
    assert told == ["first", "second", "third"]


def test_only_so_many_pixels_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "WAITING", 10)
    slow, saved = threading.Event(), []

    def write() -> None:
        slow.wait(PATIENCE)
        saved.append("first")

    with Saver() as saver:
        saver.save(8, write, nothing)
        saver.save(2, nothing, nothing)
        assert not saved  # both fit
        threading.Timer(0.05, slow.set).start()
        saver.save(50, nothing, nothing)  # larger than the limit: once nothing else waits
        assert saved


def test_an_image_that_cannot_be_saved_ends_the_run() -> None:
    """By an error at one of the next calls; those that are made are saved, and told of."""
    told: list[int] = []

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), Saver() as saver:
        saver.save(1, full, lambda: told.append(0))
        for number in range(1, 10**9):
            saver.save(1, nothing, lambda number=number: told.append(number))  # type: ignore[misc]
    assert told == list(range(1, 1 + len(told)))
    with pytest.raises(OSError, match="No space"), Saver() as saver:
        saver.save(1, full, nothing)


def test_a_reader_that_has_gone_ends_the_run() -> None:
    def gone() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), Saver() as saver:
        saver.save(1, nothing, gone)


def test_an_interruption_waits_for_images_that_are_made() -> None:
    saved: list[int] = []
    with pytest.raises(KeyboardInterrupt), Saver() as saver:
        for number in range(20):
            saver.save(1, lambda number=number: saved.append(number), nothing)  # type: ignore[misc]
        raise KeyboardInterrupt
    assert sorted(saved) == list(range(20))
