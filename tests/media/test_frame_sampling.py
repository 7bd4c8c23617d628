"""Which frames: the rule, its limits, and an error for everything that is not a rule."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filmstrip.errors import InvalidRequestError
from filmstrip.media.sampling import candidate_range, is_explicit, parse_frame_sampling, sample_frame_indices
from filmstrip.types import FrameSampling, VideoMetadata


def clip(total=498, rate=30000 / 1001):
    return VideoMetadata(total, rate, total / rate, 64, 64, np.arange(total) / rate, "test")


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


def test_fps_counts_seconds_not_frames_in_a_part_of_a_variable_clip():
    """Ten frames a second for ten seconds, then one a second for ten more."""
    times = np.concatenate([np.arange(100) / 10, 10.0 + np.arange(10)])
    metadata = VideoMetadata(110, 5.5, 20.0, 64, 64, times, "test")

    def count(**settings):
        return len(sample_frame_indices(metadata, parse_frame_sampling(settings, "p")))

    assert count(fps=2) == 40
    assert count(fps=2, end=9.95) == 20
    assert count(fps=0.5, start=10) == 5
    assert count(fps=0.5, start=5) == 7
    assert count(fps=0.5, start=5, end=12) == 4  # shown until 13 s


def test_an_empty_range_names_the_length():
    with pytest.raises(InvalidRequestError, match=r"10\.000 s long"):
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


@given(
    total=st.integers(1, 5000),
    fps=st.floats(0.5, 240),
    num_frames=st.one_of(st.none(), st.just(-1), st.integers(1, 3000)),
    rate=st.one_of(st.none(), st.just(-1), st.floats(0.01, 300)),
    server=st.integers(1, 2000),
)
def test_indices_are_always_frames_of_the_clip_in_order(total, fps, num_frames, rate, server):
    settings = {"num_frames": num_frames, "fps": rate}
    indices = sample(total, fps, server, **settings)
    assert 1 <= len(indices) <= min(total, server)
    assert indices[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise(indices))
    assert indices[-1] <= total - 1
    if len(indices) > 1:
        assert indices[-1] == total - 1
