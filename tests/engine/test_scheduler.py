"""Who gets how many tokens in a step: budgets, order, frame boundaries, preemption."""

import pytest
import torch

from filmstrip.engine.block_pool import BlockPool
from filmstrip.engine.encoder_cache import EncoderCache
from filmstrip.engine.kv_cache import KVCache
from filmstrip.engine.request import Request
from filmstrip.engine.scheduler import Scheduler
from tests.engine.helpers import alone, drain, fake_of, greedy, make_engine, run, step
from tests.fakes import feature, prompt


def make_scheduler(*, num_blocks=64, max_num_seqs=8, budget=32, prefix=True, whole_segments=False, whole_media=False):
    cache = KVCache(num_blocks, 4, enable_prefix_caching=prefix, whole_media=whole_media)
    scheduler = Scheduler(
        cache,
        EncoderCache(0),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        whole_segments=whole_segments,
        whole_media=whole_media,
    )
    return scheduler, cache


def make_request(number, each, max_tokens=8):
    return Request(f"r{number}", each, greedy(max_tokens), frozenset(), number)


def advance(scheduler, cache):
    """Schedule and pretend to compute: every request whose tokens are all computed gets token 1."""
    scheduled = scheduler.schedule()
    for request, num_tokens in scheduled.items():
        before = request.num_computed_tokens
        request.num_computed_tokens += num_tokens
        cache.publish(request, before)
        if request.num_uncomputed_tokens == 0:
            request.token_ids.append(1)
    cache.pool.check_integrity([r.block_table for r in [*scheduler.running, *scheduler.waiting]])
    return {request.request_id: num_tokens for request, num_tokens in scheduled.items()}


def test_answers_under_way_are_never_starved_by_a_long_prompt():
    scheduler, cache = make_scheduler(budget=8, num_blocks=128)
    for number in range(3):
        scheduler.add(make_request(number, prompt(2, seed=number), 100))
    advance(scheduler, cache)
    scheduler.add(make_request(3, prompt(100, seed=9)))
    for _ in range(20):
        assert advance(scheduler, cache) == {"r0": 1, "r1": 1, "r2": 1, "r3": 5}


def test_answers_come_before_an_older_prompt_under_way():
    scheduler, cache = make_scheduler(budget=8)
    scheduler.add(make_request(0, prompt(60, seed=1)))
    scheduler.add(make_request(1, prompt(2, seed=2)))
    for request in list(scheduler.waiting):  # as after a preemption that let the short one finish its prompt first
        scheduler.waiting.remove(request)
        scheduler.running.append(request)
    scheduler.running[1].token_ids.append(1)
    cache.grow(scheduler.running[1], 2)
    scheduler.running[1].num_computed_tokens = 2
    assert advance(scheduler, cache) == {"r1": 1, "r0": 7}


def test_first_come_first_served():
    scheduler, cache = make_scheduler(budget=10, prefix=False)
    for number in range(4):
        scheduler.add(make_request(number, prompt(8, seed=number)))
    assert advance(scheduler, cache) == {"r0": 8, "r1": 2}
    assert advance(scheduler, cache) == {"r0": 1, "r1": 6, "r2": 3}
    assert advance(scheduler, cache) == {"r0": 1, "r1": 1, "r2": 5, "r3": 3}


def test_a_big_request_is_not_overtaken_by_small_ones():
    scheduler, cache = make_scheduler(num_blocks=10, budget=64, prefix=False)
    scheduler.add(make_request(0, prompt(20, seed=0)))
    scheduler.add(make_request(1, prompt(24, seed=1)))
    scheduler.add(make_request(2, prompt(2, seed=2)))
    assert advance(scheduler, cache) == {"r0": 20}
    assert advance(scheduler, cache) == {"r0": 1}
    scheduler.remove(scheduler.running[0])
    assert advance(scheduler, cache) == {"r1": 24, "r2": 2}


def test_max_num_seqs():
    engine = make_engine(max_num_seqs=3)
    for seed in range(7):
        engine.add_request(str(seed), prompt(5, seed=seed), greedy(4))
    while engine.has_work:
        step(engine)
        assert engine.stats()["num_running"] <= 3
    assert max(len(counts) for counts in fake_of(engine).forwards) == 3


def test_the_budget_bounds_every_step():
    engine = make_engine(max_num_batched_tokens=9)
    run(engine, {str(seed): prompt(5 + 7 * seed, seed=seed) for seed in range(6)})
    assert max(sum(counts) for counts in fake_of(engine).forwards) == 9


@pytest.mark.parametrize(
    ("budget", "cuts"),
    [
        (16, [13, 29, 36]),  # 16 lies inside the frame that begins at 13
        (9, [8, 17, 23, 32, 36]),
        (3, [3, 6, 8, 11, 13, 16, 18, 21, 23, 26, 29, 32, 35, 36]),  # a frame larger than the budget is cut
    ],
)
def test_chunks_end_at_frame_boundaries(budget, cuts):
    """Frames of 4 tokens at 3, 8, 13, 18, 23; one token of text between them."""
    scheduler, cache = make_scheduler(budget=budget)
    each = prompt(36, feature(3, num_segments=5, length=4, gap=1))
    scheduler.add(make_request(0, each))
    ends, request = [], scheduler.waiting[0]
    while request.num_computed_tokens < 36:
        advance(scheduler, cache)
        ends.append(request.num_computed_tokens)
    assert ends == cuts


def test_whole_segments_go_over_the_budget_rather_than_be_cut():
    """Segments 3-12, 15-24, 27-36: without the rule a budget of 5 cuts them."""
    each = prompt(40, feature(3, num_segments=3, length=9, gap=3))
    scheduler, cache = make_scheduler(budget=5, whole_segments=True)
    scheduler.add(make_request(0, each))
    chunks = [advance(scheduler, cache)["r0"] for _ in range(6)]
    assert chunks == [3, 9, 3, 9, 3, 9]
    # Beside an answer under way, too; and a prompt that waits gets nothing of a budget that is overdrawn.
    scheduler, cache = make_scheduler(budget=5, whole_segments=True, prefix=False)
    scheduler.add(make_request(0, prompt(2, seed=1)))
    advance(scheduler, cache)
    scheduler.add(make_request(1, each))
    scheduler.add(make_request(2, prompt(4, seed=2)))
    assert advance(scheduler, cache) == {"r0": 1, "r1": 3, "r2": 1}
    assert advance(scheduler, cache) == {"r0": 1, "r1": 9}


def test_whole_segments_begun_by_a_cached_prefix():
    each = prompt(40, feature(3, num_segments=1, length=30))
    scheduler, cache = make_scheduler(budget=64, whole_segments=True)
    scheduler.add(make_request(0, each))
    advance(scheduler, cache)
    scheduler.remove(scheduler.running[0])
    again = prompt(35, feature(3, num_segments=1, length=30))
    scheduler.add(make_request(1, again))
    scheduled = advance(scheduler, cache)
    assert scheduled == {"r1": 3}  # 32 tokens were cached, to the end of a block inside the segment
    scheduler, cache = make_scheduler(budget=3, whole_segments=True)
    first = make_request(0, prompt(18, feature(3, num_segments=1, length=30 - 15)))
    scheduler.add(first)
    assert advance(scheduler, cache) == {"r0": 3}
    assert advance(scheduler, cache) == {"r0": 15}


@pytest.mark.parametrize(
    ("budget", "chunks"), [(5, [3, 33, 4]), (2, [2, 1, 33, 2, 2]), (35, [3, 35, 2]), (36, [36, 4]), (64, [40])]
)
def test_whole_media_are_computed_in_one_step(budget, chunks):
    """Segments 3-12, 15-24, 27-36 with text between them; behind the last the budget rules again."""
    scheduler, cache = make_scheduler(budget=budget, whole_media=True)
    scheduler.add(make_request(0, prompt(40, feature(3, num_segments=3, length=9, gap=3))))
    assert [advance(scheduler, cache)["r0"] for _ in chunks] == chunks


def shared_tokens(first, second):
    """Tokens of ``second`` that the prefix cache holds once ``first`` is computed, by a model of whole media."""
    scheduler, cache = make_scheduler(budget=64, whole_media=True)
    scheduler.add(make_request(0, first))
    advance(scheduler, cache)
    scheduler.remove(scheduler.running[0])
    return len(cache.find_prefix(make_request(1, second))) * 4


def test_whole_media_are_shared_only_with_the_same_media():
    picture, other = ({"num_segments": 1, "length": 10, "content": content} for content in (1, 2))
    two = prompt(40, feature(9, **picture), feature(25, **other))
    assert shared_tokens(two, two) == 36
    # Another question: to the end of a block inside the last picture, or of the one behind it.
    for place, num_shared in ((35, 32), (36, 36)):
        question = prompt(40, feature(9, **picture), feature(25, **other))
        question.token_ids[place] += 1
        assert shared_tokens(two, question) == num_shared
    # More media, fewer, others, elsewhere, or other words between them: only what stands before the first.
    assert shared_tokens(prompt(24, feature(9, **picture)), two) == 8
    assert shared_tokens(two, prompt(40, feature(9, **picture))) == 8
    assert shared_tokens(two, prompt(40, feature(9, **picture), feature(25, **picture))) == 8
    assert shared_tokens(two, prompt(40, feature(9, **picture), feature(26, **other))) == 8
    between = prompt(40, feature(9, **picture), feature(25, **other))
    between.token_ids[21] += 1
    assert shared_tokens(two, between) == 8
    before = prompt(40, feature(9, **picture), feature(25, **other))
    before.token_ids[5] += 1
    assert shared_tokens(two, before) == 4
    assert shared_tokens(prompt(40), prompt(40)) == 36


def test_a_preempted_requests_budget_goes_back():
    """r1 is scheduled first (it decodes), then sent to wait by the older r0, which may use the whole budget."""
    scheduler, cache = make_scheduler(num_blocks=6, budget=8, prefix=False)
    old, young = make_request(0, prompt(24, seed=0)), make_request(1, prompt(8, seed=1))
    for request, num_computed in ((old, 12), (young, 8)):
        cache.grow(request, num_computed)
        request.num_computed_tokens = num_computed
        scheduler.running.append(request)
    young.token_ids.append(1)
    assert advance(scheduler, cache) == {"r0": 8}
    assert list(scheduler.waiting) == [young]


def test_cached_blocks_that_nobody_holds_are_counted_once():
    """Six of eight blocks are free and cached. Taking four of them up leaves two: enough for 24 tokens, not for 28."""
    for num_tokens, fits in ((24, True), (25, False)):
        scheduler, cache = make_scheduler(num_blocks=8, budget=64)
        scheduler.add(make_request(0, prompt(24, seed=5)))
        advance(scheduler, cache)
        scheduler.remove(scheduler.running[0])
        assert (cache.pool.num_free, cache.pool.num_allocated) == (8, 0)
        scheduler.add(make_request(1, prompt(6, seed=1), 1))
        advance(scheduler, cache)
        assert cache.pool.num_free == 6
        again = make_request(2, prompt(num_tokens, seed=5))
        assert len(cache.find_prefix(again)) in (5, 6)
        scheduler.add(again)
        assert ("r2" in advance(scheduler, cache)) == fits


def test_a_block_that_somebody_holds_costs_nothing():
    scheduler, cache = make_scheduler(num_blocks=8, budget=64)
    scheduler.add(make_request(0, prompt(24, seed=5)))
    advance(scheduler, cache)
    scheduler.add(make_request(1, prompt(27, seed=5)))
    assert advance(scheduler, cache) == {"r0": 1, "r1": 3}
    assert cache.pool.num_free == 0


def test_preemption_keeps_generated_tokens():
    engine = make_engine(num_blocks=9, max_model_len=36, prefix=False)
    prompts = {str(seed): prompt(10, seed=seed) for seed in range(3)}
    for name, each in prompts.items():
        engine.add_request(name, each, greedy(20))
    numbers = dict.fromkeys(prompts, 0)
    while engine.has_work:
        for output in step(engine):
            numbers[output.request_id] += len(output.new_token_ids)
    assert engine.stats()["num_preemptions"] > 0
    assert numbers == {"0": 20, "1": 20, "2": 20}


def test_steps_end_even_if_the_budget_is_below_the_number_of_answers():
    engine = make_engine(max_num_batched_tokens=2, max_num_seqs=5)
    prompts = {str(seed): prompt(3, seed=seed) for seed in range(5)}
    for name, each in prompts.items():
        engine.add_request(name, each, greedy(5))
    assert drain(engine) == {name: alone(each, greedy(5)) for name, each in prompts.items()}


class TestBlockPool:
    def test_never_used_blocks_first_then_the_least_recently_freed(self):
        pool = BlockPool(6)
        first, second = pool.allocate(2), pool.allocate(2)
        for block in [*first, *second]:
            pool.publish(block, bytes([block]))
        pool.free(second)
        pool.free(first)
        # Never used 4 and 5, then the second sequence from its end, then the first from its end.
        assert pool.allocate(6) == [4, 5, *reversed(second), *reversed(first)]

    def test_blocks_without_a_name_are_reused_first(self):
        pool = BlockPool(3)
        blocks = pool.allocate(3)
        pool.publish(blocks[0], b"kept")
        pool.free(blocks)
        assert set(pool.allocate(2)) == set(blocks[1:])
        assert pool.find(b"kept") == blocks[0]
        pool.allocate(1)
        assert pool.find(b"kept") is None

    def test_taking_up_and_sharing(self):
        pool = BlockPool(2)
        (block,) = pool.allocate(1)
        pool.publish(block, b"x")
        pool.share(block)
        pool.free([block])
        assert (pool.is_free(block), pool.num_free) == (False, 1)
        pool.free([block])
        assert (pool.is_free(block), pool.num_free) == (True, 2)
        pool.share(block)
        assert pool.num_allocated == 1
        pool.check_integrity([[block]])

    def test_a_block_freed_twice_is_an_error(self):
        pool = BlockPool(2)
        blocks = pool.allocate(1)
        pool.free(blocks)
        with pytest.raises(ValueError, match="more often"):
            pool.free(blocks)
        pool.check_integrity([])

    def test_more_than_there_is(self):
        pool = BlockPool(2)
        with pytest.raises(ValueError, match="3 blocks wanted, 2 free"):
            pool.allocate(3)
        pool.check_integrity([])

    def test_the_first_with_a_content_keeps_the_name(self):
        pool = BlockPool(3)
        one, other, third = pool.allocate(3)
        pool.publish(one, b"x")
        pool.publish(other, b"x")
        assert pool.find(b"x") == one
        pool.publish(one, b"y")  # a block has one content as long as it is held
        assert pool.find(b"y") is None
        pool.free([one])
        pool.free([other])
        pool.check_integrity([[third]])
        assert pool.allocate(1) == [other]
        assert pool.find(b"x") == one

    def test_disowned_content_is_not_found(self):
        pool = BlockPool(2)
        blocks = pool.allocate(2)
        pool.publish(blocks[0], b"x")
        pool.disown(blocks)
        assert pool.find(b"x") is None
        pool.check_integrity([blocks])

    @pytest.mark.parametrize("tables", [[[0, 0]], [[0]], [[0, 1], [1]], []])
    def test_integrity_notices(self, tables):
        pool = BlockPool(3)
        pool.allocate(2)
        with pytest.raises(AssertionError):
            pool.check_integrity(tables)


class TestEncoderCache:
    @staticmethod
    def rows(value, count=2):
        return torch.full((count, 1, 4), float(value))  # 16 bytes a row

    def test_the_least_recently_used_goes_first(self):
        cache = EncoderCache(96)
        for number in range(3):
            assert cache.pin([("a", number)]) == [("a", number)]
            cache.put(("a", number), self.rows(number))
            cache.release()
        cache.pin([("a", 0)])
        cache.release()
        cache.pin([("a", 3)])
        cache.put(("a", 3), self.rows(3))
        cache.release()
        assert cache.pin([("a", n) for n in range(4)]) == [("a", 1)]
        assert cache.num_bytes == 96

    def test_pinned_segments_stay_over_the_budget_until_the_step_ends(self):
        cache = EncoderCache(40)
        keys = [("a", number) for number in range(4)]
        assert cache.pin(keys) == keys
        for key in keys:
            cache.put(key, self.rows(key[1]))
        assert [float(cache.get(key)[0, 0, 0]) for key in keys] == [0, 1, 2, 3]
        assert cache.num_bytes == 128
        cache.release()
        assert cache.num_bytes == 32
        assert cache.pin(keys) == keys[:3]

    def test_a_segment_larger_than_the_budget(self):
        cache = EncoderCache(10)
        cache.pin([("a", 0)])
        cache.put(("a", 0), self.rows(0))
        assert len(cache.get(("a", 0))) == 2
        cache.release()
        assert cache.num_bytes == 0

    def test_one_segment_wanted_twice_is_missing_once(self):
        cache = EncoderCache(1000)
        assert cache.pin([("a", 0), ("a", 0)]) == [("a", 0)]
        assert (cache.num_hits, cache.num_misses) == (0, 1)

    def test_putting_twice_and_dropping_keep_the_count(self):
        cache = EncoderCache(1000)
        cache.put(("a", 0), self.rows(0))
        cache.put(("a", 0), self.rows(1, 3))
        assert cache.num_bytes == 48
        cache.drop(("a", 0))
        cache.drop(("a", 0))
        assert cache.num_bytes == 0
