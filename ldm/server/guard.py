"""What every request must pass, whatever it asks for: host, origin, key, and kind of content.

A page of another site must not use a server on this machine: its requests carry the page's origin, and after DNS
rebinding the page's host name. Requests with an address in place of a name cannot be rebound.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN = ("/healthz", "/readyz")  # paths that need no key
FORMS = ("/v1/images/edits", "/v1/images/variations")  # paths that take forms with files, too
LOCAL = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application around another one, which sees only requests that pass."""

    def __init__(self, app: App, key: str = "", names: Iterable[str] = ()) -> None:
        """`key` is the API key, "" for none; `names` are the host's names beside addresses and localhost."""
        self.app = app
        self.key = key.encode()
        self.names = {name.lower() for name in (*names, *LOCAL)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        problem = self.problem(scope)
        if problem:
            status, message = problem
            await refuse(send, status, message)
            return
        await self.app(scope, receive, _with_headers(send))

    def problem(self, scope: Scope) -> tuple[int, str] | None:
        """Status and message for a request that does not pass."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not self.knows(hosts[0]):
            return 403, "this host name is not served; name it at start (--hostname)"
        origins = headers.get("origin", [])
        if any(origin.partition("://")[2].lower() != hosts[0].lower() for origin in origins):
            return 403, "requests from pages of other sites are not taken"
        visit = scope["method"] == "GET" and headers.get("sec-fetch-mode") == ["navigate"]
        if headers.get("sec-fetch-site", ["none"])[0] not in ("none", "same-origin") and not visit:
            return 403, "requests from pages of other sites are not taken"
        if self.key and scope["path"] not in OPEN and not self.opens(headers):
            return 401, "a key is needed: Authorization: Bearer KEY"
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
            form = scope["path"] in FORMS and kind == "multipart/form-data"
            if kind != "application/json" and not form:
                return 415, "the content must be JSON (Content-Type: application/json)"
        return None

    def knows(self, host: str) -> bool:
        """Whether a value of the header Host is an address, or one of the names."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and ":" in host else host
        name = name.removeprefix("[").removesuffix("]").lower()
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def opens(self, headers: dict[str, list[str]]) -> bool:
        """Whether the headers have the key, compared in constant time."""
        given = headers.get("authorization", [""])[0]
        scheme, _, key = given.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self.key)


def _with_headers(send: Send) -> Send:
    """`send`, with `HEADERS` added to each response."""
    own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *own]
        await send(message)

    return sending


def error_body(message: str, kind: str) -> dict[str, Any]:
    """The JSON of an error, as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def refuse(send: Send, status: int, message: str) -> None:
    """Send an error."""
    body = json.dumps(error_body(message, "refused")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await _with_headers(send)({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
