"""Queries of one request and its contiguous K and V in, attention out; knows no pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

ROWS_PER_MASK = 512
"""Rows that go through attention together where a mask is needed, which bounds the mask and skips what no row sees."""


@dataclass(frozen=True)
class Bounds:
    """What the last n of L tokens see where that is not just all up to themselves."""

    starts: np.ndarray
    """int64 (n,): the first key that each row sees."""
    ends: np.ndarray
    """int64 (n,): the first behind those."""
    hidden: np.ndarray | None = None
    """bool (L,): keys that no row before them sees, wherever what it sees ends."""

    def mask(self, rows: slice) -> tuple[int, int, np.ndarray]:
        """Keys ``first`` to ``last`` that any of ``rows`` sees, and which of them which row does: bool (rows, keys)."""
        starts, ends = self.starts[rows], self.ends[rows]
        first, last = int(starts.min()), int(ends.max())
        columns = np.arange(first, last)
        mask = (columns >= starts[:, None]) & (columns < ends[:, None])
        if self.hidden is not None:
            num_before = len(self.hidden) - len(self.starts)
            tokens = num_before + np.arange(len(self.starts))[rows]
            mask &= (columns <= tokens[:, None]) | ~self.hidden[first:last]
        return first, last, mask


def attend_dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, bounds: Bounds | None = None
) -> torch.Tensor:
    """Attention of the last n of L tokens over all L, causal unless ``bounds`` say what each of them sees.

    ``query`` is (n, num_query_heads, head_dim), ``keys`` and ``values`` are (num_kv_heads, L, head_dim); returns
    (n, num_query_heads, head_dim). Without ``bounds`` row i sees keys 0 .. L - n + i (a causal mask aligned at the lower
    right).
    """
    num_rows, length = len(query), keys.shape[1]
    apart = query.device.type == "cuda"
    rows, keys, values = grouped(query, keys, values, apart=apart)
    if bounds is not None:
        output = _attend_within(rows, keys, values, scaling, bounds)
    elif num_rows in (1, length):
        output = F.scaled_dot_product_attention(rows, keys, values, is_causal=num_rows > 1, scale=scaling)
    elif query.device.type == "cpu":
        output = _attend_in_two_parts(rows, keys, values, scaling)
    else:
        output = _attend_with_masks(rows, keys, values, scaling)
    return ungrouped(output, apart=apart)


def attend_all(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of n rows that see all L keys each; shapes as for :func:`attend_dense`."""
    apart = query.device.type == "cuda"
    output = F.scaled_dot_product_attention(*grouped(query, keys, values, apart=apart), scale=scaling)
    return ungrouped(output, apart=apart)


def grouped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, apart: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query heads beside the K and V heads that they share, by a stride of 0 instead of copies.

    ``query`` is (n, num_query_heads, head_dim), ``keys`` and ``values`` are (num_kv_heads, L, head_dim). A batch entry has
    the heads that share one K and V head; with ``apart`` it has one of each group, and all K and V heads. PyTorch's
    memory-efficient kernel for CUDA needs that: where the heads of a batch entry share K and V, it takes one row that is
    left over at the end of the queries (65 rows in tiles of 64, say) for a single query and computes something else
    (https://github.com/pytorch/pytorch/issues/191937, fixed there in August 2026).
    """
    group = query.shape[1] // keys.shape[0]
    rows = query.transpose(0, 1).unflatten(0, (-1, group))
    if apart:
        return rows.transpose(0, 1), keys.expand(group, -1, -1, -1), values.expand(group, -1, -1, -1)
    return rows, keys[:, None].expand(-1, group, -1, -1), values[:, None].expand(-1, group, -1, -1)


def ungrouped(output: torch.Tensor, *, apart: bool) -> torch.Tensor:
    """Attention of :func:`grouped` heads as (n, num_query_heads, head_dim)."""
    return (output.transpose(0, 1) if apart else output).flatten(0, 1).transpose(0, 1)


def _attend_within(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, bounds: Bounds
) -> torch.Tensor:
    """Slabs of rows, each with a mask over the keys that any of them sees."""
    outputs = []
    for start in range(0, rows.shape[2], ROWS_PER_MASK):
        slab = rows[:, :, start : start + ROWS_PER_MASK]
        first, last, mask = bounds.mask(slice(start, start + ROWS_PER_MASK))
        seen = (keys[:, :, first:last], values[:, :, first:last])
        on_device = torch.from_numpy(mask).to(rows.device)
        outputs.append(F.scaled_dot_product_attention(slab, *seen, attn_mask=on_device, scale=scaling))
    return torch.cat(outputs, dim=2)


def _attend_in_two_parts(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """All see what came before; among themselves they are causal: neither needs a mask, which is slow on CPU.

    The two results weigh as the sums of exponentials they were divided by. Only this operator of PyTorch, which
    ``scaled_dot_product_attention`` runs on CPU, returns the logarithms of those.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    num_before = keys.shape[2] - rows.shape[2]
    among, log_among = flash(rows, keys[:, :, num_before:], values[:, :, num_before:], 0.0, True, scale=scaling)
    before, log_before = flash(rows, keys[:, :, :num_before], values[:, :, :num_before], 0.0, False, scale=scaling)
    return torch.lerp(among, before, torch.sigmoid(log_before - log_among).unsqueeze(-1).to(among.dtype))


def _attend_with_masks(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Slabs of rows, each with a mask over the keys that its last row sees."""
    num_rows, length = rows.shape[2], keys.shape[2]
    outputs = []
    for start in range(0, num_rows, ROWS_PER_MASK):
        slab = rows[:, :, start : start + ROWS_PER_MASK]
        visible = length - num_rows + start + slab.shape[2]
        mask = torch.ones(slab.shape[2], visible, dtype=torch.bool, device=rows.device).tril_(visible - slab.shape[2])
        seen = (keys[:, :, :visible], values[:, :, :visible])
        outputs.append(F.scaled_dot_product_attention(slab, *seen, attn_mask=mask, scale=scaling))
    return torch.cat(outputs, dim=2)
