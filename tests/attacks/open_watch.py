"""Tells whether files were opened, by any process and any library: Linux's inotify through the C library."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Iterable
from pathlib import Path

_IN_OPEN = 0x20
_IN_NONBLOCK = os.O_NONBLOCK
_EVENT = struct.Struct("iIII")  # struct inotify_event without its name, inotify(7)


class OpenWatch:
    """Counts openings of ``paths`` from its making to :meth:`opened`; a context manager."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(_IN_NONBLOCK)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        self._names: dict[int, str] = {}
        for path in paths:
            watch = self._libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_OPEN)
            assert watch >= 0, os.strerror(ctypes.get_errno())
            self._names[watch] = path.name

    def __enter__(self) -> OpenWatch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._fd)

    def opened(self) -> list[str]:
        """Names of the files that were opened since the last question, one for each time."""
        names = []
        while select.select([self._fd], [], [], 0)[0]:
            data, position = os.read(self._fd, 1 << 16), 0
            while position < len(data):
                watch, _mask, _cookie, length = _EVENT.unpack_from(data, position)
                names.append(self._names[watch])
                position += _EVENT.size + length
        return names
