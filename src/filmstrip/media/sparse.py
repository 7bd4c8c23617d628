"""A large file on a media server in, the parts of it that somebody needs out; knows HTTP ranges and nothing of media.

The parts stand in a nameless temporary file of the full size, full of holes. What arrives is never fetched again, what is on
its way is waited for by all who want it, and when nobody wants it any more it is stopped. Every request names the version of
the file (``If-Range``), so that parts of two versions are never mixed.

One event loop only: all of it runs on the loop that it was made on.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import httpcore2

from filmstrip.config import MediaConfig
from filmstrip.errors import MediaFetchError
from filmstrip.media.address import HttpTarget
from filmstrip.media.data_url import too_large
from filmstrip.media.http_client import HttpClient, deadline, storage_errors
from filmstrip.media.http_fields import Fields, Validator, content_range
from filmstrip.media.source import FileSource

MIN_SPARSE_BYTES = 16 * 1024**2
"""Smaller files are downloaded whole: the requests for their parts would take longer than what they save."""
BLOCK_BYTES = 64 * 1024
"""Parts are fetched in whole blocks, counted from the file's beginning."""
MAX_REQUEST_BYTES = 8 * 1024**2
"""Largest part asked for in one request: a request ends early for who waits for its last byte, and has a deadline."""
MAX_CONNECTIONS = 4
_MAX_PREFETCHING = 3  # one connection is left for what somebody waits for
_MIN_WINDOW_BYTES = 256 * 1024
_MAX_WINDOW_BYTES = 4 * 1024**2

_MISSING, _ASKED_FOR, _PRESENT = b"\0", b"\1", b"\2"


class SparseFile:
    """One reader's view of a file of which only parts are here; also a MediaSource, once it is whole.

    ``fd`` is a descriptor, which cannot be written through, of a file of ``num_bytes`` bytes; only what :meth:`ensure` has
    returned for may be read from it. It is valid until :meth:`close`. ``content_hash`` is the SHA-256 of final URL, strong
    validator and size: a server gives equal strong validators only to equal bytes of one URL (RFC 9110 section 8.8.1), so
    equal hashes mean equal bytes, though unlike a hash of the bytes it does not recognise them under another URL.
    """

    block_bytes = BLOCK_BYTES

    def __init__(self, content: SparseContent) -> None:
        """``content`` may have other readers."""
        self.num_bytes = content.num_bytes
        self.content_hash = content.content_hash
        self.fd = content.fd
        self._content: SparseContent | None = content
        self._counted = content.counted
        self._reader = content.add_reader()
        self._loop = asyncio.get_running_loop()
        self._next_byte = self._window_bytes = 0

    async def ensure(self, start: int, stop: int) -> None:
        """Return once bytes ``start`` to ``stop`` (exclusive) are in the file; may be called many times at once.

        Who goes on where the last call ended gets more than was asked for, so as to wait less often. Raises ValueError for a
        range outside the file, MediaFetchError if the file changed, its server broke off twice or took longer than
        ``fetch_timeout_seconds``, MediaTooLargeError over ``max_media_bytes``, InterruptedError once closed. Cancelling
        stops what nobody else waits for.
        """
        content = self._opened()
        first, end = content.blocks(start, stop)
        if first == end:
            return
        is_sequential = self._next_byte - BLOCK_BYTES < start <= self._next_byte
        self._next_byte = stop
        if not is_sequential:
            self._window_bytes = 0
        elif not content.is_coming(first, end):
            self._window_bytes = min(max(2 * self._window_bytes, _MIN_WINDOW_BYTES), _MAX_WINDOW_BYTES)
        # Whose parts are on their way already, because somebody knew what is needed, gets nothing beyond them.
        ahead = first + self._window_bytes // BLOCK_BYTES if not content.is_coming(first, end) else end
        await content.ensure(self._reader, first, end, max(end, min(ahead, content.num_blocks)))

    def is_present(self, start: int, stop: int) -> bool:
        """Whether bytes ``start`` to ``stop`` are in the file."""
        content = self._opened()
        return content.is_present(*content.blocks(start, stop))

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ``ranges`` (start, stop) in this order in the background, after those of earlier calls.

        What is waited for goes first. A failure ends it silently: who then waits for a part asks for it again and is told.
        """
        content = self._opened()
        content.prefetch(self._reader, [content.blocks(start, stop) for start, stop in ranges])

    @property
    def num_bytes_fetched(self) -> int:
        """Bytes of the file that came from the server so far, for all its readers."""
        return self._counted.num_bytes_fetched

    def open(self) -> BinaryIO:
        """A new readable, seekable file at position 0; raises ValueError while parts are missing."""
        if not self.is_present(0, self.num_bytes):
            raise ValueError("parts of the file are missing; ensure(0, num_bytes) fetches them")
        return FileSource(os.dup(self.fd), self.content_hash).open()

    def another_reader(self) -> SparseFile:
        """A second reader of the same file, closed on its own: then what only it wanted is stopped."""
        return SparseFile(self._opened())

    def close(self) -> None:
        """Let go; stops what only this reader wanted. May be called twice, and is when nobody has this object any more."""
        content, self._content = self._content, None
        if content is not None:
            self.fd = -1
            content.remove_reader(self._reader)

    async def wait_closed(self) -> None:
        """Close, and return once this reader's requests are over and no connection is left that nobody needs."""
        content = self._content
        self.close()
        if content is not None:
            await content.wait_idle()

    def _opened(self) -> SparseContent:
        if self._content is None:
            raise InterruptedError("the file was closed")
        return self._content

    def __del__(self) -> None:
        # May run in any thread and in the middle of anything.
        content = getattr(self, "_content", None)
        if content is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed in this moment
                self._loop.call_soon_threadsafe(content.remove_reader, self._reader)


@dataclass
class _Counted:
    num_bytes_fetched: int = 0


class _Request:
    """Blocks ``first`` to ``end`` asked for, or about to be; ``readers`` want them, if only later."""

    def __init__(self, first: int, end: int, readers: set[object], *, is_prefetch: bool) -> None:
        self.first, self.end, self.readers, self.is_prefetch = first, end, readers, is_prefetch
        self.arrived = first * BLOCK_BYTES
        self.task: asyncio.Task[None] | None = None

    def overlaps(self, first: int, end: int) -> bool:
        return self.first < end and first < self.end


class _Waiter:
    """Somebody who waits for blocks ``first`` to ``end``."""

    def __init__(self, reader: object, first: int, end: int) -> None:
        self.reader, self.first, self.end = reader, first, end
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(copy.copy(error))  # a traceback grows for each who raises it


class SparseContent:
    """What all readers of one version of a file share: its bytes, connections, and requests under way.

    The bytes go when nothing refers to it any more, the connections when it has no reader.
    """

    def __init__(
        self,
        client: HttpClient,
        config: MediaConfig,
        target: HttpTarget,
        validator: Validator,
        num_bytes: int,
        on_traffic: Callable[[int, int], None],
        on_growth: Callable[[], None],
    ) -> None:
        """``on_traffic`` is called with numbers of requests sent and bytes received, ``on_growth`` when more is held.

        Raises FilmstripError (``storage_failed``) if there is no room for a file.
        """
        self.num_bytes = num_bytes
        self.num_blocks = -(-num_bytes // BLOCK_BYTES)
        identity = f"{target.url}\n{validator.text}\n{num_bytes}"
        self.content_hash = hashlib.sha256(identity.encode("utf-8")).hexdigest()
        self.counted = _Counted()
        self.loop = asyncio.get_running_loop()
        self._client, self._target, self._validator = client, target, validator
        self._timeout_seconds, self._max_bytes = config.fetch_timeout_seconds, config.max_media_bytes
        self._on_traffic, self._on_growth = on_traffic, on_growth
        self._state = bytearray(self.num_blocks)
        self._waiters: set[_Waiter] = set()
        self._waiting: deque[_Request] = deque()
        self._running: set[_Request] = set()
        self._prefetching: dict[object, deque[tuple[int, int]]] = {}
        self._readers: set[object] = set()
        self._pool: httpcore2.AsyncConnectionPool | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._is_start_due = False
        self._change: MediaFetchError | None = None
        self.fd = self._write_fd = -1
        with storage_errors():
            self._write_fd = _new_file(num_bytes)
            self.fd = _read_only(self._write_fd)

    @property
    def is_changed(self) -> bool:
        """Whether the server has another version by now, so that nothing more can be fetched."""
        return self._change is not None

    @property
    def num_bytes_held(self) -> int:
        """Bytes of the file that are here."""
        return min(self._state.count(_PRESENT) * BLOCK_BYTES, self.num_bytes)

    # Blocks

    def blocks(self, start: int, stop: int) -> tuple[int, int]:
        """The first block and the end of those that have bytes ``start`` to ``stop``; raises ValueError outside the file."""
        if not 0 <= start <= stop <= self.num_bytes:
            raise ValueError(f"no bytes {start} to {stop} in a file of {self.num_bytes}")
        return (start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) if start < stop else (0, 0)

    def is_present(self, first: int, end: int) -> bool:
        """Whether all these blocks are here."""
        return self._state.count(_PRESENT, first, end) == end - first

    def is_coming(self, first: int, end: int) -> bool:
        """Whether all these blocks are here or asked for."""
        return self._state.find(_MISSING, first, end) < 0

    def _missing_runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of blocks that are neither here nor asked for, each small enough for one request."""
        while (run := self._state.find(_MISSING, first, end)) >= 0:
            limit = min(end, run + MAX_REQUEST_BYTES // BLOCK_BYTES)
            stops = [self._state.find(state, run, limit) for state in (_ASKED_FOR, _PRESENT)]
            first = min([stop for stop in stops if stop >= 0], default=limit)
            yield run, first

    # Readers

    def add_reader(self) -> object:
        """A token for :meth:`ensure` and :meth:`prefetch`."""
        reader = object()
        self._readers.add(reader)
        return reader

    def remove_reader(self, reader: object) -> None:
        """Stop all that only this reader wanted; without any reader the connections are closed."""
        self._readers.discard(reader)
        self._prefetching.pop(reader, None)
        for waiter in [waiter for waiter in self._waiters if waiter.reader is reader]:
            waiter.fail(InterruptedError("the file was closed"))
        for request in [*self._waiting, *self._running]:
            request.readers.discard(reader)
            if not request.readers:
                self._stop(request)
        if not self._readers and self._pool is not None:
            pool, self._pool = self._pool, None
            self._end(self._close_pool(pool, [request.task for request in self._running if request.task]))

    def remove_all_readers(self) -> None:
        """As if each had been closed."""
        for reader in list(self._readers):
            self.remove_reader(reader)

    async def wait_idle(self) -> None:
        """Return once all requests and connections that nobody needs any more are over."""
        while self._ending:
            await asyncio.wait(self._ending)

    async def ensure(self, reader: object, first: int, end: int, ahead: int) -> None:
        """Return once blocks ``first`` to ``end`` are here; those up to ``ahead`` may come along."""
        if self.is_present(first, end):
            return
        self._check_usable(reader)
        waiter = _Waiter(reader, first, end)
        self._waiters.add(waiter)
        try:
            self._ask_for(reader, first, ahead)
            await waiter.future
        finally:
            self._waiters.discard(waiter)
            if not self.is_present(first, end):
                self._stop_unwanted(first, end)

    def prefetch(self, reader: object, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ranges of blocks when there is nothing that somebody waits for."""
        self._check_usable(reader)
        queue = self._prefetching.setdefault(reader, deque())
        for first, end in ranges:
            if queue and queue[-1][0] <= first <= queue[-1][1]:  # neighbours share a block, or have adjacent ones
                first, end = queue[-1][0], max(end, queue.pop()[1])
            queue.append((first, end))
        self._start_soon()

    def _check_usable(self, reader: object) -> None:
        if reader not in self._readers:
            raise InterruptedError("the file was closed")
        if self._change is not None:
            raise copy.copy(self._change)

    # Requests

    def _ask_for(self, reader: object, first: int, end: int) -> None:
        """See to it that blocks ``first`` to ``end`` are here or asked for."""
        for request in [*self._waiting, *self._running]:
            if request.overlaps(first, end):
                request.readers.add(reader)
        for run, stop in self._missing_runs(first, end):
            self._state[run:stop] = _ASKED_FOR * (stop - run)
            last = self._waiting[-1] if self._waiting else None
            if last is not None and last.end == run and (stop - last.first) * BLOCK_BYTES <= MAX_REQUEST_BYTES:
                last.end = stop
                last.readers.add(reader)
            else:
                self._waiting.append(_Request(run, stop, {reader}, is_prefetch=False))
        self._start_soon()

    def _start_soon(self) -> None:
        """Start requests in the next turn of the loop: what several readers ask for in this one may be one request."""
        if not self._is_start_due:
            self._is_start_due = True
            self.loop.call_soon(self._start)

    def _start(self) -> None:
        self._is_start_due = False
        while len(self._running) < MAX_CONNECTIONS:
            request = self._waiting.popleft() if self._waiting else self._next_prefetch()
            if request is None:
                return
            self._running.add(request)
            request.task = self.loop.create_task(self._transfer_in_time(request))
            request.task.add_done_callback(functools.partial(self._over, request))

    def _next_prefetch(self) -> _Request | None:
        if len(self._running) >= _MAX_PREFETCHING:
            return None
        for reader, queue in list(self._prefetching.items()):
            while queue:
                first, end = queue.popleft()
                run = next(self._missing_runs(first, end), None)
                if run is None:
                    continue
                if run[1] < end:
                    queue.appendleft((run[1], end))
                self._state[slice(*run)] = _ASKED_FOR * (run[1] - run[0])
                return _Request(*run, {reader}, is_prefetch=True)
            del self._prefetching[reader]
        return None

    def _stop_unwanted(self, first: int, end: int) -> None:
        """Stop requests for these blocks that nobody waits for any more."""
        for request in [*self._waiting, *self._running]:
            if request.is_prefetch or not request.overlaps(first, end):
                continue
            if not any(request.overlaps(waiter.first, waiter.end) for waiter in self._waiters):
                self._stop(request)

    def _stop(self, request: _Request) -> None:
        if request.task is None:
            self._waiting.remove(request)
            self._forget(request)
        elif not request.task.done():
            request.task.cancel()
            self._end(_outcome_of(request.task))

    def _forget(self, request: _Request) -> None:
        """What did not arrive is missing again."""
        blocks = self._state[request.first : request.end]
        self._state[request.first : request.end] = blocks.replace(_ASKED_FOR, _MISSING)

    def _over(self, request: _Request, task: asyncio.Task[None]) -> None:
        """A request is over: finished, failed or stopped."""
        self._running.discard(request)
        self._forget(request)
        self._start_soon()
        waiters = [
            waiter
            for waiter in self._waiters
            if request.overlaps(waiter.first, waiter.end)
            and not waiter.future.done()
            and not self.is_present(max(request.first, waiter.first), min(request.end, waiter.end))
        ]
        if task.cancelled():
            # Nobody wanted it, but somebody may have begun to wait for it since.
            for waiter in waiters:
                self._ask_for(waiter.reader, waiter.first, waiter.end)
        elif (error := task.exception()) is not None:
            self._failed(waiters, error)

    def _failed(self, waiters: Sequence[_Waiter], error: BaseException) -> None:
        self._prefetching.clear()
        if isinstance(error, _ChangedError):
            self._change = error
            waiters = list(self._waiters)
            for request in [*self._waiting, *self._running]:
                self._stop(request)
        for waiter in waiters:
            waiter.fail(error)

    async def _transfer_in_time(self, request: _Request) -> None:
        error = MediaFetchError(
            f"a part of the file took longer than {self._timeout_seconds:g} seconds (fetch_timeout_seconds,"
            " --fetch-timeout-seconds)",
            code="media_fetch_timeout",
        )
        async with deadline(self._timeout_seconds, error):
            await self._transfer(request)

    async def _transfer(self, request: _Request) -> None:
        with self._client.errors():
            try:
                await self._receive(request)
            except (httpcore2.ProtocolError, httpcore2.ReadError, httpcore2.WriteError):
                # Servers close connections that were idle or served long; once is no reason to give up.
                await self._receive(request)

    async def _receive(self, request: _Request) -> None:
        """Ask for what ``request`` still lacks and write what comes."""
        start, stop = request.arrived, min(request.end * BLOCK_BYTES, self.num_bytes)
        if self._pool is None:
            pool = await self._client.pool(MAX_CONNECTIONS)
            self._pool = self._pool or pool  # one that was never used needs no closing
        headers = [
            (b"Range", f"bytes={start}-{stop - 1}".encode("ascii")),
            (b"If-Range", self._validator.text.encode("ascii")),
        ]
        self._on_traffic(1, 0)
        async with self._client.get(self._pool, self._target, headers) as response:
            self._check_answer(response.status, Fields(response.headers), start, stop)
            batch = bytearray()
            try:
                async with contextlib.aclosing(response.aiter_stream()) as chunks:
                    async for chunk in chunks:
                        batch += chunk
                        self._count(len(chunk))
                        if request.arrived + len(batch) > stop:
                            raise MediaFetchError("the media server sent more of the file than was asked for")
                        if len(batch) >= BLOCK_BYTES:
                            await self._write(request, batch)
                            batch = bytearray()
            except (httpcore2.ProtocolError, httpcore2.ReadError):
                await self._write(request, batch)
                raise
            await self._write(request, batch)
        if request.arrived < stop:
            raise httpcore2.RemoteProtocolError("fewer bytes than promised")

    def _check_answer(self, status: int, fields: Fields, start: int, stop: int) -> None:
        """Raise unless this is the part of this version that was asked for."""
        if status == 200 and fields.get("etag" if self._validator.etag else "last-modified") == self._validator.text:
            raise MediaFetchError("the media server promised to send parts of the file and sends only all of it")
        if status in (200, 412, 416):
            raise _ChangedError()
        if status != 206:
            raise MediaFetchError(
                f"the media server answered with HTTP status {status} when asked for a part of the file"
            )
        part = content_range(fields)
        if fields.get("content-encoding").lower() not in ("", "identity") or part is None:
            raise MediaFetchError("the media server did not say which part of the file it sends")
        if part[2] != self.num_bytes or not self._validator.is_of_part(fields):
            raise _ChangedError()
        if part[:2] != (start, stop):
            raise MediaFetchError("the media server sent another part of the file than was asked for")

    def _count(self, num_bytes: int) -> None:
        self._on_traffic(0, num_bytes)
        self.counted.num_bytes_fetched += num_bytes
        if self.counted.num_bytes_fetched > self._max_bytes:
            raise too_large(self.counted.num_bytes_fetched, self._max_bytes)

    async def _write(self, request: _Request, data: bytearray) -> None:
        await self._client.in_thread(self._write_at, bytes(data), request.arrived)
        request.arrived += len(data)
        end = self.num_blocks if request.arrived == self.num_bytes else request.arrived // BLOCK_BYTES
        self._state[request.first : end] = _PRESENT * (end - request.first)
        for waiter in self._waiters:
            if not waiter.future.done() and self.is_present(waiter.first, waiter.end):
                waiter.future.set_result(None)
        self._on_growth()

    def _write_at(self, data: bytes, position: int) -> None:
        view = memoryview(data)
        with storage_errors():
            while view:
                count = os.pwrite(self._write_fd, view, position)
                position, view = position + count, view[count:]

    # Ending

    def _end(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish ``work`` in the background, where :meth:`wait_idle` finds it."""
        task = self.loop.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _close_pool(self, pool: httpcore2.AsyncConnectionPool, tasks: Sequence[asyncio.Task[None]]) -> None:
        if tasks:
            await asyncio.wait(tasks)
        await pool.aclose()

    def __del__(self) -> None:
        for fd in (getattr(self, "fd", -1), getattr(self, "_write_fd", -1)):
            if fd >= 0:
                os.close(fd)


class _ChangedError(MediaFetchError):
    """The server has another version of the file now."""

    def __init__(self, message: str = "the file changed on the media server while it was being read", **fields) -> None:
        super().__init__(message, **fields)


async def _outcome_of(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])


def _new_file(num_bytes: int) -> int:
    """A nameless file of ``num_bytes`` zeros that take no room."""
    with tempfile.TemporaryFile(prefix="filmstrip-", buffering=0) as file:
        os.ftruncate(file.fileno(), num_bytes)
        return os.dup(file.fileno())


def _read_only(fd: int) -> int:
    """A descriptor of the same file that cannot be written through: decoders, which get it, may be taken over."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # no /proc: not Linux
        return os.dup(fd)
