"""The page at ``/``: static files of the package, read once, with strict headers; knows nothing of what they show.

The page asks the API like any other client, so its files carry no secret and are open to all, API key or not.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("api", "app", "chat", "dom", "media", "request")
    },
}
PATHS = frozenset(_FILES)
"""Paths of the page and its parts."""

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept by the browser, but asked for again each time: a newer server is seen at once.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    headers: dict[str, str]

    def response(self, request: Request) -> Response:
        """The file, or 304 if the client has it."""
        if self._is_known(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)

    def _is_known(self, if_none_match: str) -> bool:
        """Whether one of the client's tags is ours; a comparison of weak tags, as RFC 9110 (13.1.2) wants it here."""
        tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
        return "*" in tags or self.headers["ETag"] in tags


def create_router() -> APIRouter:
    """Routes of all files; reads them, so that a missing one is found when the server starts."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        router.add_api_route(path, _endpoint(_read(name, media_type)), methods=["GET", "HEAD"], response_model=None)
    return router


def _read(name: str, media_type: str) -> _File:
    content = (importlib.resources.files("filmstrip.server") / "static" / name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content, _HEADERS | {"Content-Type": media_type, "ETag": tag})


def _endpoint(file: _File):
    async def send(request: Request) -> Response:
        return file.response(request)

    return send
