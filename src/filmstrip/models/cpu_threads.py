"""A compiled function in, the same function run on every thread of PyTorch's own pool out; knows nothing of what it does.

A second pool next to PyTorch's OpenMP threads would collapse: between parallel regions the threads of a pool spin for a
while, on the cores that the other pool now wants. So the function runs as a parallel region of the OpenMP library that
PyTorch itself has loaded, through ``GOMP_parallel``, the entry point that compilers call for ``#pragma omp parallel`` (GNU
libgomp; LLVM's and Intel's libraries have it on Linux, too). Where it is missing, plain threads are used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

Task = Callable[[int, int], None]
"""Runs the function at an address with the address of its arguments."""

_LIBRARY_PREFIXES = ("libgomp", "libiomp5", "libomp")


def run_on_threads(function: int, arguments: int) -> None:
    """Call the C function ``void function(void *arguments)`` at once on all of PyTorch's threads; returns when all did.

    ``function`` and ``arguments`` are addresses. The GIL is released meanwhile.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        _CALL(function)(arguments)
        return
    parallel = openmp_parallel()
    if parallel is not None:
        parallel(function, arguments, num_threads, 0)
        return
    call = _CALL(function)
    futures = [_threads(num_threads - 1).submit(call, arguments) for _ in range(num_threads - 1)]
    call(arguments)
    for future in futures:
        future.result()


_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def openmp_parallel() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel(function, data, num_threads, flags)`` of the library that PyTorch runs on, else None."""
    for path in loaded_openmp_libraries():
        try:
            parallel = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


def loaded_openmp_libraries(maps: str | Path = "/proc/self/maps") -> list[str]:
    """Paths of the OpenMP libraries in this process (Linux), the one that came with PyTorch first."""
    try:
        lines = Path(maps).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    found = sorted(path for path in paths if Path(path).name.startswith(_LIBRARY_PREFIXES))
    home = str(Path(torch.__file__).parent)
    return sorted(found, key=lambda path: not path.startswith(home))


@lru_cache(maxsize=1)
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="filmstrip-attention")
