"""Choosing a decoder: what is missing, too old or gone is named; what runs opens no file, stops when told, is checked."""

import os
import socket
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from filmstrip.config import VIDEO_DECODERS
from filmstrip.errors import InvalidRequestError, MediaDecodeError, MediaTooLargeError
from filmstrip.media import sandbox
from filmstrip.media.decoders.base import VideoReader
from filmstrip.media.decoders.checked import CheckedReader, DecodedFrame
from filmstrip.media.decoders.registry import import_decoder, open_reader
from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_frames
from tests.conformance import old_torchvision, suite
from tests.conformance.corpus import CLIPS, draw
from tests.media.numbered import decode_sequentially, ffmpeg, read_number

INSTALLED = [decoder for decoder in VIDEO_DECODERS if suite.is_installed(decoder)]
OTHERS = [decoder for decoder in INSTALLED if decoder != "pyav"]
LIBRARIES = {"torchcodec": "torchcodec", "decord": "decord", "opencv": "cv2", "torchvision": "torchvision"}
EXTRAS = {"torchcodec", "decord", "opencv", "torchvision"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return CLIPS["h264"].make(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(path):
    return path.read_bytes()


def test_the_default_is_pyav(clip):
    assert VIDEO_DECODERS[0] == "pyav"
    assert set(VIDEO_DECODERS) == {"pyav", *EXTRAS}
    assert open_video(BytesSource(clip)).metadata.video_backend == "pyav"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(InvalidRequestError, match=r"pyav, torchcodec, decord, opencv, torchvision, not '\.\./\.\./x'"):
        import_decoder("../../x")


@pytest.mark.parametrize("decoder", sorted(EXTRAS))
def test_a_missing_library_is_named_with_its_extra(monkeypatch, clip, decoder):
    monkeypatch.setitem(sys.modules, LIBRARIES[decoder], None)
    for use in (lambda: import_decoder(decoder), lambda: open_video(BytesSource(clip), decoder=decoder)):
        with pytest.raises(
            InvalidRequestError, match=rf"{decoder} is not installed: pip install 'filmstrip\[{decoder}\]'"
        ):
            use()


@pytest.mark.parametrize("decoder", sorted(EXTRAS))
@pytest.mark.parametrize(
    "failure", [OSError("libavutil.so.56: not found in /opt/x"), ModuleNotFoundError(name="numpy.x")]
)
def test_a_library_that_does_not_load_says_so_without_its_paths(monkeypatch, tmp_path, decoder, failure):
    library = LIBRARIES[decoder]
    failing = f"raise OSError({str(failure)!r})" if type(failure) is OSError else f"import {failure.name}"
    (tmp_path / f"{library}.py").write_text(failing)
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidRequestError, match=f"{decoder} is installed but does not load") as caught:
        import_decoder(decoder)
    assert "/" not in caught.value.message
    monkeypatch.delitem(sys.modules, library, raising=False)


@pytest.mark.parametrize(
    ("decoder", "version", "needed"),
    [("opencv", "4.10.0", "4.11"), ("torchcodec", "0.6.1+cpu", "0.7"), ("decord", "0.5.2", "0.6")],
)
def test_a_library_that_is_too_old_is_named_with_both_versions(monkeypatch, decoder, version, needed):
    library = type(sys)(LIBRARIES[decoder])
    library.__version__ = version
    monkeypatch.setitem(sys.modules, LIBRARIES[decoder], library)
    with pytest.raises(InvalidRequestError, match=rf"too old: {version.replace('+', '.')}, where {needed} is needed"):
        import_decoder(decoder)


def test_a_torchvision_without_a_decoder_names_the_one_that_took_its_place(monkeypatch):
    for name, module in old_torchvision.modules("0.28.0", has_reader=False).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(InvalidRequestError, match=r"0\.28\.0 has no video decoder any more .* use torchcodec"):
        import_decoder("torchvision")


@pytest.mark.skipif("opencv" not in INSTALLED, reason="OpenCV is not installed")
def test_opencv_before_4_13_has_its_log_level_elsewhere(monkeypatch, clip):
    import cv2

    levels = [3]
    monkeypatch.delattr(cv2.utils, "logging", raising=False)
    monkeypatch.setattr(cv2, "getLogLevel", lambda: levels[-1], raising=False)
    monkeypatch.setattr(cv2, "setLogLevel", levels.append, raising=False)
    monkeypatch.delitem(sys.modules, "filmstrip.media.decoders.opencv", raising=False)
    read_frames(open_video(BytesSource(clip), decoder="opencv"), [0], 1)
    assert levels == [3, 0, 3]


@pytest.fixture
def with_torchvision(monkeypatch):
    """A torchvision that still has its decoder."""
    for name, module in old_torchvision.modules("0.24.1", has_reader=True).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "filmstrip.media.decoders.torchvision", raising=False)
    yield
    sys.modules.pop("filmstrip.media.decoders.torchvision", None)


RIGHT_WITH_TORCHVISION = [
    "h264",
    "h264_ts",
    "rotated_90",
    "edit_list",
    "variable_rate",
    "truncated",
    "one_frame",
    "late_start",
]


@pytest.mark.parametrize("name", RIGHT_WITH_TORCHVISION)
def test_torchvision_gives_the_right_frames(with_torchvision, tmp_path, name):
    outcome = suite.run("torchvision", CLIPS[name], CLIPS[name].make(tmp_path).read_bytes())
    assert str(outcome) == "right"


@pytest.mark.parametrize("name", ["h264_avi", "appended", "damaged", "two_streams_second"])
def test_torchvision_is_refused_where_it_is_wrong(with_torchvision, tmp_path, name):
    outcome = suite.run("torchvision", CLIPS[name], CLIPS[name].make(tmp_path).read_bytes())
    assert "refused" in str(outcome)


@pytest.mark.parametrize("decoder", INSTALLED)
def test_frames_come_one_by_one_in_order_and_are_the_readers_own(clip, decoder):
    reader = open_reader(decoder, BytesSource(clip))
    assert isinstance(reader, VideoReader)
    given = []
    delivered = reader.read([3, 3, 40, 41], lambda position, rgb: given.append((position, rgb)), 1)
    assert delivered == (3, 3, 40, 41)
    assert sorted(position for position, _ in given) == [0, 1, 2, 3]
    assert [read_number(rgb) for _, rgb in sorted(given, key=lambda pair: pair[0])] == [3, 3, 40, 41]
    assert all(rgb.dtype == np.uint8 and rgb.flags.c_contiguous for _, rgb in given)
    assert reader.read([], print, 1) == ()
    with pytest.raises(IndexError):
        reader.read([60], print, 1)
    reader.close()
    reader.close()


@pytest.mark.parametrize("decoder", INSTALLED)
def test_cancelling_stops_between_frames(clip, decoder):
    cancel = threading.Event()
    given = []

    def consume(position, _rgb):
        given.append(position)
        cancel.set()

    with pytest.raises(InterruptedError):
        open_reader(decoder, BytesSource(clip)).read(range(60), consume, 1, cancel)
    assert 1 <= len(given) <= 4


@pytest.mark.parametrize("decoder", INSTALLED)
def test_an_exception_of_consume_comes_through(clip, decoder):
    def consume(position, _rgb):
        raise ZeroDivisionError(position)

    with pytest.raises(ZeroDivisionError):
        open_reader(decoder, BytesSource(clip)).read([5], consume, 1)


@pytest.mark.parametrize("decoder", INSTALLED)
def test_pixels_are_counted_before_the_library_sees_the_file(monkeypatch, clip, decoder):
    with pytest.raises(MediaTooLargeError):
        open_reader(decoder, BytesSource(clip), max_pixels=1000)


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("kind", ["hls", "concat"])
def test_a_file_that_names_another_opens_nothing(clip, decoder, kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/clip.ts"
        text = {
            "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
            "concat": f"ffconcat version 1.0\nfile '{url}'\n",
        }[kind]
        with pytest.raises(MediaDecodeError):
            open_video(BytesSource(text.encode()), decoder=decoder)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("decoder", INSTALLED)
def test_nothing_stays_behind(clip, decoder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    broken = clip[: len(clip) // 2] + bytes(len(clip) - len(clip) // 2)

    def read_all(data):
        open_reader(decoder, BytesSource(data)).read([0, 30, 59], lambda position, rgb: None, 1)

    def use():
        read_frames(open_reader(decoder, BytesSource(clip)), [0, 30], 1)
        for data in (broken, b"nothing at all"):
            with pytest.raises(MediaDecodeError) as caught:
                read_all(data)
            assert "/" not in caught.value.message

    use()
    descriptors, environment = len(os.listdir("/proc/self/fd")), dict(os.environ)
    for _ in range(3):
        use()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert dict(os.environ) == environment
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not sandbox.is_supported(), reason="this system cannot filter system calls")
@pytest.mark.parametrize("decoder", INSTALLED)
def test_once_imported_a_decoder_needs_no_file_network_or_process(path, decoder):
    """In a child that has given up these rights; what it tries to open all the same makes it fail."""
    program = f"""
        import importlib, os, pkgutil, sys
        import av
        from filmstrip.media import sandbox
        from filmstrip.media.decoders.registry import import_decoder
        from filmstrip.media.source import FileSource
        from filmstrip.media.video import open_video, read_frames

        import_decoder({decoder!r})
        for module in pkgutil.walk_packages(av.__path__, "av."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        source = FileSource(os.open({str(path)!r}, os.O_RDONLY))
        sandbox.enter(max_memory_bytes=1 << 30, niceness=0, parent=os.getppid())
        try:
            open("/etc/hostname")
            raise SystemExit("the sandbox is open")
        except PermissionError:
            pass
        _, delivered = read_frames(open_video(source, decoder={decoder!r}), [0, 7, 59], 2)
        print(delivered)
        sys.stdout.flush()
        os._exit(0)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stdout) == (0, "(0, 7, 59)\n"), result.stderr


class Lying(CheckedReader):
    """Delivers what a test tells it to."""

    name, label = "lying", "The liar"

    def __init__(self, data, frame_of, *, tells_times=True):
        super().__init__(BytesSource(data))
        self._frame_of, self.tells_times = frame_of, tells_times

    def frames(self, frame_indices, num_threads, references, check):
        for index in frame_indices:
            yield self._frame_of(index)

    def try_to_read(self, indices):
        return self.read(indices, lambda position, rgb: None, 1)


@pytest.fixture(scope="module")
def truth(path):
    """All frames as plain decoding gives them."""
    return decode_sequentially(path)[0]


def test_a_truthful_library_is_believed(clip, truth):
    assert Lying(clip, lambda index: DecodedFrame(truth[index], index / 25)).try_to_read([0, 30, 59]) == (0, 30, 59)


LIES = ("a black picture", "black in the middle", "noise", "red for blue", "upside down", "not turned")
LIES = (*LIES, "the frame before", "another time", "no time")


def lies(truth):
    """What a library may do wrong, and what the error says of it."""
    height, width = truth[0].shape[:2]
    noise = np.random.default_rng(0).integers(0, 255, truth[0].shape, np.uint8)
    return {
        "a black picture": (lambda i: DecodedFrame(np.zeros_like(truth[i]), i / 25), "wrong picture"),
        "black in the middle": (
            lambda i: DecodedFrame(truth[i] * (i != 30), i / 25),
            "wrong picture for frame 30",
        ),
        "noise": (lambda i: DecodedFrame(noise, i / 25), "wrong picture"),
        "red for blue": (lambda i: DecodedFrame(truth[i][..., ::-1], i / 25), "wrong picture"),
        "upside down": (lambda i: DecodedFrame(truth[i][::-1], i / 25), "wrong picture"),
        "not turned": (lambda i: DecodedFrame(np.rot90(truth[i]), i / 25), f"{height} x {width}"),
        "the frame before": (lambda i: DecodedFrame(truth[max(i - 1, 0)], i / 25), "wrong picture|gives frame"),
        "another time": (lambda i: DecodedFrame(truth[i], (i + 1) / 25), "at 0.040 s instead of 0.000 s"),
        "no time": (lambda i: DecodedFrame(truth[i], float("nan")), "nan s"),
    }


@pytest.mark.parametrize("kind", LIES)
def test_a_lying_library_is_refused(clip, truth, kind):
    frame_of, reason = lies(truth)[kind]
    with pytest.raises(MediaDecodeError, match=rf"The liar .*{reason}.*; choose another decoder .*--video-decoder"):
        Lying(clip, frame_of).try_to_read([0, 30, 59])


def test_a_library_without_times_is_compared_frame_by_frame(clip, truth):
    def frame_of(index):
        return DecodedFrame(truth[31 if index == 30 else index], index / 25)

    assert Lying(clip, frame_of).try_to_read([0, 30, 59])  # it says the right time, and nothing looks at the picture
    with pytest.raises(MediaDecodeError, match="frame 30"):
        Lying(clip, frame_of, tells_times=False).try_to_read([0, 30, 59])


def test_a_frame_that_differs_little_from_its_neighbour_is_told_from_it(tmp_path):
    """A slowly moving line: neighbours differ by far less than colour conversions may, and still fit less well."""
    moving = np.full((120, 96, 160, 3), 90, np.uint8)
    for number, image in enumerate(moving):
        image[20:60, number : number + 6] = 120
    size = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "160x96", "-r", "25")
    ffmpeg(*size, "-i", "-", "-c:v", "libx264", "-qp", "0", tmp_path / "slow.mp4", stdin=moving.tobytes())
    data = (tmp_path / "slow.mp4").read_bytes()
    frames = decode_sequentially(tmp_path / "slow.mp4")[0]

    def shifted(by):
        return Lying(data, lambda i: DecodedFrame(frames[i + by] + np.uint8(3), i / 25), tells_times=False)

    assert shifted(0).try_to_read([10, 50]) == (10, 50)
    for by in (-1, 1):
        with pytest.raises(MediaDecodeError, match=f"gives frame {10 + by} instead of frame 10"):
            shifted(by).try_to_read([10, 50])


def test_the_drawn_frames_are_what_plain_decoding_shows(truth):
    assert [read_number(frame) for frame in truth] == list(range(60))
    assert np.abs(truth[7].astype(int) - draw(7)).mean() < 2
