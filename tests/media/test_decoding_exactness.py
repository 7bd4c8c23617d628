"""The right frames from every kind of file: scattered, dense and repeated reads equal plain decoding, bit by bit."""

import itertools
import random
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest

from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_frames
from tests.media.numbered import decode_sequentially, encode, ffmpeg, has_encoder, read_number

X264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p")


def h264(folder, name="clip.mp4", *more, gop=12, **clip):
    return encode(folder / name, *X264, "-g", str(gop), "-bf", "3", *more, **clip)


def make_plain(folder):
    return h264(folder)


def make_long_gop(folder):
    return h264(folder, gop=250, num_frames=300)


def make_two_streams(folder):
    small = h264(folder, "small.mp4", width=80, height=48, first=500)
    large = h264(folder, "large.mp4")
    ffmpeg("-i", small, "-i", large, "-map", "0", "-map", "1", "-c", "copy", folder / "two.mp4")
    return folder / "two.mp4"


def make_variable_rate(folder):
    times = "settb=1/90000,setpts='if(lt(N,20),N,20+(N-20)*3)*3600'"
    return h264(folder, "vfr.mp4", "-vf", times, "-vsync", "vfr", "-video_track_timescale", "90000")


def make_transport_stream(folder):
    return h264(folder, "late.ts", "-output_ts_offset", "1400", gop=10, num_frames=150)


def make_edit_list(folder):
    source = h264(folder, gop=10, num_frames=90)
    ffmpeg("-ss", "1.13", "-i", source, "-c", "copy", folder / "edited.mp4")
    return folder / "edited.mp4"


def make_open_gop_h264(folder):
    return h264(folder, "open.mp4", "-x264-params", "open-gop=1:keyint=10:min-keyint=10:bframes=3:scenecut=0")


def make_open_gop_hevc(folder):
    parameters = "open-gop=1:keyint=12:min-keyint=12:bframes=4:log-level=error"
    return encode(folder / "open.mp4", "-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", parameters)


def make_odd_size(folder):
    return encode(folder / "odd.mp4", "-c:v", "libx264", "-pix_fmt", "yuv444p", "-g", "9", width=161, height=97)


def make_high_depth(folder):
    return encode(folder / "deep.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p10le", "-g", "15")


def make_full_range(folder):
    return h264(folder, "full.mp4", "-vf", "scale=out_range=full", "-color_range", "pc")


def make_vp9(folder):
    arguments = ("-c:v", "libvpx-vp9", "-b:v", "300k", "-g", "20", "-auto-alt-ref", "1", "-lag-in-frames", "12")
    return encode(folder / "clip.webm", *arguments)


def make_avi(folder):
    return encode(folder / "clip.avi", "-c:v", "mpeg4", "-bf", "2", "-g", "12", "-q:v", "3")


def make_mpeg4(folder):
    return encode(folder / "clip.mp4", "-c:v", "mpeg4", "-bf", "2", "-g", "12", "-q:v", "3")


def make_mkv_copy_with_made_up_times(folder):
    ffmpeg("-fflags", "+genpts", "-i", make_avi(folder), "-c", "copy", folder / "copied.mkv")
    return folder / "copied.mkv"


def make_mpeg2(folder):
    return encode(folder / "clip.mpg", "-c:v", "mpeg2video", "-bf", "2", "-g", "12", "-q:v", "3")


def make_av1(folder):
    encoder = next((name for name in ("libsvtav1", "libaom-av1") if has_encoder(name)), None)
    if encoder is None:
        pytest.skip("this ffmpeg cannot encode AV1")
    speed = ("-preset", "10") if encoder == "libsvtav1" else ("-cpu-used", "8")
    return encode(folder / "clip.mkv", "-c:v", encoder, *speed, "-g", "20", num_frames=40)


def make_one_frame(folder):
    return h264(folder, "one.mp4", num_frames=1)


def make_gif(folder):
    return encode(folder / "clip.gif", num_frames=12, rate="10")


MAKERS = {name.removeprefix("make_"): maker for name, maker in list(globals().items()) if name.startswith("make_")}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def clip(request, tmp_path_factory):
    """A file, and its frames and times as plain decoding gives them."""
    path = MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    frames, times = decode_sequentially(path)
    return path, frames, times


def open_path(path):
    return open_video(BytesSource(Path(path).read_bytes()))


def test_every_frame_is_the_one_plain_decoding_gives(clip):
    path, frames, times = clip
    reader = open_path(path)
    total = len(frames)
    assert reader.metadata.total_num_frames == total
    assert (reader.metadata.height, reader.metadata.width) == frames[0].shape[:2]
    np.testing.assert_allclose(reader.metadata.timestamps, np.array(times) - times[0], atol=1.1e-3)
    rng = random.Random(0)
    wanted = [
        list(range(total)),
        [0],
        [total - 1],
        [0, 0, total // 2, total // 2, total - 1, total - 1],
        np.linspace(0, total - 1, min(total, 7)).astype(int).tolist(),
        *(sorted(rng.sample(range(total), min(total, size))) for size in (1, 2, 5, 11)),
    ]
    for num_threads in (1, 2, 4):
        for indices in wanted:
            got, delivered = read_frames(reader, indices, num_threads)
            assert list(delivered) == indices
            for i, index in enumerate(indices):
                assert np.array_equal(got[i], frames[index]), (index, num_threads)


def test_the_frames_are_those_that_were_drawn(clip):
    path, frames, _ = clip
    drawn = [read_number(frame) for frame in frames]
    got, _ = read_frames(open_path(path), range(len(frames)), 2)
    assert [read_number(frame) for frame in got] == drawn
    assert all(later == earlier + 1 for earlier, later in itertools.pairwise(drawn))


def test_the_larger_of_two_streams_is_taken(tmp_path):
    reader = open_path(make_two_streams(tmp_path))
    assert (reader.metadata.width, reader.metadata.height) == (160, 96)
    assert read_number(read_frames(reader, [7], 1)[0][0]) == 7


def test_times_of_a_variable_rate_are_the_real_ones(tmp_path):
    metadata = open_path(make_variable_rate(tmp_path)).metadata
    expected = [(n if n < 20 else 20 + (n - 20) * 3) / 25 for n in range(60)]
    np.testing.assert_allclose(metadata.timestamps, expected, atol=1e-4)


def test_times_of_a_constant_rate_are_exactly_index_over_rate(tmp_path):
    metadata = open_path(h264(tmp_path, rate="30000/1001")).metadata
    assert metadata.fps == 30000 / 1001
    assert metadata.timestamps.tolist() == [index / metadata.fps for index in range(60)]
    assert metadata.duration == 60 / metadata.fps


def test_an_edit_list_hides_what_comes_before_it(tmp_path):
    reader = open_path(make_edit_list(tmp_path))
    assert (
        read_number(read_frames(reader, [0], 1)[0][0])
        == 29  # the first at or after 1.13 s; decoding begins at the key frame 20
    )  # 1.13 s at 25 frames per second, after the key frame at 20
    assert reader.metadata.timestamps[0] == 0


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_by_the_display_matrix(tmp_path, degrees):
    source = h264(tmp_path, num_frames=20)
    rotated, upright = tmp_path / "rotated.mp4", tmp_path / "upright.rgb"
    ffmpeg("-display_rotation", degrees, "-i", source, "-c", "copy", rotated) if _has_display_rotation() else ffmpeg(
        "-i", source, "-c", "copy", "-metadata:s:v:0", f"rotate={degrees}", rotated
    )
    reader = open_path(rotated)
    assert reader.metadata.rotation_degrees % 360 in (degrees, 360 - degrees)
    ffmpeg("-i", rotated, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", upright)
    size = (reader.metadata.height, reader.metadata.width, 3)
    expected = np.fromfile(upright, np.uint8).reshape(size).astype(int)
    assert np.abs(read_frames(reader, [0], 1)[0][0] - expected).mean() < 2


def _has_display_rotation():
    text = subprocess.run(["ffmpeg", "-hide_banner", "-h", "full"], capture_output=True, text=True, check=True).stdout
    return "-display_rotation" in text


def test_broken_packets_cost_only_their_frames(tmp_path):
    path = h264(tmp_path, gop=10, num_frames=80)
    frames, _ = decode_sequentially(path)
    data = bytearray(path.read_bytes())
    rng = random.Random(3)
    middle = data.index(b"mdat") + 4 + (len(data) - data.index(b"mdat")) // 2
    for _ in range(60):
        data[middle + rng.randrange(400)] = rng.randrange(256)
    reader = open_video(BytesSource(bytes(data)))
    got, delivered = read_frames(reader, range(80), 3)
    same = [index for index in range(80) if delivered[index] == index and np.array_equal(got[index], frames[index])]
    assert len(same) >= 60
    assert set(range(25)) <= set(same)
    assert set(range(65, 80)) <= set(same)


def test_a_truncated_file_gives_what_is_there(tmp_path):
    path = h264(tmp_path, "clip.mp4", "-movflags", "+faststart", gop=10, num_frames=100)
    frames, _ = decode_sequentially(path)
    data = path.read_bytes()
    reader = open_video(BytesSource(data[: len(data) * 6 // 10]))
    total = reader.metadata.total_num_frames
    assert 30 < total < 90
    got, delivered = read_frames(reader, range(total), 2)
    exact = [index for index in range(total) if delivered[index] == index]
    assert len(exact) >= total - 4
    assert all(np.array_equal(got[index], frames[index]) for index in exact[:-2])
    assert all(read_number(got[i]) == delivered[i] for i in range(total - 2))


def test_a_frame_that_cannot_be_decoded_is_replaced_and_reported(tmp_path):
    """Whole packets blanked: the reader says which frame it showed instead."""
    path = h264(tmp_path, gop=10, num_frames=40)
    data = bytearray(path.read_bytes())
    with_positions = _packet_positions(path)
    for position, size in with_positions[20:30]:  # one whole group of pictures, its key frame included
        data[position : position + size] = bytes(size)
    reader = open_video(BytesSource(bytes(data)))
    got, delivered = read_frames(reader, [5, 24, 35], 2)
    assert delivered[0] == 5
    assert delivered[2] == 35
    assert delivered[1] < 20
    assert [read_number(frame) for frame in got] == list(delivered)


def _packet_positions(path):
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
