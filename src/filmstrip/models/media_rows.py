"""Token ids and where media stand among them in, embeddings of a packed batch out; knows no model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from filmstrip.models.batch import EmbeddingPlacement


def media_rows(placements: Sequence[EmbeddingPlacement], num_tokens: int) -> torch.Tensor | None:
    """bool (N,): which rows are media; None if none. Raises ValueError if ``placements`` (sorted) overlap or stick out."""
    if not placements:
        return None
    rows = torch.zeros(num_tokens, dtype=torch.bool, device=placements[0].embeddings.device)
    end = 0
    for placement in placements:
        if placement.start < end:
            raise ValueError(f"media rows overlap at row {placement.start}: the ones before end at {end}")
        end = placement.start + len(placement.embeddings)
        rows[placement.start : end] = True
    if end > num_tokens:
        raise ValueError(f"media rows end at {end} in a batch of {num_tokens} tokens")
    return rows


def embed_rows(
    embed_tokens: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,
    placements: Sequence[EmbeddingPlacement],
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """Embedding of each row, (N, hidden_size): ``embed_tokens``' for text, the encoder's for media.

    ``rows`` is what :func:`media_rows` says of the ``placements``.
    """
    if rows is None:
        return embed_tokens(token_ids)
    # The id of a media row may be anything, even outside the table: row 0 stands in and is overwritten.
    embeds = embed_tokens(token_ids.masked_fill(rows, 0))
    for placement in placements:
        embeds[placement.start : placement.start + len(placement.embeddings)] = placement.embeddings[:, 0]
    return embeds
