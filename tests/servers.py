"""Servers in tests: small limits and requests, jobs that are waited for, options of `ldm serve`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from launched import PATIENCE

from ldm.cli.serve import ServeOptions
from ldm.server.limits import Limits
from ldm.server.service import NoteHandler

# so small that little is needed to exceed them
LIMITS = Limits(body=200_000, upload=10_000, pixels=96 * 96, steps=500, images=4, characters=300, queue=8)
SMALL: dict[str, Any] = {"prompt": "a fox", "width": 64, "height": 64, "steps": 2, "seed": 1, "scheduler": "euler"}


def over(client: httpx2.Client, answer: httpx2.Response) -> dict[str, Any]:
    """The state of a job when it is over; `answer` is that to its request."""
    assert answer.status_code == 202, answer.text
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = client.get(answer.headers["location"]).json()
        if found["state"] not in ("waiting", "running"):
            return dict(found)
        time.sleep(0.01)
    raise AssertionError("the job does not end")


@contextmanager
def noting() -> Iterator[None]:
    """Warnings become notes of their jobs, as `ldm serve` has it."""
    handler = NoteHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def options(loading: dict[str, Any], **given: Any) -> ServeOptions:
    """Options of the command; those that are not given are as without them."""
    usual: dict[str, Any] = {
        "host": "127.0.0.1", "port": 0, "api_key": None, "hostnames": (), "log_prompts": False, "drain_seconds": 1.0,
        "most": None, "limits": Limits(), "history": None, "history_most": None, "runs": None, "train": False,
    }  # fmt: skip
    return ServeOptions(loading, **(usual | given))
