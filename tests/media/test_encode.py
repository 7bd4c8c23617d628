"""What scripts may ask for and may not, and that nothing stays behind: threads, descriptors, event loops."""

import asyncio
import base64
import threading

import numpy as np
import pytest
from PIL import Image

from filmstrip import encode_image_base64, encode_video_base64, load_image, load_video
from filmstrip.config import MediaConfig
from filmstrip.errors import (
    InvalidRequestError,
    MediaBlockedError,
    MediaDecodeError,
    MediaFetchError,
    MediaTooLargeError,
)
from tests.media.clips import h264
from tests.media.numbered import numbered_frame, read_number


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return h264(tmp_path_factory.mktemp("clip"), "clip.mp4", num_frames=50)


def test_metadata_describe_the_frames(clip):
    frames, metadata = load_video(clip, num_frames=5, fps=1000, start=0.4, end=1.2)
    assert set(metadata) == {
        *("total_num_frames", "fps", "duration", "video_backend"),
        *("frames_indices", "timestamps", "height", "width"),
    }
    assert metadata["frames_indices"] == [10, 15, 20, 25, 30]
    assert metadata["timestamps"] == [0.4, 0.6, 0.8, 1.0, 1.2]
    assert (metadata["height"], metadata["width"]) == frames.shape[1:3] == (96, 160)
    assert [read_number(frame) for frame in frames] == metadata["frames_indices"]


def test_min_and_max_frames(clip):
    assert len(load_video(clip, num_frames=3, min_frames=7)[0]) == 7
    assert len(load_video(clip, num_frames=-1, max_frames=9)[0]) == 9
    assert len(load_video(clip, num_frames=-1, config=MediaConfig(max_video_frames=11))[0]) == 11


@pytest.mark.parametrize("key", ["num_frames", "fps", "start", "end", "min_frames", "max_frames"])
@pytest.mark.parametrize("value", [True, "3", float("nan"), float("inf"), -2, [1]])
def test_wrong_settings_name_their_key(clip, key, value):
    with pytest.raises(InvalidRequestError) as caught:
        load_video(clip, **{key: value})
    assert caught.value.param == f"load_video.{key}"


def test_frames_in_one_url_are_a_video():
    pictures = [Image.fromarray(numbered_frame(number, 80, 48)) for number in (3, 4, 5)]
    joined = encode_video_base64(pictures, num_frames=-1)
    assert joined.count(",") == 2
    frames, metadata = load_video(f"data:video/jpeg;base64,{joined}", num_frames=2)
    assert [read_number(frame) for frame in frames] == [3, 5]
    assert metadata["video_backend"] == "frames"
    assert metadata["total_num_frames"] == 3
    with pytest.raises(MediaTooLargeError, match="3 frames; the limit is 2"):
        load_video(f"data:video/jpeg;base64,{joined}", config=MediaConfig(max_video_frames=2))
    with pytest.raises(MediaFetchError, match="frame 1"):
        load_video("data:video/jpeg;base64," + joined.replace(",", ",!!!!", 1))
    with pytest.raises(MediaDecodeError, match="frame 1"):
        load_video("data:video/jpeg;base64," + joined.replace(",", ",AAAA", 1))


def test_one_frame_is_a_video_too():
    encoded = encode_video_base64([numbered_frame(9, 80, 48)], format="PNG")
    frames, _ = load_video(f"data:video/png;base64,{encoded}")
    np.testing.assert_array_equal(frames, [numbered_frame(9, 80, 48)])


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 5, 4), (7, 5)])
def test_png_keeps_every_kind_of_array(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if shape[-1] == 4:
        array[..., 3] = 255
    loaded = np.asarray(load_image("data:image/png;base64," + encode_image_base64(array)))
    expected = np.stack([array] * 3, -1) if array.ndim == 2 else array[..., :3]
    np.testing.assert_array_equal(loaded, expected)


def test_quality_is_that_of_the_format():
    picture = numbered_frame(5, 200, 120)
    low, high = (len(encode_image_base64(picture, "jpeg", quality=quality)) for quality in (10, 95))
    assert low < high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_image_base64(np.zeros((2, 2, 3), np.uint8), "tiff"), "JPEG, PNG, WEBP"),
        (lambda: encode_video_base64(np.zeros((2, 4, 4, 3), np.uint8), format="mp4"), "JPEG, PNG, WEBP"),
        (lambda: encode_video_base64(np.zeros((2, 4, 4, 3), np.uint8), num_frames=0), "num_frames"),
        (lambda: encode_video_base64(np.zeros((2, 4, 4, 3), np.uint8), num_frames=-3), "num_frames"),
        (lambda: encode_video_base64(np.zeros((2, 4, 4, 3), np.uint8), fps=2), "fps"),
        (lambda: encode_video_base64(np.zeros((2, 4, 4, 3), np.float32)), "uint8"),
        (lambda: encode_image_base64(np.zeros((2, 2, 2), np.uint8)), "array"),
        (lambda: load_video(b""), "video"),
        (lambda: load_video(b"no video at all"), "video"),
        (lambda: load_image(b"no picture at all"), "image"),
        (lambda: load_video("data:video/mp4;base64,?"), "base64"),
        (lambda: load_video("data:text/html;base64,AAAA"), "text/html"),
        (lambda: load_video("ftp://example.org/clip.mp4"), "scheme"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(InvalidRequestError, match=message):
        call()


def test_policy_holds_for_scripts_too(clip):
    with pytest.raises(MediaBlockedError):
        load_video("http://127.0.0.1:9/clip.mp4", config=MediaConfig())
    with pytest.raises(MediaBlockedError):
        load_video(str(clip), config=MediaConfig(allow_local_files=False))
    with pytest.raises(MediaTooLargeError, match="100"):
        load_video(
            "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode(),
            config=MediaConfig(max_media_bytes=100),
        )


def test_no_thread_is_left_behind(clip):
    before = set(threading.enumerate())
    for source in (clip, clip.read_bytes(), clip.as_uri(), "http://127.0.0.1:9/clip.mp4"):
        if source == "http://127.0.0.1:9/clip.mp4":
            with pytest.raises(MediaBlockedError):
                load_video(source)
        else:
            load_video(source, num_frames=2)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) <= before


def test_it_works_inside_an_event_loop(clip):
    async def inside():
        return load_video(clip, num_frames=2)[1]["frames_indices"]

    assert asyncio.run(inside()) == [0, 49]
