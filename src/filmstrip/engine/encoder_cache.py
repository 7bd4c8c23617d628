"""Embeddings of media segments by content, up to a byte budget; knows neither requests nor the encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch

SegmentKey = tuple[str, int]


class EncoderCache:
    """Least recently used segments go first; what the current step needs is pinned until :meth:`release`.

    A segment larger than the whole budget is still usable: it stays for its step and is dropped at the end of it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._entries: OrderedDict[SegmentKey, torch.Tensor] = OrderedDict()
        self._pinned: set[SegmentKey] = set()

    def pin(self, keys: Iterable[SegmentKey]) -> list[SegmentKey]:
        """Keep these for the step; returns the ones that are missing and must be encoded, each once, in order."""
        missing: dict[SegmentKey, None] = {}
        for key in keys:
            self._pinned.add(key)
            if key in self._entries:
                self._entries.move_to_end(key)
                self.num_hits += 1
            elif key not in missing:
                missing[key] = None
                self.num_misses += 1
        return list(missing)

    def put(self, key: SegmentKey, embeddings: torch.Tensor) -> None:
        """Add one encoded segment, dropping old ones that are not pinned."""
        self.drop(key)
        self._entries[key] = embeddings
        self.num_bytes += _num_bytes(embeddings)
        self._shrink()

    def get(self, key: SegmentKey) -> torch.Tensor:
        """A pinned segment's embeddings, (num_tokens, num_embedding_rows, hidden_size)."""
        return self._entries[key]

    def drop(self, key: SegmentKey) -> None:
        """Forget one segment, if it is there."""
        if key in self._entries:
            self.num_bytes -= _num_bytes(self._entries.pop(key))

    def release(self) -> None:
        """End of the step: nothing is pinned any more, and the budget holds again."""
        self._pinned.clear()
        self._shrink()

    def _shrink(self) -> None:
        while self.num_bytes > self.max_bytes:
            oldest = next((key for key in self._entries if key not in self._pinned), None)
            if oldest is None:
                return
            self.drop(oldest)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
