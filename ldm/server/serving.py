"""A server's process: it listens, serves, and when it is told to stop, finishes its jobs first."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn

from ldm.errors import LdmError
from ldm.server.api import make_app
from ldm.server.jobs import Event, ServerJob
from ldm.server.service import Service

log = logging.getLogger(__name__)
CONNECTIONS = 1024  # at a time; of more, requests are answered with 503
FETCH_SECONDS = 5.0  # in which the last images must be fetched after the end of the last job


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and who may use it."""

    host: str
    port: int
    key: str
    names: tuple[str, ...]  # of the host, beside addresses and localhost
    drain_seconds: float  # in which jobs are finished when the server is told to stop
    prompts: bool  # whether the log has prompts


def serve(service: Service, options: Listening) -> None:
    """Serve until a signal (SIGTERM or SIGINT) tells to stop; a second one stops at once.

    Raises:
        LdmError: the port is taken, or the host is none of this machine's.
    """
    opened = listening(options.host, options.port)
    service.watchers.append(lambda job, event: log_job(job, event, options.prompts))
    config = uvicorn.Config(
        make_app(service, options.key, options.names), log_config=None, access_log=False, server_header=False,
        proxy_headers=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=10, timeout_graceful_shutdown=5,
        lifespan="off", ws="none",
    )  # fmt: skip
    host, port = opened.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    DrainingServer(config, service, options.drain_seconds).run(sockets=[opened])
    if service.history is not None:
        service.history.close()


@contextmanager
def in_thread(service: Service, key: str = "") -> Iterator[str]:
    """A server in a thread of this process: its address. Server and engine end with the context."""
    opened = listening("127.0.0.1", 0)
    config = uvicorn.Config(make_app(service, key), log_config=None, access_log=False, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, name="ldm-server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        service.engine.close(0)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens: connections wait until the server takes them.

    Raises:
        LdmError: as `serve`.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen()
    except OSError as error:
        raise LdmError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another (--host, --port)"
        ) from None
    return opened


def log_job(job: ServerJob, event: Event, prompts: bool) -> None:
    """Log a line of JSON about a job that is over; with its prompts only if they are asked for."""
    if not event.last:
        return
    waited, ran = job.seconds
    line = {
        "job": job.id,
        "state": job.state,
        "images": len(job.made),
        "waited": round(waited, 3),
        "ran": round(ran, 3),
    }
    if prompts:
        line |= {"prompts": job.request.prompts, "error": job.error}
    log.info("%s", json.dumps(line))


class DrainingServer(uvicorn.Server):
    """A server that finishes its jobs before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float) -> None:
        super().__init__(config)
        self.service, self.seconds = service, seconds
        self.draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; at the second signal, stop at once."""
        if self.draining:
            self.should_exit = self.force_exit = True
            return
        self.draining = True
        threading.Thread(target=self._drain, name="ldm-drain", daemon=True).start()

    def _drain(self) -> None:
        """Take no more jobs, finish those that are there, and let their images be fetched."""
        self.service.engine.close(self.seconds)
        end = time.monotonic() + FETCH_SECONDS
        while time.monotonic() < end and not self.service.fetched():
            time.sleep(0.05)
        self.should_exit = True
