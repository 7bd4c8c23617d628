"""Which blocks a request needs and which it can share with others that began alike; knows no scheduling policy."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

from filmstrip.engine.block_pool import BlockPool
from filmstrip.engine.request import Request

_ROOT = b"filmstrip"


class KVCache:
    """Block tables over a :class:`BlockPool`, with a prefix cache of full blocks.

    A block's hash covers the hash before it (so, everything before it), its token ids, and for each media segment that
    overlaps it what the segment is and where it begins. Placeholder ids alone never identify content. Positions need not be
    hashed: they follow from the tokens and from the segments' grids, and the grid is part of a media hash.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._sharing = enable_prefix_caching
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def num_new_blocks(self, request: Request, num_tokens: int) -> int:
        """Blocks that must be allocated before ``num_tokens`` more tokens of ``request`` can be computed."""
        needed = -(-(request.num_computed_tokens + num_tokens) // self.block_size)
        return max(0, needed - len(request.block_table))

    def find_prefix(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix that leaves at least one token to compute (its logits are needed)."""
        if not self._sharing:
            return []
        self._extend_hashes(request, len(request.token_ids) - 1)
        blocks = []
        for index in range((len(request.token_ids) - 1) // self.block_size):
            block = self.pool.find(request.block_hashes[index])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_tokens_to_come(self, request: Request, other: Request) -> int:
        """Tokens, in whole blocks, that both begin with and that the running ``other`` has still to compute.

        A block's hash covers all before it, so where two prompts part can be found by halving.
        """
        if not self._sharing:
            return 0
        self._extend_hashes(request, len(request.token_ids) - 1)
        low, high = 0, min(len(request.block_hashes), len(other.block_hashes))
        while low < high:
            middle = (low + high) // 2
            if request.block_hashes[middle] == other.block_hashes[middle]:
                low = middle + 1
            else:
                high = middle
        return low * self.block_size - other.num_computed_tokens

    def take_prefix(self, request: Request, blocks: list[int]) -> None:
        """Let ``request``, which holds nothing, begin with these cached blocks."""
        for block in blocks:
            self.pool.share(block)
        request.block_table = array("i", blocks)
        request.num_computed_tokens = len(blocks) * self.block_size
        self.num_queried_tokens += len(request.token_ids)
        self.num_hit_tokens += request.num_computed_tokens

    def grow(self, request: Request, num_tokens: int) -> None:
        """Allocate what ``num_tokens`` more tokens need; the caller has checked that it is there."""
        request.block_table.extend(self.pool.allocate(self.num_new_blocks(request, num_tokens)))

    def publish(self, request: Request, num_before: int) -> None:
        """Offer the blocks that became full since ``num_before`` tokens were computed."""
        if not self._sharing:
            return
        self._extend_hashes(request, request.num_computed_tokens)
        for index in range(num_before // self.block_size, request.num_computed_tokens // self.block_size):
            self.pool.publish(request.block_table[index], request.block_hashes[index])

    def disown(self, request: Request) -> None:
        """Offer nothing of this request's content any more: some of it is not numbers."""
        self.pool.disown(request.block_table)

    def free(self, request: Request) -> None:
        """Let go of all blocks; nothing of the request is computed any more."""
        self.pool.free(request.block_table)
        request.block_table = array("i")
        request.num_computed_tokens = 0

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        """Hashes of the full blocks among the first ``num_tokens`` tokens."""
        for index in range(len(request.block_hashes), num_tokens // self.block_size):
            start, end = index * self.block_size, (index + 1) * self.block_size
            digest = hashlib.sha256(request.block_hashes[-1] if request.block_hashes else _ROOT)
            digest.update(np.asarray(request.token_ids[start:end], np.int64).tobytes())
            for segment in request.segments_between(start, end):
                name, number = segment.key
                digest.update(f"|{name}|{number}|{segment.range.offset - start}|{segment.range.length}".encode())
            request.block_hashes.append(digest.digest())
