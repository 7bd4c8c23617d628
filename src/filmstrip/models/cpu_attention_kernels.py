"""Addresses of Q, pages and a work list in, attention out: the compiled inner loops of attention on CPU; knows no tensors.

Compiled by numba from what is written here, once for each type of stored K and V, and cached on disk. One function runs on
every thread of a pool and takes work items from a shared counter until none is left.

A K page is stored transposed, (head_dim, block_size), a V page as (block_size, head_dim): then both products of attention,
scores = Q K^T and output = P V, are the same small matrix product, rows of fp32 times a page of contiguous rows, with no sum
across a vector. Rows of a page are padded to whole vectors.

Softmax is computed online (Milakov and Gimelshein, 2018) in powers of two: Q arrives multiplied by log2(e).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

VECTOR = 16
"""fp32 lanes of a vector; narrower hardware runs it as several."""

ARGUMENTS = (
    "next_item",  # address of the counter of work items taken
    "next_slot",  # address of the counter of scratch slots taken
    "num_items",
    "items",
    "query",  # fp32 (N, num_kv_heads * group, head_dim), multiplied by scaling * log2(e)
    "output",  # fp32, same shape
    "key_pages",
    "value_pages",
    "block_tables",  # int32
    "table_stride",
    "scratch",
    "scratch_stride",
    "partials",
    "partial_stride",
    "pending",  # int64, one for each partial and head: how many splits are done; all 0 before and after
    "num_kv_heads",
    "group",
    "head_dim",
    "block_size",
    "key_columns",  # block_size in whole vectors: row stride of a K page
    "value_columns",  # head_dim in whole vectors: row stride of a V page
    "keys",  # of the tokens to be stored, in the dtype of the pages
    "key_token_stride",
    "key_head_stride",
    "values",
    "value_token_stride",
    "value_head_stride",
)
"""Names of the int64 numbers that a kernel is called with, in order: addresses, sizes, strides in elements."""

(
    _NEXT_ITEM,
    _NEXT_SLOT,
    _NUM_ITEMS,
    _ITEMS,
    _QUERY,
    _OUTPUT,
    _KEY_PAGES,
    _VALUE_PAGES,
    _BLOCK_TABLES,
    _TABLE_STRIDE,
    _SCRATCH,
    _SCRATCH_STRIDE,
    _PARTIALS,
    _PARTIAL_STRIDE,
    _PENDING,
    _NUM_KV_HEADS,
    _GROUP,
    _HEAD_DIM,
    _BLOCK_SIZE,
    _KEY_COLUMNS,
    _VALUE_COLUMNS,
    _KEYS,
    _KEY_TOKEN_STRIDE,
    _KEY_HEAD_STRIDE,
    _VALUES,
    _VALUE_TOKEN_STRIDE,
    _VALUE_HEAD_STRIDE,
) = range(len(ARGUMENTS))

WORK_FIELDS = ("sequence", "first_row", "num_rows", "first_position", "start", "end", "num_splits", "split", "partial")
"""A work item of attention: a request, rows of the packed batch, the position of the first, the tokens to see (``start`` at
a page's beginning), how many splits its tokens have, which this is, and where the partial results of the first lie."""

(_SEQUENCE, _FIRST_ROW, _NUM_ROWS, _FIRST_POSITION, _START, _END, _NUM_SPLITS, _SPLIT, _PARTIAL) = range(
    len(WORK_FIELDS)
)

RUN_FIELDS = ("token", "length", "block", "offset")
"""A run of tokens to be stored: consecutive rows of the batch for consecutive slots of one block."""

(_TOKEN, _LENGTH, _BLOCK, _OFFSET) = range(len(RUN_FIELDS))

_FLAGS = {"contract", "reassoc", "nsz", "arcp"}
_LOWEST = np.float32(-1e30)
_ROUND = np.float32(12582912.0)
_MIN_EXPONENT = np.float32(-126.0)
_EXP2 = tuple(
    np.float32(value)
    for value in (
        1.0,
        0.6931471824645996,
        0.24022646248340607,
        0.05550329014658928,
        0.009618519805371761,
        0.0013399859890341759,
        0.00015337577497120947,
    )
)
"""Polynomial for 2^x on [-0.5, 0.5]: weighted least squares at Chebyshev nodes, relative error 1e-7."""


@intrinsic
def _fetch_add(typingctx: Any, address: Any) -> Any:
    """Atomically add 1 to the int64 at ``address``; its value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """``address`` as a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The fp32 number whose representation is ``bits``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _bits_of_float(typingctx: Any, value: Any) -> Any:
    """The representation of an fp32 number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic(prefer_literal=True)
def _product(
    typingctx: Any, rows: Any, vectors: Any, half: Any, c: Any, ldc: Any, a: Any, lda: Any, b: Any, ldb: Any, depth: Any
) -> Any:
    """C[:rows, :vectors * VECTOR] += A[:rows, :depth] B[:depth, :vectors * VECTOR], all held in registers.

    ``rows``, ``vectors`` and ``half`` are literals; ``a``, ``b`` and ``c`` are addresses, A and C fp32, B bf16 if ``half`` is
    1 and else fp32; ``lda``, ``ldb`` and ``ldc`` are row strides in elements.
    """
    num_rows, num_vectors, is_half = rows.literal_value, vectors.literal_value, half.literal_value
    # A multiply-add takes about four cycles and two start in each: eight independent sums keep the units busy.
    unroll = max(1, 8 // (num_rows * num_vectors))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        int64, float32 = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(float32, VECTOR)
        _, _, _, c, ldc, a, lda, b, ldb, depth = args
        muladd = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{VECTOR}f32"
        )

        def constant(value: int) -> Any:
            return ir.Constant(int64, value)

        def element(base: Any, row: Any, stride: Any, column: Any, size: int) -> Any:
            offset = builder.mul(builder.add(builder.mul(row, stride), column), constant(size))
            return builder.add(base, offset)

        def load_b(k: Any, index: int) -> Any:
            address = element(b, k, ldb, constant(index * VECTOR), 2 if is_half else 4)
            if not is_half:
                return builder.load(builder.inttoptr(address, vector.as_pointer()), align=4)
            raw = builder.load(builder.inttoptr(address, ir.VectorType(ir.IntType(16), VECTOR).as_pointer()), align=2)
            wide_type = ir.VectorType(ir.IntType(32), VECTOR)
            wide = builder.shl(builder.zext(raw, wide_type), ir.Constant(wide_type, [16] * VECTOR))
            return builder.bitcast(wide, vector)

        def splat_a(row: int, k: Any) -> Any:
            address = element(a, constant(row), lda, k, 4)
            value = builder.load(builder.inttoptr(address, float32.as_pointer()), align=4)
            single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(
                single,
                ir.Constant(vector, ir.Undefined),
                ir.Constant(ir.VectorType(ir.IntType(32), VECTOR), [0] * VECTOR),
            )

        zero = ir.Constant(vector, [0.0] * VECTOR)
        sums = {}
        for part in range(unroll):
            for row in range(num_rows):
                for index in range(num_vectors):
                    sums[part, row, index] = cgutils.alloca_once_value(builder, zero)

        def step(k: Any, part: int) -> None:
            columns = [load_b(k, index) for index in range(num_vectors)]
            for row in range(num_rows):
                factor = splat_a(row, k)
                for index in range(num_vectors):
                    slot = sums[part, row, index]
                    builder.store(builder.call(muladd, [factor, columns[index], builder.load(slot)]), slot)

        whole = builder.sub(depth, builder.srem(depth, constant(unroll)))
        with cgutils.for_range_slice(builder, constant(0), whole, constant(unroll), int64) as (k, _):
            for part in range(unroll):
                step(builder.add(k, constant(part)), part)
        if unroll > 1:
            with cgutils.for_range_slice(builder, whole, depth, constant(1), int64) as (k, _):
                step(k, 0)
        for row in range(num_rows):
            for index in range(num_vectors):
                total = builder.load(sums[0, row, index])
                for part in range(1, unroll):
                    total = builder.fadd(total, builder.load(sums[part, row, index]))
                address = element(c, constant(row), ldc, constant(index * VECTOR), 4)
                pointer = builder.inttoptr(address, vector.as_pointer())
                builder.store(builder.fadd(total, builder.load(pointer, align=4)), pointer, align=4)
        return context.get_dummy_value()

    return types.void(rows, vectors, half, *([types.int64] * 7)), codegen


@njit(error_model="numpy", fastmath=_FLAGS)
def _matmul(rows: int, width: int, half: int, c: int, ldc: int, a: int, lda: int, b: int, ldb: int, depth: int) -> None:
    """C[:rows, :width] += A[:rows, :depth] B[:depth, :width]; ``width`` is a multiple of VECTOR (see :func:`_product`)."""
    size = 2 if half else 4
    column = 0
    while column < width:
        pair = column + 2 * VECTOR <= width
        row = 0
        bb = b + column * size
        while row < rows:
            left = rows - row
            cc = c + (row * ldc + column) * 4
            aa = a + row * lda * 4
            if pair:
                if half:
                    if left >= 8:
                        _product(8, 2, 1, cc, ldc, aa, lda, bb, ldb, depth)
                    elif left >= 4:
                        _product(4, 2, 1, cc, ldc, aa, lda, bb, ldb, depth)
                    elif left >= 2:
                        _product(2, 2, 1, cc, ldc, aa, lda, bb, ldb, depth)
                    else:
                        _product(1, 2, 1, cc, ldc, aa, lda, bb, ldb, depth)
                elif left >= 8:
                    _product(8, 2, 0, cc, ldc, aa, lda, bb, ldb, depth)
                elif left >= 4:
                    _product(4, 2, 0, cc, ldc, aa, lda, bb, ldb, depth)
                elif left >= 2:
                    _product(2, 2, 0, cc, ldc, aa, lda, bb, ldb, depth)
                else:
                    _product(1, 2, 0, cc, ldc, aa, lda, bb, ldb, depth)
            elif half:
                if left >= 8:
                    _product(8, 1, 1, cc, ldc, aa, lda, bb, ldb, depth)
                elif left >= 4:
                    _product(4, 1, 1, cc, ldc, aa, lda, bb, ldb, depth)
                else:
                    _product(1, 1, 1, cc, ldc, aa, lda, bb, ldb, depth)
            elif left >= 8:
                _product(8, 1, 0, cc, ldc, aa, lda, bb, ldb, depth)
            elif left >= 4:
                _product(4, 1, 0, cc, ldc, aa, lda, bb, ldb, depth)
            else:
                _product(1, 1, 0, cc, ldc, aa, lda, bb, ldb, depth)
            if left >= 8:
                row += 8
            elif left >= 4:
                row += 4
            elif left >= 2 and pair:
                row += 2
            else:
                row += 1
        column += 2 * VECTOR if pair else VECTOR


@njit(error_model="numpy", fastmath=_FLAGS)
def _exp2(x: float) -> float:
    """2^x for x <= 0 in fp32; 0 below the smallest normal number. No branch and no call, so that loops over it vectorise."""
    bounded = max(x, _MIN_EXPONENT)
    whole = np.floor(bounded + np.float32(0.5))
    f = bounded - whole
    value = _EXP2[6]
    value = value * f + _EXP2[5]
    value = value * f + _EXP2[4]
    value = value * f + _EXP2[3]
    value = value * f + _EXP2[2]
    value = value * f + _EXP2[1]
    value = value * f + _EXP2[0]
    scale = _float_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))
    return value * scale if x > _MIN_EXPONENT else np.float32(0.0)


@njit(error_model="numpy", fastmath=_FLAGS)
def _softmax_row(scores: Any, limit: int, output: Any, state: Any) -> None:
    """One row of online softmax: scores[:limit] become weights, the rest 0; ``output`` and ``state`` (maximum, sum) follow."""
    width = len(scores)
    largest = state[0]
    for t in range(limit):
        largest = max(largest, scores[t])
    if largest > state[0]:
        shrink = _exp2(state[0] - largest)
        state[0] = largest
        state[1] *= shrink
        for d in range(len(output)):
            output[d] *= shrink
    for t in range(width):
        scores[t] = _exp2(min(scores[t] - largest, np.float32(0.0)))
    for t in range(limit, width):
        scores[t] = np.float32(0.0)
    total = np.float32(0.0)
    for t in range(width):
        total += scores[t]
    state[1] += total


@njit(error_model="numpy", fastmath=_FLAGS)
def _attend_item(arg: Any, item: Any, head: int, half: int, q: Any, output: Any, scores: Any, state: Any) -> None:
    """Attention of one work item and head over its tokens, left unnormalised in ``output`` and ``state``."""
    group, head_dim, block_size = arg[_GROUP], arg[_HEAD_DIM], arg[_BLOCK_SIZE]
    num_heads, key_columns, value_columns = arg[_NUM_KV_HEADS], arg[_KEY_COLUMNS], arg[_VALUE_COLUMNS]
    size = 2 if half else 4
    rows = item[_NUM_ROWS] * group
    table = carray(_pointer(arg[_BLOCK_TABLES]), (item[_SEQUENCE] + 1, arg[_TABLE_STRIDE]), dtype=np.int32)[
        item[_SEQUENCE]
    ]
    query = carray(
        _pointer(arg[_QUERY]), (item[_FIRST_ROW] + item[_NUM_ROWS], num_heads, group, head_dim), dtype=np.float32
    )
    for row in range(rows):
        q[row] = query[item[_FIRST_ROW] + row // group, head, row % group]
        output[row] = np.float32(0.0)
        state[row, 0] = _LOWEST
        state[row, 1] = np.float32(0.0)
    for base in range(item[_START], item[_END], block_size):
        valid = min(block_size, item[_END] - base)
        page = np.int64(table[base // block_size]) * num_heads + head
        scores[:rows] = np.float32(0.0)
        key_page = arg[_KEY_PAGES] + page * head_dim * key_columns * size
        _matmul(
            rows,
            key_columns,
            half,
            scores.ctypes.data,
            key_columns,
            q.ctypes.data,
            head_dim,
            key_page,
            key_columns,
            head_dim,
        )
        for row in range(rows):
            visible = item[_FIRST_POSITION] + row // group + 1 - base
            _softmax_row(scores[row], max(0, min(valid, visible)), output[row], state[row])
        value_page = arg[_VALUE_PAGES] + page * block_size * value_columns * size
        _matmul(
            rows,
            value_columns,
            half,
            output.ctypes.data,
            value_columns,
            scores.ctypes.data,
            key_columns,
            value_page,
            value_columns,
            valid,
        )


@njit(error_model="numpy", fastmath=_FLAGS)
def _write_output(arg: Any, item: Any, head: int, output: Any, state: Any) -> None:
    """Normalise and store the rows of a finished work item."""
    group, head_dim = arg[_GROUP], arg[_HEAD_DIM]
    result = carray(
        _pointer(arg[_OUTPUT]),
        (item[_FIRST_ROW] + item[_NUM_ROWS], arg[_NUM_KV_HEADS], group, head_dim),
        dtype=np.float32,
    )
    for row in range(item[_NUM_ROWS] * group):
        target = result[item[_FIRST_ROW] + row // group, head, row % group]
        factor = np.float32(1.0) / state[row, 1]
        for d in range(head_dim):
            target[d] = output[row, d] * factor


@njit(error_model="numpy", fastmath=_FLAGS)
def _partial(arg: Any, item: Any, head: int, split: int) -> Any:
    """Where the unnormalised output and the state of a split are kept, (rows, value_columns + VECTOR)."""
    index = (item[_PARTIAL] + split) * arg[_NUM_KV_HEADS] + head
    address = arg[_PARTIALS] + index * arg[_PARTIAL_STRIDE] * 4
    return carray(_pointer(address), (item[_NUM_ROWS] * arg[_GROUP], arg[_VALUE_COLUMNS] + VECTOR), dtype=np.float32)


@njit(error_model="numpy", fastmath=_FLAGS)
def _merge_splits(arg: Any, item: Any, head: int, output: Any, state: Any) -> None:
    """Combine the partial results of all splits: sums weighted by 2^(own maximum - common maximum)."""
    width = arg[_VALUE_COLUMNS]
    for row in range(item[_NUM_ROWS] * arg[_GROUP]):
        largest = _LOWEST
        for split in range(item[_NUM_SPLITS]):
            largest = max(largest, _partial(arg, item, head, split)[row, width])
        output[row] = np.float32(0.0)
        total = np.float32(0.0)
        for split in range(item[_NUM_SPLITS]):
            part = _partial(arg, item, head, split)[row]
            weight = _exp2(part[width] - largest)
            total += weight * part[width + 1]
            for d in range(width):
                output[row, d] += weight * part[d]
        state[row, 1] = total


@njit(error_model="numpy", fastmath=_FLAGS)
def _attend(arguments: Any, half: int) -> None:
    """One thread's share of attention: take items until none is left."""
    arg = carray(arguments, (len(ARGUMENTS),), dtype=np.int64)
    num_heads, group, head_dim = arg[_NUM_KV_HEADS], arg[_GROUP], arg[_HEAD_DIM]
    key_columns, value_columns = arg[_KEY_COLUMNS], arg[_VALUE_COLUMNS]
    stride = arg[_SCRATCH_STRIDE]
    max_rows = stride // (head_dim + value_columns + key_columns + 2)
    scratch = arg[_SCRATCH] + _fetch_add(arg[_NEXT_SLOT]) * stride * 4
    q = carray(_pointer(scratch), (max_rows, head_dim), dtype=np.float32)
    scratch += max_rows * head_dim * 4
    output = carray(_pointer(scratch), (max_rows, value_columns), dtype=np.float32)
    scratch += max_rows * value_columns * 4
    scores = carray(_pointer(scratch), (max_rows, key_columns), dtype=np.float32)
    scratch += max_rows * key_columns * 4
    state = carray(_pointer(scratch), (max_rows, 2), dtype=np.float32)
    items = carray(_pointer(arg[_ITEMS]), (arg[_NUM_ITEMS], len(WORK_FIELDS)), dtype=np.int64)
    while True:
        taken = _fetch_add(arg[_NEXT_ITEM])
        if taken >= arg[_NUM_ITEMS] * num_heads:
            return
        item, head = items[taken // num_heads], taken % num_heads
        _attend_item(arg, item, head, half, q, output, scores, state)
        if item[_NUM_SPLITS] > 1:
            part = _partial(arg, item, head, item[_SPLIT])
            for row in range(item[_NUM_ROWS] * group):
                part[row, :value_columns] = output[row]
                part[row, value_columns] = state[row, 0]
                part[row, value_columns + 1] = state[row, 1]
            pending = arg[_PENDING] + (item[_PARTIAL] * num_heads + head) * 8
            if _fetch_add(pending) < item[_NUM_SPLITS] - 1:
                continue
            carray(_pointer(pending), (1,), dtype=np.int64)[0] = 0
            _merge_splits(arg, item, head, output, state)
        _write_output(arg, item, head, output, state)


@njit(error_model="numpy")
def _store(arguments: Any, dtype: Any) -> None:
    """One thread's share of storing new K and V: take (run, head) pairs until none is left."""
    arg = carray(arguments, (len(ARGUMENTS),), dtype=np.int64)
    num_heads, head_dim, block_size = arg[_NUM_KV_HEADS], arg[_HEAD_DIM], arg[_BLOCK_SIZE]
    key_columns, value_columns = arg[_KEY_COLUMNS], arg[_VALUE_COLUMNS]
    runs = carray(_pointer(arg[_ITEMS]), (arg[_NUM_ITEMS], len(RUN_FIELDS)), dtype=np.int64)
    while True:
        taken = _fetch_add(arg[_NEXT_ITEM])
        if taken >= arg[_NUM_ITEMS] * num_heads:
            return
        run, head = runs[taken // num_heads], taken % num_heads
        page, offset, length = run[_BLOCK] * num_heads + head, run[_OFFSET], run[_LENGTH]
        key_page = carray(_pointer(arg[_KEY_PAGES]), (page + 1, head_dim, key_columns), dtype=dtype)[page]
        value_page = carray(_pointer(arg[_VALUE_PAGES]), (page + 1, block_size, value_columns), dtype=dtype)[page]
        last = run[_TOKEN] + length - 1
        first_key = run[_TOKEN] * arg[_KEY_TOKEN_STRIDE] + head * arg[_KEY_HEAD_STRIDE]
        keys = carray(
            _pointer(arg[_KEYS]),
            (last * arg[_KEY_TOKEN_STRIDE] + head * arg[_KEY_HEAD_STRIDE] + head_dim,),
            dtype=dtype,
        )
        for d in range(head_dim):
            for i in range(length):
                key_page[d, offset + i] = keys[first_key + i * arg[_KEY_TOKEN_STRIDE] + d]
        first_value = run[_TOKEN] * arg[_VALUE_TOKEN_STRIDE] + head * arg[_VALUE_HEAD_STRIDE]
        values = carray(
            _pointer(arg[_VALUES]),
            (last * arg[_VALUE_TOKEN_STRIDE] + head * arg[_VALUE_HEAD_STRIDE] + head_dim,),
            dtype=dtype,
        )
        for i in range(length):
            for d in range(head_dim):
                value_page[offset + i, d] = values[first_value + i * arg[_VALUE_TOKEN_STRIDE] + d]


_SIGNATURE = types.void(types.voidptr)


@cfunc(_SIGNATURE, cache=True)
def attend_fp32(arguments: Any) -> None:
    """Attention over fp32 pages."""
    _attend(arguments, 0)


@cfunc(_SIGNATURE, cache=True)
def attend_bf16(arguments: Any) -> None:
    """Attention over bf16 pages; sums are fp32."""
    _attend(arguments, 1)


@cfunc(_SIGNATURE, cache=True)
def store_fp32(arguments: Any) -> None:
    """Store fp32 K and V."""
    _store(arguments, np.uint32)


@cfunc(_SIGNATURE, cache=True)
def store_bf16(arguments: Any) -> None:
    """Store bf16 K and V (any two-byte numbers)."""
    _store(arguments, np.uint16)
