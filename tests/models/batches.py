"""Packed batches for model tests, made the way the engine makes them: a block table for each request, slots by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from filmstrip.models.batch import Batch, EmbeddingPlacement
from filmstrip.types import PlaceholderRange


@dataclass(eq=False)
class PackedRequest:
    """One request: its tokens, M-RoPE positions (3, L), media embeddings by range and the blocks it owns."""

    token_ids: list[int]
    positions: torch.Tensor
    blocks: list[int]
    media: list[tuple[PlaceholderRange, torch.Tensor]] = field(default_factory=list)


def text_request(token_ids: Sequence[int], blocks: Sequence[int]) -> PackedRequest:
    """A request without media."""
    return PackedRequest(list(token_ids), torch.arange(len(token_ids)).expand(3, -1), list(blocks))


def pack(
    chunks: Sequence[tuple[PackedRequest, int, int]],
    block_size: int,
    *,
    all_logits: bool = False,
    device: torch.device | str = "cpu",
) -> Batch:
    """The batch that runs tokens ``start:end`` of each (request, start, end); logits of the last row of each, or of all."""
    token_ids: list[int] = []
    positions, slots, placements, last_rows = [], [], [], []
    for request, start, end in chunks:
        base = len(token_ids)
        for place, embeddings in request.media:
            low, high = max(place.offset, start), min(place.end, end)
            if low < high:
                rows = embeddings[low - place.offset : high - place.offset]
                placements.append(EmbeddingPlacement(base + low - start, rows))
        token_ids += request.token_ids[start:end]
        positions.append(request.positions[:, start:end])
        slots += [request.blocks[i // block_size] * block_size + i % block_size for i in range(start, end)]
        last_rows.append(len(token_ids) - 1)
    query_lens = [end - start for _, start, end in chunks]
    context_lens = [end for _, _, end in chunks]
    num_blocks = max(-(-length // block_size) for length in context_lens)
    tables = torch.zeros(len(chunks), num_blocks, dtype=torch.int32)
    for row, (request, _, end) in enumerate(chunks):
        used = -(-end // block_size)
        tables[row, :used] = torch.tensor(request.blocks[:used], dtype=torch.int32)
    return Batch(
        token_ids=torch.tensor(token_ids).to(device),
        positions=torch.cat(positions, dim=1).to(device),
        slot_mapping=torch.tensor(slots).to(device),
        cu_seqlens_q=torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32).to(device),
        block_tables=tables.to(device),
        logits_indices=(torch.arange(len(token_ids)) if all_logits else torch.tensor(last_rows)).to(device),
        query_lens=query_lens,
        context_lens_list=context_lens,
        placements=placements,
    )
