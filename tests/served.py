"""A server in a thread of the test's process, at an address of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from ldm.server.api import make_app
from ldm.server.service import Service
from ldm.server.serving import listening


@contextmanager
def running(service: Service, key: str = "") -> Iterator[str]:
    """The address of a server, which ends with the context, as its service does."""
    opened = listening("127.0.0.1", 0)
    config = uvicorn.Config(make_app(service, key), log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        service.engine.close(0)
