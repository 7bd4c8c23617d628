"""Files that are no good, readers that change their mind: a clear error, soon, and nothing left behind."""

import io
import os
import struct
import subprocess
import threading

import numpy as np
import pytest
from PIL import Image

from filmstrip.errors import MediaDecodeError, MediaTooLargeError
from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_frames, read_patches
from filmstrip.types import FramePlan, PatchLayout
from tests.media.numbered import encode


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return encode(path, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "10", num_frames=200).read_bytes()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", str(path)]
    subprocess.run(command, check=True, timeout=60)
    return path.read_bytes()


def moov(data):
    at = data.index(b"moov") - 4
    return data[at : at + int.from_bytes(data[at : at + 4], "big")]


def test_files_that_are_no_videos(clip, sound, capfd):
    bad = {
        "nothing": b"",
        "text": b"once upon a time " * 100,
        "noise": np.random.default_rng(0).bytes(5000),
        "no moov": clip[: clip.index(b"moov") - 4],
        "moov only": clip[:32] + moov(clip),
        "sound only": sound,
    }
    for name, data in bad.items():
        with pytest.raises(MediaDecodeError) as caught:
            open_video(BytesSource(data))
        assert "0x" not in caught.value.message, name
        assert "<" not in caught.value.message, name
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_picture_is_refused_with_advice(format):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 90)).save(file, format)
    with pytest.raises(MediaDecodeError, match="not a video; send it as image_url"):
        open_video(BytesSource(file.getvalue()))


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '/etc/passwd'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
    ],
)
def test_playlists_open_nothing(content):
    with pytest.raises(MediaDecodeError):
        open_video(BytesSource(content.encode()))


def test_too_large_a_picture_is_refused_by_its_header(clip):
    assert open_video(BytesSource(clip), max_pixels=160 * 96).metadata.width == 160
    with pytest.raises(MediaTooLargeError, match=r"160 x 96 = 15360 .* 15359 .*--max-image-pixels"):
        open_video(BytesSource(clip), max_pixels=160 * 96 - 1)


def test_a_header_that_lies_about_the_size_is_not_believed(clip):
    data = bytearray(clip)
    at = data.index(b"avc1")
    data[at + 28 : at + 32] = struct.pack(">HH", 65535, 65535)
    metadata = open_video(BytesSource(bytes(data)), max_pixels=178_956_970).metadata
    assert (metadata.width, metadata.height) == (160, 96)


def test_cancelling_stops_soon(clip):
    cancel = threading.Event()
    given = []

    def consume(position, _rgb):
        given.append(position)
        cancel.set()

    with pytest.raises(InterruptedError):
        open_video(BytesSource(clip)).read(range(200), consume, 4, cancel)
    assert len(given) < 60  # what the four jobs had in hand: a job is a group of ten


def test_an_exception_of_the_consumer_comes_out_and_ends_all_threads(clip):
    def consume(position, _rgb):
        raise ZeroDivisionError(f"at {position}")

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        open_video(BytesSource(clip)).read(range(200), consume, 4)
    assert threading.active_count() == before


def test_nothing_stays_open(clip):
    def num_open():
        return len(os.listdir("/proc/self/fd"))

    plan = FramePlan((0, 50, 199), 96, 160, PatchLayout(16, 2, 2))
    read_patches(open_video(BytesSource(clip)), plan, 3)
    before = num_open()
    for _ in range(10):
        reader = open_video(BytesSource(clip))
        read_patches(reader, plan, 3)
        reader.close()
        reader.close()
    assert num_open() <= before + 1


def test_never_more_frames_alive_than_threads_need(clip):
    alive = most = 0
    lock = threading.Lock()

    class Frame(np.ndarray):
        pass

    def consume(position, rgb):
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        assert rgb.shape == (96, 160, 3)
        with lock:
            alive -= 1

    open_video(BytesSource(clip)).read(range(200), consume, 3)
    assert 1 <= most <= 3


def test_frame_numbers_must_exist(clip):
    reader = open_video(BytesSource(clip))
    for wrong in ([200], [-1]):
        with pytest.raises(IndexError):
            read_frames(reader, wrong, 1)
