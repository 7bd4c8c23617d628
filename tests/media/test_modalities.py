"""The protocol of the kinds of media: the same content by every way in, and back through base64."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

import filmstrip
from filmstrip.config import MediaConfig
from filmstrip.errors import InvalidRequestError, MediaBlockedError, MediaDecodeError, MediaTooLargeError
from filmstrip.media.modalities import ImageIO, MediaIO, TimeSeriesIO, VideoIO
from filmstrip.types import FrameSampling, FrameTiming
from tests.media.numbered import encode, numbered_frame, read_number

SERIES = np.arange(10, dtype=np.float32).reshape(5, 2) / 3


def png():
    file = io.BytesIO()
    Image.fromarray(numbered_frame(7, 160, 96)).save(file, "PNG")
    return file.getvalue()


def npy():
    file = io.BytesIO()
    np.save(file, SERIES)
    return file.getvalue()


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("modalities") / "clip.mp4", "-c:v", "libx264", num_frames=10).read_bytes()


def pixels(loaded):
    """What was loaded, as an array."""
    return loaded.frames if hasattr(loaded, "frames") else np.asarray(loaded)


@pytest.fixture(params=["image", "video", "time_series"])
def kind(request, mp4):
    """A modality, the bytes of a file, the file's type."""
    return {
        "image": (ImageIO(), png(), "image/png"),
        "video": (VideoIO(sampling=FrameSampling(num_frames=4)), mp4, "video/mp4"),
        "time_series": (TimeSeriesIO(), npy(), "application/octet-stream"),
    }[request.param]


def test_every_way_in_gives_the_same(kind, tmp_path):
    modality, data, media_type = kind
    assert isinstance(modality, MediaIO)
    path = tmp_path / "media"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    expected = pixels(modality.load_bytes(data))
    assert expected.size > 0
    for loaded in (
        modality.load_file(path),
        modality.load_file(str(path)),
        modality.load_base64(media_type, text),
        modality.load(path.as_uri()),
        modality.load(str(path)),
        modality.load(f"data:{media_type};base64,{text}"),
    ):
        np.testing.assert_array_equal(pixels(loaded), expected)


def test_what_is_encoded_loads_back(kind):
    modality, data, _ = kind
    loaded = modality.load_bytes(data)
    for media in (loaded, data):
        if isinstance(modality, VideoIO):
            modality = VideoIO(format="PNG", sampling=FrameSampling(num_frames=4))
            media_type = "video/png"
        else:
            media_type = "image/png" if isinstance(modality, ImageIO) else "application/octet-stream"
        again = modality.load_base64(media_type, modality.encode_base64(media))
        np.testing.assert_array_equal(pixels(again), pixels(loaded))


def test_a_file_is_never_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:image").mkdir()
    (tmp_path / "data:image" / "x.png").write_bytes(png())
    assert ImageIO().load_file("data:image/x.png").size == (160, 96)


def test_frames_sampled_by_the_client_keep_their_times():
    frames = [numbered_frame(i, 160, 96) for i in (3, 9)]
    video = VideoIO(timing=FrameTiming(timestamps=(0.5, 4.0)), sampling=FrameSampling(num_frames=-1))
    loaded = video.load_base64("video/jpeg", video.encode_base64(frames))
    assert loaded.timestamps == [0.5, 4.0]
    assert [read_number(frame) for frame in loaded.frames] == [3, 9]


def test_limits_and_rights_of_the_config_hold(tmp_path):
    config = MediaConfig(max_image_pixels=100, max_time_series_values=9, allow_local_files=False)
    with pytest.raises(MediaTooLargeError, match="--max-image-pixels"):
        ImageIO(config).load_bytes(png())
    with pytest.raises(MediaTooLargeError, match="--max-time-series-values"):
        TimeSeriesIO(config).load_bytes(npy())
    with pytest.raises(MediaTooLargeError, match="--max-time-series-values"):
        TimeSeriesIO(config).encode_base64(SERIES)
    with pytest.raises(MediaBlockedError):
        VideoIO(config).load_file(tmp_path)


def test_wrong_formats_and_nothing_to_encode_are_refused():
    with pytest.raises(InvalidRequestError, match="JPEG, PNG, WEBP"):
        VideoIO(format="GIF")
    with pytest.raises(MediaDecodeError, match="no frames"):
        VideoIO().encode_base64([])


def test_the_public_functions_for_time_series(tmp_path):
    path = tmp_path / "series.npy"
    path.write_bytes(npy())
    np.testing.assert_array_equal(filmstrip.load_time_series(str(path)), SERIES)
    np.testing.assert_array_equal(filmstrip.load_time_series(npy()), SERIES)
    for media in (SERIES, path, npy()):
        text = filmstrip.encode_time_series_base64(media)
        np.testing.assert_array_equal(filmstrip.load_time_series(f"data:;base64,{text}"), SERIES)


def test_the_public_function_for_videos_takes_a_decoder_and_times(mp4):
    assert filmstrip.load_video(mp4, 4, video_decoder="opencv")[1]["video_backend"] == "opencv"
    with pytest.raises(InvalidRequestError):
        filmstrip.load_video(mp4, 4, video_decoder="none")
    text = VideoIO().encode_base64([numbered_frame(i, 160, 96) for i in range(3)])
    info = filmstrip.load_video(f"data:video/jpeg;base64,{text}", timestamps=[1, 2, 4])[1]
    assert (info["timestamps"], info["duration"]) == ([1, 2, 4], pytest.approx(4 + 1.5))
