"""Queries of one request and its contiguous K and V in, attention out; knows no pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROWS_AT_ONCE = 512
"""Rows that go through attention together where a mask is needed, which bounds the mask and skips what no row sees."""


def attend_dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of the last n of L tokens over all L.

    ``query`` is (n, num_query_heads, head_dim), ``keys`` and ``values`` are (num_kv_heads, L, head_dim); returns
    (n, num_query_heads, head_dim). Query row i sees keys 0 .. L - n + i (a causal mask aligned at the lower right).
    """
    num_rows, length, group = len(query), keys.shape[1], query.shape[1] // keys.shape[0]
    # One batch entry per K and V head; its query heads share K and V by a stride of 0 instead of copies.
    rows = query.transpose(0, 1).unflatten(0, (-1, group))
    keys, values = (tensor[:, None].expand(-1, group, -1, -1) for tensor in (keys, values))
    if num_rows == length or num_rows == 1:
        output = F.scaled_dot_product_attention(rows, keys, values, is_causal=num_rows > 1, scale=scaling)
        return output.flatten(0, 1).transpose(0, 1)
    outputs = []
    for start in range(0, num_rows, ROWS_AT_ONCE):
        slab = rows[:, :, start : start + ROWS_AT_ONCE]
        visible = length - num_rows + start + slab.shape[2]
        mask = torch.ones(slab.shape[2], visible, dtype=torch.bool, device=query.device).tril_(visible - slab.shape[2])
        outputs.append(
            F.scaled_dot_product_attention(
                slab, keys[:, :, :visible], values[:, :, :visible], attn_mask=mask, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).flatten(0, 1).transpose(0, 1)
