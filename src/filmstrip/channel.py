"""Frames of bytes and file descriptors over a Unix stream socket; knows nothing of what they mean.

A frame is its length, the number of descriptors, the descriptors (each group attached to one filler byte) and the message.
Nothing is pickled: a peer can send wrong values but no code. A descriptor can get lost, when a process has too many files
open; the frame around it stays readable.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterable, Sequence

HEADER = struct.Struct("<IH")
MAX_DESCRIPTORS_PER_BYTE = 128
"""Descriptors attached to one filler byte; Linux takes up to 253 in one message."""
_RECEIVE_BYTES = 1 << 20


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that nobody took over."""
    for descriptor in descriptors:
        os.close(descriptor)


def frame_parts(payload: bytes, descriptors: Sequence[int] = ()) -> list[tuple[bytes, Sequence[int]]]:
    """A frame as pieces to send in order, each with the descriptors attached to it."""
    groups = [
        descriptors[start : start + MAX_DESCRIPTORS_PER_BYTE]
        for start in range(0, len(descriptors), MAX_DESCRIPTORS_PER_BYTE)
    ]
    return [
        (HEADER.pack(len(payload), len(descriptors)), ()),
        *((b"\0", group) for group in groups),
        (payload, ()),
    ]


def send_frame(connection: socket.socket, payload: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one frame over a blocking socket."""
    for data, attached in frame_parts(payload, descriptors):
        if attached:
            socket.send_fds(connection, [data], list(attached))
        else:
            connection.sendall(data)


class FrameReader:
    """Reads frames from a blocking Unix stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._descriptors: list[int] = []

    def read(self) -> tuple[bytes, list[int] | None] | None:
        """The next message's bytes and descriptors, None at the end of the stream.

        None instead of the descriptors if some did not arrive, because this process has no room for them; those that did
        are closed.
        """
        header = self._read_exactly(HEADER.size)
        if header is None:
            return None
        num_bytes, num_descriptors = HEADER.unpack(header)
        num_groups = -(-num_descriptors // MAX_DESCRIPTORS_PER_BYTE)
        payload = self._read_exactly(num_groups + num_bytes)
        if payload is None:
            return None
        descriptors, self._descriptors = self._descriptors, []
        if len(descriptors) != num_descriptors:
            close_all(descriptors)
            return payload[num_groups:], None
        return payload[num_groups:], descriptors

    def _read_exactly(self, num_bytes: int) -> bytes | None:
        buffer = bytearray()
        while len(buffer) < num_bytes:
            data, descriptors, _, _ = socket.recv_fds(
                self._connection, min(num_bytes - len(buffer), 1 << 20), MAX_DESCRIPTORS_PER_BYTE
            )
            self._descriptors.extend(descriptors)
            if not data:
                return None
            buffer += data
        return bytes(buffer)


class AsyncChannel:
    """One end of a connection, used from an event loop by one caller at a time; owns the socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one frame; raises OSError if the other end is gone."""
        self._loop = asyncio.get_running_loop()
        for data, attached in frame_parts(payload, descriptors):
            view = memoryview(data)
            while view:
                try:
                    if attached:
                        sent = socket.send_fds(self._connection, [view], list(attached))
                    else:
                        sent = self._connection.send(view)
                except BlockingIOError:
                    await self._writable()
                    continue
                view, attached = view[sent:], ()

    async def receive(self, max_bytes: int) -> bytes:
        """The next message, without descriptors; raises EOFError at the end and ValueError for more than ``max_bytes``."""
        num_bytes, _ = HEADER.unpack(await self._receive_exactly(HEADER.size))
        if num_bytes > max_bytes:
            raise ValueError(f"a message of {num_bytes} bytes; at most {max_bytes} are read")
        return await self._receive_exactly(num_bytes)

    def close(self) -> None:
        """Close the socket; may be called twice, and while a cancelled :meth:`receive` is still being cleaned up."""
        fd = self._connection.fileno()
        if fd >= 0 and self._loop is not None and not self._loop.is_closed():
            # Or the event loop would stop watching whatever gets this number next.
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
        self._connection.close()

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(self._connection, lambda: ready.done() or ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_writer(self._connection)

    async def _receive_exactly(self, num_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        while len(buffer) < num_bytes:
            data = await loop.sock_recv(self._connection, min(num_bytes - len(buffer), _RECEIVE_BYTES))
            if not data:
                raise EOFError("the other end is gone")
            buffer += data
        return bytes(buffer)
