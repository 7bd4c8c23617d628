"""What a model asks of an attention backend; a backend owns the layout of its K and V pages, nothing else indexes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from filmstrip.models.batch import Batch


@dataclass(frozen=True)
class AttentionShape:
    """The sizes that pages and kernels are made for; all layers are alike."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_query_heads_per_kv_head(self) -> int:
        """Query heads that share one K and V head (grouped-query attention)."""
        return self.num_query_heads // self.num_kv_heads


class AttentionStep(Protocol):
    """One forward pass: what is the same for all layers has been worked out once."""

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Store K and V of the N packed tokens, return softmax(scaling * Q K^T) V over each token's request.

        ``query`` is (N, num_query_heads, head_dim), ``key`` and ``value`` are (N, num_kv_heads, head_dim), of any strides;
        the result is contiguous (N, num_query_heads, head_dim) in the dtype of ``query``. A token sees the tokens of its
        own request up to and including itself.
        """
        ...


class PagedAttention(Protocol):
    """K and V pages of every layer and the way to attend over them."""

    block_size: int
    """Tokens per page."""
    kv_bytes_per_token: int
    """Memory of K and V of one token over all layers, padding of the pages included."""

    def allocate(self, num_blocks: int) -> None:
        """Make ``num_blocks`` pages for every layer; pages made before are dropped."""
        ...

    def begin(self, batch: Batch) -> AttentionStep:
        """Prepare the forward pass of ``batch``."""
        ...
