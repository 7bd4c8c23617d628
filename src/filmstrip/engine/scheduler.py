"""Who computes how many tokens in the next step; knows blocks and budgets, no tensors.

Each step is ``{request: num_tokens}``: prefill, a chunk of it and decode are one idea. Answers that have begun come first,
so that a long prompt never holds them up; then prompts under way, then waiting ones in order of arrival.
"""

from __future__ import annotations

from collections import deque

from filmstrip.engine.encoder_cache import EncoderCache
from filmstrip.engine.kv_cache import KVCache
from filmstrip.engine.request import Request
from filmstrip.types import PlaceholderRange

MIN_TOKENS_WORTH_WAITING = 256
"""A prompt waits for another that computes the same beginning if that spares it at least so many tokens."""


class Scheduler:
    """First come, first served, with preemption by recompute: when blocks run out, the youngest running request gives its
    blocks back, keeps its tokens and waits at the front."""

    def __init__(
        self,
        cache: KVCache,
        encoder_cache: EncoderCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        whole_segments: bool = False,
        whole_media: bool = False,
    ) -> None:
        """``whole_segments``: media segments are never cut; one that is longer than the budget goes over it.

        ``whole_media``: the same for all from a request's first media token to its last.
        """
        self._cache, self._encoder_cache = cache, encoder_cache
        self._whole_segments, self._whole_media = whole_segments, whole_media
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is, and free its blocks."""
        if request in self.running:
            self.running.remove(request)
            self._encoder_cache.let_go(request.attended_keys)
        else:
            self.waiting.remove(request)
        self._cache.free(request)

    def restart(self, request: Request) -> None:
        """Let a running request give its blocks back and be computed again from its first token on, as soon as it can."""
        self.running.remove(request)
        self._encoder_cache.let_go(request.attended_keys)
        self._cache.free(request)
        self.waiting.appendleft(request)

    def schedule(self) -> dict[Request, int]:
        """Tokens to compute per request; their blocks are allocated. Empty only if there is nothing to do."""
        scheduled: dict[Request, int] = {}
        budget = self._max_num_batched_tokens
        num_preemptions = self.num_preemptions
        # One token each for answers that have begun comes before any prompt takes the rest of the budget.
        for request in sorted(self.running, key=lambda request: request.num_uncomputed_tokens > 1):
            if budget > 0 and request in self.running:  # an earlier one may have preempted it
                budget = self._schedule_running(request, budget, scheduled)
        # Blocks are short in a step that preempted: whoever was sent to wait must not take them right back.
        if self.num_preemptions == num_preemptions:
            self._admit_waiting(budget, scheduled)
        return scheduled

    def _admit_waiting(self, budget: int, scheduled: dict[Request, int]) -> None:
        """Start waiting requests in order of arrival until the budget, the blocks or the places are used up."""
        passed: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs > len(passed):
            request = self.waiting.popleft()
            if self._is_worth_waiting(request):
                passed.append(request)
                continue
            num_tokens = self._admit(request, budget)
            if num_tokens == 0:
                passed.append(request)
                break
            self.running.append(request)
            scheduled[request] = num_tokens
            budget -= num_tokens
        self.waiting.extendleft(reversed(passed))

    def _is_worth_waiting(self, request: Request) -> bool:
        """Whether a running request is about to compute much of what this one begins with.

        Ten questions about a clip that arrive together compute the clip once: the first does, the others find its blocks.
        Whoever is waited for advances in every step or stops running, so nobody waits for ever.
        """
        return any(
            self._cache.num_tokens_to_come(request, each) >= MIN_TOKENS_WORTH_WAITING
            for each in self.running
            if each.num_uncomputed_tokens >= MIN_TOKENS_WORTH_WAITING
        )

    def _schedule_running(self, request: Request, budget: int, scheduled: dict[Request, int]) -> int:
        """Schedule a running request, preempting the youngest ones if need be; the budget that is left."""
        num_tokens = self._chunk(request, request.num_computed_tokens, budget)
        while self._cache.num_new_blocks(request, num_tokens) > self._cache.pool.num_free:
            victim = max(self.running, key=lambda candidate: candidate.arrival)
            self._preempt(victim)
            budget += scheduled.pop(victim, 0)
            if victim is request:
                return budget
            num_tokens = self._chunk(request, request.num_computed_tokens, budget)
        self._cache.grow(request, num_tokens)
        scheduled[request] = num_tokens
        return budget - num_tokens

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        self.restart(request)

    def _admit(self, request: Request, budget: int) -> int:
        """Start a waiting request if there is room for it; the tokens it got, 0 if it must go on waiting.

        Room means blocks for all of its tokens, not just for its first chunk, beside what the running requests are still
        to get: otherwise long prompts would push each other out halfway. It also means room for the media that its tokens
        attend to until it ends.
        """
        if not self._encoder_cache.can_hold(request.attended_keys):
            return 0
        prefix = self._cache.find_prefix(request)
        num_prefix_tokens = len(prefix) * self._cache.block_size
        num_new = -(-len(request.token_ids) // self._cache.block_size) - len(prefix)
        # Cached blocks that nobody holds are counted as free; taking them up makes them less.
        num_revived = sum(self._cache.pool.is_free(block) for block in prefix)
        num_promised = sum(self._cache.num_new_blocks(each, each.num_uncomputed_tokens) for each in self.running)
        if num_new + num_revived + num_promised > self._cache.pool.num_free:
            return 0
        num_tokens = self._chunk(request, num_prefix_tokens, budget)
        self._cache.take_prefix(request, prefix)
        self._encoder_cache.hold(request.attended_keys)
        if not request.was_scheduled:
            request.was_scheduled, request.num_cached_tokens = True, num_prefix_tokens
        self._cache.grow(request, num_tokens)
        return num_tokens

    def _chunk(self, request: Request, start: int, budget: int) -> int:
        """Tokens from ``start`` on that fit the budget; a cut inside media moves back to where they begin.

        A recurrent state can be copied aside only at the end of a chunk, so chunks end where that is of use.
        """
        end = min(len(request.token_ids), start + budget)
        checkpoint = self._cache.next_checkpoint(request, start)
        if checkpoint is not None and checkpoint <= end:
            return checkpoint - start
        if end < len(request.token_ids):
            media = self._media_around(request, end)
            if media is None:
                end = self._cache.align(request, start, end)
            elif media.offset > start:
                end = media.offset
            elif self._whole_segments or self._whole_media:
                end = media.end
        return end - start

    def _media_around(self, request: Request, end: int) -> PlaceholderRange | None:
        """The media that a cut before token ``end`` would cut: a segment, or all from the first to the last."""
        if self._whole_media:
            ranges = [request.media_range] if request.media_range else []
        else:
            ranges = [segment.range for segment in request.segments_between(end - 1, end)]
        return next((each for each in ranges if each.offset < end < each.end), None)
