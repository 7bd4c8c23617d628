"""A hostile internet on 127.0.0.1: names, public addresses, one site that may be visited and one that must not be.

Whatever address is dialled that is not one of the public site's leads to the canary, which answers with a good clip: a hole
in the rules shows as a hit and as an answer of status 200, not as a connection that happens to be refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.media.web import PUBLIC, Exchange, FakeNetwork, Site, serving

HOST = "allowed.test"
SECRET = "s3cret-text-of-the-site"
PLAIN_NAMES = {
    HOST: [PUBLIC],
    "evilallowed.test": [PUBLIC],
    "allowed.test.evil.com": [PUBLIC],
    "xn--llowed-7ve.test": [PUBLIC],
    "xn--bcher-kva.test": [PUBLIC],
    "localhost": ["127.0.0.1", "::1"],
    "metadata.google.internal": ["169.254.169.254"],
    "private.test": ["10.0.0.7"],
    "mixed.test": [PUBLIC, "10.0.0.7"],
    "mixed-first.test": ["127.0.0.1", PUBLIC],
    "mapped.test": ["::ffff:127.0.0.1"],
    "scoped.test": ["fe80::1%eth0"],
}
"""What the name server answers, always."""


class Names:
    """The name server; ``rebinding.test`` has a public address the first time it is asked and a private one after."""

    def __init__(self, table: dict[str, list[str]]) -> None:
        self.asked: list[str] = []
        self._table = table

    async def resolve(self, host: str) -> list[str]:
        self.asked.append(host)
        if host == "rebinding.test":
            return [PUBLIC] if self.asked.count(host) == 1 else ["127.0.0.1"]
        if host not in self._table:
            raise OSError("unknown host")
        return self._table[host]


class Network(FakeNetwork):
    """Dials the public site on ports 80 and 443 of its address, and the canary for everything else."""

    def __init__(self, site_port: int, tls_port: int, canary_port: int) -> None:
        super().__init__({(PUBLIC, 80): site_port, (PUBLIC, 443): tls_port})
        self._canary_port = canary_port

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self._routes.setdefault((host, port), self._canary_port)
        return await super().connect_tcp(host, port, timeout, local_address, socket_options)


class Internet:
    """All of it; enter it inside the event loop that is to serve it."""

    def __init__(self, clip: bytes, folder: Path) -> None:
        """``clip`` is a good video, ``folder`` is for the TLS site's certificate, which nobody vouches for."""
        self.table = dict(PLAIN_NAMES)
        self.names = Names(self.table)
        self._clip, self._folder = clip, folder
        self._stack = contextlib.AsyncExitStack()
        self.site: Site
        self.canary: Site
        self.network: Network

    async def __aenter__(self) -> Internet:
        self.site = await self._stack.enter_async_context(serving(self._answer))
        self.canary = await self._stack.enter_async_context(serving(self._bait))
        tls = await self._stack.enter_async_context(serving(self._answer, ssl=_self_signed(self._folder)))
        self.tls_port = tls.port
        self.network = Network(self.site.port, tls.port, self.canary.port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def reset(self) -> None:
        """Forget all hits and questions."""
        self.names.asked.clear()
        self.network.dialled.clear()
        for site in (self.site, self.canary):
            site.requests.clear()
            site.num_connections = 0

    async def _bait(self, exchange: Exchange) -> None:
        await exchange.answer(200, "Content-Type: video/mp4", self._clip)

    async def _answer(self, exchange: Exchange) -> None:
        url = urlsplit(exchange.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        answer = getattr(self, f"_{url.path.strip('/').replace('-', '_').partition('.')[0]}", self._missing)
        await answer(exchange, query)

    async def _missing(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.answer(404, "Content-Type: text/plain", SECRET.encode())

    async def _status(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.answer(int(query["code"]), "Content-Type: text/plain", SECRET.encode())

    async def _good(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.answer(200, 'Content-Type: video/mp4\nETag: "1"', self._clip)

    async def _text(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.answer(200, f"Content-Type: {query.get('type', 'text/plain')}", SECRET.encode() * 40)

    async def _to(self, exchange: Exchange, query: dict[str, str]) -> None:
        """Redirect to ``url``."""
        location = query["url"].replace("CANARY", str(self.canary.port))
        await exchange.answer(int(query.get("code", 302)), f"Location: {location}")

    async def _hops(self, exchange: Exchange, query: dict[str, str]) -> None:
        """``num`` redirects before the clip."""
        num = int(query["num"])
        location = f"/hops?num={num - 1}" if num > 1 else "/good.mp4"
        await exchange.answer(302, f"Location: http://{HOST}{location}")

    async def _loop(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.answer(302, f"Location: http://{HOST}/loop")

    async def _huge_length(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: 10000000000\r\n\r\n")
        await self._flood(exchange)

    async def _endless(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nConnection: close\r\n\r\n")
        await self._flood(exchange)

    async def _endless_chunks(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await exchange.send(b"10000\r\n" + bytes(65536) + b"\r\n")

    async def _endless_headers(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await exchange.send(b"X-More: " + b"a" * 1000 + b"\r\n")

    async def _flood(self, exchange: Exchange) -> None:
        while True:
            await exchange.send(bytes(65536))

    async def _drip(self, exchange: Exchange, query: dict[str, str]) -> None:
        """One byte now and then, for ever."""
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: 100000\r\n\r\n")
        while True:
            await exchange.send(b"\0")
            await asyncio.sleep(0.1)

    async def _silence(self, exchange: Exchange, query: dict[str, str]) -> None:
        await asyncio.sleep(60)

    async def _cut(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: 100000\r\n\r\n" + bytes(50))
        raise ConnectionResetError

    async def _garbage(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.send(b"\xff\xfe not http at all\r\n\r\n" + SECRET.encode())
        raise ConnectionResetError

    async def _gzip(self, exchange: Exchange, query: dict[str, str]) -> None:
        bomb = gzip.compress(bytes(50_000_000))
        await exchange.answer(200, "Content-Type: video/mp4\nContent-Encoding: gzip", bomb)

    async def _empty(self, exchange: Exchange, query: dict[str, str]) -> None:
        await exchange.answer(200, "Content-Type: video/mp4")


def _self_signed(folder: Path) -> ssl.SSLContext:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}"]
    command += ["-addext", f"subjectAltName=DNS:{HOST}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


class ConnectionWatch:
    """Every connection and name look-up of this process by Python code, whatever library makes it.

    An audit hook cannot be taken away again (PEP 578), so there is one for the process; it records only while watching.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.expected_ports: set[int] = set()
        self._watching = threading.Event()
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self):
        """Record until the block ends, beginning with nothing."""
        self.seen.clear()
        self._watching.set()
        try:
            yield
        finally:
            self._watching.clear()

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self._watching.is_set():
            return
        if event == "socket.connect":
            address = arguments[1]
            if isinstance(address, tuple) and not (address[0] == "127.0.0.1" and address[1] in self.expected_ports):
                self.seen.append(f"connect {address}")
        elif event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", b"127.0.0.1"):
            self.seen.append(f"look up {arguments[0]!r}")


@contextlib.asynccontextmanager
async def internet(clip: bytes, folder: Path) -> AsyncIterator[Internet]:
    """An :class:`Internet` that is there as long as the block runs."""
    async with Internet(clip, folder) as whole:
        yield whole
