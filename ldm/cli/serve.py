"""`ldm serve`: makes images for others over HTTP."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.server.limits import Limits

NEEDED = ("fastapi", "greenlet", "prometheus_client", "python_multipart", "uvicorn")
KEY = "LDM_API_KEY"  # environment variable


@dataclass(frozen=True)
class ServeOptions:
    """The options of `ldm serve`."""

    loading: dict[str, Any]  # settings of loading that were given
    host: str
    port: int
    api_key: str | None
    hostnames: tuple[str, ...]
    log_prompts: bool
    drain_seconds: float
    most: int | None  # as for `Engine`
    limits: Limits
    history: str | None  # the folder of the history


def check_packages() -> None:
    """Raise unless the packages of the extra `serve` are there.

    Raises:
        LdmError: one is missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise LdmError(f"ldm serve needs {', '.join(missing)}: pip install 'ldm[serve]'")


def key_of(options: ServeOptions) -> str:
    """The API key; "" for none, which only this machine's own address allows.

    Raises:
        LdmError: others could use the server without a key, or the key is too short.
    """
    key = options.api_key or os.environ.get(KEY, "")
    if not key and not is_local(options.host):
        raise LdmError(
            f"--host {options.host} opens the server to others: set a key, which they need (--api-key, or {KEY})"
        )
    if key and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise LdmError("--api-key: at least 8 letters, digits and signs without spaces are needed")
    return key


def is_local(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_images(options: ServeOptions) -> None:
    """Load the model, and serve until a signal comes."""
    check_packages()
    key = key_of(options)
    from ldm.server.history import History
    from ldm.server.service import NoteHandler, Service, about_no_job
    from ldm.server.serving import Listening, serve
    from pipelines import Pipeline
    from pipelines.tuning import typed

    history = None if options.history is None else History(Path(options.history))  # before a model is loaded
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(about_no_job)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, handlers=[handler, NoteHandler()])
    logging.getLogger("ldm.server").setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the client is told what is wrong with its form
    with ThreadPoolExecutor(1) as thread:  # beside its OpenMP team, which ends with it, the engine's would wait badly
        pipeline = thread.submit(Pipeline, **typed(options.loading)).result()
    if not is_local(options.host):
        print(
            f"ldm: everybody who reaches {options.host}, port {options.port}, and has the key can make images; traffic "
            "is not encrypted: let a proxy with TLS stand before it",
            file=sys.stderr,
        )
    service = Service(pipeline, options.loading, options.limits, options.most, history)
    serve(
        service,
        Listening(options.host, options.port, key, options.hostnames, options.drain_seconds, options.log_prompts),
    )
