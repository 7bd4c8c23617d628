"""Every tensor of one forward pass; made by the engine, read by a model, kept by nobody.

Tokens of all scheduled requests are packed end to end: request s owns rows ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]``. A
decode step is a row count of 1, a prefill chunk is more; the model need not know the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class EmbeddingPlacement:
    """Rows ``start : start + len(embeddings)`` of the packed batch are media, not text.

    ``embeddings`` is (num_rows, 1 + num_deepstack, hidden_size) in the model's dtype: what :meth:`Model.encode` returned for
    one segment, or the slice of it that falls into this chunk. ``segment_end`` is the first token of the request behind
    the whole segment; None if the model need not know.
    """

    start: int
    embeddings: torch.Tensor
    segment_end: int | None = None


@dataclass
class AttendedMedia:
    """A media segment that tokens of a request attend to: ``encoded`` is what :meth:`Model.encode` returned for it.

    ``offset`` is where in the request the token stands that shows it, ``grid_thw`` the item's patch grid.
    """

    offset: int
    encoded: torch.Tensor
    grid_thw: tuple[int, int, int]


@dataclass
class Batch:
    """One packed forward pass over S requests and N tokens.

    All on the model's device. Int tensors are int32 where attention kernels want it, int64 where torch indexing does.
    """

    token_ids: torch.Tensor
    """int64 (N,); rows covered by a placement hold the placeholder id and are not embedded."""
    positions: torch.Tensor
    """int64 (3, N), float32 if some are no whole numbers: temporal, height, width; three equal rows for text."""
    slot_mapping: torch.Tensor
    """int64 (N,): block_id * block_size + offset that each token's K and V are written to."""
    cu_seqlens_q: torch.Tensor
    """int32 (S + 1,)"""
    context_lens: torch.Tensor
    """int32 (S,): tokens of each request in the cache once this step's are written."""
    block_tables: torch.Tensor
    """int32 (S, max_blocks): physical blocks in order, padded with 0."""
    logits_indices: torch.Tensor
    """int64 (R,): rows whose logits are wanted (the last row of each request that finishes its prompt or decodes)."""
    query_lens: list[int]
    """Host copy of the row counts, so that a CPU backend need not read tensors."""
    context_lens_list: list[int]
    placements: list[EmbeddingPlacement] = field(default_factory=list)
    state_slots: torch.Tensor | None = None
    """int64 (S,): where each request's recurrent state is, all different; None if the model has none."""
    attended_media: list[list[AttendedMedia]] = field(default_factory=list)
    """For each of S requests the media that its tokens in the batch see, by offset (:meth:`CrossAttentionModel.seen_media`);
    empty for models that have media among their tokens."""
    request_lens: list[int] = field(default_factory=list)
    """Tokens of each request, computed or not; more than ``context_lens_list`` while chunks of it are still to come."""
    has_media: list[bool] = field(default_factory=list)
    """Whether each request shows media, in this chunk or anywhere else."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.token_ids.shape[0]

    def rows_of(self, chosen: Sequence[bool]) -> torch.Tensor | None:
        """bool (N,) on the batch's device: the rows of the requests that are ``chosen`` (S values); None if none is."""
        if len(chosen) != len(self.query_lens):
            raise ValueError(f"{len(chosen)} values for a batch of {len(self.query_lens)} requests")
        if not any(chosen):
            return None
        rows = np.repeat(np.asarray(chosen), self.query_lens)
        return torch.from_numpy(rows).to(self.token_ids.device, non_blocking=True)
