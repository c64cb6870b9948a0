"""Images that threads save while the model makes the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

THREADS = 4  # that save: compressing an image takes one of them as long as a fast GPU takes to make it
WAITING = 2**26  # pixels of images that may wait to be saved: 64 images of 1024×1024


class Saver:
    """Saves images in threads, and tells of them in their order. It is used as a context, whose end waits for all.

    The error of an image that cannot be saved is raised by one of the next calls, or at the end. After an error or an
    interruption, the images that are made are still saved.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS)
        self._waiting: deque[tuple[int, Future[None]]] = deque()  # with the pixels of each
        self._pixels = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            for _, future in self._waiting:
                future.result()

    def save(self, pixels: int, write: Callable[[], None], tell: Callable[[], None]) -> None:
        """Save an image of so many pixels: call `write`, and, once the images before it are saved, `tell`.

        Waits while too many images wait to be saved.

        Raises:
            Exception: an image before could not be saved; the error of its `write` or `tell`.
        """
        while self._waiting and (self._waiting[0][1].done() or self._pixels + pixels > WAITING):
            saved_pixels, first = self._waiting[0]
            first.result()
            self._waiting.popleft()
            self._pixels -= saved_pixels
        before = [self._waiting[-1][1]] if self._waiting else []

        def saved() -> None:
            write()
            wait(before)
            tell()

        self._waiting.append((pixels, self._pool.submit(saved)))
        self._pixels += pixels
