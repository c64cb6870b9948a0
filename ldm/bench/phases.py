"""The phases of a new process that makes an image, from the command to its end.

`python -m ldm.bench.phases BEGAN ARGUMENT…` is the command `ldm` with these arguments. `BEGAN` is the time of the
monotonic clock at which the process was started. The last line of stdout is JSON: the seconds of each phase.
"""

from __future__ import annotations

import atexit
import importlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

REST = "the rest"
CALLS = (  # a phase, and a function of a module that it consists of
    ("checking and reading the model", "pipelines.tuning", "open_source"),
    ("loading weights", "ldm.weights.components", "Opened.load"),
    ("fused layers", "pipelines.tuning", "Tuning.apply"),
    ("text", "pipelines.run", "encode_prompts"),
    ("decoding", "pipelines.pipeline", "decode"),
    ("saving", "ldm.cli.saving", "Saver.save"),
    ("saving", "ldm.cli.saving", "Saver.__exit__"),
)


class Clock:
    """Seconds by phase. The time of a phase within another counts for the inner one alone."""

    def __init__(self, began: float) -> None:
        self.seconds: dict[str, float] = {}
        self._names, self._last = [REST], began

    def turn(self, name: str) -> None:
        """Count the time since the last turn for a phase."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time counts for a phase."""
        self.turn(self._names[-1])
        self._names.append(name)
        try:
            yield
        finally:
            self.turn(self._names.pop())

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are a phase."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **named)

        return call

    def stepped(self, sample: Callable[..., Generator[Any, Any, None]]) -> Callable[..., Generator[Any, Any, None]]:
        """The sampling loop, whose first step and further steps are phases."""

        def steps(*arguments: Any, **named: Any) -> Generator[Any, Any, None]:
            made, latents, name = sample(*arguments, **named), None, "first step"
            with suppress(StopIteration):
                while True:
                    with self.phase(name):
                        step = made.send(latents)
                    latents, name = (yield step), "further steps"

        return steps


def main() -> None:
    """Run the command and print the phases."""
    clock = Clock(float(sys.argv.pop(1)))
    clock.turn("Python")
    command, cli = (importlib.import_module(f"ldm.cli.{name}") for name in ("main", "importing"))  # by name: it is run
    clock.turn("command line")
    with cli.importing():
        importlib.import_module("torch")
        clock.turn("importing PyTorch")
        importlib.import_module("ldm.cli.making")
    clock.turn("importing ldm")
    for name, module, path in CALLS:
        owner: Any = importlib.import_module(module)
        *outer, last = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, last, clock.timed(name, getattr(owner, last)))
    run: Any = importlib.import_module("pipelines.run")
    run.sample = clock.stepped(run.sample)
    atexit.register(report, clock)
    command.command()


def report(clock: Clock) -> None:
    """Print the phases; what comes after it is the process's exit."""
    clock.turn(REST)
    print(json.dumps({"phases": clock.seconds, "ended": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main()
