"""Pictures and clips for scripts: what is loaded is right, what is encoded loads back, what is wrong is named."""

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
from tests.media.numbered import encode, numbered_frame, read_number


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return encode(folder / "clip.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "20", num_frames=90, rate="30")


def test_load_video_says_what_it_loaded(clip):
    frames, metadata = load_video(clip, num_frames=4)
    assert frames.dtype == np.uint8
    assert frames.shape == (4, 96, 160, 3)
    assert [read_number(frame) for frame in frames] == [0, 29, 59, 89]
    assert metadata["frames_indices"] == [0, 29, 59, 89]
    assert metadata["timestamps"] == [index / 30 for index in (0, 29, 59, 89)]
    assert (metadata["total_num_frames"], metadata["fps"], metadata["duration"]) == (90, 30.0, 3.0)
    assert metadata["video_backend"] == "pyav"


def test_metadata_describe_the_frames_of_a_part(clip):
    frames, metadata = load_video(clip, num_frames=5, fps=1000, start=0.4, end=1.2)
    assert set(metadata) == {
        *("total_num_frames", "fps", "duration", "video_backend"),
        *("frames_indices", "timestamps", "height", "width"),
    }
    assert metadata["frames_indices"] == [12, 18, 24, 30, 36]
    assert metadata["timestamps"] == [0.4, 0.6, 0.8, 1.0, 1.2]
    assert (metadata["height"], metadata["width"]) == frames.shape[1:3] == (96, 160)
    assert [read_number(frame) for frame in frames] == metadata["frames_indices"]


def test_load_video_settings(clip):
    assert len(load_video(clip)[0]) == 32
    assert len(load_video(clip, num_frames=10, fps=2)[0]) == 6
    assert len(load_video(clip, num_frames=-1)[0]) == 90
    assert load_video(clip, num_frames=2, start=1, end=2)[1]["frames_indices"] == [30, 60]


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


def test_a_start_beyond_the_end_names_its_key(clip):
    with pytest.raises(InvalidRequestError, match=r"3\.000 s long") as caught:
        load_video(clip, start=9)
    assert caught.value.param == "start"


def test_every_kind_of_address_gives_the_same_frames(clip):
    expected = load_video(clip, num_frames=3)[0]
    url = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    for source in (str(clip), clip.as_uri(), clip.read_bytes(), url):
        np.testing.assert_array_equal(load_video(source, num_frames=3)[0], expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_encoded_video_loads_back(clip, format):
    encoded = encode_video_base64(clip, num_frames=5, format=format)
    frames, metadata = load_video(f"data:video/{format.lower()};base64,{encoded}")
    assert [read_number(frame) for frame in frames] == [0, 22, 44, 66, 89]
    assert metadata["timestamps"] == [0, 0.5, 1.0, 1.5, 2.0]
    if format == "PNG":
        np.testing.assert_array_equal(frames, load_video(clip, num_frames=5)[0])


def test_frames_that_were_chosen_already_can_be_encoded():
    frames = np.stack([numbered_frame(i, 80, 48) for i in range(6)])
    from_array = encode_video_base64(frames, num_frames=-1, format="PNG")
    from_pictures = encode_video_base64([Image.fromarray(frame) for frame in frames], num_frames=-1, format="PNG")
    assert from_array == from_pictures
    np.testing.assert_array_equal(load_video(f"data:video/png;base64,{from_array}")[0], frames)
    fewer = encode_video_base64(frames, num_frames=2, format="PNG")
    assert [read_number(f) for f in load_video(f"data:video/png;base64,{fewer}")[0]] == [0, 5]
    with pytest.raises(MediaDecodeError, match="no frames"):
        encode_video_base64([])


def test_an_encoded_picture_loads_back(tmp_path):
    picture = Image.fromarray(numbered_frame(77, 60, 40))
    picture.save(tmp_path / "p.png")
    for source in (picture, np.asarray(picture), tmp_path / "p.png", (tmp_path / "p.png").read_bytes()):
        loaded = load_image("data:image/png;base64," + encode_image_base64(source))
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(picture))
    jpeg = load_image("data:image/jpeg;base64," + encode_image_base64(picture, "JPEG"))
    assert read_number(np.asarray(jpeg)) == 77


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
        (lambda: encode_video_base64(np.zeros((4, 4, 3), np.uint8)), "encode_image_base64 takes one picture"),
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


def test_what_is_missing_or_of_another_kind(clip, tmp_path):
    with pytest.raises(MediaFetchError):
        load_video(tmp_path / "missing.mp4")
    with pytest.raises(InvalidRequestError, match="num_frames"):
        load_video(clip, num_frames=0)
    with pytest.raises(InvalidRequestError, match="speed"):
        load_video(clip, speed=2)
    with pytest.raises(MediaDecodeError):
        load_image(clip)


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

    assert asyncio.run(inside()) == [0, 89]
