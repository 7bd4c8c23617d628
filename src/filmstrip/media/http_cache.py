"""Downloads kept for the next question about the same URL, least recently used go first; knows no sockets.

What is kept may be used again only after its server said that it is still right, or before the time is up for which it said
so: both are for the caller to see to, with what the entry remembers. Used from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from filmstrip.media.http_fields import Validator
from filmstrip.media.source import FileSource
from filmstrip.media.sparse import SparseContent

MAX_ENTRIES = 256
"""Each entry holds one or two descriptors, of which a process has few."""


@dataclass(frozen=True)
class CacheEntry:
    """A download and what its server said of it.

    ``final_url`` is where redirects led, in normal form; ``fresh_until`` the ``time.monotonic()`` until which it may be used
    unasked.
    """

    final_url: str
    validator: Validator
    content: FileSource | SparseContent
    fresh_until: float = 0.0

    @property
    def is_fresh(self) -> bool:
        """Whether it may be used unasked."""
        return time.monotonic() < self.fresh_until

    @property
    def num_bytes_held(self) -> int:
        """Bytes that it really takes, in memory or in a temporary file."""
        if isinstance(self.content, SparseContent):
            return self.content.num_bytes_held
        return self.content.num_bytes


class HttpCache:
    """At most ``max_bytes`` (0: nothing at all) in at most ``MAX_ENTRIES`` entries, by URL in normal form."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, CacheEntry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, url: str) -> CacheEntry | None:
        """What is kept of ``url``."""
        with self._lock:
            entry = self._entries.get(url)
            if entry is not None:
                self._entries.move_to_end(url)
            return entry

    def put(self, url: str, entry: CacheEntry) -> None:
        """Keep ``entry`` instead of what was kept of ``url``; what is larger than the whole cache is not kept."""
        with self._lock:
            self._entries.pop(url, None)
            if entry.num_bytes_held <= self._max_bytes and self._max_bytes > 0:
                self._entries[url] = entry
        self.trim()

    def drop(self, url: str, entry: CacheEntry) -> None:
        """Keep ``entry`` no more, unless another has taken its place."""
        with self._lock:
            if self._entries.get(url) is entry:
                del self._entries[url]

    def trim(self) -> None:
        """Let go of the least recently used until the limits hold; to be called when a kept file has grown."""
        with self._lock:
            dropped = []
            num_bytes = sum(entry.num_bytes_held for entry in self._entries.values())
            while num_bytes > self._max_bytes or len(self._entries) > MAX_ENTRIES:
                _, entry = self._entries.popitem(last=False)
                num_bytes -= entry.num_bytes_held
                dropped.append(entry)
        del dropped  # files are closed outside the lock

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            entries, self._entries = self._entries, OrderedDict()
        entries.clear()

    @property
    def num_bytes_held(self) -> int:
        """Bytes of all entries."""
        with self._lock:
            return sum(entry.num_bytes_held for entry in self._entries.values())

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)
