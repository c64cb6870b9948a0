"""Foreign warnings that are dropped: those of libraries about their own insides, which no user of `ldm` can act upon.

Each is named by its logger and its text; whatever else a library has to say is shown.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

DROPPED = (
    # torchao registers enumerations with PyTorch in a way that is no longer needed; others import torchao too
    ("torch.utils._pytree", "is an Enum subclass and is now natively supported by torch.compile"),
    # compilation for the CPU looks for CUDA all the same; the run's own line names its device
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # xformers was built for another PyTorch; our error says so where it is asked for, and others only import it
    ("xformers", "WARNING[XFORMERS]"),
)


@dataclass(frozen=True)
class Without:
    """A logger's filter that drops the messages with a text."""

    text: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message stays."""
        return self.text not in str(record.msg)


def quiet() -> None:
    """Drop these warnings from now on, in this process; PyTorch need not be imported yet."""
    for name, text in DROPPED:
        logging.getLogger(name).addFilter(Without(text))
