"""Who gives way when blocks run out, who comes back first, and who may not start at all."""

import random

import pytest

from filmstrip.engine.encoder_cache import EncoderCache
from filmstrip.engine.kv_cache import KVCache
from filmstrip.engine.request import Request
from filmstrip.engine.scheduler import Scheduler
from tests.engine.helpers import greedy
from tests.fakes import feature, prompt


class Steps:
    """A scheduler over a small pool, and a pretended model that always answers 1."""

    def __init__(self, num_blocks, *, budget=64, max_num_seqs=8):
        self.cache = KVCache(num_blocks, 4, enable_prefix_caching=False)
        self.scheduler = Scheduler(
            self.cache, EncoderCache(0), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        self.num_added = 0

    def add(self, each):
        self.num_added += 1
        self.scheduler.add(Request(f"r{self.num_added - 1}", each, greedy(16), frozenset(), self.num_added))

    def step(self):
        scheduled = self.scheduler.schedule()
        for request, num_tokens in scheduled.items():
            request.num_computed_tokens += num_tokens
            if request.num_uncomputed_tokens == 0:
                request.token_ids.append(1)
        self.cache.pool.check_integrity([each.block_table for each in self.scheduler.running])
        return {request.request_id: num_tokens for request, num_tokens in scheduled.items()}

    @property
    def waiting(self):
        return [request.request_id for request in self.scheduler.waiting]


def test_who_was_preempted_comes_before_who_never_ran():
    steps = Steps(6, max_num_seqs=3)
    for number in range(4):
        steps.add(prompt(8 if number < 3 else 1, seed=number))
    assert steps.step() == {"r0": 8, "r1": 8, "r2": 8}
    assert steps.step() == {"r0": 1, "r1": 1}
    assert steps.waiting == ["r2", "r3"]
    steps.scheduler.remove(steps.scheduler.running[0])
    assert steps.step() == {"r1": 1, "r2": 9}


def test_two_preempted_in_one_step_keep_their_order():
    """The oldest needs five blocks at once: both younger ones go, and wait in order of arrival."""
    steps = Steps(8, budget=24)
    for number in range(3):
        steps.add(prompt(24 if number == 0 else 4, seed=number))
    first, second, third = steps.scheduler.waiting
    for request, num_computed in ((first, 4), (second, 4), (third, 4)):
        steps.scheduler.waiting.remove(request)
        steps.scheduler.running.append(request)
        steps.cache.grow(request, num_computed)
        request.num_computed_tokens = num_computed
    for request in (second, third):
        request.token_ids += [1, 1, 1, 1, 1]
        steps.cache.grow(request, 5)
        request.num_computed_tokens = 8
    assert steps.step() == {"r0": 20}
    assert steps.waiting == ["r1", "r2"]


@pytest.mark.parametrize(("num_blocks", "starts"), [(15, False), (16, True)])
def test_a_prompt_waits_for_room_that_running_prompts_do_not_need(num_blocks, starts):
    """Frames of 6 tokens leave 2 of each step's 8, which would let the second prompt start; but the first has taken only 2
    of its 9 blocks by then, and the second needs 7."""
    steps = Steps(num_blocks, budget=8)
    steps.add(prompt(36, feature(0, num_segments=6, length=6, gap=0)))
    steps.add(prompt(28, seed=1))
    assert steps.step() == {"r0": 6} | ({"r1": 2} if starts else {})


@pytest.mark.parametrize("seed", range(20))
def test_segments_between_are_those_that_overlap(seed):
    chance = random.Random(seed)
    items, offset = [], 0
    for _ in range(3):
        items.append(feature(offset + chance.randrange(3), length=chance.randrange(1, 4), gap=chance.randrange(2)))
        offset = items[-1].segments[-1].end
    request = Request("r", prompt(offset + 3, *items), greedy(), frozenset(), 0)
    everything = [segment for item in items for segment in item.segments]
    for start in range(offset + 3):
        for end in range(start + 1, offset + 4):
            found = [segment.range for segment in request.segments_between(start, end)]
            assert found == [each for each in everything if each.offset < end and each.end > start]
