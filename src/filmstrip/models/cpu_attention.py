"""Packed Q, K and V of one step in, attention over pages in main memory out; knows no model and no scheduler."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from filmstrip.models.batch import Batch
from filmstrip.models.paged_attention import AttentionShape

DEFAULT_BLOCK_SIZE = 32


class CpuPagedAttention:
    """Pages (num_blocks, num_kv_heads, block_size, head_dim) for each layer, one tensor for K and one for V."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, block_size: int | None = None) -> None:
        self.shape = shape
        self.dtype = dtype
        self.block_size = block_size or DEFAULT_BLOCK_SIZE
        self.pages: list[tuple[torch.Tensor, torch.Tensor]] = []

    def allocate(self, num_blocks: int) -> None:
        """Make ``num_blocks`` zeroed pages for every layer."""
        page_shape = (num_blocks, self.shape.num_kv_heads, self.block_size, self.shape.head_dim)
        self.pages = [
            (torch.zeros(page_shape, dtype=self.dtype), torch.zeros(page_shape, dtype=self.dtype))
            for _ in range(self.shape.num_layers)
        ]

    def begin(self, batch: Batch) -> CpuAttentionStep:
        """Prepare the forward pass of ``batch``."""
        return CpuAttentionStep(self, batch)


class CpuAttentionStep:
    """One forward pass on CPU."""

    def __init__(self, attention: CpuPagedAttention, batch: Batch) -> None:
        self._attention = attention
        self._batch = batch
        self._blocks = torch.div(batch.slot_mapping, attention.block_size, rounding_mode="floor")
        self._offsets = batch.slot_mapping % attention.block_size

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See :class:`filmstrip.models.paged_attention.AttentionStep`."""
        key_pages, value_pages = self._attention.pages[layer_index]
        key_pages[self._blocks, :, self._offsets] = key.to(key_pages.dtype)
        value_pages[self._blocks, :, self._offsets] = value.to(value_pages.dtype)
        output = torch.empty(query.shape, dtype=query.dtype)
        start = 0
        block_size = self._attention.block_size
        group = self._attention.shape.num_query_heads_per_kv_head
        for sequence, (num_rows, length) in enumerate(
            zip(self._batch.query_lens, self._batch.context_lens_list, strict=True)
        ):
            blocks = self._batch.block_tables[sequence, : -(-length // block_size)]
            keys = key_pages[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            values = value_pages[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            mask = torch.ones(num_rows, length, dtype=torch.bool).tril(length - num_rows)
            rows = query[start : start + num_rows].transpose(0, 1).unflatten(0, (-1, group))
            result = F.scaled_dot_product_attention(
                rows,
                keys.to(rows.dtype)[:, None].expand(-1, group, -1, -1),
                values.to(rows.dtype)[:, None].expand(-1, group, -1, -1),
                attn_mask=mask,
                scale=scaling,
            )
            output[start : start + num_rows] = result.flatten(0, 1).transpose(0, 1)
            start += num_rows
        return output
