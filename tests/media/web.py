"""A small internet for tests: names, public addresses and servers that exist only on 127.0.0.1, with hit counters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import httpcore2

PUBLIC = "93.184.216.34"
OTHER_PUBLIC = "151.101.1.69"

Handler = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request to a :class:`Site` and the connection to answer on."""

    def __init__(self, head: str, writer: asyncio.StreamWriter) -> None:
        self.head, self._writer = head, writer
        self.path = head.split(" ")[1]

    def header(self, name: str) -> str | None:
        """A request header, None if there is none."""
        for line in self.head.splitlines()[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name:
                return value.strip()
        return None

    async def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, status: int, headers: str = "", body: bytes = b"", *, length: bool = True) -> None:
        """Send a whole response; ``headers`` is lines joined with newlines."""
        lines = [f"HTTP/1.1 {status} Status", *headers.splitlines()]
        if length:
            lines.append(f"Content-Length: {len(body)}")
        await self.send("\r\n".join([*lines, "", ""]).encode("utf-8") + body)


class Site:
    """A server on 127.0.0.1: ``requests`` has the head of each request, ``num_connections`` counts connections."""

    def __init__(self, handler: Handler) -> None:
        self.requests: list[str] = []
        self.num_connections = 0
        self.num_disconnected = 0
        self.requested = asyncio.Event()
        self.disconnected = asyncio.Event()
        self._handler = handler
        self.port = 0

    @property
    def num_open(self) -> int:
        """Connections that are open."""
        return self.num_connections - self.num_disconnected

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.requests.append(head)
                self.requested.set()
                await self._handler(Exchange(head, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.num_disconnected += 1
            self.disconnected.set()
            writer.close()


@contextlib.asynccontextmanager
async def serving(handler: Handler, **options) -> AsyncIterator[Site]:
    """A :class:`Site` whose requests ``handler`` answers."""
    site = Site(handler)
    connections: set[asyncio.Task] = set()

    async def connected(reader, writer):
        task = asyncio.current_task()
        connections.add(task)
        with contextlib.suppress(asyncio.CancelledError):  # asyncio reports it as an error of the callback
            await site._serve(reader, writer)
        connections.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, **options)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


def replying(body: bytes, status: int = 200, headers: str = "") -> Handler:
    """A handler that answers every request alike."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(status, headers, body)

    return handler


class FakeResolver:
    """Answers from a table; a host with several answers gives them in turn, the last one for ever."""

    def __init__(self, **hosts: Sequence[Sequence[str]]) -> None:
        self.asked: list[str] = []
        self._answers = {name.replace("__", "-").replace("_", "."): list(answers) for name, answers in hosts.items()}

    async def resolve(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        answers = self._answers.get(host)
        if answers is None:
            raise OSError("unknown host")
        return answers.pop(0) if len(answers) > 1 else answers[0]


class FakeNetwork(httpcore2.AsyncNetworkBackend):
    """Dials sites instead of addresses: ``routes`` maps (address, port) to a port of 127.0.0.1; all else is unreachable."""

    def __init__(self, routes: dict[tuple[str, int], int]) -> None:
        self.dialled: list[tuple[str, int]] = []
        self._routes = routes
        self._real = httpcore2.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.dialled.append((host, port))
        if (host, port) not in self._routes:
            raise httpcore2.ConnectError("unreachable")
        return await self._real.connect_tcp("127.0.0.1", self._routes[host, port], timeout)


class ServedFile:
    """A handler that serves one file as RFC 9110 wants it: validators, conditions, ranges.

    ``etag`` and ``last_modified`` are left out where they are None; ``headers`` is lines added to 200 and 304 answers;
    ``part`` may replace the answer to a Range request and returns whether it did. Counters: ``num_whole``,
    ``num_unchanged`` and ``ranges``, the (start, stop) of each part asked for.
    """

    def __init__(self, body: bytes, *, etag: str | None = '"v1"', last_modified: str | None = None, headers: str = ""):
        self.body, self.etag, self.last_modified, self.headers = body, etag, last_modified, headers
        self.accepts_ranges = True
        self.part: Callable[[Exchange, int, int], Awaitable[bool]] | None = None
        self.ranges: list[tuple[int, int]] = []
        self.num_whole = self.num_unchanged = 0

    @property
    def num_bytes_of_ranges(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def fields(self) -> str:
        """Header lines of this version."""
        lines = [f"ETag: {self.etag}"] if self.etag else []
        lines += [f"Last-Modified: {self.last_modified}"] if self.last_modified else []
        lines += ["Accept-Ranges: bytes"] if self.accepts_ranges else []
        return "\n".join([*lines, *self.headers.splitlines()])

    async def __call__(self, exchange: Exchange) -> None:
        wanted = exchange.header("range")
        is_same = exchange.header("if-range") in (None, self.etag, self.last_modified)
        if wanted and self.accepts_ranges and is_same:
            start, stop = (int(bound) for bound in wanted.removeprefix("bytes=").split("-"))
            await self._send_part(exchange, start, stop + 1)
        elif self._is_unchanged(exchange):
            self.num_unchanged += 1
            await exchange.answer(304, self.fields(), length=False)
        else:
            self.num_whole += 1
            await exchange.answer(200, self.fields(), self.body)

    def _is_unchanged(self, exchange: Exchange) -> bool:
        if self.etag and exchange.header("if-none-match"):
            return exchange.header("if-none-match") == self.etag
        return bool(self.last_modified) and exchange.header("if-modified-since") == self.last_modified

    async def _send_part(self, exchange: Exchange, start: int, stop: int) -> None:
        self.ranges.append((start, stop))
        if self.part is None or not await self.part(exchange, start, stop):
            await self.send_part(exchange, start, stop)

    async def send_part(self, exchange: Exchange, start: int, stop: int) -> None:
        """A right answer to a Range request."""
        if start >= len(self.body):
            await exchange.answer(416, f"Content-Range: bytes */{len(self.body)}")
            return
        body = self.body[start:stop]
        where = f"Content-Range: bytes {start}-{start + len(body) - 1}/{len(self.body)}"
        await exchange.answer(206, f"{where}\n{self.fields()}", body)
