"""A check that all processes of a run have the same configuration, images and weights; all end if one differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from accelerate.utils import gather_object

from ldm.errors import LdmError


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys that differ between two configurations, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in chain(before, (key for key in now if key not in before)):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Compare facts that should be the same on all processes of the run; all of them call it.

    Raises:
        LdmError: one process has other facts than the first; raised on every process.
    """
    first, *others = gather_object([dict(facts)])
    for rank, other in enumerate(others, 1):
        for name, expected, found in differences(first, other):
            raise LdmError(
                f"the processes of this run differ: {name} is {expected!r} on process 0 and {found!r} on process "
                f"{rank}; start all of them with the same code, configuration, images and weights"
            )
