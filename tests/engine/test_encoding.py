"""Which segments are encoded, in which runs: holes in the encoder cache, neighbours, bounds, chunks."""

import dataclasses

import pytest

from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import PlaceholderRange
from tests.engine.helpers import alone, greedy, make_engine, run, step
from tests.fakes import FakeModel, feature, prompt


class CountingModel(FakeModel):
    """Remembers the number of patch rows and segments of each call of the encoder."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def encode(self, items):
        self.calls += [(len(item.patches), item.num_segments) for item in items]
        return super().encode(items)


def forget(engine, item, *numbers):
    """Drop segments of a media item from the encoder cache."""
    for number in numbers:
        engine.runner.encoder_cache.drop((f"video:{item.media_hash}", number))


def test_holes_in_the_encoder_cache_are_filled_piece_by_piece():
    one, other = feature(2, num_segments=5, content=80), feature(30, num_segments=4, content=81)
    each = prompt(60, one, other, seed=15)
    engine = make_engine(prefix=False, model=CountingModel())
    assert run(engine, {"all": each})["all"] == alone(each)
    assert engine.model.calls == [(15, 5), (12, 4)]
    forget(engine, one, 0, 2, 3)
    forget(engine, other, 3)
    assert run(engine, {"holes": each})["holes"] == alone(each)
    assert engine.model.calls[2:] == [(3, 1), (6, 2), (3, 1)]


def test_following_segments_of_two_items_are_no_neighbours():
    """Segment 0 of one item and segment 1 of the next miss: their numbers follow, their pixels do not."""
    one, other = feature(2, num_segments=2, content=82), feature(12, num_segments=2, content=83)
    each = prompt(40, one, other, seed=16)
    engine = make_engine(prefix=False, model=CountingModel())
    run(engine, {"all": each})
    forget(engine, one, 0)
    forget(engine, other, 1)
    assert run(engine, {"again": each})["again"] == alone(each)
    assert engine.model.calls[2:] == [(3, 1), (3, 1)]


@pytest.mark.parametrize(("bound", "calls"), [(1, [1] * 5), (3, [1] * 5), (7, [2, 2, 1]), (100, [5])])
def test_long_videos_are_encoded_in_bounded_pieces(monkeypatch, bound, calls):
    monkeypatch.setattr("filmstrip.engine.model_runner.MAX_PATCHES_PER_ENCODE", bound)
    each = prompt(40, feature(2, num_segments=5, content=84), seed=17)
    engine = make_engine(model=CountingModel())
    assert run(engine, {"a": each})["a"] == alone(each)
    assert [num_segments for _, num_segments in engine.model.calls] == calls


def test_parts_of_a_picture_are_encoded_as_they_are_shown():
    """Its grid has one temporal group, whatever the number of segments; what is encoded has the grid of its own rows."""
    picture = dataclasses.replace(feature(1, num_segments=5, content=88, modality="image"), grid_thw=(1, 15, 1))
    each = prompt(40, picture, seed=18)
    engine = make_engine(max_num_batched_tokens=8, model=CountingModel())
    assert run(engine, {"a": each})["a"] == alone(each)
    assert engine.model.calls == [(6, 2), (6, 2), (3, 1)]


def test_a_chunk_encodes_what_it_shows_and_no_more():
    engine = make_engine(max_num_batched_tokens=8, model=CountingModel())
    each = prompt(30, feature(0, num_segments=6, length=4, gap=0, content=85))
    engine.add_request("a", each, greedy())
    for number in range(1, 4):
        step(engine)
        assert engine.model.num_encoded_segments == 2 * number
    step(engine)
    assert engine.model.num_encoded_segments == 6


def test_two_requests_of_one_step_encode_a_clip_once():
    prompts = {str(seed): prompt(30, feature(seed, content=86), seed=seed) for seed in range(4)}
    engine = make_engine(prefix=False, model=CountingModel(), encoder_cache_bytes=0)
    assert run(engine, prompts) == {name: alone(each) for name, each in prompts.items()}
    assert engine.model.calls == [(9, 3)]
    assert engine.stats()["encoder_cache_bytes"] == 0


def test_nothing_is_encoded_while_answering():
    engine = make_engine(encoder_cache_bytes=0, model=CountingModel())
    each = prompt(12, feature(0, content=87))
    run(engine, {"a": each}, greedy(20))
    assert engine.model.calls == [(9, 3)]


GRIDS = ((2, 2), (1, 3), (2, 1))
RANGES = (PlaceholderRange(2, 4), PlaceholderRange(7, 3), PlaceholderRange(10, 2))


def tiles():
    """A media item whose segments have 4, 3 and 2 patch rows."""
    return dataclasses.replace(feature(0, num_segments=1, length=9, content=88), segments=RANGES, segment_grids=GRIDS)


@pytest.mark.parametrize("max_num_batched_tokens", [1, 4, 512])
def test_segments_of_different_sizes(max_num_batched_tokens):
    """They are seen as if each were an item of its own."""
    whole, apart, start = tiles(), [], 0
    for number, (grid, place) in enumerate(zip(GRIDS, RANGES, strict=True)):
        rows = SharedTensor.create((place.length, whole.patches.shape[1]))
        rows.array[:] = whole.patches.array[start : start + place.length]
        apart.append(
            dataclasses.replace(
                whole, patches=rows, grid_thw=(1, *grid), segments=(place,), segment_grids=(), media_hash=str(number)
            )
        )
        start += place.length
    one, many = prompt(20, whole, seed=18), prompt(20, *apart, seed=18)
    engine = make_engine(max_num_batched_tokens=max_num_batched_tokens)
    assert run(engine, {"a": one})["a"] == alone(many)


@pytest.mark.parametrize(("bound", "calls"), [(1, [4, 3, 2]), (6, [4, 5]), (7, [7, 2]), (9, [9])])
def test_segments_of_different_sizes_in_bounded_pieces(monkeypatch, bound, calls):
    monkeypatch.setattr("filmstrip.engine.model_runner.MAX_PATCHES_PER_ENCODE", bound)
    each = prompt(20, tiles(), seed=18)
    engine = make_engine(model=CountingModel(), prefix=False)
    assert run(engine, {"a": each})["a"] == alone(each)
    assert [num_rows for num_rows, _ in engine.model.calls] == calls
    forget(engine, tiles(), 1)
    assert run(engine, {"again": each})["again"] == alone(each)
    assert engine.model.calls[len(calls) :] == [(3, 1)]
