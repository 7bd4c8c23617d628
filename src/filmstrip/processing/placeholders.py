"""Prompt pieces to token ids, placeholder ranges and M-RoPE positions; knows no pixels and no family's wording.

Media stand in the prompt by range, never by token id: what a user types can neither move nor break them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from filmstrip.types import PlaceholderRange


@dataclass(frozen=True)
class Placeholder:
    """One media segment in the prompt: ``height * width`` tokens of ``token_id`` for item number ``item``.

    ``time`` is its place on the temporal axis, counted from where its item begins; it may lie between two tokens' places.

    ``token_ids`` are the tokens where they are not all alike, in one row; ``pooling`` then is what
    :class:`filmstrip.types.MediaFeature` says of it.
    """

    item: int
    token_id: int
    height: int
    width: int
    time: float = 0
    token_ids: tuple[int, ...] = ()
    pooling: np.ndarray | None = field(default=None, compare=False)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.height * self.width


Piece = str | int | Placeholder


@dataclass(frozen=True)
class Assembled:
    """Token ids, and the placeholders with their offsets in them."""

    token_ids: list[int]
    placed: list[tuple[int, Placeholder]]

    def segments(self, item: int) -> tuple[PlaceholderRange, ...]:
        """Ranges of one item's segments, in order."""
        return tuple(PlaceholderRange(offset, p.length) for offset, p in self.placed if p.item == item)

    def pooling(self, item: int) -> np.ndarray | None:
        """How tokens of one item's segments are pooled, the same for all of them; None where they are not."""
        return next((p.pooling for _, p in self.placed if p.item == item), None)


def assemble(pieces: Sequence[Piece], encode_text: Callable[[str], list[int]]) -> Assembled:
    """Encode text pieces (neighbours as one, as a tokenizer would see them) and lay out placeholders."""
    token_ids: list[int] = []
    placed: list[tuple[int, Placeholder]] = []
    text: list[str] = []

    def flush() -> None:
        if text:
            token_ids.extend(encode_text("".join(text)))
            text.clear()

    for piece in pieces:
        if isinstance(piece, str):
            text.append(piece)
            continue
        flush()
        if isinstance(piece, Placeholder):
            placed.append((len(token_ids), piece))
            token_ids.extend(piece.token_ids or [piece.token_id] * piece.length)
        else:
            token_ids.append(piece)
    flush()
    return Assembled(token_ids, placed)


def mrope_positions(
    num_tokens: int, placed: Sequence[tuple[int, Placeholder]], *, beyond_time: bool = False
) -> tuple[np.ndarray, float]:
    """Multimodal rotary positions of a whole prompt.

    Text advances all three axes (temporal, height, width) by one per token. A segment of h x w tokens has the same temporal
    position throughout, its row and column on the other axes, and the text behind it goes on ``max(h, w)`` later
    (Qwen3-VL: every temporal group of a video is such a segment; Transformers' ``Qwen3VLModel.get_rope_index``). Segments
    of one item with no token between them (Qwen2-VL: a whole video) begin at the same place and differ by their ``time``;
    the text behind the last goes on as if they were one (``Qwen2_5_VLModel.get_rope_index``), be their times later or not;
    with ``beyond_time`` it goes on behind whatever of them reaches furthest, times included.

    Returns int32 (3, num_tokens), or float32 where some time lies between two places, and the delta by which generated
    tokens' positions differ from their index: they go on behind the prompt's last, as the text of a next turn would
    (Transformers' ``generate``).
    """
    dtype = np.int32 if all(float(placeholder.time).is_integer() for _, placeholder in placed) else np.float32
    positions = np.empty((3, num_tokens), dtype)
    index = begin = 0
    current, extent = dtype(0), 0
    for number, (offset, placeholder) in enumerate(placed):
        positions[:, index:offset] = current + np.arange(offset - index)
        current += dtype(offset - index)
        index = offset + placeholder.length
        rows, columns = np.divmod(np.arange(placeholder.length), placeholder.width)
        positions[0, offset:index] = current + placeholder.time
        positions[1, offset:index] = current + rows
        positions[2, offset:index] = current + columns
        extent = max(extent, placeholder.height, placeholder.width)
        if number + 1 == len(placed) or not _is_next(placeholder, index, placed[number + 1]):
            current = positions[:, begin:index].max() + dtype(1) if beyond_time else current + dtype(extent)
            begin, extent = index, 0
    positions[:, index:] = current + np.arange(num_tokens - index)
    current += dtype(num_tokens - index)
    return positions, (current - dtype(num_tokens)).item()


def _is_next(placeholder: Placeholder, end: int, following: tuple[int, Placeholder]) -> bool:
    """Whether the placed segment ``following`` goes on with the item of ``placeholder``, which ends at ``end``."""
    offset, other = following
    return offset == end and other.item == placeholder.item


def count_prompt_tokens(pieces: Sequence[Piece], num_text_tokens: Callable[[str], int]) -> int:
    """Tokens of a prompt that is not laid out: it may be far longer than any context. Neighbouring texts count as one."""
    num_tokens, text = 0, ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        num_tokens += num_text_tokens(text) + (piece.length if isinstance(piece, Placeholder) else 1)
        text = ""
    return num_tokens + num_text_tokens(text)
