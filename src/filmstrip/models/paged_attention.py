"""What a model asks of an attention backend; a backend owns the layout of its K and V pages, nothing else indexes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from filmstrip.models.batch import Batch
from filmstrip.models.dense_attention import Bounds


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


@dataclass(frozen=True)
class Span:
    """Rows of a batch that see each other both ways: all tokens of their request before ``end``.

    ``num_rows`` rows from ``first_row`` on; all tokens of the span are in the cache once this step's are written.
    """

    first_row: int
    num_rows: int
    end: int
    gaps: tuple[tuple[int, int], ...] = ()
    """Tokens of the request, first and first behind, that are not of the span: only what stands behind them sees them."""


class VisibleTokens:
    """Which tokens of its request each of N packed rows sees: those before it, itself, and the rest of its span."""

    def __init__(self, batch: Batch, spans: Sequence[Span] = ()) -> None:
        lens = zip(batch.query_lens, batch.context_lens_list, strict=True)
        positions = np.concatenate([np.arange(length - num_rows, length) for num_rows, length in lens])
        self._positions = positions.astype(np.int64)
        self.ends = self._positions + 1
        """int64 (N,): first token of its request behind those that the row sees."""
        first_rows = np.cumsum([0, *batch.query_lens])
        self._hidden: dict[int, np.ndarray] = {}
        for span in spans:
            self.ends[span.first_row : span.first_row + span.num_rows] = span.end
            request = int(np.searchsorted(first_rows, span.first_row, side="right")) - 1
            for first, end in span.gaps:
                length = batch.context_lens_list[request]
                hidden = self._hidden.setdefault(int(first_rows[request]), np.zeros(length, bool))
                hidden[first:end] = True
        self.has_spans = bool(spans)

    def starts(self, window: int | None, chunk_size: int | None = None) -> np.ndarray:
        """int64 (N,): the first token that each row sees in layers where a token sees ``window`` tokens up to itself.

        None: all. A window bounds how far back a span is seen, too. With a ``chunk_size`` requests are cut into chunks of so
        many tokens, and nothing before its own chunk is seen; raises ValueError if there are spans, which could reach out of
        one.
        """
        starts = np.zeros_like(self._positions)
        if chunk_size is not None:
            if self.has_spans:
                raise ValueError("attention in chunks and spans that are seen both ways do not go together")
            starts = self._positions // chunk_size * chunk_size
        return starts if window is None else np.maximum(self._positions - window + 1, starts)

    def has_gaps(self, first_row: int) -> bool:
        """Whether rows of the request that begins in ``first_row`` see not all tokens between two that they see."""
        return first_row in self._hidden

    def bounds(self, rows: slice, window: int | None, chunk_size: int | None = None) -> Bounds | None:
        """What ``rows``, all of one request, see, if that is not just all tokens up to themselves."""
        if window is None and chunk_size is None and not self.has_spans:
            return None
        return Bounds(self.starts(window, chunk_size)[rows], self.ends[rows], self._hidden.get(rows.start))


class AttentionStep(Protocol):
    """One forward pass: what is the same for all layers has been worked out once."""

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
        """Store K and V of the N packed tokens, return softmax(scaling * Q K^T) V over each token's request.

        ``query`` is (N, num_query_heads, head_dim), ``key`` and ``value`` are (N, num_kv_heads, head_dim), of any strides;
        the result is contiguous (N, num_query_heads, head_dim) in the dtype of ``query``. A token sees the tokens of its
        own request up to and including itself, of those the last ``window`` if given, and the rest of its span. With a
        ``chunk_size`` token i sees token j only if ``j // chunk_size == i // chunk_size``.
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

    def begin(self, batch: Batch, spans: Sequence[Span] = ()) -> AttentionStep:
        """Prepare the forward pass of ``batch``, whose rows in ``spans`` see each other both ways."""
        ...
