"""The right frames from every kind of file: every read equals plain decoding from start to end, bit by bit.

Ordinary files first, then those whose times or key frames mislead, then damaged ones.
"""

import random
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_frames
from tests.media import field_pictures
from tests.media.clips import append, blank, box, drop_packets, h264, packets, remux
from tests.media.numbered import decode_sequentially, encode, ffmpeg, has_encoder, read_number

NUM_FRAMES = 60
CODED_ORDER = "b-adapt=0:scenecut=0"


# Ordinary files, whose frames also stand at the times that plain decoding gives


def make_plain(folder):
    return h264(folder, "clip.mp4", gop=12)


def make_long_gop(folder):
    return h264(folder, "clip.mp4", gop=250, num_frames=300)


def make_two_streams(folder):
    small = h264(folder, "small.mp4", gop=12, width=80, height=48, first=500)
    large = h264(folder, "large.mp4", gop=12)
    ffmpeg("-i", small, "-i", large, "-map", "0", "-map", "1", "-c", "copy", folder / "two.mp4")
    return folder / "two.mp4"


def make_variable_rate(folder):
    times = "settb=1/90000,setpts='if(lt(N,20),N,20+(N-20)*3)*3600'"
    return h264(folder, "vfr.mp4", "-vf", times, "-vsync", "vfr", "-video_track_timescale", "90000", gop=12)


def make_transport_stream(folder):
    return h264(folder, "late.ts", "-output_ts_offset", "1400", num_frames=150)


def make_edit_list(folder):
    source = h264(folder, "clip.mp4", num_frames=90)
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
    return h264(folder, "full.mp4", "-vf", "scale=out_range=full", "-color_range", "pc", gop=12)


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


def makers():
    """The functions above whose names begin with make_, by what follows."""
    return {name.removeprefix("make_"): maker for name, maker in globals().items() if name.startswith("make_")}


ORDINARY = makers()


# Files whose times or key frames mislead


def make_intra_refresh(folder):
    """Key frames that are recovery points: whole only some frames later."""
    return encode(folder / "refresh.mp4", "-c:v", "libx264", "-x264-params", "intra-refresh=1:keyint=20:bframes=0")


def make_intra_refresh_ts(folder):
    return encode(folder / "refresh.ts", "-c:v", "libx264", "-x264-params", "intra-refresh=1:keyint=15:bframes=0")


def make_bare_h264(folder):
    return h264(folder, "bare.h264")


def make_bare_hevc(folder):
    return encode(folder / "bare.hevc", "-c:v", "libx265", "-x265-params", "log-level=error:keyint=12:bframes=3")


def make_h264_in_avi(folder):
    """AVI numbers these packets in coded order, which is not that of display."""
    return h264(folder, "coded.avi", "-x264-params", CODED_ORDER)


def make_appended(folder):
    """The clock of the second half begins anew, at the same times."""
    halves = [h264(folder, f"half{i}.ts", num_frames=30, first=30 * i) for i in range(2)]
    return append(folder / "appended.ts", *halves)


def make_appended_shifted(folder):
    """The clock steps back, to times between those of the first half."""
    first = h264(folder, "first.ts", num_frames=30)
    second = h264(folder, "second.ts", "-output_ts_offset", "0.1001", num_frames=30, first=30)
    return append(folder / "shifted.ts", first, second)


def make_appended_with_a_gap(folder):
    first = h264(folder, "first.ts", num_frames=30)
    second = h264(folder, "second.ts", "-output_ts_offset", "5000", num_frames=30, first=30)
    return append(folder / "gap.ts", first, second)


def make_clock_wraps(folder):
    """The 33-bit clock of MPEG-TS passes zero in the middle."""
    return h264(folder, "wrap.ts", "-output_ts_offset", f"{2**33 / 90_000 - 2.5:.3f}")


def make_no_times(folder):
    """A Matroska copy whose first times are before zero, which FFmpeg does not tell."""
    copy = ("-avoid_negative_ts", "disabled", "-output_ts_offset", "-1")
    return remux(h264(folder, "clip.mp4"), folder / "negative.mkv", *copy)


def make_repeated_times(folder):
    halved = "setts=pts=floor(PTS/1024)*512:dts=floor(DTS/1024)*512"
    return remux(h264(folder, "clip.mp4", num_b_frames=0), folder / "repeated.mkv", "-bsf:v", halved)


def make_one_time_for_all(folder):
    plain = h264(folder, "clip.mp4", num_b_frames=0)
    return remux(plain, folder / "same.mkv", "-bsf:v", "setts=pts=0:dts=0:duration=0")


def make_finer_than_the_clock(folder):
    """100,000 frames per second in a container that counts milliseconds."""
    return h264(folder, "fast.mkv", rate="100000")


def make_ten_second_frames(folder):
    return h264(folder, "slow.mp4", rate="1/10")


def make_cut_in_an_open_gop(folder):
    parameters = "open-gop=1:keyint=10:min-keyint=10:bframes=3:scenecut=0"
    source = h264(folder, "open.ts", "-x264-params", parameters)
    ffmpeg("-ss", "0.9", "-i", source, "-c", "copy", folder / "cut.ts")
    return folder / "cut.ts"


def make_cut_in_an_open_gop_hevc(folder):
    parameters = "open-gop=1:keyint=12:min-keyint=12:bframes=4:log-level=error"
    source = encode(folder / "open.ts", "-c:v", "libx265", "-x265-params", parameters)
    ffmpeg("-ss", "0.9", "-i", source, "-c", "copy", folder / "cut.ts")
    return folder / "cut.ts"


def make_cut_to_matroska(folder):
    ffmpeg("-ss", "0.85", "-i", h264(folder, "clip.mp4"), "-c", "copy", folder / "cut.mkv")
    return folder / "cut.mkv"


def make_cut_at_both_ends(folder):
    ffmpeg("-ss", "0.53", "-i", h264(folder, "clip.mp4"), "-t", "1.1", "-c", "copy", folder / "cut.mp4")
    return folder / "cut.mp4"


def make_begins_between_key_frames(folder):
    return drop_packets(h264(folder, "clip.mp4", gop=20), folder / "late.mkv", 7)


def make_edit_list_without_its_key_frame(folder):
    source = h264(folder, "clip.mp4", gop=20)
    return remux(source, folder / "keyless.mp4", "-bsf:v", "noise=drop='eq(n,0)'")


def make_fragmented(folder):
    return h264(folder, "fragments.mp4", "-movflags", "frag_keyframe+empty_moov")


def make_long_gop_ts(folder):
    return h264(folder, "long.ts", gop=250, num_frames=320)


def make_deep_pyramid(folder):
    return h264(folder, "pyramid.mp4", "-x264-params", "b-pyramid=normal:bframes=7:b-adapt=0", gop=30)


def make_deep_pyramid_hevc(folder):
    parameters = "bframes=8:b-adapt=0:keyint=40:log-level=error"
    return encode(folder / "pyramid.mp4", "-c:v", "libx265", "-x265-params", parameters)


def make_interlaced(folder):
    return h264(folder, "fields.mp4", "-flags", "+ilme+ildct", "-x264-params", "tff=1", height=128)


def make_interlaced_mpeg2(folder):
    coding = ("-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-bf", "2", "-g", "12", "-q:v", "3")
    return encode(folder / "fields.ts", *coding, height=128)


def make_vp8_with_hidden_frames(folder):
    hidden = ("-auto-alt-ref", "1", "-lag-in-frames", "16")
    return encode(folder / "clip.webm", "-c:v", "libvpx", "-b:v", "200k", "-g", "30", *hidden)


def make_vp9_with_hidden_frames(folder):
    hidden = ("-auto-alt-ref", "1", "-lag-in-frames", "16")
    return encode(folder / "clip.webm", "-c:v", "libvpx-vp9", "-b:v", "300k", "-g", "250", *hidden)


def make_prores(folder):
    return encode(folder / "clip.mov", "-c:v", "prores_ks", num_frames=20)


def make_motion_jpeg(folder):
    return encode(folder / "clip.avi", "-c:v", "mjpeg", "-q:v", "3", num_frames=30)


def make_flash(folder):
    return h264(folder, "clip.flv")


def make_theora(folder):
    return encode(folder / "clip.ogv", "-c:v", "libtheora", "-q:v", "8")


def make_windows_media(folder):
    return encode(folder / "clip.wmv", "-c:v", "wmv2", "-q:v", "3", "-g", "12")


def make_mpeg1(folder):
    return encode(folder / "clip.mpg", "-c:v", "mpeg1video", "-bf", "2", "-g", "12", "-q:v", "3")


def make_material_exchange(folder):
    return encode(folder / "clip.mxf", "-c:v", "mpeg2video", "-bf", "2", "-g", "12", "-q:v", "3")


def make_ivf(folder):
    return encode(folder / "clip.ivf", "-c:v", "libvpx-vp9", "-b:v", "300k", "-g", "20")


def make_grey(folder):
    return encode(folder / "grey.mp4", "-c:v", "libx264", "-pix_fmt", "gray", "-g", "10")


def make_rgb(folder):
    return encode(folder / "rgb.mkv", "-c:v", "libx264rgb", "-pix_fmt", "rgb24", "-g", "10")


def make_ten_bit_422(folder):
    return encode(folder / "deep.mp4", "-c:v", "libx264", "-pix_fmt", "yuv422p10le", "-g", "10")


def make_field_pictures_ts(folder):
    return field_pictures.mux(folder / "fields.ts")


def make_field_pictures_timed_each(folder):
    return field_pictures.mux(folder / "fields.ts", times_of="fields")


def make_field_pictures_without_times(folder):
    return field_pictures.mux(folder / "fields.ts").with_suffix(".h264")


def make_all_marked_as_keys(folder):
    """What Matroska and AVI say of H.263, AVI of anything once its index is lost."""
    return encode(folder / "clip.mkv", "-c:v", "h263", "-s", "176x144", "-g", "20")


def make_avi_without_index(folder):
    path = encode(folder / "clip.avi", "-c:v", "wmv2", "-g", "20")
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"idx1")])
    return path


def make_packed_b_frames(folder):
    return encode(folder / "clip.avi", "-c:v", "libxvid", "-g", "20", "-bf", "2")


def make_bare_mpeg1(folder):
    return encode(folder / "clip.m1v", "-c:v", "mpeg1video", "-g", "20", "-bf", "2")


def make_mpeg1_in_asf(folder):
    return encode(folder / "clip.asf", "-c:v", "mpeg1video", "-g", "20", "-bf", "2", "-q:v", "3")


def make_late_matroska(folder):
    """Sound for so long before the first picture that FFmpeg does not know of B-frames when it begins to tell times."""
    sound = ("-f", "lavfi", "-i", "sine=d=20", "-itsoffset", "12")
    path = folder / "late.mkv"
    ffmpeg(*sound, "-i", h264(folder, "clip.mp4"), "-map", "0:a", "-map", "1:v", "-c:v", "copy", "-c:a", "aac", path)
    return path


def make_long_gop_cut(folder):
    """The first key frame that is left stands 587 packets from the beginning."""
    options = ("-keyint_min", "600", "-sc_threshold", "0")
    clip = h264(folder, "clip.mkv", *options, gop=600, num_b_frames=0, num_frames=640)
    return drop_packets(clip, folder / "cut.mkv", 13)


def make_one_pixel_high(folder):
    return encode(folder / "line.mkv", "-c:v", "ffv1", width=10, height=1, num_frames=8)


MAKERS = makers()
NO_ROOM_FOR_A_NUMBER = {"one_pixel_high"}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def clip(request, tmp_path_factory):
    """A kind of file, a reader of it, and its frames and their times as plain decoding gives them."""
    path = MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    return request.param, open_path(path), *decode_sequentially(path)


def open_path(path):
    return open_video(BytesSource(Path(path).read_bytes()))


def requests(total):
    """Index lists: dense, scattered, repeated, the first and the last alone, at random."""
    rng = random.Random(7)
    yield list(range(total))
    for size in (7, 8):
        yield np.linspace(0, total - 1, min(total, size)).astype(int).tolist()
    yield sorted([0, total // 2, total - 1] * 2)
    yield [0]
    yield [total - 1]
    for size in (1, 2, 3, 5, 9, 11):
        yield sorted(rng.sample(range(total), min(total, size)))


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_every_read_equals_plain_decoding(clip, num_threads):
    _, reader, frames, _ = clip
    assert reader.metadata.total_num_frames == len(frames)
    assert (reader.metadata.height, reader.metadata.width) == frames[0].shape[:2]
    for indices in requests(len(frames)):
        got, delivered = read_frames(reader, indices, num_threads)
        assert list(delivered) == indices
        wrong = [index for index, frame in zip(indices, got, strict=True) if not np.array_equal(frame, frames[index])]
        assert wrong == []


def test_frames_carry_successive_numbers(clip):
    kind, reader, frames, _ = clip
    if kind in NO_ROOM_FOR_A_NUMBER:
        pytest.skip("a picture of ten pixels holds no number")
    numbers = [read_number(frame) for frame in read_frames(reader, range(len(frames)), 2)[0]]
    assert numbers == list(range(numbers[0], numbers[0] + len(frames)))


def test_times_begin_at_zero_and_never_fall(clip):
    """Those of ordinary files are the ones that plain decoding gives."""
    kind, reader, _, times = clip
    metadata = reader.metadata
    if kind in ORDINARY:
        np.testing.assert_allclose(metadata.timestamps, np.array(times) - times[0], atol=1.1e-3)
    assert len(metadata.timestamps) == metadata.total_num_frames
    assert metadata.timestamps[0] == 0
    assert (np.diff(metadata.timestamps) >= 0).all()
    assert np.isfinite([metadata.fps, metadata.duration]).all()
    assert metadata.fps > 0
    assert metadata.duration >= metadata.timestamps[-1]


def test_the_larger_of_two_streams_is_taken(tmp_path):
    reader = open_path(make_two_streams(tmp_path))
    assert (reader.metadata.width, reader.metadata.height) == (160, 96)
    assert read_number(read_frames(reader, [7], 1)[0][0]) == 7


def test_times_of_a_variable_rate_are_the_real_ones(tmp_path):
    metadata = open_path(make_variable_rate(tmp_path)).metadata
    expected = [(n if n < 20 else 20 + (n - 20) * 3) / 25 for n in range(60)]
    np.testing.assert_allclose(metadata.timestamps, expected, atol=1e-4)


def test_times_of_a_constant_rate_are_exactly_index_over_rate(tmp_path):
    metadata = open_path(h264(tmp_path, "clip.mp4", rate="30000/1001")).metadata
    assert metadata.fps == 30000 / 1001
    assert metadata.timestamps.tolist() == [index / metadata.fps for index in range(60)]
    assert metadata.duration == 60 / metadata.fps


def test_an_edit_list_hides_what_comes_before_it(tmp_path):
    reader = open_path(make_edit_list(tmp_path))
    first = read_frames(reader, [0], 1)[0][0]
    assert read_number(first) == 29  # the first at or after 1.13 s; decoding begins at the key frame 20
    assert reader.metadata.timestamps[0] == 0


@pytest.mark.parametrize("name", ["g.avi", "slow.avi"])
def test_a_frame_left_out_is_a_gap_in_the_times(tmp_path, name):
    """However coarse the container's clock is: AVI's ticks are whole frames."""
    rate = {"g.avi": 25, "slow.avi": 1}[name]
    leave_out = ("-vf", "select=not(eq(n\\,20))", "-vsync", "vfr", "-r", str(rate))
    path = encode(tmp_path / name, "-c:v", "mjpeg", *leave_out, num_frames=40, rate=str(rate))
    reader = open_path(path)
    numbers = [read_number(frame) for frame in read_frames(reader, range(39), 2)[0]]
    assert numbers == [number for number in range(40) if number != 20]
    np.testing.assert_allclose(reader.metadata.timestamps, np.array(numbers) / rate)
    assert reader.metadata.duration == pytest.approx(40 / rate)


@pytest.mark.parametrize(
    ("pieces", "numbers"),
    [
        ([(5, 10), (30, 20)], [*range(5, 15), *range(30, 50)]),
        ([(0, 10), (10, 10), (27, 10)], [*range(20), *range(27, 37)]),
        ([(0, 20), (0, 20)], [*range(20), *range(20)]),
    ],
)
def test_pieces_of_an_edit_list_follow_one_another(tmp_path, pieces, numbers):
    """As editors write them that cut without encoding anew; ``pieces`` are (first frame, number of frames)."""
    path = h264(tmp_path, "clip.mp4", gop=12)
    path.write_bytes(with_edit_list(path.read_bytes(), pieces))
    reader = open_path(path)
    assert reader.metadata.total_num_frames == len(numbers)
    for indices in requests(len(numbers)):
        got, delivered = read_frames(reader, indices, 2)
        assert list(delivered) == indices
        assert [read_number(frame) for frame in got] == [numbers[index] for index in indices]
    assert reader.metadata.timestamps.tolist() == [index / 25 for index in range(len(numbers))]


def with_edit_list(data, pieces):
    """An MP4 whose tables stand behind its pictures, with these edits in place of its own."""
    at = data.index(b"elst") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    begin = struct.unpack(">i", data[at + 20 : at + 24])[0]
    milliseconds, ticks = 40, 512  # of a frame, by the clocks of the movie and of its track as FFmpeg writes them
    edits = [struct.pack(">IiHH", count * milliseconds, begin + first * ticks, 1, 0) for first, count in pieces]
    edited = bytearray(data[:at] + box(b"elst", bytes(4), struct.pack(">I", len(pieces)), *edits) + data[at + size :])
    for kind in (b"moov", b"trak", b"edts"):
        place = data.rindex(kind, 0, at) - 4
        edited[place : place + 4] = (
            int.from_bytes(edited[place : place + 4], "big") + len(edited) - len(data)
        ).to_bytes(4, "big")
    return bytes(edited)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda image: image[::-1, ::-1].transpose(1, 0, 2)),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
    ],
)
def test_a_display_matrix_may_mirror(tmp_path, matrix, shown):
    """As of a front camera. ``matrix`` is (a, b, c, d): right is (a, b) and down is (c, d), seen by the viewer."""
    path = h264(tmp_path, "clip.mp4", num_frames=10)
    plain = decode_sequentially(path)[0][3]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    reader = open_path(path)
    got = read_frames(reader, [3], 1)[0][0]
    assert np.array_equal(got, shown(plain))
    assert reader.metadata.is_mirrored == (matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0)
    assert (reader.metadata.height, reader.metadata.width) == got.shape[:2]


def test_lost_pictures_between_recordings_move_no_other(tmp_path):
    """Both begin between two key frames: what is lost at the joint keeps its place, what is lost before all is dropped."""
    whole = h264(tmp_path, "clip.ts")
    cut = tmp_path / "cut.ts"
    cut.write_bytes(without_pictures(whole.read_bytes(), 13))
    reader = open_path(append(tmp_path / "both.ts", cut, cut))
    frames, _ = decode_sequentially(tmp_path / "both.ts")
    total = reader.metadata.total_num_frames
    assert total == 40 + 47
    got, delivered = read_frames(reader, range(total), 2)
    num_lost = total - len(frames)
    assert num_lost > 0
    assert [read_number(frame) for frame in got[:37]] == list(range(20, 57))
    assert [read_number(frame) for frame in got[-40:]] == list(range(20, 60))
    assert list(delivered[-40:]) == list(range(total - 40, total))
    lost = [index for index in range(total) if delivered[index] != index]
    assert len(lost) == num_lost
    assert 37 <= min(lost) <= max(lost) < total - 40
    assert reader.metadata.timestamps[-1] == pytest.approx((total - 1) / 25)


def without_pictures(data, num_pictures):
    """An MPEG transport stream without the first pictures of the stream that FFmpeg numbers first."""
    packets, num_begun = [data[at : at + 188] for at in range(0, len(data), 188)], 0
    kept = []
    for packet in packets:
        is_video = packet[1] & 0x1F == 1 and packet[2] == 0
        num_begun += is_video and bool(packet[1] & 0x40)
        if not is_video or num_begun > num_pictures:
            kept.append(packet)
    return b"".join(kept)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_by_the_display_matrix(tmp_path, degrees):
    source = h264(tmp_path, "clip.mp4", num_frames=20)
    rotated, upright = tmp_path / "rotated.mp4", tmp_path / "upright.rgb"
    if has_display_rotation():
        ffmpeg("-display_rotation", degrees, "-i", source, "-c", "copy", rotated)
    else:
        ffmpeg("-i", source, "-c", "copy", "-metadata:s:v:0", f"rotate={degrees}", rotated)
    reader = open_path(rotated)
    assert reader.metadata.rotation_degrees % 360 in (degrees, 360 - degrees)
    ffmpeg("-i", rotated, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", upright)
    size = (reader.metadata.height, reader.metadata.width, 3)
    expected = np.fromfile(upright, np.uint8).reshape(size).astype(int)
    assert np.abs(read_frames(reader, [0], 1)[0][0] - expected).mean() < 2


def has_display_rotation():
    """Whether this ffmpeg writes the display matrix by an option of its own (from version 6 on)."""
    text = subprocess.run(["ffmpeg", "-hide_banner", "-h", "full"], capture_output=True, text=True, check=True).stdout
    return "-display_rotation" in text


@pytest.mark.parametrize(
    "maker",
    [
        make_bare_h264,
        make_h264_in_avi,
        make_appended,
        make_no_times,
        make_clock_wraps,
        make_late_matroska,
        make_bare_mpeg1,
        make_field_pictures_ts,
        make_field_pictures_timed_each,
        make_field_pictures_without_times,
    ],
)
def test_times_are_right_where_the_file_does_not_tell_them(tmp_path, maker):
    metadata = open_path(maker(tmp_path)).metadata
    np.testing.assert_allclose(metadata.timestamps, np.arange(NUM_FRAMES) / 25, atol=1.1e-3)
    assert metadata.fps == pytest.approx(25)
    assert metadata.duration == pytest.approx(NUM_FRAMES / 25)


def test_a_gap_between_recordings_stays_in_the_times(tmp_path):
    times = open_path(make_appended_with_a_gap(tmp_path)).metadata.timestamps
    assert times[29] < 2
    assert times[30] == pytest.approx(5000, abs=1)


def test_what_stands_before_the_first_key_frame_is_not_counted(tmp_path):
    reader = open_path(make_begins_between_key_frames(tmp_path))
    assert reader.metadata.total_num_frames == 40
    assert read_number(read_frames(reader, [0], 1)[0][0]) == 20


def test_frames_of_another_size_are_given_in_the_first_ones(tmp_path):
    """A stream may change its size; the array of frames cannot."""
    first = h264(tmp_path, "first.ts", num_frames=20)
    second = h264(tmp_path, "second.ts", "-output_ts_offset", "10", num_frames=20, first=20, width=240, height=144)
    reader = open_path(append(tmp_path / "both.ts", first, second))
    got, delivered = read_frames(reader, range(40), 2)
    assert got.shape == (40, 96, 160, 3)
    assert delivered == tuple(range(40))
    assert [read_number(frame) for frame in got] == list(range(40))


# Damaged files


@pytest.fixture(scope="module", params=["mkv", "mp4"])
def groups(request, tmp_path_factory):
    """Forty frames in closed groups of ten: the bytes, the packets, the frames."""
    return forty_frames(tmp_path_factory.mktemp("groups"), request.param)


def forty_frames(folder, suffix):
    path = h264(folder, f"clip.{suffix}", num_frames=40)
    return path.read_bytes(), packets(path), decode_sequentially(path)[0]


@pytest.mark.parametrize(
    ("lost", "wanted", "shown"),
    [
        (slice(20, 30), [5, 24, 35], [5, 19, 35]),  # the frame before, of another group
        (slice(30, 40), [39], [29]),
        (slice(10, 30), [12, 22, 31], [9, 9, 31]),
    ],
)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_lost_group_is_replaced_and_reported(groups, lost, wanted, shown, num_threads):
    data, places, frames = groups
    reader = open_video(BytesSource(blank(data, places[lost])))
    got, delivered = read_frames(reader, wanted, num_threads)
    assert list(delivered) == shown
    for frame, index in zip(got, delivered, strict=True):
        assert np.array_equal(frame, frames[index])


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ([0, 4, 15], [15, 15, 15]),  # nothing before: the next that was wanted
        ([3, 7], [10, 10]),  # nothing wanted decodes: the first that does
    ],
)
def test_a_lost_beginning_is_replaced_by_what_follows(tmp_path, wanted, shown):
    path = encode(tmp_path / "clip.webm", "-c:v", "libvpx", "-b:v", "300k", "-g", "10", num_frames=30)
    reader = open_video(BytesSource(blank(path.read_bytes(), packets(path)[:10])))
    assert reader.metadata.total_num_frames == 30
    got, delivered = read_frames(reader, wanted, 2)
    assert list(delivered) == shown
    assert [read_number(frame) for frame in got] == shown


def test_a_beginning_that_no_longer_says_it_is_a_key_frame_is_left_out(tmp_path):
    """In Matroska, whose packets alone say it; the index of an MP4 goes on saying it."""
    data, places, frames = forty_frames(tmp_path, "mkv")
    reader = open_video(BytesSource(blank(data, places[:10])))
    assert reader.metadata.total_num_frames == 30
    got, _ = read_frames(reader, range(30), 2)
    assert np.array_equal(got, frames[10:])


def test_flipped_bytes_never_raise_and_spare_the_other_groups(groups):
    data, places, frames = groups
    for seed in range(12):
        rng = random.Random(seed)
        damaged = bytearray(data)
        for place in rng.sample(places[10:20], 3):
            for _ in range(8):
                damaged[place[0] + rng.randrange(place[1])] ^= 1 << rng.randrange(8)
        got, delivered = read_frames(open_video(BytesSource(bytes(damaged))), range(40), 2)
        assert len(delivered) == 40
        for index in (*range(10), *range(20, 40)):
            assert delivered[index] == index
            assert np.array_equal(got[index], frames[index]), (seed, index)


@pytest.mark.parametrize("suffix", ["mkv", "ts", "avi", "webm", "flv", "mpg"])
def test_truncated_files_give_what_is_there(tmp_path, suffix):
    codec = {"webm": ("libvpx-vp9",), "mpg": ("mpeg2video", "-bf", "2"), "avi": ("mpeg4", "-bf", "2")}
    coding = codec.get(suffix, ("libx264", "-bf", "3"))
    path = encode(tmp_path / f"clip.{suffix}", "-c:v", *coding, "-g", "10", num_frames=100)
    frames, data = decode_sequentially(path)[0], path.read_bytes()
    for share in (0.35, 0.6, 0.9):
        reader = open_video(BytesSource(data[: int(len(data) * share)]))
        total = reader.metadata.total_num_frames
        assert 0 < total <= 100
        got, delivered = read_frames(reader, range(total), 2)
        assert all(0 <= index < total for index in delivered)
        # The last packet may be half there, and what refers to it is concealed.
        sound = [index for index in range(max(total - 6, 0)) if np.array_equal(got[index], frames[index])]
        assert sound == list(range(max(total - 6, 0)))


def test_a_truncated_mp4_with_its_index_in_front_gives_what_is_there(tmp_path):
    path = h264(tmp_path, "clip.mp4", "-movflags", "+faststart", num_frames=100)
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
