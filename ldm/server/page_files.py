"""The files of the page, as they are in the package, sent with a policy that lets the page load only what is here."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {"content-security-policy": POLICY, "cache-control": "no-cache"}  # kept, and asked whether it is still so


def page_files() -> dict[str, Path]:
    """The page's files by their paths in requests."""
    files = {f"/page/{path.name}": path for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS}
    return {"/": files.pop("/page/index.html"), **files}


def page_routes() -> APIRouter:
    """A route for each file."""
    routes = APIRouter()
    for path, file in page_files().items():
        answer = _answer(file.read_bytes(), KINDS[file.suffix])
        routes.add_api_route(path, answer, methods=["GET"], response_model=None, include_in_schema=False)
    return routes


def _answer(data: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'
    headers = {**HEADERS, "etag": tag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    return answer
