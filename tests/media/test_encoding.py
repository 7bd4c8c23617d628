"""Pictures and clips for scripts: what is loaded is right, and what is encoded loads back."""

import base64

import numpy as np
import pytest
from PIL import Image

from filmstrip import encode_image_base64, encode_video_base64, load_image, load_video
from filmstrip.errors import InvalidRequestError, MediaDecodeError, MediaFetchError
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


def test_load_video_settings(clip):
    assert len(load_video(clip)[0]) == 32
    assert len(load_video(clip, num_frames=10, fps=2)[0]) == 6
    assert len(load_video(clip, num_frames=-1)[0]) == 90
    assert load_video(clip, num_frames=2, start=1, end=2)[1]["frames_indices"] == [30, 60]


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


def test_errors(clip, tmp_path):
    with pytest.raises(MediaFetchError):
        load_video(tmp_path / "missing.mp4")
    with pytest.raises(InvalidRequestError, match="num_frames"):
        load_video(clip, num_frames=0)
    with pytest.raises(InvalidRequestError, match="speed"):
        load_video(clip, speed=2)
    with pytest.raises(MediaDecodeError):
        load_image(clip)
