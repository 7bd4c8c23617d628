"""Stream copies that keep frames and lose their order, and files that gain a stream midway: still the right frames."""

import numpy as np
import pytest

from filmstrip.media.decoders import pyav
from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_frames
from tests.media.clips import h264, remux
from tests.media.numbered import decode_sequentially, encode, ffmpeg, read_number

ALWAYS_REORDERED = ("-x264-params", "b-adapt=0:scenecut=0")
TS_PACKET = 188


def make_avi_to_mp4(folder):
    return remux(h264(folder, "clip.avi", *ALWAYS_REORDERED), folder / "copy.mp4")


def make_avi_to_matroska(folder):
    source = h264(folder, "clip.avi", *ALWAYS_REORDERED)
    ffmpeg("-fflags", "+genpts", "-i", source, "-c", "copy", folder / "copy.mkv")
    return folder / "copy.mkv"


def make_avi_to_transport_stream(folder):
    source = h264(folder, "clip.avi", *ALWAYS_REORDERED)
    ffmpeg("-fflags", "+genpts", "-i", source, "-c", "copy", folder / "copy.ts")
    return folder / "copy.ts"


def make_bare_h264_to_mp4(folder):
    return remux(h264(folder, "clip.h264"), folder / "copy.mp4")


def make_mpeg4_avi_to_mov(folder):
    source = encode(folder / "clip.avi", "-c:v", "mpeg4", "-bf", "2", "-g", "12", "-q:v", "3")
    return remux(source, folder / "copy.mov")


def make_decoding_times_shown(folder):
    return remux(h264(folder, "clip.mp4"), folder / "copy.mkv", "-bsf:v", "setts=pts=DTS")


MAKERS = {name.removeprefix("make_"): maker for name, maker in list(globals().items()) if name.startswith("make_")}


def open_path(path):
    return open_video(BytesSource(path.read_bytes()))


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_frames_timed_in_coded_order_are_counted(tmp_path, kind):
    """``ffmpeg -i clip.h264 -c copy clip.mp4`` gives each packet the next time, whatever its frame's place is."""
    path = MAKERS[kind](tmp_path)
    frames, times = decode_sequentially(path)
    assert times != sorted(times)  # the decoder says itself that these times are not those of its frames
    reader = open_path(path)
    assert reader.metadata.total_num_frames == len(frames)
    for indices in (range(len(frames)), [0, 7, 23, len(frames) - 1], [31], [4, 4, 5]):
        for num_threads in (1, 4):
            got, delivered = read_frames(reader, indices, num_threads)
            assert list(delivered) == list(indices)
            wrong = [i for i, frame in zip(indices, got, strict=True) if not np.array_equal(frame, frames[i])]
            assert wrong == []
    assert [read_number(frame) for frame in frames] == sorted(read_number(frame) for frame in frames)
    assert (np.diff(reader.metadata.timestamps) > 0).all()


def test_times_in_coded_order_are_trusted_where_frames_come_in_it(tmp_path, monkeypatch):
    """MPEG-2 announces reordering even where it has no B-frames; a seek must still spare what comes before."""
    path = encode(tmp_path / "clip.mp4", "-c:v", "mpeg2video", "-bf", "0", "-g", "10", "-q:v", "3", num_frames=200)
    reader = open_path(path)
    num_packets = 0
    decode = pyav._decode

    def counting(stream, packet):
        nonlocal num_packets
        num_packets += packet is not None
        return decode(stream, packet)

    monkeypatch.setattr(pyav, "_decode", counting)
    got, delivered = read_frames(reader, [195], 1)
    assert delivered == (195,)
    assert read_number(got[0]) == 195
    assert 1 <= num_packets <= 10


def test_a_stream_that_appears_midway_changes_nothing_else(tmp_path):
    """A packet of a stream that no table announced. PyAV counts streams once, at the beginning."""
    path = h264(tmp_path, "clip.ts", gop=12)
    frames, _ = decode_sequentially(path)
    data = bytearray(path.read_bytes())
    starts = [at for at in range(0, len(data), TS_PACKET) if data[at + 1] & 0x5F == 0x41 and not data[at + 2]]
    assert len(starts) == 60  # payload begins here, stream 0x100: one packet for each frame
    data[starts[30] + 2] = 0xA3
    for _ in range(5):  # what PyAV takes for the flag of the new stream is left over in memory
        reader = open_video(BytesSource(bytes(data)))
        indices = [0, 11, 23, *range(36, 59)]
        got, delivered = read_frames(reader, [index - (index > 30) for index in indices], 2)
        assert reader.metadata.total_num_frames == 59
        assert list(delivered) == [index - (index > 30) for index in indices]
        assert all(np.array_equal(frame, frames[index]) for index, frame in zip(indices, got, strict=True))
