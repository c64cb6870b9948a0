"""`ldm serve`: makes images for others over HTTP."""

from __future__ import annotations

import ipaddress
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import LdmError
from ldm.server.limits import Limits

if TYPE_CHECKING:
    from ldm.server.history import History
    from ldm.server.service import Service

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
    history: str | None  # the folder; None: there is none
    replicas: str | None = None  # their number, or the least and the largest; None: one engine, in this process
    replica_jobs: int = 8  # of each, above which another one is started
    ray_address: str | None = None  # of a cluster; None: one on this machine


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


def replicas_of(options: ServeOptions) -> tuple[int, int] | None:
    """The least and the largest number of replicas ("4", or "1-8"); None: there are none.

    Raises:
        LdmError: the option stands for no number, is needed and not given, or Ray is missing.
    """
    text = options.replicas
    if text is None:
        if options.ray_address is not None:
            raise LdmError("--ray-address needs --replicas, the number of engines there")
        return None
    low, dash, high = text.partition("-")
    least, most = (int(one) if one.isascii() and one.isdecimal() else 0 for one in (low, high if dash else low))
    if not 1 <= least <= most:
        raise LdmError(f"--replicas {text!r}: a number is needed, such as 4, or the least and the largest, such as 1-8")
    if find_spec("ray") is None:
        raise LdmError("--replicas needs ray: pip install 'ldm[cluster]'")
    return least, most


def serve_images(options: ServeOptions) -> None:
    """Load the model, and serve until a signal comes."""
    check_packages()
    key, replicas = key_of(options), replicas_of(options)
    from ldm.server.history import History
    from ldm.server.service import log_to_stderr
    from ldm.server.serving import Listening, serve

    history = None if options.history is None else History(Path(options.history))  # before a model is loaded
    log_to_stderr()
    with _service(options, history, replicas) as service:
        if not is_local(options.host):
            print(
                f"ldm: everybody who reaches {options.host}, port {options.port}, and has the key can make images; "
                "traffic is not encrypted: let a proxy with TLS stand before it",
                file=sys.stderr,
            )
        serve(
            service,
            Listening(options.host, options.port, key, options.hostnames, options.drain_seconds, options.log_prompts),
        )


def _service(
    options: ServeOptions, history: History | None, replicas: tuple[int, int] | None
) -> AbstractContextManager[Service]:
    """The service that is asked for, within this process or with replicas."""
    if replicas is not None:
        from ldm.server.cluster import ClusterOptions, clustered

        cluster = ClusterOptions(*replicas, options.replica_jobs, options.ray_address)
        return clustered(options.loading, options.limits, options.most, history, cluster)
    from ldm.server.service import Service
    from pipelines import Pipeline
    from pipelines.tuning import typed

    with ThreadPoolExecutor(1) as thread:  # beside its OpenMP team, which ends with it, the engine's would wait badly
        pipeline = thread.submit(Pipeline, **typed(options.loading)).result()
    return nullcontext(Service(pipeline, options.loading, options.limits, options.most, history))
