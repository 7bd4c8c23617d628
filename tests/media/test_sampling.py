"""Sampling with every setting at once: the rules that hold whatever is combined."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from filmstrip.errors import InvalidRequestError
from filmstrip.media.sampling import candidate_range, parse_frame_sampling, sample_frame_indices
from filmstrip.types import VideoMetadata


def clip(times, duration=None):
    times = np.asarray(times, float)
    duration = duration or float(times[-1]) + 0.04
    return VideoMetadata(len(times), len(times) / duration, duration, 64, 64, times, "test")


counts = st.one_of(st.none(), st.integers(1, 400))
optional_seconds = st.one_of(st.none(), st.floats(0, 60))


@given(
    gaps=st.lists(st.floats(0.001, 2), min_size=1, max_size=300),
    num_frames=st.one_of(st.just(-1), counts),
    fps=st.one_of(st.none(), st.just(-1), st.floats(0.01, 500)),
    start=optional_seconds,
    end=optional_seconds,
    least=counts,
    most=counts,
    server=counts,
)
def test_whatever_is_asked(gaps, num_frames, fps, start, end, least, most, server):
    assume(start is None or end is None or start <= end)
    assume(least is None or most is None or least <= most)
    metadata = clip(np.cumsum([0.0, *gaps]))
    settings = {"num_frames": num_frames, "fps": fps, "start": start, "end": end}
    sampling = parse_frame_sampling({**settings, "min_frames": least, "max_frames": most}, "p")
    try:
        first, last = candidate_range(metadata, sampling)
    except InvalidRequestError:
        between = (metadata.timestamps >= (start or 0)) & (metadata.timestamps <= (math.inf if end is None else end))
        assert not between.any()
        return
    indices = sample_frame_indices(metadata, sampling, max_frames=server)
    assert all(isinstance(index, int) for index in indices)
    assert all(later > earlier for earlier, later in itertools.pairwise(indices))
    assert indices[0] == first
    assert indices[-1] == (last if len(indices) > 1 else first)
    num_candidates = last - first + 1
    upper = min(count for count in (num_candidates, most, server) if count is not None)
    assert min(least or 1, upper) <= len(indices) <= upper
    if num_frames not in (None, -1) and least is None:
        assert len(indices) <= num_frames
    if num_frames not in (None, -1) and fps in (None, -1):
        assert len(indices) == min(max(num_frames, least or 1), upper)


@given(value=st.one_of(st.booleans(), st.text(), st.floats(), st.integers(), st.lists(st.integers()), st.none()))
@pytest.mark.parametrize("key", ["num_frames", "fps", "start", "end", "min_frames", "max_frames"])
def test_any_value_is_taken_or_refused_by_name(key, value):
    sampling, refusal = attempt(lambda: parse_frame_sampling({key: value}, "a.b"))
    if refusal is not None:
        assert refusal.param == f"a.b.{key}"
        assert len(refusal.message) < 300
        return
    indices, refusal = attempt(lambda: sample_frame_indices(clip(np.arange(100) / 25), sampling))
    if refusal is not None:  # a window that ends before the clip begins is no window
        assert key in ("start", "end")
        assert refusal.param == key
        return
    assert set(indices) <= set(range(100))


def attempt(call):
    """What ``call`` returns and None, or None and the error that it was refused with."""
    try:
        return call(), None
    except InvalidRequestError as error:
        return None, error


def test_the_lower_of_count_and_rate_inside_a_window():
    metadata = clip(np.arange(500) / 25)
    for num_frames, fps, count in [(10, 4, 10), (100, 4, 20), (-1, 4, 20), (10, -1, 10), (-1, 1000, 126)]:
        sampling = parse_frame_sampling({"num_frames": num_frames, "fps": fps, "start": 5, "end": 10}, "p")
        indices = sample_frame_indices(metadata, sampling)
        assert (len(indices), indices[0], indices[-1]) == (count, 125, 250)


def test_real_times_decide_what_lies_in_a_window():
    """Half the frames of this clip lie in its last tenth."""
    metadata = clip([*np.arange(50) * 0.18, *(9 + np.arange(50) * 0.02)])
    sampling = parse_frame_sampling({"num_frames": -1, "start": 9}, "p")
    assert sample_frame_indices(metadata, sampling) == tuple(range(50, 100))
