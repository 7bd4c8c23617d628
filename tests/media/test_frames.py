"""Frames sampled by the client: their times, sizes and limits (attack case A30)."""

import io
import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from filmstrip.errors import InvalidRequestError, MediaDecodeError, MediaTooLargeError
from filmstrip.media.frames import frame_times, open_frame_array, open_frames
from filmstrip.media.source import BytesSource
from filmstrip.types import FrameTiming

LIMITS = {"max_pixels": 10_000, "max_frames": 8}


def picture(color, size=(8, 6), format="PNG", **options):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format, **options)
    return BytesSource(file.getvalue())


def times(num_frames, **timing):
    return frame_times(num_frames, FrameTiming(**timing))


def test_without_any_timing_two_frames_a_second_are_assumed():
    result = times(5)
    assert result.timestamps.tolist() == [0, 0.5, 1, 1.5, 2]
    assert (result.fps, result.duration, result.assumed) == (2, 2.5, True)


@pytest.mark.parametrize(
    ("num_frames", "timing", "timestamps", "fps", "duration"),
    [
        (3, {"fps": 4}, [0, 0.25, 0.5], 4, 0.75),
        (4, {"duration": 8}, [0, 2, 4, 6], 0.5, 8),
        (3, {"fps": 30, "frames_indices": (0, 15, 30)}, [0, 0.5, 1], 2, 1.5),
        (3, {"fps": 30, "frames_indices": (30, 45, 60), "total_num_frames": 90}, [1, 1.5, 2], 2, 3),
        (2, {"total_num_frames": 100, "duration": 4, "frames_indices": (0, 99)}, [0, 3.96], 1 / 3.96, 4),
        (3, {"fps": 10, "frames_indices": (0, 1, 8)}, [0, 0.1, 0.8], 2.5, 1.2),
        (1, {"fps": 25, "frames_indices": (50,)}, [2], 25, 2.04),
        (2, {"fps": 25, "frames_indices": (5, 5)}, [0.2, 0.2], 25, 0.24),
        (2, {"fps": 10, "total_num_frames": 2, "duration": 3}, [0, 0.1], 10, 3),
    ],
)
def test_times_follow_from_what_is_given(num_frames, timing, timestamps, fps, duration):
    result = times(num_frames, **timing)
    assert result.timestamps.dtype == np.float64
    np.testing.assert_allclose(result.timestamps, timestamps, rtol=1e-12)
    assert result.fps == pytest.approx(fps)
    assert result.duration == pytest.approx(duration)
    assert not result.assumed


def test_a_total_alone_says_nothing_of_time():
    assert times(3, total_num_frames=3).assumed


@pytest.mark.parametrize(
    ("timing", "message"),
    [
        ({"frames_indices": (0, 2, 1), "fps": 1}, "frames_indices must not decrease"),
        ({"frames_indices": (-1, 0, 1), "fps": 1}, "frames_indices must be integers from 0"),
        ({"frames_indices": (0, 1), "fps": 1}, "frames_indices has 2 entries, but 3 frames"),
        ({"frames_indices": (0, 1, 2, 3), "fps": 1}, "frames_indices has 4 entries, but 3 frames"),
        ({"frames_indices": (), "fps": 1}, "frames_indices has 0 entries"),
        ({"frames_indices": (0, 1, math.nan), "fps": 1}, "frames_indices must be integers"),
        ({"frames_indices": (0, 1, True), "fps": 1}, "frames_indices must be integers"),
        ({"frames_indices": (0, 1, "2"), "fps": 1}, "frames_indices must be integers"),
        ({"frames_indices": (0, 1, 10**30), "fps": 1}, "frames_indices must be integers"),
        ({"frames_indices": (0, 1, 9), "fps": 1, "total_num_frames": 9}, "ends with 9, but total_num_frames is 9"),
        ({"frames_indices": (0, 1, 2)}, "frames_indices can be turned into times only with fps"),
        ({"frames_indices": (0, 1, 2), "duration": 1}, "frames_indices can be turned into times only with fps"),
        ({"frames_indices": (0, 1, 2), "total_num_frames": 3}, "frames_indices can be turned into times only"),
        ({"total_num_frames": 2}, "total_num_frames is 2, but 3 frames"),
        ({"total_num_frames": 300, "duration": 10}, "frames_indices is needed: total_num_frames is 300"),
        *[({"total_num_frames": value}, "total_num_frames must be") for value in (0, -1, 2.5, True, "3")],
        *[({"fps": value}, "fps must be a number") for value in (0, -1, math.nan, math.inf, 1e9, "2", True, 1e-300)],
        *[
            ({"duration": value}, "duration must be a number")
            for value in (0, -1, math.nan, math.inf, 1e300, "2", True)
        ],
    ],
)
def test_timing_that_cannot_be_is_refused(timing, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        times(3, **timing)
    assert caught.value.param == message.split(" ")[0] or caught.value.param in timing
    with pytest.raises(InvalidRequestError) as caught:
        frame_times(3, FrameTiming(**timing), "messages[0].video_url")
    assert caught.value.param == "messages[0].video_url"


number = st.one_of(st.none(), st.floats(), st.integers(-3, 2**40), st.booleans(), st.just("1"))


@given(
    st.integers(1, 5),
    number,
    st.one_of(st.none(), st.lists(st.integers(-1, 50), max_size=6).map(tuple)),
    number,
    number,
)
def test_any_timing_is_refused_or_gives_rising_finite_times(num_frames, fps, indices, total, duration):
    try:
        result = times(num_frames, fps=fps, frames_indices=indices, total_num_frames=total, duration=duration)
    except InvalidRequestError:
        return
    assert len(result.timestamps) == num_frames
    assert np.isfinite(result.timestamps).all()
    assert (np.diff(result.timestamps) >= 0).all()
    assert result.timestamps[0] >= 0
    assert 0 < result.fps < math.inf
    assert 0 < result.duration < math.inf


def test_pictures_look_like_a_video():
    reader = open_frames([picture((n, 0, 0)) for n in range(4)], FrameTiming(fps=4), **LIMITS)
    metadata = reader.metadata
    assert (metadata.total_num_frames, metadata.fps, metadata.height, metadata.width) == (4, 4, 6, 8)
    assert (metadata.video_backend, metadata.timing_assumed) == ("frames", False)
    assert metadata.timestamps.tolist() == [0, 0.25, 0.5, 0.75]
    for index in (2, 0, 3, 3):
        assert reader.frame(index).shape == (6, 8, 3)
        assert (reader.frame(index) == (index, 0, 0)).all()
    reader.close()
    reader.close()


def test_pictures_may_be_of_different_formats_and_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture((9, 9, 9)), picture((9, 9, 9), (6, 8), "JPEG", exif=exif), picture((9, 9, 9), format="WEBP")]
    reader = open_frames(frames, FrameTiming(), **LIMITS)
    assert [reader.frame(index).shape for index in range(3)] == [(6, 8, 3)] * 3
    assert reader.metadata.timing_assumed


def test_pictures_of_different_sizes_are_refused():
    with pytest.raises(MediaDecodeError, match="frame 2 is 6x8, frame 0 8x6"):
        open_frames([picture(0), picture(0), picture(0, (6, 8))], FrameTiming(), **LIMITS)


def test_too_many_frames_are_refused_before_any_is_opened():
    with pytest.raises(MediaTooLargeError, match=r"9 frames; the limit is 8 \(max_video_frames, --max-video-frames\)"):
        open_frames([BytesSource(b"not a picture")] * 9, FrameTiming(), **LIMITS)


def test_a_broken_picture_is_named():
    with pytest.raises(MediaDecodeError, match=r"frame 1: .*not an image"):
        open_frames([picture(0), BytesSource(bytes(100))], FrameTiming(), **LIMITS)
    with pytest.raises(MediaTooLargeError, match=r"frame 1: .*--max-image-pixels"):
        open_frames([picture(0), picture(0, (200, 200))], FrameTiming(), **LIMITS)
    with picture(0, (60, 60)).open() as file:
        cut_off = BytesSource(file.read()[:-30])
    with pytest.raises(MediaDecodeError, match=r"frame 1: .*PNG"):
        open_frames([picture(0, (60, 60)), cut_off], FrameTiming(), **LIMITS).frame(1)


def test_no_frames_are_an_error():
    with pytest.raises(MediaDecodeError, match="no frames"):
        open_frames([], FrameTiming(), **LIMITS)


def test_opening_can_be_cancelled():
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(InterruptedError):
        open_frames([picture(0)], FrameTiming(), **LIMITS, cancel=cancel)


def test_arrays_look_like_a_video():
    array = np.arange(4 * 6 * 8 * 3, dtype=np.uint8).reshape(4, 6, 8, 3)
    reader = open_frame_array(array, FrameTiming(fps=30, frames_indices=(0, 10, 20, 30)), **LIMITS)
    assert (reader.metadata.total_num_frames, reader.metadata.height, reader.metadata.width) == (4, 6, 8)
    assert reader.metadata.fps == pytest.approx(3)
    assert (reader.frame(3) == array[3]).all()


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 4, 4, 3)),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((2, 0, 4, 3), np.uint8),
        [[1]],
        "x",
    ],
)
def test_other_arrays_are_refused(frames):
    with pytest.raises(MediaDecodeError, match="array"):
        open_frame_array(frames, FrameTiming(), **LIMITS)


def test_arrays_have_the_same_limits():
    with pytest.raises(MediaTooLargeError, match="--max-video-frames"):
        open_frame_array(np.zeros((9, 1, 1, 3), np.uint8), FrameTiming(), **LIMITS)
    with pytest.raises(MediaTooLargeError, match="200x100 = 20000 pixels"):
        open_frame_array(np.zeros((1, 100, 200, 3), np.uint8), FrameTiming(), **LIMITS)
