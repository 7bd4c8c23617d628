"""Encoded bytes of one media item, opened as often as needed; knows nothing of what they encode."""

from __future__ import annotations

import hashlib
import io
import os
from typing import BinaryIO, Protocol


class MediaSource(Protocol):
    """Encoded bytes that can be read from several threads at once.

    ``content_hash`` is the SHA-256 of the bytes in hex; ``num_bytes`` their count.
    """

    content_hash: str
    num_bytes: int

    def open(self) -> BinaryIO:
        """A new readable, seekable binary file at position 0, independent of all others."""
        ...


class BytesSource:
    """Bytes in memory (a download or a data URL)."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.num_bytes = len(data)
        self.content_hash = hashlib.sha256(data).hexdigest()

    def open(self) -> BinaryIO:
        """A ``BytesIO`` that shares the bytes."""
        return io.BytesIO(self._data)


class FileSource:
    """An open file descriptor, read by position so that all readers can share it; takes over the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.num_bytes = os.fstat(fd).st_size
        digest = hashlib.sha256()
        with self.open() as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        self.content_hash = digest.hexdigest()

    def open(self) -> BinaryIO:
        """A buffered reader with a position of its own."""
        return io.BufferedReader(_PositionalReader(self, self._fd, self.num_bytes), 1 << 16)

    def __del__(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)


class _PositionalReader(io.RawIOBase):
    """Reads a shared descriptor with ``pread``; keeps the descriptor's owner alive."""

    def __init__(self, owner: FileSource, fd: int, num_bytes: int) -> None:
        super().__init__()
        self._owner, self._fd, self._num_bytes, self._position = owner, fd, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[override]
        count = os.preadv(self._fd, [buffer], self._position)
        self._position += count
        return count
