"""One request as the engine keeps it: tokens, how far they are computed, the blocks they lie in; knows no other request."""

from __future__ import annotations

import bisect
import itertools
from array import array
from dataclasses import dataclass, field

import numpy as np

from filmstrip.models.base import SeenMedia
from filmstrip.types import FinishReason, MediaFeature, PlaceholderRange, ProcessedPrompt, SamplingParams


@dataclass(frozen=True)
class Segment:
    """One independently encodable piece of a media item and its place in the prompt."""

    feature: MediaFeature
    index: int
    range: PlaceholderRange
    first_row: int
    """Where its patches begin among the item's."""
    num_rows: int

    @property
    def key(self) -> tuple[str, int]:
        """What the piece is: content hash of the item, and which piece of it."""
        return (f"{self.feature.modality}:{self.feature.media_hash}", self.index)


@dataclass(eq=False)
class Request:
    """A request from arrival to its last token.

    ``token_ids`` grows from the prompt by every generated token. ``num_computed_tokens`` of them have K and V in
    ``block_table``; preemption sets it to 0 and keeps the tokens. ``seen_media`` is the model's, if tokens attend to media
    beside the prompt.
    """

    request_id: str
    prompt: ProcessedPrompt
    params: SamplingParams
    stop_token_ids: frozenset[int]
    arrival: int
    seen_media: SeenMedia | None = None
    token_ids: list[int] = field(init=False)
    block_table: array[int] = field(default_factory=lambda: array("i"))
    """Physical blocks in order; an array, so that a step copies it as memory and not number by number."""
    block_hashes: list[bytes] = field(default_factory=list)
    cache_salt: bytes = b""
    """What beside tokens and media decides on K and V: requests of different salts share no blocks."""
    state_slot: int | None = None
    """Where the recurrent state is while the request runs; None if it waits or the model has none."""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache held when the request was first scheduled."""
    was_scheduled: bool = False
    segments: list[Segment] = field(init=False)
    attended_keys: frozenset[tuple[str, int]] = field(init=False)
    """Keys of the segments that tokens may attend to up to the last one generated; empty if media are among the tokens."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt.token_ids)
        segments = [
            Segment(feature, index, placed, first_row, num_rows)
            for feature in self.prompt.features
            for index, (placed, (first_row, num_rows)) in enumerate(zip(feature.segments, _rows(feature), strict=True))
        ]
        self.segments = sorted(segments, key=lambda segment: segment.range.offset)
        self._offsets = [segment.range.offset for segment in self.segments]
        self._ends = [segment.range.end for segment in self.segments]
        self.attended_keys = frozenset(segment.key for segment in self.segments if self.seen_media is not None)

    @property
    def media_range(self) -> PlaceholderRange | None:
        """All from the first media token to the last, text between them included; None without media."""
        if not self.segments:
            return None
        first = self._offsets[0]
        return PlaceholderRange(first, self._ends[-1] - first)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose K and V are not in the cache yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    def positions_between(self, start: int, end: int) -> np.ndarray:
        """(3, end - start): from the prompt's table; beyond it, and without one, the index plus the prompt's delta.

        int64, or float32 where the prompt's are.
        """
        positions = np.tile(np.arange(start, end) + self.prompt.position_delta, (3, 1))
        table = self.prompt.positions
        if table is not None and np.issubdtype(table.dtype, np.floating):
            positions = positions.astype(np.float32)
        num_from_table = min(end, self.num_prompt_tokens) - start
        if table is not None and num_from_table > 0:
            positions[:, :num_from_table] = table[:, start : start + num_from_table]
        return positions

    def segments_between(self, start: int, end: int) -> list[Segment]:
        """Media segments that overlap tokens ``start`` to ``end``, in order."""
        first = bisect.bisect_right(self._ends, start)
        last = bisect.bisect_left(self._offsets, end)
        return self.segments[first:last]

    def segments_seen(self, start: int, end: int) -> list[Segment]:
        """Media segments that must be at hand to compute tokens ``start`` to ``end``, in order."""
        if self.seen_media is None:
            return self.segments_between(start, end)
        seen = self.seen_media(self._offsets, start, end)
        return self.segments[seen.start : seen.stop]

    def finish_reason(self, max_model_len: int) -> tuple[FinishReason | None, int | None]:
        """Why the request ends with its newest token, and the stop token if one was asked for by id."""
        token = self.token_ids[-1]
        if token in self.stop_token_ids:
            return "stop", None
        if token in self.params.stop_token_ids:
            return "stop", token
        limit = self.params.max_tokens
        if (limit is not None and self.num_output_tokens >= limit) or len(self.token_ids) >= max_model_len:
            return "length", None
        return None, None


def _rows(feature: MediaFeature) -> list[tuple[int, int]]:
    """First row and number of rows of each segment's patches."""
    equal = [feature.patches.shape[0] // len(feature.segments)] * len(feature.segments)
    counts = [height * width for height, width in feature.segment_grids] or equal
    return list(zip(itertools.accumulate(counts, initial=0), counts, strict=False))
