"""The process of a side: it loads the model, makes images on request, and reports errors."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from typing import Any

import torch

from ldm.bench.measuring import Seconds, peak, reset_peak, timed
from ldm.bench.options import RIVALS, BenchOptions, Call
from ldm.bench.sides import make_side
from ldm.errors import LdmError, first_line
from ldm.runtime.quiet import quiet


class SideProcess:
    """A side that runs in its own process."""

    def __init__(self, name: str, options: BenchOptions, call: Call, device: torch.device, dtype: torch.dtype) -> None:
        """Start the process, which loads the model; see `wait`."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, name, options, call, device, dtype), daemon=True)
        self.process.start()
        other.close()

    def wait(self) -> None:
        """Wait until the model is loaded.

        Raises:
            LdmError: the model cannot be loaded, or a package is missing.
        """
        self._answer()

    def image(self, steps: int) -> tuple[Seconds, float]:
        """Make one batch of images; returns its times and the peak memory in GB since the model was loaded.

        Raises:
            LdmError: the process has died.
        """
        return self._answer(steps)

    def _answer(self, steps: int = 0) -> Any:
        try:
            if steps:
                self.pipe.send(steps)
            problem, answer = self.pipe.recv()
        except (EOFError, OSError):
            raise LdmError(f"the process of {self.name} has died; does memory suffice for all sides?") from None
        if problem:
            raise LdmError(problem)
        return answer


def _serve(pipe: Any, name: str, options: BenchOptions, call: Call, device: torch.device, dtype: torch.dtype) -> None:
    """Make images for each request on the pipe, until the pipe is closed; what packages warn of is not shown."""
    quiet()
    warnings.simplefilter("ignore")
    if name in RIVALS:
        logging.disable(logging.WARNING)
    try:
        side = make_side(name, options, call, device, dtype)
        reset_peak(device)
        pipe.send(("", None))
        while True:
            steps = pipe.recv()
            pipe.send(("", (timed(side, steps, device), peak(device))))
    except LdmError as error:
        pipe.send((str(error), None))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:  # such as errors of the rival's packages
        pipe.send((f"{name}: {type(error).__name__}: {first_line(error)}", None))
