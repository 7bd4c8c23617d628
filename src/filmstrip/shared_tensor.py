"""One array in anonymous shared memory, handed between processes by file descriptor; knows nothing of what it holds.

Written once by whoever creates it, read in place by whoever receives the descriptor; never pickled. The memory is freed by
the kernel when the last holder drops it, so a crash leaves nothing behind and no file name exists.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


_MAX_OPEN_FILES = 1 << 20
_FILES_PER_TENSOR = 2  # our descriptor and the one that Python's mmap duplicates


def raise_open_files_limit() -> None:
    """Allow this process as many open files as the system lets it: every tensor is one, and 1024 are soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    with contextlib.suppress(OSError, ValueError):  # a system may have bounds of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_kept_tensors() -> int:
    """How many tensors a cache may hold so that at least half of the files this process may open are left."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (_MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft) // (2 * _FILES_PER_TENSOR)


class SharedTensor:
    """A C-contiguous numpy array backed by anonymous shared memory.

    ``array`` is a view; ``fd`` stays open for as long as this object lives (a received descriptor is closed at the end,
    too).
    """

    def __init__(self, fd: int, shape: tuple[int, ...], dtype: str) -> None:
        """Map ``fd``, whose size must be at least what ``shape`` and ``dtype`` need; takes over the descriptor."""
        self.fd = fd
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)
        self.num_bytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        try:
            self._map = mmap.mmap(fd, max(self.num_bytes, 1))
        except BaseException:
            os.close(fd)
            self.fd = -1
            raise
        self.array = np.frombuffer(self._map, self.dtype, count=self.num_bytes // self.dtype.itemsize).reshape(
            self.shape
        )

    @classmethod
    def create(cls, shape: tuple[int, ...], dtype: str = "uint8") -> SharedTensor:
        """Allocate zeroed memory of ``shape``."""
        num_bytes = max(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, 1)
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("filmstrip", os.MFD_CLOEXEC)
        else:  # macOS has no memfd: an unlinked temporary file does the same
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, num_bytes)
        return cls(fd, shape, dtype)

    def torch(self) -> torch.Tensor:
        """The same memory as a torch tensor; the tensor keeps the mapping alive."""
        import torch

        return torch.from_numpy(self.array)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # ``close`` is bound here because ``os`` may be gone when the interpreter ends.
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            close(fd)
