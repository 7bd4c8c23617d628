"""Requests that a model computes in different ways, by their length or because they show media, in one engine.

The fake pretends other rotary embeddings, and an adapter, by other positions: K and V of one way are wrong in another.
"""

import dataclasses

import numpy as np
import pytest

from filmstrip.types import ProcessedPrompt
from tests.engine.helpers import drain, greedy, make_engine, run
from tests.fakes import FakeModel, feature, prompt

LIMIT = 30


class ChangingFakeModel(FakeModel):
    """Long requests, and those with media, have positions of their own."""

    def __init__(self, *, limit=LIMIT, has_media_adapter=True):
        super().__init__()
        self.info = dataclasses.replace(
            self.info, original_max_position_embeddings=limit, has_media_adapter=has_media_adapter
        )

    def forward(self, batch):
        limit = self.info.original_max_position_embeddings
        positions = batch.positions.clone()
        long_rows = batch.rows_of([limit is not None and length > limit for length in batch.request_lens])
        if long_rows is not None:
            positions[:, long_rows] += 1000
        adapted = batch.rows_of([self.info.has_media_adapter and shows for shows in batch.has_media])
        if adapted is not None:
            positions[:, adapted] += 5000
        return super().forward(dataclasses.replace(batch, positions=positions))


def one_by_one(each, num_tokens):
    """The truth: every token from a fresh engine, which computes all before it at once."""
    tokens = []
    for _ in range(num_tokens):
        now = dataclasses.replace(each, token_ids=each.token_ids + tokens)
        engine = make_engine(model=ChangingFakeModel(), prefix=False)
        tokens += run(engine, {"now": now}, greedy(1))["now"]
    return tokens


def text(num_tokens, seed=0):
    return prompt(num_tokens, seed=seed, mrope=False)


def with_picture(num_tokens, seed=0):
    return prompt(num_tokens, feature(12, num_segments=1, length=3, content=seed), seed=seed, mrope=False)


PROMPTS = {
    "short": text(5),
    "crosses_at_once": text(LIMIT),
    "crosses_later": text(LIMIT - 5, seed=1),
    "long": text(LIMIT + 20),
    "picture": with_picture(18),
    "picture_crosses": with_picture(LIMIT - 3, seed=1),
    "picture_long": with_picture(LIMIT + 11),
}


@pytest.fixture(scope="module")
def truth():
    return {name: one_by_one(each, 9) for name, each in PROMPTS.items()}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("budget", [3, 16, 512])
@pytest.mark.parametrize("num_blocks", [18, 256])
def test_answers_are_those_of_requests_computed_at_once(truth, prefix, budget, num_blocks):
    engine = make_engine(
        model=ChangingFakeModel(),
        prefix=prefix,
        max_num_batched_tokens=budget,
        num_blocks=num_blocks,
        max_model_len=num_blocks * 4,
    )
    assert run(engine, PROMPTS, greedy(9)) == truth
    assert run(engine, PROMPTS, greedy(9)) == truth  # with whatever is in the caches now
    assert (engine.stats()["num_preemptions"] > 0) == (num_blocks == 18)


def test_a_request_that_becomes_long_is_computed_again():
    engine = make_engine(model=ChangingFakeModel())
    engine.add_request("a", text(LIMIT - 1), greedy(4))
    drain(engine)
    model = engine.model
    assert isinstance(model, ChangingFakeModel)
    assert model.forwards == [[LIMIT - 1], [1], [LIMIT + 1], [1]]
    assert engine.stats()["num_preemptions"] == 0


def test_an_answer_that_ends_at_the_limit_is_not_computed_again():
    engine = make_engine(model=ChangingFakeModel())
    engine.add_request("a", text(LIMIT - 1), greedy(2))
    drain(engine)
    model = engine.model
    assert isinstance(model, ChangingFakeModel)
    assert model.forwards == [[LIMIT - 1], [1]]


def hits_after(first, second, **options):
    engine = make_engine(model=ChangingFakeModel(**options))
    run(engine, {"first": first}, greedy(1))
    before = engine.stats()["prefix_cache_hit_tokens"]
    run(engine, {"second": second}, greedy(1))
    return engine.stats()["prefix_cache_hit_tokens"] - before


def test_blocks_serve_requests_of_the_same_way_only():
    token_ids = np.random.default_rng(0).integers(0, 90, 60).tolist()
    short, shorter, long, longer = (ProcessedPrompt(token_ids[:length]) for length in (20, 14, 40, 60))
    assert hits_after(short, shorter) == 12
    assert hits_after(long, longer) == 40
    assert hits_after(long, short) == hits_after(short, long) == 0
    assert hits_after(long, short, limit=None) == 16


def test_blocks_before_a_picture_serve_text_only_where_no_adapter_is():
    shows = with_picture(24)
    reads = ProcessedPrompt([*shows.token_ids[:12], 1, 2, 3])
    assert hits_after(shows, shows) == 20
    assert hits_after(shows, reads) == hits_after(reads, shows) == 0
    assert hits_after(shows, reads, has_media_adapter=False) == 12
