"""Addresses of Q, K, V, pages and a work list in, attention out: the compiled loops of attention on CPU; knows no tensors.

Compiled by numba from what is written here and cached on disk. A kernel runs on every thread
of a pool; each takes work from a shared counter until none is left.

A K page is stored transposed, (head_dim, block_size), a V page as (block_size, head_dim): then both products of attention,
scores = Q K^T and output = P V, are the same small matrix product, fp32 rows times a page of contiguous rows, with no sum
across a vector. Rows of a page are padded to whole vectors. A page is read once for all rows and all query heads of its K
and V head, and while it is read the next one is fetched.

Softmax is computed online (Milakov and Gimelshein, 2018, "Online normalizer calculation for softmax") in powers of two: Q
arrives multiplied by log2(e). Long contexts are split; the last split to finish merges the partial results.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, from_dtype, njit, types
from numba.np.numpy_support import carray

from filmstrip.models import cpu_simd
from filmstrip.models.cpu_simd import LOWEST, VECTOR, exp2_in_place, fetch_add, largest_of, pointer_to, product

TILE_COLUMNS = 128
"""Columns of scores that go through softmax at once; several small pages together."""

ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            "next_work",  # address of the counter of work taken
            "next_slot",  # address of the counter of scratch slots taken
            "num_works",
            "works",
            "query",  # fp32 (N, num_kv_heads, group, head_dim), multiplied by scaling * log2(e)
            "output",  # fp32, same shape
            "key_pages",
            "value_pages",
            "block_tables",  # int32 (S, table_stride)
            "table_stride",
            "scratch",
            "scratch_stride",  # floats of one thread: max_rows * scratch_row
            "max_rows",
            "partials",
            "partial_stride",  # floats of one partial result
            "pending",  # int64, one for each partial and head: how many splits are done; 0 before and after
            "num_kv_heads",
            "group",
            "head_dim",
            "block_size",
            "key_columns",  # block_size in whole vectors: row stride of a K page
            "value_columns",  # head_dim in whole vectors: row stride of a V page
            "keys",  # tokens to be stored, in the dtype of the pages; or where gathered ones go
            "key_token_stride",
            "key_head_stride",
            "values",
            "value_token_stride",
            "value_head_stride",
            "row_starts",  # int64 (N,): the first token of its request that each row sees
            "row_ends",  # int64 (N,): the first behind those
        )
    ]
)
"""What a kernel is called with: addresses, sizes, and strides in elements."""

WORK = np.dtype(
    [
        (name, np.int64)
        for name in ("sequence", "first_row", "num_rows", "start", "end", "num_splits", "split", "partial")
    ]
)
"""Attention work: a request, rows of the packed batch, the tokens that any of them sees (``start`` at the start of a page),
how many splits they have, which this is, and the index of the first split's partial result."""

RUN = np.dtype([(name, np.int64) for name in ("token", "length", "block", "offset")])
"""A run to copy: consecutive tokens from or to consecutive slots of one block."""

_Arguments, _Work, _Run = from_dtype(ARGUMENTS), from_dtype(WORK), from_dtype(RUN)
# No assumption that there is no NaN or infinity: a page may hold anything behind its last token.
_FLAGS = {"contract", "reassoc", "nsz", "arcp"}
_LOWEST = np.float32(LOWEST)


def scratch_row(head_dim: int, key_columns: int, value_columns: int) -> int:
    """Floats of scratch that one row of a work item needs: Q, output, scores, state."""
    return head_dim + value_columns + max(key_columns, TILE_COLUMNS) + 2


@njit(error_model="numpy")
def _panel_fp32(
    rows: int,
    vectors: int,
    accumulate: int,
    c: int,
    ldc: int,
    a: int,
    lda: int,
    b: int,
    ldb: int,
    depth: int,
    ahead: int,
) -> int:
    """The largest product that fits ``rows``; how many rows it did."""
    if vectors == 2:
        if rows >= 8:
            product(8, 2, 0, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
            return 8
        if rows >= 4:
            product(4, 2, 0, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
            return 4
        if rows >= 2:
            product(2, 2, 0, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
            return 2
        product(1, 2, 0, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
        return 1
    if rows >= 8:
        product(8, 1, 0, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
        return 8
    product(1, 1, 0, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
    return 1


@njit(error_model="numpy")
def _panel_bf16(
    rows: int,
    vectors: int,
    accumulate: int,
    c: int,
    ldc: int,
    a: int,
    lda: int,
    b: int,
    ldb: int,
    depth: int,
    ahead: int,
) -> int:
    """The largest product that fits ``rows``; how many rows it did."""
    if vectors == 2:
        if rows >= 8:
            product(8, 2, 1, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
            return 8
        if rows >= 4:
            product(4, 2, 1, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
            return 4
        if rows >= 2:
            product(2, 2, 1, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
            return 2
        product(1, 2, 1, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
        return 1
    if rows >= 8:
        product(8, 1, 1, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
        return 8
    product(1, 1, 1, accumulate, c, ldc, a, lda, b, ldb, depth, ahead)
    return 1


@njit(error_model="numpy")
def multiply(
    rows: int,
    columns: int,
    half: int,
    accumulate: int,
    c: int,
    ldc: int,
    a: int,
    lda: int,
    b: int,
    ldb: int,
    depth: int,
    ahead: int,
) -> None:
    """:func:`filmstrip.models.cpu_simd.product` of any number of rows and whole vectors of columns."""
    size = 2 if half else 4
    column = 0
    while column < columns:
        vectors = 2 if column + 2 * VECTOR <= columns else 1
        row = 0
        while row < rows:
            panel_c, panel_a, panel_b = c + (row * ldc + column) * 4, a + row * lda * 4, b + column * size
            panel_ahead = ahead if row == 0 else 0
            if half:
                row += _panel_bf16(
                    rows - row, vectors, accumulate, panel_c, ldc, panel_a, lda, panel_b, ldb, depth, panel_ahead
                )
            else:
                row += _panel_fp32(
                    rows - row, vectors, accumulate, panel_c, ldc, panel_a, lda, panel_b, ldb, depth, panel_ahead
                )
        column += vectors * VECTOR


@njit(error_model="numpy", fastmath=_FLAGS)
def softmax_row(scores: Any, first: int, limit: int, output: Any, state: Any) -> None:
    """One step of online softmax on one row.

    ``scores[first:limit]`` (whole vectors long in all) become weights 2^(score - maximum), the rest 0; ``state`` holds the
    maximum so far and the sum of weights; ``output`` is rescaled when the maximum grows.
    """
    if first >= limit:
        first = limit = 0
    for t in range(first):
        scores[t] = _LOWEST
    for t in range(limit, len(scores)):
        scores[t] = _LOWEST
    num_vectors = (limit + VECTOR - 1) // VECTOR
    address = scores.ctypes.data
    largest = largest_of(address, num_vectors)
    if largest > state[0]:
        shrink = np.exp2(state[0] - largest)
        state[0] = largest
        state[1] *= shrink
        for d in range(len(output)):
            output[d] *= shrink
    state[1] += exp2_in_place(address, num_vectors, state[0])
    for t in range(num_vectors * VECTOR, len(scores)):
        scores[t] = np.float32(0.0)


@njit(error_model="numpy")
def _ahead(table: Any, index: int, num_blocks: int, num_heads: int) -> Any:
    """How many pages behind page ``index`` of a request the next one lies."""
    return (np.int64(table[index + 1]) - np.int64(table[index])) * num_heads if index + 1 < num_blocks else np.int64(0)


@njit(error_model="numpy", fastmath=_FLAGS)
def _attend_work(arg: Any, work: Any, head: int, half: int, q: Any, output: Any, scores: Any, state: Any) -> None:
    """Attention of one work item and head over its tokens, left unnormalised in ``output`` and ``state``."""
    rows, size = work.num_rows * arg.group, 2 if half else 4
    block_size, num_heads, key_columns = arg.block_size, arg.num_kv_heads, arg.key_columns
    table = carray(pointer_to(arg.block_tables + work.sequence * arg.table_stride * 4, np.int32), (arg.table_stride,))
    query_shape = (work.first_row + work.num_rows, num_heads, arg.group, arg.head_dim)
    query = carray(pointer_to(arg.query, np.float32), query_shape)
    for row in range(rows):
        q[row] = query[work.first_row + row // arg.group, head, row % arg.group]
        output[row] = np.float32(0.0)
        state[row, 0] = _LOWEST
        state[row, 1] = np.float32(0.0)
    num_tokens = work.first_row + work.num_rows
    row_starts: Any = carray(pointer_to(arg.row_starts, np.int64), (num_tokens,))
    row_ends: Any = carray(pointer_to(arg.row_ends, np.int64), (num_tokens,))
    # Pages without padding lie side by side in a tile of scores.
    tile_pages = max(1, TILE_COLUMNS // block_size) if key_columns == block_size else 1
    tile = carray(pointer_to(scores.ctypes.data, np.float32), (rows, tile_pages * key_columns))
    key_page, value_page = arg.head_dim * key_columns * size, block_size * arg.value_columns * size
    num_blocks = (work.end + block_size - 1) // block_size
    for base in range(work.start, work.end, tile_pages * block_size):
        valid = min(tile_pages * block_size, work.end - base)
        first, last = base // block_size, (base + valid - 1) // block_size
        for index in range(first, last + 1):
            page = np.int64(table[index]) * num_heads + head
            multiply(
                rows,
                key_columns,
                half,
                0,
                tile.ctypes.data + (index - first) * key_columns * 4,
                tile.shape[1],
                q.ctypes.data,
                arg.head_dim,
                arg.key_pages + page * key_page,
                key_columns,
                arg.head_dim,
                _ahead(table, index, num_blocks, num_heads) * key_page,
            )
        for row in range(rows):
            token = work.first_row + row // arg.group
            visible = max(0, min(valid, row_ends[token] - base))
            softmax_row(tile[row], max(0, row_starts[token] - base), visible, output[row], state[row])
        for index in range(first, last + 1):
            page = np.int64(table[index]) * num_heads + head
            multiply(
                rows,
                arg.value_columns,
                half,
                1,
                output.ctypes.data,
                arg.value_columns,
                tile.ctypes.data + (index - first) * key_columns * 4,
                tile.shape[1],
                arg.value_pages + page * value_page,
                arg.value_columns,
                min(block_size, valid - (index - first) * block_size),
                _ahead(table, index, num_blocks, num_heads) * value_page,
            )


@njit(error_model="numpy")
def _partial(arg: Any, work: Any, head: int, split: int) -> Any:
    """Where a split's unnormalised output and state are kept, (rows, value_columns + VECTOR)."""
    index = (work.partial + split) * arg.num_kv_heads + head
    shape = (work.num_rows * arg.group, arg.value_columns + VECTOR)
    return carray(pointer_to(arg.partials + index * arg.partial_stride * 4, np.float32), shape)


@njit(error_model="numpy")
def _keep_split(arg: Any, work: Any, head: int, output: Any, state: Any) -> bool:
    """Put a split's result where the others find it; True if it was the last of them."""
    part = _partial(arg, work, head, work.split)
    for row in range(work.num_rows * arg.group):
        part[row, : arg.value_columns] = output[row]
        part[row, arg.value_columns] = state[row, 0]
        part[row, arg.value_columns + 1] = state[row, 1]
    pending = arg.pending + (work.partial * arg.num_kv_heads + head) * 8
    if fetch_add(pending) < work.num_splits - 1:
        return False
    carray(pointer_to(pending, np.int64), (1,))[0] = 0
    return True


@njit(error_model="numpy", fastmath=_FLAGS)
def _merge_splits(arg: Any, work: Any, head: int, output: Any, state: Any) -> None:
    """Combine the partial results: each weighs 2^(its maximum - the common maximum)."""
    width = arg.value_columns
    for row in range(work.num_rows * arg.group):
        largest = _LOWEST
        for split in range(work.num_splits):
            largest = max(largest, _partial(arg, work, head, split)[row, width])
        output[row] = np.float32(0.0)
        total = np.float32(0.0)
        for split in range(work.num_splits):
            part = _partial(arg, work, head, split)[row]
            weight = np.exp2(part[width] - largest)
            total += weight * part[width + 1]
            for d in range(width):
                output[row, d] += weight * part[d]
        state[row, 1] = total


@njit(error_model="numpy", fastmath=_FLAGS)
def _write_output(arg: Any, work: Any, head: int, output: Any, state: Any) -> None:
    """Normalise and store the rows of a finished work item."""
    shape = (work.first_row + work.num_rows, arg.num_kv_heads, arg.group, arg.head_dim)
    result = carray(pointer_to(arg.output, np.float32), shape)
    for row in range(work.num_rows * arg.group):
        target = result[work.first_row + row // arg.group, head, row % arg.group]
        factor = np.float32(1.0) / state[row, 1]
        for d in range(arg.head_dim):
            target[d] = output[row, d] * factor


@njit(error_model="numpy")
def _attend(arguments: Any, half: int) -> None:
    """One thread's share of attention."""
    arg = carray(arguments, (1,))[0]
    works: Any = carray(pointer_to(arg.works, _Work), (arg.num_works,))
    rows, columns = arg.max_rows, max(arg.key_columns, TILE_COLUMNS)
    address = arg.scratch + fetch_add(arg.next_slot) * arg.scratch_stride * 4
    q = carray(pointer_to(address, np.float32), (rows, arg.head_dim))
    address += q.size * 4
    output = carray(pointer_to(address, np.float32), (rows, arg.value_columns))
    address += output.size * 4
    scores = carray(pointer_to(address, np.float32), (rows, columns))
    address += scores.size * 4
    state = carray(pointer_to(address, np.float32), (rows, 2))
    while True:
        taken = fetch_add(arg.next_work)
        if taken >= arg.num_works * arg.num_kv_heads:
            return
        work, head = works[taken // arg.num_kv_heads], taken % arg.num_kv_heads
        _attend_work(arg, work, head, half, q, output, scores, state)
        if work.num_splits > 1:
            if not _keep_split(arg, work, head, output, state):
                continue
            _merge_splits(arg, work, head, output, state)
        _write_output(arg, work, head, output, state)


@njit(error_model="numpy")
def _copy(arguments: Any, dtype: Any, size: int, gather: bool) -> None:
    """One thread's share of copying runs of tokens into pages, or out of them if ``gather``."""
    arg = carray(arguments, (1,))[0]
    runs: Any = carray(pointer_to(arg.works, _Run), (arg.num_works,))
    num_heads, head_dim = arg.num_kv_heads, arg.head_dim
    while True:
        taken = fetch_add(arg.next_work)
        if taken >= arg.num_works * num_heads:
            return
        run, head = runs[taken // num_heads], taken % num_heads
        page = run.block * num_heads + head
        key_address = arg.key_pages + page * head_dim * arg.key_columns * size
        key_page = carray(pointer_to(key_address, dtype), (head_dim, arg.key_columns))
        value_address = arg.value_pages + page * arg.block_size * arg.value_columns * size
        value_page = carray(pointer_to(value_address, dtype), (arg.block_size, arg.value_columns))
        for i in range(run.length):
            key_row = arg.keys + ((run.token + i) * arg.key_token_stride + head * arg.key_head_stride) * size
            key = carray(pointer_to(key_row, dtype), (head_dim,))
            value_row = arg.values + ((run.token + i) * arg.value_token_stride + head * arg.value_head_stride) * size
            value = carray(pointer_to(value_row, dtype), (head_dim,))
            slot = run.offset + i
            if gather:
                for d in range(head_dim):
                    key[d] = key_page[d, slot]
                    value[d] = value_page[slot, d]
            else:
                for d in range(head_dim):
                    key_page[d, slot] = key[d]
                    value_page[slot, d] = value[d]


def _compile(kernel: Callable[[Any], None]) -> Any:
    """``kernel`` as a C function; kept on disk, unless no cache directory of numba's is writable."""
    signature = types.void(types.CPointer(_Arguments))
    try:
        return cfunc(signature, cache=True)(kernel)
    except RuntimeError:  # numba found no place for its cache
        return cfunc(signature)(kernel)


@dataclass(frozen=True)
class Kernels:
    """Compiled C functions ``void kernel(ARGUMENTS *)`` for one type of stored K and V; their code lives as long as they."""

    attend: Any
    """Attention over pages."""
    store: Any
    """Put K and V of tokens into their pages."""
    gather: Any
    """Copy K and V of tokens out of their pages."""


@cache
def compiled_kernels(half: bool) -> Kernels:
    """Kernels for fp32 pages, or bf16 ones if ``half``; compiled on the first call of a process, or read from disk."""
    # numba recompiles when this file changes, and when a captured variable does, but does not look at what is imported.
    code = zlib.crc32(Path(cpu_simd.__file__).read_bytes())
    dtype, size = (np.uint16, 2) if half else (np.uint32, 4)
    is_half = int(half)

    def attend(arguments: Any) -> None:
        _attend(arguments, is_half if code >= 0 else 0)

    def store(arguments: Any) -> None:
        _copy(arguments, dtype, size, False)

    def gather(arguments: Any) -> None:
        _copy(arguments, dtype, size, True)

    return Kernels(_compile(attend), _compile(store), _compile(gather))
