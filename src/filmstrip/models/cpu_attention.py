"""Packed Q, K and V of one step in, attention over pages in main memory out; knows no model and no scheduler.

Requests with few rows (decode steps, short follow-ups) are read in place by compiled kernels; long prefill chunks gather
their pages once per layer and go through ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from filmstrip.models import cpu_attention_kernels as kernels
from filmstrip.models.batch import Batch
from filmstrip.models.cpu_threads import run_on_threads
from filmstrip.models.paged_attention import AttentionShape

DEFAULT_BLOCK_SIZE = 32
"""Two vectors of scores: what the kernels hold in registers at once."""

MAX_ROWS_PER_ITEM = 64
"""Query rows times grouped heads that one work item takes: its scratch stays in a core's cache."""

MIN_TOKENS_PER_SPLIT = 256
ITEMS_PER_THREAD = 4
"""Long contexts are split until there are so many items for each thread, but never below so many tokens."""


class CpuPagedAttention:
    """K pages (num_blocks, num_kv_heads, head_dim, block_size) and V pages (num_blocks, num_kv_heads, block_size, head_dim).

    The last dimension is padded to whole vectors. Pages are float32 or bfloat16; sums are always fp32.
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, block_size: int | None = None) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"K and V on CPU are stored as float32 or bfloat16, not {dtype}")
        self.shape = shape
        self.dtype = dtype
        self.block_size = block_size or DEFAULT_BLOCK_SIZE
        self.key_columns = _whole_vectors(self.block_size)
        self.value_columns = _whole_vectors(shape.head_dim)
        self.pages: list[tuple[torch.Tensor, torch.Tensor]] = []
        is_half = dtype == torch.bfloat16
        self.attend_kernel = (kernels.attend_bf16 if is_half else kernels.attend_fp32).address
        self.store_kernel = (kernels.store_bf16 if is_half else kernels.store_fp32).address

    def allocate(self, num_blocks: int) -> None:
        """Make ``num_blocks`` zeroed pages for every layer; pages made before are dropped first."""
        heads, head_dim = self.shape.num_kv_heads, self.shape.head_dim
        self.pages = []
        for _ in range(self.shape.num_layers):
            key_pages = torch.zeros(num_blocks, heads, head_dim, self.key_columns, dtype=self.dtype)
            value_pages = torch.zeros(num_blocks, heads, self.block_size, self.value_columns, dtype=self.dtype)
            self.pages.append((key_pages, value_pages))

    def begin(self, batch: Batch) -> CpuAttentionStep:
        """Prepare the forward pass of ``batch``."""
        return CpuAttentionStep(self, batch)


class CpuAttentionStep:
    """One forward pass on CPU: work lists and scratch memory are made once, then used by every layer."""

    def __init__(self, attention: CpuPagedAttention, batch: Batch) -> None:
        self._attention = attention
        shape, num_threads = attention.shape, torch.get_num_threads()
        group = shape.num_query_heads_per_kv_head
        self._block_tables = np.ascontiguousarray(batch.block_tables.numpy(), dtype=np.int32)
        self._runs = plan_runs(batch.slot_mapping.numpy(), attention.block_size)
        work = plan_work(
            batch.query_lens,
            batch.context_lens_list,
            num_kv_heads=shape.num_kv_heads,
            max_rows=max(1, MAX_ROWS_PER_ITEM // group),
            block_size=attention.block_size,
            num_threads=num_threads,
        )
        self._items = work.items
        max_rows = int(work.items[:, kernels.WORK_FIELDS.index("num_rows")].max()) * group
        row_size = shape.head_dim + attention.value_columns + attention.key_columns + 2
        self._scratch = np.empty((num_threads, max_rows * row_size), dtype=np.float32)
        partial_size = max_rows * (attention.value_columns + kernels.VECTOR)
        self._partials = np.empty((work.num_partials * shape.num_kv_heads, partial_size), dtype=np.float32)
        self._pending = np.zeros(work.num_partials * shape.num_kv_heads, dtype=np.int64)
        self._counters = np.zeros(2, dtype=np.int64)
        self._arguments = np.zeros(len(kernels.ARGUMENTS), dtype=np.int64)
        self._set(
            next_item=self._counters[0:].ctypes.data,
            next_slot=self._counters[1:].ctypes.data,
            block_tables=self._block_tables.ctypes.data,
            table_stride=self._block_tables.shape[1],
            scratch=self._scratch.ctypes.data,
            scratch_stride=self._scratch.shape[1],
            partials=self._partials.ctypes.data,
            partial_stride=partial_size,
            pending=self._pending.ctypes.data,
            num_kv_heads=shape.num_kv_heads,
            group=group,
            head_dim=shape.head_dim,
            block_size=attention.block_size,
            key_columns=attention.key_columns,
            value_columns=attention.value_columns,
        )

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See :class:`filmstrip.models.paged_attention.AttentionStep`."""
        key_pages, value_pages = self._attention.pages[layer_index]
        self._set(key_pages=key_pages.data_ptr(), value_pages=value_pages.data_ptr())
        key, value = (_rows_contiguous(tensor.to(self._attention.dtype)) for tensor in (key, value))
        self._set(
            keys=key.data_ptr(),
            key_token_stride=key.stride(0),
            key_head_stride=key.stride(1),
            values=value.data_ptr(),
            value_token_stride=value.stride(0),
            value_head_stride=value.stride(1),
        )
        self._run(self._attention.store_kernel, self._runs)
        scaled = (query.to(torch.float32) * (scaling * math.log2(math.e))).contiguous()
        output = torch.empty_like(scaled)
        self._set(query=scaled.data_ptr(), output=output.data_ptr())
        self._run(self._attention.attend_kernel, self._items)
        return output.to(query.dtype)

    def _set(self, **values: int) -> None:
        """Fill in arguments of the kernels by name."""
        for name, value in values.items():
            self._arguments[_ARGUMENT_INDEX[name]] = value

    def _run(self, kernel: int, work: np.ndarray) -> None:
        """Run a kernel over a work list on all threads."""
        self._set(items=work.ctypes.data, num_items=len(work))
        self._counters[:] = 0
        run_on_threads(kernel, self._arguments.ctypes.data)


@dataclass(frozen=True)
class WorkPlan:
    """Work items of attention, int64 (num_items, fields), most expensive first, and how many of them are split parts."""

    items: np.ndarray
    num_partials: int


def plan_work(
    query_lens: list[int],
    context_lens: list[int],
    *,
    num_kv_heads: int,
    max_rows: int,
    block_size: int,
    num_threads: int,
) -> WorkPlan:
    """Cut every request into tiles of ``max_rows`` rows, and tiles over long contexts into splits, for balance."""
    tiles = []
    first_row = 0
    for sequence, (num_rows, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        for start in range(0, num_rows, max_rows):
            rows = min(max_rows, num_rows - start)
            position = length - num_rows + start
            tiles.append((sequence, first_row + start, rows, position, position + rows))
        first_row += num_rows
    split_length = _split_length(sum(tile[-1] for tile in tiles) * num_kv_heads, block_size, num_threads)
    items, num_partials = [], 0
    for sequence, row, rows, position, length in tiles:
        num_splits = -(-length // split_length)
        step = -(-length // (num_splits * block_size)) * block_size
        num_splits = -(-length // step)
        for split in range(num_splits):
            end = min(length, (split + 1) * step)
            items.append((sequence, row, rows, position, split * step, end, num_splits, split, num_partials))
        if num_splits > 1:
            num_partials += num_splits
    table = np.array(items, dtype=np.int64).reshape(-1, len(kernels.WORK_FIELDS))
    cost = (table[:, 5] - table[:, 4]) * table[:, 2]
    return WorkPlan(table[np.argsort(-cost, kind="stable")], num_partials)


def plan_runs(slots: np.ndarray, block_size: int) -> np.ndarray:
    """Runs of consecutive slots within a block, int64 (num_runs, fields), from the slot of each token."""
    if len(slots) == 0:
        return np.zeros((0, len(kernels.RUN_FIELDS)), dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, (np.diff(slots) != 1) | (slots[1:] % block_size == 0)])
    lengths = np.diff(np.r_[starts, len(slots)])
    first = slots[starts]
    return np.ascontiguousarray(np.stack([starts, lengths, first // block_size, first % block_size], axis=1), np.int64)


def _split_length(total_tokens: int, block_size: int, num_threads: int) -> int:
    """Tokens that one item should take at most, in whole blocks."""
    if num_threads == 1:
        return max(total_tokens, 1)
    wanted = max(MIN_TOKENS_PER_SPLIT, total_tokens // (num_threads * ITEMS_PER_THREAD))
    return -(-wanted // block_size) * block_size


def _whole_vectors(columns: int) -> int:
    return -(-columns // kernels.VECTOR) * kernels.VECTOR


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_ARGUMENT_INDEX = {name: index for index, name in enumerate(kernels.ARGUMENTS)}
