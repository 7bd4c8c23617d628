"""What every request passes before its route: a request id, a check of the host it asks for, the API key; pure ASGI."""

from __future__ import annotations

import hmac
import ipaddress
import re
import uuid
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from filmstrip.server.errors import REQUEST_ID_HEADER, HTTPRequestError, error_response

_SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OPEN_PATHS = frozenset({"/health", "/ping"})


class RequestIds:
    """Gives every request an id for logs and echoes it as ``X-Request-Id``.

    A client's own id is kept if it is 1 to 128 letters, digits, ``.``, ``_``, ``:`` or ``-``. It only ever labels: what the
    engine calls a request is drawn at random, so that nobody can name somebody else's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with ``request.state.request_id`` set."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = sent if _SAFE_REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class HostCheck:
    """Refuses requests addressed to a host name that is not ours.

    A page of the public web can point a name of its own at 127.0.0.1 and so reach a server on the visitor's machine; its
    requests carry that name. ``allowed_hosts`` empty means: if the server listens on this machine only, ``localhost`` and
    IP addresses; else anything.
    """

    def __init__(self, app: ASGIApp, listens_on: str, allowed_hosts: Sequence[str]) -> None:
        self._app = app
        self._allowed = {host.lower().rstrip(".") for host in allowed_hosts}
        self._check = bool(allowed_hosts) or is_loopback(listens_on)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] != "http" or not self._check or self._is_ours(Headers(scope=scope).get("host", "")):
            await self._app(scope, receive, send)
            return
        error = HTTPRequestError(
            403, "the Host header names a host this server is not known by (--allowed-hosts)", code="host_not_allowed"
        )
        await error_response(error)(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = _without_port(host).lower().rstrip(".")
        return name in self._allowed or name == "localhost" or _ip_address(name) is not None


class ApiKeyCheck:
    """Lets only requests with ``Authorization: Bearer KEY`` pass.

    ``/health``, ``/ping`` and ``open_paths`` are open to all.
    """

    def __init__(self, app: ASGIApp, api_key: str, open_paths: Collection[str] = ()) -> None:
        self._app = app
        self._open_paths = _OPEN_PATHS | frozenset(open_paths)
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._is_right(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = HTTPRequestError(
            401,
            "the Authorization header must carry this server's API key as 'Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _is_right(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # The time of the comparison must not tell how much of a guess was right.
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._api_key)


def is_loopback(host: str) -> bool:
    """Whether a server that listens on ``host`` can be reached from its own machine only."""
    address = _ip_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _ip_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
