"""Which frames: the rule, its limits, an error for all that is not a rule, and what holds whatever is combined."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from filmstrip.errors import InvalidRequestError
from filmstrip.media.sampling import (
    candidate_range,
    given_frame_indices,
    is_explicit,
    parse_frame_sampling,
    sample_frame_indices,
)
from filmstrip.types import FrameSampling, VideoMetadata


def clip(total=498, rate=30000 / 1001):
    """A clip of constant rate."""
    return clip_at(np.arange(total) / rate, total / rate)


def clip_at(times, duration=None):
    """A clip whose frames stand at ``times``; the last is shown for 0.04 s if ``duration`` is not given."""
    times = np.asarray(times, float)
    duration = duration or float(times[-1]) + 0.04
    return VideoMetadata(len(times), len(times) / duration, duration, 64, 64, times, "test")


def sample(total=498, rate=30000 / 1001, server=None, **settings):
    return sample_frame_indices(clip(total, rate), parse_frame_sampling(settings, "p"), max_frames=server)


def test_the_known_case():
    assert sample(num_frames=4) == (0, 165, 331, 497)


def test_num_frames_and_fps_take_the_lower_count():
    assert len(sample(num_frames=10, fps=2)) == 10
    assert len(sample(num_frames=100, fps=2)) == 33  # floor(16.6166 s * 2)
    assert len(sample(300, 30, num_frames=-1, fps=1)) == 10
    assert len(sample(300, 30, num_frames=7, fps=-1)) == 7
    assert sample(20, 10, num_frames=-1) == tuple(range(20))


def test_at_least_one_and_at_most_the_clip():
    assert sample(10, 30, fps=0.01) == (0,)
    assert sample(10, 30, num_frames=1) == (0,)
    assert sample(10, 30, num_frames=50) == tuple(range(10))
    assert sample(10, 30, fps=1000) == tuple(range(10))
    assert sample(1, 30, num_frames=4) == (0,)


def test_a_whole_number_of_frames_survives_binary_fractions():
    assert len(sample(300, 30000 / 1001, fps=30000 / 1001)) == 300
    assert len(sample(90, 29.97, fps=29.97)) == 90


def test_bounds_on_the_count():
    assert len(sample(num_frames=100, max_frames=12)) == 12
    assert len(sample(fps=0.1, min_frames=6)) == 6
    assert len(sample(num_frames=-1, server=40)) == 40
    assert len(sample(num_frames=-1, max_frames=60, server=40)) == 40
    assert len(sample(3, 30, num_frames=1, min_frames=9)) == 3


def test_start_and_end():
    assert sample(100, 10, num_frames=3, start=2, end=4) == (20, 30, 40)
    assert sample(100, 10, num_frames=-1, start=9.5) == (95, 96, 97, 98, 99)
    assert sample(100, 10, fps=2, start=5) == tuple(np.linspace(50, 99, 10).astype(int))
    assert candidate_range(clip(100, 30), FrameSampling(start_seconds=0.1, end_seconds=0.3)) == (3, 9)


def test_the_lower_of_count_and_rate_inside_a_window():
    metadata = clip_at(np.arange(500) / 25)
    for num_frames, fps, count in [(10, 4, 10), (100, 4, 20), (-1, 4, 20), (10, -1, 10), (-1, 1000, 126)]:
        sampling = parse_frame_sampling({"num_frames": num_frames, "fps": fps, "start": 5, "end": 10}, "p")
        indices = sample_frame_indices(metadata, sampling)
        assert (len(indices), indices[0], indices[-1]) == (count, 125, 250)


def test_real_times_decide_what_lies_in_a_window():
    """Half the frames of this clip lie in its last tenth."""
    metadata = clip_at([*np.arange(50) * 0.18, *(9 + np.arange(50) * 0.02)])
    sampling = parse_frame_sampling({"num_frames": -1, "start": 9}, "p")
    assert sample_frame_indices(metadata, sampling) == tuple(range(50, 100))


def test_fps_counts_seconds_not_frames_in_a_part_of_a_variable_clip():
    """Ten frames a second for ten seconds, then one a second for ten more."""
    times = np.concatenate([np.arange(100) / 10, 10.0 + np.arange(10)])
    metadata = clip_at(times, 20.0)

    def count(**settings):
        return len(sample_frame_indices(metadata, parse_frame_sampling(settings, "p")))

    assert count(fps=2) == 40
    assert count(fps=2, end=9.95) == 20
    assert count(fps=0.5, start=10) == 5
    assert count(fps=0.5, start=5) == 7
    assert count(fps=0.5, start=5, end=12) == 4  # shown until 13 s


def test_an_empty_range_names_the_length():
    with pytest.raises(InvalidRequestError, match=r"no frame lies from start 12 s on; the clip is 10\.000 s long"):
        sample(100, 10, num_frames=3, start=12)
    with pytest.raises(InvalidRequestError, match="no frame lies between"):
        sample(100, 10, num_frames=3, start=1.02, end=1.08)


def test_what_counts_as_asked():
    assert not is_explicit(FrameSampling(max_frames=4, start_seconds=1))
    assert is_explicit(FrameSampling(fps=-1))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num_frames", [0, -2, 1.5, 2.0, "4", True, [], 2**31, math.nan]),
        ("fps", [0, -2, -0.5, "2", False, math.nan, math.inf, -math.inf, 1e12, {}]),
        ("min_frames", [0, -1, 1.5, "1", True]),
        ("max_frames", [0, -1, 1.5, "1", True]),
        ("start", [-1, math.nan, math.inf, "0", True]),
        ("end", [-1, math.nan, math.inf, "0", True]),
    ],
)
def test_wrong_values_name_their_key(key, values):
    for value in values:
        with pytest.raises(InvalidRequestError) as caught:
            parse_frame_sampling({key: value}, "media_io_kwargs.video")
        assert caught.value.param == f"media_io_kwargs.video.{key}"
        assert repr(value)[:40] in caught.value.message


def test_unknown_keys_and_contradictions():
    with pytest.raises(InvalidRequestError, match="num_frames, fps"):
        parse_frame_sampling({"frames": 3}, "p")
    with pytest.raises(InvalidRequestError) as caught:
        parse_frame_sampling({"start": 5, "end": 2}, "p")
    assert caught.value.param == "p.start"
    with pytest.raises(InvalidRequestError):
        parse_frame_sampling({"min_frames": 5, "max_frames": 2}, "p")


def test_none_is_not_said():
    assert parse_frame_sampling({"num_frames": None, "fps": 2}, "p") == FrameSampling(fps=2)


@given(value=st.one_of(st.booleans(), st.text(), st.floats(), st.integers(), st.lists(st.integers()), st.none()))
@pytest.mark.parametrize("key", ["num_frames", "fps", "start", "end", "min_frames", "max_frames"])
def test_any_value_is_taken_or_refused_by_name(key, value):
    sampling, refusal = attempt(lambda: parse_frame_sampling({key: value}, "a.b"))
    if refusal is not None:
        assert refusal.param == f"a.b.{key}"
        assert len(refusal.message) < 300
        return
    assert sampling is not None
    indices, refusal = attempt(lambda: sample_frame_indices(clip_at(np.arange(100) / 25), sampling))
    if refusal is not None:  # a window that ends before the clip begins is no window
        assert key in ("start", "end")
        assert refusal.param == key
        return
    assert indices is not None
    assert set(indices) <= set(range(100))


def given_frames(times, server=100, **settings):
    """Of frames that a client took at ``times``."""
    return given_frame_indices(clip_at(times), parse_frame_sampling(settings, "p"), max_frames=server)


def test_of_frames_that_a_client_chose_those_between_start_and_end():
    times = [100.0, 100.5, 103.0, 104.0, 110.0, 111.0]
    assert given_frames(times) == (0, 1, 2, 3, 4, 5)
    assert given_frames(times, start=100.5) == (1, 2, 3, 4, 5)
    assert given_frames(times, start=101, end=110) == (2, 3, 4)
    assert given_frames(times, end=104, num_frames=2) == (0, 3)
    assert given_frames(times, start=100.5, max_frames=3, num_frames=-1) == (1, 3, 5)
    assert given_frames(times, end=104, server=3) == (0, 2, 3)
    assert given_frames(times, start=111, fps=0.001) == (5,)
    for empty in ({"start": 112}, {"end": 99}, {"start": 105, "end": 106}):
        with pytest.raises(InvalidRequestError, match=r"last frame stands at 111\.000 s"):
            given_frames(times, **empty)


def attempt(call):
    """What ``call`` returns and None, or None and the error that it was refused with."""
    try:
        return call(), None
    except InvalidRequestError as error:
        return None, error


counts = st.one_of(st.none(), st.integers(1, 3000))
optional_seconds = st.one_of(st.none(), st.floats(0, 60))


clips = st.one_of(
    st.lists(st.floats(0.001, 2), min_size=1, max_size=300).map(lambda gaps: clip_at(np.cumsum([0.0, *gaps]))),
    st.builds(clip, st.integers(1, 5000), st.floats(0.5, 240)),
)


@given(
    metadata=clips,
    num_frames=st.one_of(st.just(-1), counts),
    fps=st.one_of(st.none(), st.just(-1), st.floats(0.01, 500)),
    start=optional_seconds,
    end=optional_seconds,
    least=counts,
    most=counts,
    server=counts,
)
def test_whatever_is_asked(metadata, num_frames, fps, start, end, least, most, server):
    assume(start is None or end is None or start <= end)
    assume(least is None or most is None or least <= most)
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
