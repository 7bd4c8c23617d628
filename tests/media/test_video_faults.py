"""Hostile and broken files, and readers that are stopped: an error that says what is wrong, and nothing left behind."""

import io
import itertools
import os
import random
import signal
import socket
import struct
import threading
import weakref

import numpy as np
import pytest
from PIL import Image

from filmstrip import load_video
from filmstrip.errors import MediaDecodeError, MediaError, MediaTooLargeError
from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_frames, read_patches
from filmstrip.types import FramePlan, PatchLayout
from tests.media.clips import append, box, h264, remux
from tests.media.numbered import encode, ffmpeg, read_number

MAX_PIXELS = 178_956_970


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("video")


@pytest.fixture(scope="module")
def clip(folder):
    """200 frames in groups of ten."""
    return h264(folder, "clip.mp4", num_frames=200).read_bytes()


@pytest.fixture(scope="module")
def one_group(folder):
    """300 frames behind a single key frame."""
    return h264(folder, "group.mp4", gop=300, num_frames=300).read_bytes()


@pytest.fixture
def listener():
    """A loopback port, and a function that says whether anyone called."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        def was_called():
            try:
                server.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield server.getsockname()[1], was_called


def picture(format, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 40, 90)).save(buffer, format)
    return buffer.getvalue()


def with_external_data(data, url):
    """An MP4 whose data reference names another place; its index must stand at the end of the file."""
    changed = bytearray(data)
    entry = box(b"url ", bytes(4), url.encode() + b"\0")
    start = changed.index(b"dref") - 4
    old = int.from_bytes(changed[start : start + 4], "big")
    new = box(b"dref", bytes(4), (1).to_bytes(4, "big"), entry)
    changed[start : start + old] = new
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        at = changed.index(parent) - 4
        size = int.from_bytes(changed[at : at + 4], "big") + len(new) - old
        changed[at : at + 4] = size.to_bytes(4, "big")
    return bytes(changed)


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{url}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    '<Representation id="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "imf": '<AssetMap xmlns="http://www.smpte-ra.org/schemas/429-9/2007/AM"><Path>{url}</Path></AssetMap>',
    "rtsp": "RTSP/1.0 200 OK\r\nContent-Base: {url}\r\n\r\n",
    "smooth": '<SmoothStreamingMedia MajorVersion="2" Duration="9"><StreamIndex Url="{url}"/></SmoothStreamingMedia>',
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_file_that_names_another_opens_nothing(kind, listener, tmp_path, capfd):
    port, was_called = listener
    secret = tmp_path / "secret.mp4"
    h264(tmp_path, secret.name)
    for url in (f"http://127.0.0.1:{port}/clip.ts", secret.as_uri(), str(secret)):
        named = tmp_path / "clip.mp4"
        named.write_text(PLAYLISTS[kind].format(url=url, port=port))
        with pytest.raises(MediaDecodeError) as caught:
            load_video(named)
        assert str(tmp_path) not in caught.value.message
    assert not was_called()
    assert capfd.readouterr().err == ""


def test_an_external_data_reference_is_not_followed(clip, listener, tmp_path):
    port, was_called = listener
    for url in (f"http://127.0.0.1:{port}/clip.mov", (tmp_path / "secret.mp4").as_uri()):
        with pytest.raises(MediaDecodeError, match="refers to another file"):
            open_video(BytesSource(with_external_data(clip, url)))
    assert not was_called()


def bad_files(folder, clip):
    cover = folder / "cover.m4a"
    (folder / "cover.png").write_bytes(picture("PNG"))
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", folder / "sound.m4a")
    streams = ("-map", "0", "-map", "1", "-c:a", "copy", "-c:v", "png", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", folder / "sound.m4a", "-i", folder / "cover.png", *streams, cover)
    fast = remux(folder / "clip.mp4", folder / "fast.mp4", "-movflags", "+faststart").read_bytes()
    broken = bytearray(clip)
    broken[broken.index(b"stsz") + 12 : broken.index(b"stsz") + 16] = b"\x7f\xff\xff\xff"
    return {
        "nothing": b"",
        "one byte": b"\0",
        "zeros": bytes(4096),
        "text": b"Call me Ishmael. " * 99,
        "noise": random.Random(0).randbytes(9999),
        "PNG": picture("PNG"),
        "JPEG": picture("JPEG"),
        "WebP": picture("WEBP"),
        "BMP": picture("BMP"),
        "TIFF": picture("TIFF"),
        "sound": (folder / "sound.m4a").read_bytes(),
        "sound with a cover": cover.read_bytes(),
        "no index": clip[: clip.index(b"moov") - 4],
        "index alone": fast[: fast.index(b"mdat")],
        "half an index": fast[: fast.index(b"moov") + 300],
        "2**31 sizes": bytes(broken),
        "header alone": clip[:32],
        "HTML": b"<!doctype html><html><body>not found</body></html>",
        "zip": b"PK\x03\x04" + bytes(200),
    }


def test_what_is_no_video_says_so(folder, clip, capfd):
    for name, data in bad_files(folder, clip).items():
        with pytest.raises(MediaDecodeError) as caught:
            open_video(BytesSource(data), max_pixels=MAX_PIXELS)
        message = caught.value.message
        assert message, name
        for forbidden in ("0x", "<", ">", "object at", "/tmp", "Errno", str(folder)):
            assert forbidden not in message, (name, message)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_picture_is_refused_with_advice(format):
    with pytest.raises(MediaDecodeError, match="not a video; send it as image_url"):
        open_video(BytesSource(picture(format)))


def test_random_damage_never_ends_in_anything_but_a_media_error(clip, capfd):
    for seed in range(150):
        rng = random.Random(seed)
        data = bytearray(clip)
        start = rng.choice([0, data.index(b"moov")])
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(start, len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            reader = open_video(BytesSource(bytes(data)), max_pixels=10**7)
            total = reader.metadata.total_num_frames
            wanted = sorted({0, total // 2, total - 1})
            _, delivered = read_frames(reader, wanted, 1 + seed % 3)
        except MediaError:
            continue
        assert len(delivered) == len(wanted)
        assert all(0 <= index < total for index in delivered)
        assert np.isfinite(reader.metadata.timestamps).all()
    assert capfd.readouterr().err == ""


def test_too_large_a_picture_is_refused_by_its_header(clip):
    assert open_video(BytesSource(clip), max_pixels=160 * 96).metadata.width == 160
    with pytest.raises(MediaTooLargeError, match=r"160 x 96 = 15360 .* 15359 .*--max-image-pixels"):
        open_video(BytesSource(clip), max_pixels=160 * 96 - 1)


def test_a_header_that_lies_about_the_size_is_not_believed(clip):
    data = bytearray(clip)
    at = data.index(b"avc1")
    data[at + 28 : at + 32] = struct.pack(">HH", 65535, 65535)
    metadata = open_video(BytesSource(bytes(data)), max_pixels=MAX_PIXELS).metadata
    assert (metadata.width, metadata.height) == (160, 96)


def test_pixels_are_counted_before_they_are_decoded(tmp_path):
    gif = bytearray(encode(tmp_path / "clip.gif", num_frames=3).read_bytes())
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    with pytest.raises((MediaTooLargeError, MediaDecodeError)):
        open_video(BytesSource(bytes(gif)), max_pixels=MAX_PIXELS)
    gif[6:10] = struct.pack("<HH", 14_000, 14_000)
    with pytest.raises(
        MediaTooLargeError, match=r"14000 x 14000 = 196000000 pixels; the limit is 178956970 .*--max-image"
    ):
        open_video(BytesSource(bytes(gif)), max_pixels=MAX_PIXELS)


def test_a_stream_that_outgrows_the_limit_shows_what_fits(tmp_path):
    small = h264(tmp_path, "small.ts", num_frames=200)
    large = h264(tmp_path, "large.ts", "-output_ts_offset", "30", num_frames=3, width=1600, height=1200)
    reader = open_video(BytesSource(append(tmp_path / "both.ts", small, large).read_bytes()), max_pixels=20_000)
    got, delivered = read_frames(reader, [0, 100, 201], 2)
    assert got.shape[1:] == (96, 160, 3)
    assert delivered == (0, 100, 199)  # the last that fits


@pytest.mark.parametrize("size", [(2, 2), (16, 4000), (4000, 16)])
def test_strange_shapes(tmp_path, size):
    width, height = size
    path = encode(tmp_path / "clip.mkv", "-c:v", "ffv1", "-pix_fmt", "bgr0", width=width, height=height, num_frames=3)
    got, _ = read_frames(open_video(BytesSource(path.read_bytes())), [0, 2], 2)
    assert got.shape == (2, height, width, 3)


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("name", ["clip", "one_group"])
def test_cancelling_stops_after_what_is_in_hand(request, name, num_threads):
    cancel = threading.Event()
    given = []

    def consume(position, _rgb):
        given.append(position)
        cancel.set()

    before = set(threading.enumerate())
    with pytest.raises(InterruptedError):
        open_video(BytesSource(request.getfixturevalue(name))).read(range(200), consume, num_threads, cancel)
    # A packet brings out few frames at a time, and each thread looks at the event before every packet.
    assert 1 <= len(given) <= 4 * num_threads
    assert set(threading.enumerate()) <= before


def test_cancelled_before_it_began(clip):
    cancel = threading.Event()
    cancel.set()
    plan = FramePlan((0, 99), 96, 160, PatchLayout(16, 2, 2))
    with pytest.raises(InterruptedError):
        read_patches(open_video(BytesSource(clip)), plan, 2, cancel)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_an_exception_of_one_frame_stops_all_threads(clip, num_threads):
    calls = []

    def consume(position, _rgb):
        calls.append(position)
        raise ZeroDivisionError(position)

    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        open_video(BytesSource(clip)).read(range(200), consume, num_threads)
    assert len(calls) <= num_threads
    assert set(threading.enumerate()) <= before


def test_ctrl_c_ends_the_threads(clip):
    given = []
    main = threading.get_ident()
    calls, release = itertools.count(), threading.Event()

    def consume(position, _rgb):
        given.append(position)
        if next(calls) == 0:
            signal.pthread_kill(main, signal.SIGINT)
        release.wait(0.05)

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        open_video(BytesSource(clip)).read(range(200), consume, 2)
    assert len(given) < 200
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("name", ["clip", "one_group"])
def test_few_pictures_are_alive_at_any_time(request, name, num_threads):
    """Each picture is dropped once it is consumed; a list of them would hold two hundred."""
    lock = threading.Lock()
    alive = most = 0

    def died():
        nonlocal alive
        with lock:
            alive -= 1

    def consume(_position, rgb):
        nonlocal alive, most
        weakref.finalize(rgb, died)
        with lock:
            alive += 1
            most = max(most, alive)

    open_video(BytesSource(request.getfixturevalue(name))).read(range(200), consume, num_threads)
    assert 1 <= most <= 2 * num_threads + 1


def test_no_more_frames_are_handed_over_at_once_than_threads_were_asked_for(clip):
    inside = most = 0
    lock = threading.Lock()

    def consume(_position, rgb):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        assert rgb.shape == (96, 160, 3)
        with lock:
            inside -= 1

    open_video(BytesSource(clip)).read(range(200), consume, 3)
    assert 1 <= most <= 3


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


def test_broken_files_leave_no_descriptor(folder, clip):
    files = bad_files(folder, clip)
    paths = []
    for number, data in enumerate(files.values()):
        paths.append(folder / f"bad{number}.mp4")
        paths[-1].write_bytes(data)

    def read_all():
        for path in paths:
            with pytest.raises(MediaError):
                load_video(path)

    read_all()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_all()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_readers_share_a_file_from_many_threads(clip):
    reader = open_video(BytesSource(clip))
    results = {}

    def work(number):
        results[number] = read_frames(reader, [number, 199 - number], 2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (got, delivered) in results.items():
        assert delivered == (number, 199 - number)
        assert [read_number(frame) for frame in got] == [number, 199 - number]
    assert len(results) == 6


def test_frame_numbers_must_exist(clip):
    reader = open_video(BytesSource(clip))
    for wrong in ([200], [-1]):
        with pytest.raises(IndexError):
            read_frames(reader, wrong, 1)
