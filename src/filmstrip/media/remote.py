"""A file of which only parts are here: a worker reads it as if it were whole, its parent fetches what is missing.

The bytes stand in a file full of holes behind a shared descriptor. Before a worker reads a part, it asks for it on a socket
and waits until the parent says that it is there. :class:`RangeServer` is the parent's side; neither knows how parts are
fetched, nor what they encode.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import struct
import threading
from collections.abc import Sequence
from typing import BinaryIO, Protocol

from filmstrip.errors import MediaDecodeError

_RANGE = struct.Struct("<QQ?")
"""First byte and end. From the worker: and whether somebody waits for them. From the parent: they are there (true)."""
_BLOCK_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 16


class RemoteSource:
    """A :class:`~filmstrip.media.source.MediaSource` in the worker, read from several threads at once."""

    def __init__(self, fd: int, connection: socket.socket, content_hash: str) -> None:
        """``fd`` is the file with holes, ``connection`` (blocking) leads to a :class:`RangeServer`; both are taken over."""
        self.fd = fd
        self.content_hash = content_hash
        self.num_bytes = os.fstat(fd).st_size
        self._connection = connection
        self._present = bytearray(-(-self.num_bytes // _BLOCK_BYTES))
        self._changed = threading.Condition()
        self._is_broken = False
        threading.Thread(target=self._receive, name="filmstrip-remote", daemon=True).start()

    def open(self) -> BinaryIO:
        """A buffered reader that waits for what is missing."""
        return io.BufferedReader(_RemoteReader(self), _BUFFER_BYTES)

    def open_skimming(self, ranges: Sequence[tuple[int, int]]) -> SkimmingReader:
        """A reader that can be told to give zeros for the bytes of ``ranges`` instead of waiting for them."""
        return SkimmingReader(self, ranges)

    def wait_for(self, start: int, stop: int) -> None:
        """Return once bytes ``start`` to ``stop`` are here; raises OSError if the parent is gone."""
        with self._changed:
            if self._has(start, stop):
                return
            self._ask_for(start, stop, waits=True)
            while not self._has(start, stop):
                if self._is_broken:
                    raise OSError("the parts of the file cannot be fetched any more")
                self._changed.wait()

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Let the parent fetch ``ranges`` in this order, waiting for none."""
        with self._changed:
            for start, stop in ranges:
                if not self._has(start, stop):
                    self._ask_for(start, stop, waits=False)

    def has(self, start: int, stop: int) -> bool:
        """Whether these bytes are known to be here."""
        with self._changed:
            return self._has(start, stop)

    def _ask_for(self, start: int, stop: int, *, waits: bool) -> None:
        start = start // _BLOCK_BYTES * _BLOCK_BYTES
        stop = min(-(-stop // _BLOCK_BYTES) * _BLOCK_BYTES, self.num_bytes)
        self._connection.sendall(_RANGE.pack(start, stop, waits))

    def _has(self, start: int, stop: int) -> bool:
        first, end = start // _BLOCK_BYTES, -(-min(stop, self.num_bytes) // _BLOCK_BYTES)
        return self._present.find(0, first, end) < 0

    def _receive(self) -> None:
        try:
            while data := self._connection.recv(_RANGE.size, socket.MSG_WAITALL):
                start, stop, _ = _RANGE.unpack(data)
                with self._changed:
                    first, end = start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES)
                    self._present[first:end] = b"\1" * (end - first)
                    self._changed.notify_all()
        except (OSError, struct.error):
            pass
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()


class _RemoteReader(io.RawIOBase):
    """Reads by position; a position of its own."""

    def __init__(self, source: RemoteSource) -> None:
        super().__init__()
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.num_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[override]
        stop = min(self._position + len(buffer), self._source.num_bytes)
        room = stop - self._position
        if room <= 0:
            return 0
        self._source.wait_for(self._position, stop)
        count = os.preadv(self._source.fd, [memoryview(buffer)[:room]], self._position)
        self._position += count
        return count


class SkimmingReader(_RemoteReader):
    """While ``is_skimming``, everything inside ``ranges`` reads as zeros and nothing is fetched for it.

    For going through a container whose tables say everything about its packets, so that their contents need not be there.
    Unbuffered: what was read as zeros must not be found in a buffer later.
    """

    def __init__(self, source: RemoteSource, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__(source)
        self._ranges = ranges
        self._zeros = b""
        self.is_skimming = False

    def read(self, size: int = -1) -> bytes | None:
        """Up to ``size`` bytes. Zeros are made once: most of a long file is read here, and not for what it holds."""
        start, stop = self._position, min(self._position + size, self._source.num_bytes)
        if self.is_skimming and size > 0 and any(first <= start < stop <= end for first, end in self._ranges):
            self._position = stop
            if len(self._zeros) != stop - start:
                self._zeros = bytes(stop - start)
            return self._zeros
        return super().read(size)


class PartialFile(Protocol):
    """What the parent fetches parts of (:class:`~filmstrip.media.sparse.SparseFile`)."""

    num_bytes: int

    async def ensure(self, start: int, stop: int) -> None:
        """Return once these bytes are in the file; raises the MediaError family."""
        ...

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch these ranges in the background."""
        ...

    def close(self) -> None:
        """Stop fetching."""
        ...


class RangeServer:
    """Fetches what one worker asks for; ``failed`` raises the first error."""

    def __init__(self, file: PartialFile, connection: socket.socket) -> None:
        """``file`` and ``connection`` are taken over."""
        connection.setblocking(False)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._file, self._connection = file, connection
        self._sending = asyncio.Lock()
        self._fetching: set[asyncio.Task[None]] = set()
        self._serving = asyncio.ensure_future(self._serve())
        self._serving.add_done_callback(lambda _: self._connection.close())

    def close(self) -> None:
        """Stop fetching; what arrived stays. May be called twice."""
        for task in (self._serving, *self._fetching):
            task.cancel()
        self._file.close()
        if not self.failed.cancel():
            self.failed.exception()  # it has been looked at, or nobody cares

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        buffer = b""
        try:
            while data := await loop.sock_recv(self._connection, 1 << 16):
                buffer += data
                while len(buffer) >= _RANGE.size:
                    self._take(*_RANGE.unpack(buffer[: _RANGE.size]))
                    buffer = buffer[_RANGE.size :]
        except OSError:
            pass  # the worker is gone
        except Exception as error:
            self._fail(error)

    def _take(self, start: int, stop: int, waits: bool) -> None:
        if not 0 <= start <= stop <= self._file.num_bytes:
            raise MediaDecodeError("the decoder asked for what is not in the file", code="media_decode_crashed")
        if not waits:
            self._file.prefetch([(start, stop)])
            return
        task = asyncio.ensure_future(self._fetch(start, stop))
        self._fetching.add(task)
        task.add_done_callback(self._fetching.discard)

    async def _fetch(self, start: int, stop: int) -> None:
        try:
            await self._file.ensure(start, stop)
            async with self._sending:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(self._connection, _RANGE.pack(start, stop, True))
        except OSError:
            pass  # the worker is gone
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
