"""Scheduled requests to the tensors of one forward pass; knows no model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from filmstrip.engine.encoder_cache import EncoderCache
from filmstrip.engine.request import Request
from filmstrip.models.batch import AttendedMedia, Batch, EmbeddingPlacement


def build_batch(
    scheduled: Mapping[Request, int], block_size: int, encoder_cache: EncoderCache, device: torch.device
) -> tuple[Batch, list[Request]]:
    """Pack the scheduled tokens, and name the requests whose logits the batch asks for, in row order.

    A request is sampled when its chunk ends with its last token. All media segments that the chunks see must be in
    ``encoder_cache``; those that stand among the tokens with as many rows as their ranges have tokens.
    """
    token_ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    placements: list[EmbeddingPlacement] = []
    attended: list[list[AttendedMedia]] = []
    sampled: list[Request] = []
    logits_rows: list[int] = []
    row = 0
    for request, num_tokens in scheduled.items():
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        indices = np.arange(start, end)
        token_ids.append(np.asarray(request.token_ids[start:end], np.int64))
        positions.append(request.positions_between(start, end))
        blocks = np.frombuffer(request.block_table, np.intc)
        slots.append(blocks[indices // block_size].astype(np.int64) * block_size + indices % block_size)
        if request.seen_media is None:
            placements += _placements(request, start, end, row, encoder_cache)
        else:
            attended.append(_attended_media(request, start, end, encoder_cache))
        row += num_tokens
        if end == len(request.token_ids):
            sampled.append(request)
            logits_rows.append(row - 1)
    query_lens = list(scheduled.values())
    context_lens = [request.num_computed_tokens + count for request, count in scheduled.items()]
    width = max(len(request.block_table) for request in scheduled)
    tables = np.zeros((len(scheduled), width), np.int32)
    for table, request in zip(tables, scheduled, strict=True):
        table[: len(request.block_table)] = np.frombuffer(request.block_table, np.intc)

    packed_positions = np.concatenate(positions, axis=1)
    if np.issubdtype(packed_positions.dtype, np.floating):  # of float32 and int64 NumPy makes float64
        packed_positions = packed_positions.astype(np.float32)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    states = [request.state_slot for request in scheduled if request.state_slot is not None]
    batch = Batch(
        token_ids=tensor(np.concatenate(token_ids)),
        positions=tensor(packed_positions),
        slot_mapping=tensor(np.concatenate(slots)),
        cu_seqlens_q=tensor(np.cumsum([0, *query_lens], dtype=np.int32)),
        context_lens=tensor(np.asarray(context_lens, np.int32)),
        block_tables=tensor(tables),
        logits_indices=tensor(np.asarray(logits_rows, np.int64)),
        query_lens=query_lens,
        context_lens_list=context_lens,
        placements=placements,
        state_slots=tensor(np.asarray(states, np.int64)) if states else None,
        attended_media=attended,
        request_lens=[len(request.token_ids) for request in scheduled],
        has_media=[bool(request.segments) for request in scheduled],
    )
    return batch, sampled


def _placements(
    request: Request, start: int, end: int, row: int, encoder_cache: EncoderCache
) -> list[EmbeddingPlacement]:
    """Where the chunk ``start:end``, which begins at ``row`` of the batch, shows media."""
    placements = []
    for segment in request.segments_between(start, end):
        first, last = max(segment.range.offset, start), min(segment.range.end, end)
        embeddings, offset = encoder_cache.get(segment.key), segment.range.offset
        rows = embeddings[first - offset : last - offset]
        placements.append(EmbeddingPlacement(row + first - start, rows, segment.range.end))
    return placements


def _attended_media(request: Request, start: int, end: int, encoder_cache: EncoderCache) -> list[AttendedMedia]:
    """What the chunk ``start:end`` attends to."""
    return [
        AttendedMedia(segment.range.offset, encoder_cache.get(segment.key), segment.feature.grid_thw)
        for segment in request.segments_seen(start, end)
    ]
