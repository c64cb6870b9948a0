"""Signals while a stage trains: the first SIGTERM or SIGINT asks the run to stop, a second one ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AT_ONCE = 1.0  # seconds within which signals are one: a terminal and a launcher both send it


class Signals:
    """The signal that asked the run to stop, if one came."""

    def __init__(self) -> None:
        self.asked = 0  # number of the signal that asked the run to stop; 0: none
        self._asked_at = 0.0  # seconds, when it came
        self._leave: Callable[[], None] | None = None  # called by the first signal

    @contextmanager
    def leaving_with(self, leave: Callable[[], None]) -> Iterator[None]:
        """Within this context, a first signal calls `leave`, which may raise, at once."""
        self._leave = leave
        try:
            yield
        finally:
            self._leave = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within this context, signals are kept for the loop to read.

        A signal that comes after the last step began is passed to the handler that was there before.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: object) -> None:
            if not self.asked:
                self.asked, self._asked_at = number, time.monotonic()
                if self._leave:
                    self._leave()
            elif time.monotonic() - self._asked_at > AT_ONCE:
                restore()
                signal.raise_signal(number)

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            restore()
        if self.asked:
            signal.raise_signal(self.asked)
