"""Blocks of the KV cache: who holds them, which are free, which still hold something worth keeping; knows no tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """``num_blocks`` numbered blocks with reference counts.

    A block nobody holds is free; if it carries a hash its content can be taken up again until the block is given out for
    something else, which happens to the least recently freed first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Insertion order is the order of reuse: never used and uncached blocks first, then the oldest cached ones.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._free)

    @property
    def num_allocated(self) -> int:
        """Blocks that some request holds."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks of unknown content; the caller has checked :attr:`num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._num_holders[block] = 1
            blocks.append(block)
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds this content, held or free."""
        return self._block_of.get(block_hash)

    def is_free(self, block: int) -> bool:
        """Whether nobody holds ``block``."""
        return self._num_holders[block] == 0

    def share(self, block: int) -> None:
        """One more holder for a block found by :meth:`find`."""
        if self._num_holders[block] == 0:
            del self._free[block]
        self._num_holders[block] += 1

    def publish(self, block: int, block_hash: bytes) -> None:
        """Say what a full block holds, so that others find it; the first block with a content keeps the name."""
        if block_hash not in self._block_of and self._hash_of[block] is None:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def disown(self, blocks: Iterable[int]) -> None:
        """Let nobody find the content of these blocks any more; whoever holds them goes on holding them."""
        for block in blocks:
            self._forget(block)

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one holder of each. The end of a sequence is reused before its beginning, which more prompts share."""
        for block in reversed(blocks):
            if self._num_holders[block] == 0:
                raise ValueError(f"block {block} was freed more often than held")
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless counts, free list and names agree with the requests' block tables (for tests)."""
        holders = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a request holds a block twice"
            for block in table:
                holders[block] += 1
        assert holders == self._num_holders, "reference counts differ from the block tables"
        assert set(self._free) == {block for block, count in enumerate(holders) if count == 0}, "the free list is wrong"
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash, "a content names the wrong block"
        assert len(self._block_of) == sum(name is not None for name in self._hash_of), "a name was lost"

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            self._hash_of[block] = None
            del self._block_of[block_hash]
