"""Packed Q, K and V of one step in, attention over pages in main memory out; knows no model and no scheduler.

Compiled kernels read pages in place. Only long prefill chunks in bf16, on a CPU that multiplies bf16 in hardware, gather
their pages and go through ``scaled_dot_product_attention``, which uses those units; and so do chunks with spans that have
gaps, which the kernels do not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from filmstrip.models.batch import Batch
from filmstrip.models.cpu_attention_kernels import ARGUMENTS, RUN, WORK, compiled_kernels, scratch_row
from filmstrip.models.cpu_features import cpu_has_bfloat16_units
from filmstrip.models.cpu_simd import VECTOR
from filmstrip.models.cpu_threads import run_on_threads
from filmstrip.models.dense_attention import Bounds, attend_dense
from filmstrip.models.paged_attention import AttentionShape, Span, VisibleTokens

DEFAULT_BLOCK_SIZE = 32
"""Two vectors of scores, what the kernels hold in registers at once."""

MAX_ROWS_PER_WORK = 64
"""Query rows times grouped heads of one work item: its scratch stays in a core's second-level cache."""

MIN_TOKENS_PER_SPLIT = 256
WORKS_PER_THREAD = 4
"""Long contexts are split until there are so many work items for each thread, but never below so many tokens."""

MIN_GATHER_ROWS = 128
"""Rows of a chunk from which bf16 attention on bf16 units is faster than reading pages in place, the copy included
(``benchmarks/attention.py`` measures it)."""


class CpuPagedAttention:
    """K pages (num_blocks, num_kv_heads, head_dim, block_size) and V pages (num_blocks, num_kv_heads, block_size, head_dim).

    The last dimension is padded to whole vectors. Pages are float32 or bfloat16; sums are fp32 either way.
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, block_size: int | None = None) -> None:
        """Compile the kernels, or read them from disk."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"K and V on CPU are stored as float32 or bfloat16, not {dtype}")
        self.shape = shape
        self.dtype = dtype
        self.block_size = block_size or DEFAULT_BLOCK_SIZE
        self.key_columns = _whole_vectors(self.block_size)
        self.value_columns = _whole_vectors(shape.head_dim)
        page_size = shape.head_dim * self.key_columns + self.block_size * self.value_columns
        layer_bytes = shape.num_kv_heads * page_size * dtype.itemsize
        self.kv_bytes_per_token = -(-shape.num_layers * layer_bytes // self.block_size)
        self.kernels = compiled_kernels(dtype == torch.bfloat16)
        self.gathers_long_chunks = dtype == torch.bfloat16 and cpu_has_bfloat16_units()
        self.pages: list[tuple[torch.Tensor, torch.Tensor]] = []

    def allocate(self, num_blocks: int) -> None:
        """Make ``num_blocks`` zeroed pages for every layer; pages made before are dropped first."""
        heads, head_dim = self.shape.num_kv_heads, self.shape.head_dim
        self.pages = []
        for _ in range(self.shape.num_layers):
            key_pages = torch.zeros(num_blocks, heads, head_dim, self.key_columns, dtype=self.dtype)
            value_pages = torch.zeros(num_blocks, heads, self.block_size, self.value_columns, dtype=self.dtype)
            self.pages.append((key_pages, value_pages))

    def begin(self, batch: Batch, spans: Sequence[Span] = ()) -> CpuAttentionStep:
        """Prepare the forward pass of ``batch``, whose rows in ``spans`` see each other both ways."""
        return CpuAttentionStep(self, batch, VisibleTokens(batch, spans))


@dataclass(frozen=True)
class _GatheredChunk:
    """Rows of a request that are attended after gathering its pages."""

    rows: slice
    length: int
    runs: np.ndarray


@dataclass(frozen=True)
class _Plan:
    """What layers that see equally far back share: work for the kernels, and memory for results of splits."""

    works: np.ndarray
    row_starts: np.ndarray
    partials: np.ndarray
    pending: np.ndarray


class CpuAttentionStep:
    """One forward pass on CPU: work lists and scratch memory are made once, then used by every layer."""

    def __init__(self, attention: CpuPagedAttention, batch: Batch, visible: VisibleTokens) -> None:
        self._attention = attention
        self._batch, self._visible = batch, visible
        shape = attention.shape
        group, num_threads = shape.num_query_heads_per_kv_head, torch.get_num_threads()
        self._block_tables = np.ascontiguousarray(batch.block_tables.numpy(), dtype=np.int32)
        self._store_runs = plan_runs(batch.slot_mapping.numpy(), attention.block_size)
        first_rows = np.cumsum([0, *batch.query_lens])[:-1].tolist()
        self._is_gathered = [
            self._is_long(num_rows) or visible.has_gaps(row)
            for num_rows, row in zip(batch.query_lens, first_rows, strict=True)
        ]
        self._gathered_chunks = self._plan_gathered_chunks(batch)
        longest = max((chunk.length for chunk in self._gathered_chunks), default=0)
        self._gathered = torch.empty(2, shape.num_kv_heads * longest * shape.head_dim, dtype=attention.dtype)
        max_rows = min(max(self._paged_lens(), default=0) or 1, max(1, MAX_ROWS_PER_WORK // group)) * group
        row_size = scratch_row(shape.head_dim, attention.key_columns, attention.value_columns)
        self._partial_size = max_rows * (attention.value_columns + VECTOR)
        self._scratch = np.empty((num_threads, max_rows * row_size), dtype=np.float32)
        self._plans: dict[tuple[int | None, int | None], _Plan] = {}
        self._counters = np.zeros(2, dtype=np.int64)
        self._arguments = np.zeros(1, dtype=ARGUMENTS)
        self._set(
            next_work=self._counters.ctypes.data,
            next_slot=self._counters.ctypes.data + self._counters.itemsize,
            block_tables=self._block_tables.ctypes.data,
            table_stride=self._block_tables.shape[1],
            scratch=self._scratch.ctypes.data,
            scratch_stride=self._scratch.shape[1],
            max_rows=max_rows,
            row_ends=visible.ends.ctypes.data,
            partial_stride=self._partial_size,
            num_kv_heads=shape.num_kv_heads,
            group=group,
            head_dim=shape.head_dim,
            block_size=attention.block_size,
            key_columns=attention.key_columns,
            value_columns=attention.value_columns,
        )

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None = None,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """See :class:`filmstrip.models.paged_attention.AttentionStep`."""
        kernels, (key_pages, value_pages) = self._attention.kernels, self._attention.pages[layer_index]
        self._set(key_pages=key_pages.data_ptr(), value_pages=value_pages.data_ptr())
        key, value = (_contiguous_rows(tensor.to(self._attention.dtype)) for tensor in (key, value))
        self._set_tokens(key, value)
        self._run(kernels.store, self._store_runs)
        output = torch.empty(query.shape, dtype=torch.float32)
        plan = self._plan(window, chunk_size)
        if len(plan.works):
            scaled = (query.to(torch.float32) * (scaling * math.log2(math.e))).contiguous()
            self._set(
                query=scaled.data_ptr(),
                output=output.data_ptr(),
                row_starts=plan.row_starts.ctypes.data,
                partials=plan.partials.ctypes.data,
                pending=plan.pending.ctypes.data,
            )
            self._run(kernels.attend, plan.works)
        for chunk in self._gathered_chunks:
            output[chunk.rows] = self._attend_gathered(
                chunk, query[chunk.rows], scaling, self._visible.bounds(chunk.rows, window, chunk_size)
            )
        return output.to(query.dtype)

    def _plan(self, window: int | None, chunk_size: int | None) -> _Plan:
        """Work of layers that see ``window`` tokens back, or their chunk's, made when the first of them asks."""
        key = (window, chunk_size)
        if key not in self._plans:
            attention, batch, num_heads = self._attention, self._batch, self._attention.shape.num_kv_heads
            row_starts = self._visible.starts(window, chunk_size)
            works, num_partials = plan_works(
                self._paged_lens(),
                np.concatenate([[0], np.cumsum(batch.query_lens)])[:-1].tolist(),
                row_starts,
                self._visible.ends,
                num_kv_heads=num_heads,
                max_rows=max(1, MAX_ROWS_PER_WORK // attention.shape.num_query_heads_per_kv_head),
                block_size=attention.block_size,
                num_threads=torch.get_num_threads(),
            )
            self._plans[key] = _Plan(
                works,
                row_starts,
                np.empty((num_partials * num_heads, self._partial_size), dtype=np.float32),
                np.zeros(num_partials * num_heads, dtype=np.int64),
            )
        return self._plans[key]

    def _attend_gathered(
        self, chunk: _GatheredChunk, query: torch.Tensor, scaling: float, visible: Bounds | None
    ) -> torch.Tensor:
        """Attention of one chunk over a contiguous copy of its request's pages."""
        shape = self._attention.shape
        size = shape.num_kv_heads * chunk.length * shape.head_dim
        keys, values = (part[:size].view(shape.num_kv_heads, chunk.length, -1) for part in self._gathered)
        self._set_tokens(keys.transpose(0, 1), values.transpose(0, 1))
        self._run(self._attention.kernels.gather, chunk.runs)
        return attend_dense(query.to(keys.dtype), keys, values, scaling, visible)

    def _paged_lens(self) -> list[int]:
        """Rows of each request that the kernels attend."""
        pairs = zip(self._batch.query_lens, self._is_gathered, strict=True)
        return [0 if is_gathered else num_rows for num_rows, is_gathered in pairs]

    def _plan_gathered_chunks(self, batch: Batch) -> list[_GatheredChunk]:
        chunks, row = [], 0
        lens = zip(self._block_tables, batch.query_lens, batch.context_lens_list, self._is_gathered, strict=True)
        for blocks, num_rows, length, is_gathered in lens:
            if is_gathered:
                runs = plan_block_runs(blocks, length, self._attention.block_size)
                chunks.append(_GatheredChunk(slice(row, row + num_rows), length, runs))
            row += num_rows
        return chunks

    def _is_long(self, num_rows: int) -> bool:
        return self._attention.gathers_long_chunks and num_rows >= MIN_GATHER_ROWS

    def _set_tokens(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Tell the kernels where K and V of single tokens lie, (N, num_kv_heads, head_dim) of any strides but the last."""
        self._set(
            keys=key.data_ptr(),
            key_token_stride=key.stride(0),
            key_head_stride=key.stride(1),
            values=value.data_ptr(),
            value_token_stride=value.stride(0),
            value_head_stride=value.stride(1),
        )

    def _set(self, **values: int) -> None:
        """Fill in arguments of the kernels by name."""
        for name, value in values.items():
            self._arguments[name] = value

    def _run(self, kernel, works: np.ndarray) -> None:
        """Run a kernel over a list of work on all threads."""
        self._set(works=works.ctypes.data, num_works=len(works))
        self._counters[:] = 0
        run_on_threads(kernel.address, self._arguments.ctypes.data)


def plan_works(
    query_lens: Sequence[int],
    first_rows: Sequence[int],
    row_starts: np.ndarray,
    row_ends: np.ndarray,
    *,
    num_kv_heads: int,
    max_rows: int,
    block_size: int,
    num_threads: int,
) -> tuple[np.ndarray, int]:
    """Attention work for the kernels, records :data:`WORK`, most expensive first, and the number of partial results.

    Requests are cut into tiles of ``max_rows`` rows (one with 0 rows has no work); a tile over a long context is split
    until all threads have enough to do. A row of the batch sees tokens ``row_starts`` to ``row_ends`` of its request.
    """
    tiles = []
    for sequence, (num_rows, first_row) in enumerate(zip(query_lens, first_rows, strict=True)):
        for row in range(first_row, first_row + num_rows, max_rows):
            rows = min(max_rows, first_row + num_rows - row)
            first = int(row_starts[row : row + rows].min()) // block_size * block_size
            tiles.append((sequence, row, rows, first, int(row_ends[row : row + rows].max())))
    num_tokens = sum(end - first for *_, first, end in tiles) * num_kv_heads
    split_length = (
        num_tokens + 1
        if num_threads == 1
        else max(MIN_TOKENS_PER_SPLIT, num_tokens // (num_threads * WORKS_PER_THREAD))
    )
    works, num_partials = [], 0
    for sequence, first_row, rows, first, last in tiles:
        length = last - first
        step = -(-length // -(-length // split_length))
        step = -(-step // block_size) * block_size
        starts = range(first, last, step)
        for split, start in enumerate(starts):
            end = min(last, start + step)
            works.append((sequence, first_row, rows, start, end, len(starts), split, num_partials))
        num_partials += len(starts) if len(starts) > 1 else 0
    records = np.array(works, dtype=WORK)
    cost = (records["end"] - records["start"]) * records["num_rows"]
    return records[np.argsort(-cost, kind="stable")], num_partials


def plan_runs(slots: np.ndarray, block_size: int) -> np.ndarray:
    """Records :data:`RUN` for tokens that go to ``slots`` (block * block_size + offset)."""
    starts = np.flatnonzero(np.diff(slots, prepend=slots[:1] - 2) != 1)
    starts = np.union1d(starts, np.flatnonzero(slots % block_size == 0))
    runs = np.empty(len(starts), dtype=RUN)
    runs["token"] = starts
    runs["length"] = np.diff(starts, append=len(slots))
    runs["block"], runs["offset"] = np.divmod(slots[starts], block_size)
    return runs


def plan_block_runs(blocks: np.ndarray, length: int, block_size: int) -> np.ndarray:
    """Records :data:`RUN` for the first ``length`` tokens of a request that owns ``blocks``."""
    starts = np.arange(0, length, block_size)
    runs = np.zeros(len(starts), dtype=RUN)
    runs["token"] = starts
    runs["length"] = np.minimum(block_size, length - starts)
    runs["block"] = blocks[: len(starts)]
    return runs


def _whole_vectors(columns: int) -> int:
    return -(-columns // VECTOR) * VECTOR


def _contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
