"""Encoded bytes of one media item, opened as often as needed; knows nothing of what they encode."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, BinaryIO, Protocol

_CHUNK_BYTES = 1 << 20
_HASH_CHUNK_BYTES = 32 << 20
"""Larger contents are hashed in pieces of this size, several at a time: one core hashes slower than a disk reads."""
_MAX_HASH_THREADS = 4
_MAX_PACKED_MEMORY_BYTES = 32 << 20
_MAX_REMEMBERED_FILES = 1024
# A file changed less than this ago may change again without its time stamp showing it (clocks of file systems are coarse).
_SETTLED_SECONDS = 3.0
_CANCEL_CHECK_SECONDS = 0.1
_NICENESS = 10


class MediaSource(Protocol):
    """Encoded bytes that can be read from several threads at once.

    ``content_hash`` identifies the bytes (see :class:`ContentHash`); ``num_bytes`` is their count.
    """

    content_hash: str
    num_bytes: int

    def open(self) -> BinaryIO:
        """A new readable, seekable binary file at position 0, independent of all others."""
        ...


class ContentHash:
    """SHA-256 of up to ``32 MiB``; of more, the SHA-256 of the SHA-256 digests of its 32 MiB pieces. In hex."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._piece = hashlib.sha256()
        self._room = _HASH_CHUNK_BYTES

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        view = memoryview(data)
        while view:
            if not self._room:
                self._digests.append(self._piece.digest())
                self._piece, self._room = hashlib.sha256(), _HASH_CHUNK_BYTES
            taken, view = view[: self._room], view[self._room :]
            self._piece.update(taken)
            self._room -= len(taken)

    def hexdigest(self) -> str:
        """The hash of what was added."""
        return _join_digests([*self._digests, self._piece.digest()])


def _join_digests(digests: list[bytes]) -> str:
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


def _hash_of_bytes(data: bytes) -> str:
    content_hash = ContentHash()
    content_hash.update(data)
    return content_hash.hexdigest()


class BytesSource:
    """Bytes that a caller of the Python API holds in memory."""

    def __init__(self, data: bytes, content_hash: str | None = None) -> None:
        """Keep ``data``; ``content_hash`` is its hash if known already."""
        self._data = data
        self.num_bytes = len(data)
        self.content_hash = content_hash or _hash_of_bytes(data)

    def open(self) -> BinaryIO:
        """A ``BytesIO`` that shares the bytes."""
        return io.BytesIO(self._data)


class FileSource:
    """An open file descriptor, read by position so that all readers can share it; takes over the descriptor."""

    def __init__(self, fd: int, content_hash: str | None = None, *, cancel: threading.Event | None = None) -> None:
        """Take over ``fd``, a regular file open for reading.

        ``content_hash`` is the hash of its bytes if known already; otherwise the file is read now, unless one with the
        same identity (inode, size, times) was read before. Setting ``cancel`` stops that reading with InterruptedError.
        """
        self.fd = fd
        self.num_bytes = os.fstat(fd).st_size
        self.content_hash = content_hash or _FILE_HASHES.hash_of(self, fd, cancel)

    def open(self) -> BinaryIO:
        """A buffered reader with a position of its own."""
        return io.BufferedReader(_PositionalReader(self, self.fd, self.num_bytes), 1 << 16)

    def __del__(self) -> None:
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            os.close(fd)


class SpanSource:
    """A part of another source: bytes ``start`` to ``stop`` of it, one of many pictures packed into one file."""

    def __init__(self, whole: FileSource, start: int, stop: int) -> None:
        """Raises ValueError if there is no such part."""
        if not 0 <= start <= stop <= whole.num_bytes:
            raise ValueError(f"no part from {start} to {stop} in {whole.num_bytes} bytes")
        self._whole, self._start = whole, start
        self.num_bytes = stop - start
        self.content_hash = f"{whole.content_hash}:{start}-{stop}"

    def open(self) -> BinaryIO:
        """A ``BytesIO`` with a copy of the part."""
        return io.BytesIO(os.pread(self._whole.fd, self.num_bytes, self._start))


class SpooledBytes:
    """Bytes that arrive bit by bit, kept in memory while they are few and in a nameless temporary file after that.

    Either way they stand behind a file descriptor, which other processes can be given. Used by one thread at a time.
    :meth:`finish` gives what arrived as a source; without it everything is freed with this object.
    """

    def __init__(self, max_memory_bytes: int) -> None:
        self.num_bytes = 0
        self._max_memory_bytes = max_memory_bytes
        self._file = _memory_file()
        self._is_in_memory = True
        self._digest = ContentHash()

    def write(self, chunk: bytes) -> None:
        """Add ``chunk``; raises OSError where the disk is full."""
        self._digest.update(chunk)
        if self._is_in_memory and self.num_bytes + len(chunk) > self._max_memory_bytes:
            self._move_to_disk()
        self.num_bytes += len(chunk)
        _write_all(self._file, chunk)

    def finish(self) -> FileSource:
        """All bytes as a source, which nobody can write to; nothing may be written after."""
        with self._file as file:
            return FileSource(_read_only(file.fileno()), self._digest.hexdigest())

    def _move_to_disk(self) -> None:
        on_disk = tempfile.TemporaryFile(prefix="filmstrip-", buffering=0)  # noqa: SIM115  (closed by finish or with the object)
        with self._file as memory:
            position = 0
            while chunk := os.pread(memory.fileno(), _CHUNK_BYTES, position):
                _write_all(on_disk, chunk)
                position += len(chunk)
        self._file, self._is_in_memory = on_disk, False


def file_source(source: MediaSource) -> FileSource:
    """``source`` behind a descriptor, its bytes copied into memory of their own if they do not stand behind one already."""
    return source if isinstance(source, FileSource) else pack([source])[0]


def pack(sources: Sequence[MediaSource]) -> tuple[FileSource, list[tuple[int, int]]]:
    """All of ``sources`` one after the other behind one descriptor, and where each begins and ends."""
    spool = SpooledBytes(_MAX_PACKED_MEMORY_BYTES)
    spans = []
    for source in sources:
        start = spool.num_bytes
        with source.open() as file:
            while chunk := file.read(_CHUNK_BYTES):
                spool.write(chunk)
        spans.append((start, spool.num_bytes))
    return spool.finish(), spans


def _memory_file() -> Any:
    """A file in memory that has no name; where the system has none (macOS), a nameless one on disk."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("filmstrip-media", os.MFD_CLOEXEC), "r+b", buffering=0)
    return tempfile.TemporaryFile(prefix="filmstrip-", buffering=0)


def _read_only(fd: int) -> int:
    """A new descriptor of the same file through which it cannot be written: decoders, which get it, may be taken over."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no /proc: not Linux
        return os.dup(fd)


def _write_all(file: Any, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def _hash_of_file(fd: int, num_bytes: int, cancel: threading.Event | None) -> str:
    """The :class:`ContentHash` of the first ``num_bytes`` of a file, pieces in parallel."""

    def digest_of(start: int) -> bytes:
        piece = hashlib.sha256()
        position, end = start, min(start + _HASH_CHUNK_BYTES, num_bytes)
        while position < end and (chunk := os.pread(fd, min(_CHUNK_BYTES, end - position), position)):
            piece.update(chunk)
            position += len(chunk)
            if cancel is not None and cancel.is_set():
                raise InterruptedError("reading the file was cancelled")
        return piece.digest()

    starts = range(0, max(num_bytes, 1), _HASH_CHUNK_BYTES)
    if len(starts) == 1:
        return _join_digests([digest_of(0)])
    return _join_digests(list(_HASH_THREADS.map(digest_of, starts)))


def _stand_back() -> None:
    """Let this thread stand behind others when cores are short: hashing an hour of video must not hold up an answer."""
    if sys.platform == "linux":  # where threads have priorities of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


_HASH_THREADS = ThreadPoolExecutor(_MAX_HASH_THREADS, thread_name_prefix="filmstrip-hash", initializer=_stand_back)


class _FileHashes:
    """Hashes of files by identity, so that a clip asked about again is not read from end to end again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hashes: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._being_read: dict[tuple[int, ...], Future[None]] = {}

    def hash_of(self, owner: FileSource, fd: int, cancel: threading.Event | None) -> str:
        """The hash of the file ``fd``, read only if its identity is new or too young to be trusted; by one at a time."""
        before = _identity(fd)
        if not _is_settled(fd):
            return _hash_of_file(fd, owner.num_bytes, cancel)
        while True:
            with self._lock:
                known = self._hashes.get(before)
                if known is not None:
                    self._hashes.move_to_end(before)
                    return known
                other = self._being_read.get(before)
                if other is None:
                    mine = self._being_read[before] = Future()
                    break
            _wait_for(other, cancel)  # it may have been given up: then it is ours to read
        try:
            content_hash = _hash_of_file(fd, owner.num_bytes, cancel)
            if _identity(fd) == before:
                self._remember(before, content_hash)
            return content_hash
        finally:
            with self._lock:
                del self._being_read[before]
            mine.set_result(None)

    def _remember(self, identity: tuple[int, ...], content_hash: str) -> None:
        with self._lock:
            self._hashes[identity] = content_hash
            if len(self._hashes) > _MAX_REMEMBERED_FILES:
                self._hashes.popitem(last=False)


_FILE_HASHES = _FileHashes()


def _is_settled(fd: int) -> bool:
    return time.time() - os.fstat(fd).st_ctime > _SETTLED_SECONDS


def _wait_for(other: Future[None], cancel: threading.Event | None) -> None:
    while not wait([other], timeout=_CANCEL_CHECK_SECONDS).done:
        if cancel is not None and cancel.is_set():
            raise InterruptedError("reading the file was cancelled")


def _identity(fd: int) -> tuple[int, ...]:
    """Device, inode, size and times: equal before and after means not written in between (ctime cannot be set back)."""
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


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
        # Never past the size seen when the file was opened: a file that grows meanwhile would not match its hash.
        room = max(self._num_bytes - self._position, 0)
        count = os.preadv(self._fd, [memoryview(buffer)[:room]], self._position)
        self._position += count
        return count
