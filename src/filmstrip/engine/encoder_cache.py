"""Embeddings of media segments by content, up to a byte budget; knows neither requests nor the encoder."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable

import torch

SegmentKey = tuple[str, int]


class EncoderCache:
    """Least recently used segments go first; what the current step needs is pinned until :meth:`release`.

    A segment larger than the whole budget is still usable: it stays for its step and is dropped at the end of it.

    What requests attend to in every step is held from their start to their end, ``bytes_per_held_segment`` each, and never
    more than the budget.
    """

    def __init__(self, max_bytes: int, bytes_per_held_segment: int = 0) -> None:
        self.max_bytes, self.bytes_per_held_segment = max_bytes, bytes_per_held_segment
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._entries: OrderedDict[SegmentKey, torch.Tensor] = OrderedDict()
        self._pinned: set[SegmentKey] = set()
        self._num_holders: Counter[SegmentKey] = Counter()

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

    def can_hold(self, keys: Collection[SegmentKey]) -> bool:
        """Whether there is room for these beside what is held."""
        num_held = len(self._num_holders.keys() | set(keys))
        return not keys or num_held * self.bytes_per_held_segment <= self.max_bytes

    def hold(self, keys: Iterable[SegmentKey]) -> None:
        """Keep these, as soon as they are here, until :meth:`let_go` has been called as often."""
        self._num_holders.update(keys)

    def let_go(self, keys: Iterable[SegmentKey]) -> None:
        """Undo one :meth:`hold`; what nobody holds is kept as long as there is room."""
        self._num_holders.subtract(keys)
        self._num_holders = +self._num_holders

    def put(self, key: SegmentKey, embeddings: torch.Tensor) -> None:
        """Add one encoded segment, dropping old ones that are not pinned."""
        self.drop(key)
        self._entries[key] = embeddings
        self.num_bytes += _num_bytes(embeddings)
        self._shrink()

    def get(self, key: SegmentKey) -> torch.Tensor:
        """What the encoder gave for a pinned segment; embeddings are (num_tokens, num_embedding_rows, hidden_size)."""
        return self._entries[key]

    def drop(self, key: SegmentKey) -> None:
        """Forget one segment, if it is there."""
        if key in self._entries:
            self.num_bytes -= _num_bytes(self._entries.pop(key))

    def check_integrity(self, holders: Iterable[Iterable[SegmentKey]]) -> None:
        """Raise AssertionError unless exactly what ``holders`` attend to is held, within the budget (for tests)."""
        expected = Counter(key for keys in holders for key in keys)
        assert self._num_holders == expected, "held segments differ from what running requests attend to"
        assert not expected or len(expected) * self.bytes_per_held_segment <= self.max_bytes, "too much is held"

    def release(self) -> None:
        """End of the step: nothing is pinned any more, and the budget holds again."""
        self._pinned.clear()
        self._shrink()

    def _shrink(self) -> None:
        kept = self._pinned | self._num_holders.keys() if self.num_bytes > self.max_bytes else set()
        while self.num_bytes > self.max_bytes:
            oldest = next((key for key in self._entries if key not in kept), None)
            if oldest is None:
                return
            self.drop(oldest)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
