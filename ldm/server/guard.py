"""What every request must pass, whatever it asks for: host, origin, key, and kind of content.

A page of another site must not use a server on this machine: its requests carry the page's origin, and after DNS
rebinding the page's host name. Requests with an address in place of a name cannot be rebound.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEY = "LDM_API_KEY"  # environment variable that may hold the key
RAY_TOKEN = "RAY_AUTH_TOKEN"  # the same for the token without which nobody uses the server's replicas
OPEN = ("/healthz", "/readyz")  # paths that need no key
EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
FORMS = (EDITS, VARIATIONS)  # paths that take forms with files, too
A1111 = "/sdapi/"  # what the paths of AUTOMATIC1111's API begin with
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

    def __init__(self, app: ASGIApp, key: str = "", names: Iterable[str] = (), files: Iterable[str] = ()) -> None:
        """`key` is the API key, "" for none; `names` are the host's names beside addresses and localhost.

        `files` are paths of the page, which need no key.
        """
        self.app = app
        self.key = key.encode()
        self.open = {*OPEN, *files}
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
            await refuse(send, status, message, scope["path"])
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
        if self.key and scope["path"] not in self.open and not self.opens(headers):
            return 401, "a key is needed: Authorization: Bearer KEY, or Basic with it as the password"
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
            form = scope["path"] in FORMS and kind == "multipart/form-data"
            if kind != "application/json" and not form and not _is_empty(headers):
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
        """Whether the headers have the key, as a token or as any user's password, compared in constant time."""
        scheme, _, text = headers.get("authorization", [""])[0].partition(" ")
        key = text.strip().encode("latin-1")
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except ValueError:
                return False
        return scheme.lower() in ("bearer", "basic") and hmac.compare_digest(key, self.key)


def _is_empty(headers: dict[str, list[str]]) -> bool:
    """Whether a request has no content, and so none of any kind."""
    return headers.get("content-length", ["0"]) == ["0"] and not {"content-type", "transfer-encoding"} & headers.keys()


def _with_headers(send: Send) -> Send:
    """`send`, with those of `HEADERS` added to each response that it lacks."""
    own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = list(message.get("headers", ()))
            names = {name.lower() for name, _ in given}
            message["headers"] = given + [pair for pair in own if pair[0] not in names]
        await send(message)

    return sending


def error_body(message: str, kind: str, path: str = "") -> dict[str, Any]:
    """The JSON of an error, as OpenAI's clients read it; at paths of AUTOMATIC1111's API, as its clients do."""
    if path.startswith(A1111):
        return {"error": kind, "detail": message, "body": "", "errors": message}
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def refuse(send: Send, status: int, message: str, path: str) -> None:
    """Send an error to a request of a path."""
    body = json.dumps(error_body(message, "refused", path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await _with_headers(send)({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
