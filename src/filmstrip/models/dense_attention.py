"""Queries of one request and its contiguous K and V in, attention out; knows no pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend_dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of the last n of L tokens over all L.

    ``query`` is (n, num_query_heads, head_dim), ``keys`` and ``values`` are (num_kv_heads, L, head_dim); returns
    (n, num_query_heads, head_dim). Query row i sees keys 0 .. L - n + i (a causal mask aligned at the lower right).
    """
    num_rows, num_query_heads, _ = query.shape
    num_kv_heads, length, _ = keys.shape
    group = num_query_heads // num_kv_heads
    # One batch entry per K and V head; its query heads share K and V by a stride of 0 instead of copies.
    rows = query.transpose(0, 1).unflatten(0, (num_kv_heads, group))
    keys, values = (tensor[:, None].expand(-1, group, -1, -1) for tensor in (keys, values))
    if num_rows == length:
        output = F.scaled_dot_product_attention(rows, keys, values, is_causal=num_rows > 1, scale=scaling)
    elif num_rows == 1:
        output = F.scaled_dot_product_attention(rows, keys, values, scale=scaling)
    else:
        mask = torch.ones(num_rows, length, dtype=torch.bool, device=query.device).tril_(length - num_rows)
        output = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    return output.flatten(0, 1).transpose(0, 1)
