"""Which blocks a request needs and which it can share with others that began alike; knows no scheduling policy."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

from filmstrip.engine.block_pool import BlockPool
from filmstrip.engine.request import Request
from filmstrip.engine.state_pool import StatePool

MIN_TOKENS_PER_CHECKPOINT = 128
"""Recurrent states of a prompt are copied aside so many tokens apart at least: a chunk of its own for fewer costs more
than it spares."""
MAX_LIKELY_CHECKPOINTS = 3
"""So often a prompt's state is copied aside at places that :meth:`KVCache.next_checkpoint` names."""
_ROOT = b"filmstrip"


class KVCache:
    """Block tables over a :class:`BlockPool`, with a prefix cache of full blocks.

    A block's hash covers the hash before it (so, everything before it), its token ids, for each media segment that overlaps
    it what the segment is and where it begins, for each that its tokens attend to what that is, and M-RoPE positions; the
    first block's covers the request's salt, too.
    Placeholder ids alone never identify content; nor do pixels the positions: the same frames, said to be taken at other
    times, may stand at others.

    With ``whole_media`` K and V of a media token depend on all media behind it, too, so hashes from the first media token on
    cover everything up to the last.

    With ``states`` every request that holds blocks also holds a slot of recurrent state, and cached blocks are worth
    nothing beyond the last of them whose state was kept.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool,
        states: StatePool | None = None,
        whole_media: bool = False,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self._whole_media = whole_media
        self.states = states
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
        if self.states is not None:
            while blocks and not self.states.has(request.block_hashes[len(blocks) - 1]):
                blocks.pop()
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
        """Let ``request``, which holds nothing, begin with these cached blocks; gives it a state, if models have one."""
        if self.states is not None:
            request.state_slot = self.states.acquire(request.block_hashes[len(blocks) - 1] if blocks else None)
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

    def next_checkpoint(self, request: Request, start: int) -> int | None:
        """Where, beyond ``start`` tokens, the request's state should be copied aside: a chunk must end there.

        Other prompts are likely to part from this one before its first picture (another picture), behind its last one
        (another question) or at its end (the next turn of a conversation).
        """
        return next((end for end in self._checkpoints(request) if end > start), None)

    def align(self, request: Request, start: int, end: int) -> int:
        """``end`` of a chunk, or the end of its last whole block if the state is worth copying aside there, too.

        A block that shows media is not cut: what is encoded is best used in one step.
        """
        aligned = end // self.block_size * self.block_size
        if not self._keeps_states or aligned <= start or request.segments_between(aligned, end):
            return end
        return aligned

    def keep_state(self, request: Request) -> int | None:
        """The slot to copy the request's state to after a step, or None if it need not be kept."""
        end = request.num_computed_tokens
        if not self._keeps_states or end % self.block_size or not 0 < end < request.num_prompt_tokens:
            return None
        assert self.states is not None
        name = request.block_hashes[end // self.block_size - 1]
        return self.states.keep(name, is_likely=end in self._checkpoints(request))

    def disown(self, request: Request) -> None:
        """Offer nothing of this request's content any more: some of it is not numbers."""
        self.pool.disown(request.block_table)
        if self.states is not None:
            self.states.disown(request.block_hashes)

    def free(self, request: Request) -> None:
        """Let go of all blocks and of the state; nothing of the request is computed any more."""
        if self.states is not None and request.state_slot is not None:
            self.states.release(request.state_slot)
            request.state_slot = None
        self.pool.free(request.block_table)
        request.block_table = array("i")
        request.num_computed_tokens = 0

    @property
    def _keeps_states(self) -> bool:
        return self._sharing and self.states is not None and self.states.num_checkpoints > 0

    def _checkpoints(self, request: Request) -> list[int]:
        """Tokens, in whole blocks, after which the request's state is to be copied aside; ascending."""
        if not self._keeps_states:
            return []
        last = request.num_prompt_tokens - 1  # at least one token is computed, for its logits
        ends = [last]
        if request.segments:  # the likeliest first: another question about the same pictures
            ends = [request.segments[-1].range.end, last, request.segments[0].range.offset]
        kept = [0]
        for end in (min(end, last) // self.block_size * self.block_size for end in ends):
            if all(abs(end - other) >= MIN_TOKENS_PER_CHECKPOINT for other in kept):
                kept.append(end)
        return sorted(kept[1:])

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        """Hashes of the full blocks among the first ``num_tokens`` tokens."""
        first, last = len(request.block_hashes), num_tokens // self.block_size
        if first >= last:
            return
        positions = request.positions_between(first * self.block_size, last * self.block_size)
        # Where they are the indices, they are those of a prompt without a table, too, and need not be hashed.
        shifts = np.split(positions - np.arange(first * self.block_size, last * self.block_size), last - first, axis=1)
        for index, shift in zip(range(first, last), shifts, strict=True):
            start, end = index * self.block_size, (index + 1) * self.block_size
            digest = hashlib.sha256(request.block_hashes[-1] if request.block_hashes else _ROOT + request.cache_salt)
            digest.update(_content(request, start, end))
            if request.seen_media is not None:  # maybe far away, even behind this block
                for segment in request.segments_seen(start, end):
                    name, number = segment.key
                    digest.update(f"|sees|{name}|{number}".encode())
            if shift.any():
                # In one type, because positions further on decide whether those of a prompt are whole numbers.
                digest.update(shift.astype(np.float64).tobytes())
            media = request.media_range if self._whole_media else None
            if media is not None and start <= media.offset < end:  # the blocks behind cover it through this one
                digest.update(_content(request, media.offset, media.end))
                shift = request.positions_between(media.offset, media.end) - media.offset
                digest.update(shift.astype(np.float64).tobytes())
            request.block_hashes.append(digest.digest())


def _content(request: Request, start: int, end: int) -> bytes:
    """What stands in tokens ``start`` to ``end``: ids, and which media where."""
    content = [np.asarray(request.token_ids[start:end], np.int64).tobytes()]
    for segment in request.segments_between(start, end):
        name, number = segment.key
        content.append(f"|{name}|{number}|{segment.range.offset - start}|{segment.range.length}".encode())
    return b"".join(content)
