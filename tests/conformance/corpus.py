"""The clips every decoder is held to, and what each of them shows: numbers, size, times and colours; decodes nothing.

``python -m tests.conformance.corpus FOLDER`` makes them all.
"""

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.media.clips import append, blank, drop_packets, packets, remux
from tests.media.numbered import ffmpeg, numbered_frame

WIDTH, HEIGHT, RATE = 160, 96, 25
COLOURS = ((200, 40, 40), (40, 180, 40), (50, 50, 200), (200, 190, 50))
"""Painted along the bottom, one beside the other: grey bars would look the same through a wrong colour matrix."""

X264 = ("-c:v", "libx264", "-preset", "veryfast", "-bf", "3", "-g", "12")
H264 = (*X264, "-pix_fmt", "yuv420p", "-crf", "18")
H265 = ("-c:v", "libx265", "-preset", "veryfast", "-crf", "18")
OPEN_GOP = "open-gop=1:keyint=10:min-keyint=10:bframes=3:scenecut=0"


def draw(number, width=WIDTH, height=HEIGHT):
    """uint8 RGB: the bars of :func:`numbered_frame` over four patches of colour."""
    image = numbered_frame(number, width, height)
    edges = np.linspace(0, width, len(COLOURS) + 1).astype(int)
    for place, colour in enumerate(COLOURS):
        image[height * 3 // 4 :, edges[place] : edges[place + 1]] = colour
    return image


@dataclass(frozen=True)
class Clip:
    """A file and its truth: ``numbers`` of the frames shown, ``times`` in seconds from the first, (width, height).

    ``time_tolerance_seconds`` is the tick of a container that cannot say the times exactly. ``replaced`` maps the places of
    frames that are damaged in the file to the places of those shown instead.
    """

    name: str
    about: str
    make: Callable[[Path], Path]
    numbers: tuple[int, ...]
    times: tuple[float, ...]
    size: tuple[int, int] = (WIDTH, HEIGHT)
    time_tolerance_seconds: float = 1e-6
    replaced: tuple[tuple[int, int], ...] = ()


CLIPS: dict[str, Clip] = {}


def clip(about, *, numbers=range(60), times=None, size=(WIDTH, HEIGHT), tolerance=1e-6, replaced=()):
    """Register the maker below; frames follow one another at 25 fps unless ``times`` says otherwise."""

    def register(make):
        name = make.__name__
        at = tuple(times) if times is not None else tuple(place / RATE for place in range(len(numbers)))
        CLIPS[name] = Clip(name, about, make, tuple(numbers), at, size, tolerance, tuple(replaced))
        return make

    return register


def encode(path, *arguments, num_frames=60, width=WIDTH, height=HEIGHT, rate=RATE, first=0, quarter_turns=0):
    """Encode drawn frames; ``arguments`` are those of the output. Returns ``path``."""
    images = [np.rot90(draw(first + i, width, height), quarter_turns) for i in range(num_frames)]
    coded_height, coded_width = images[0].shape[:2]
    size = f"{coded_width}x{coded_height}"
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", rate, "-i", "-")
    ffmpeg(*raw, *arguments, path, stdin=b"".join(image.tobytes() for image in images))
    return path


@clip("H.264 with B-frames in MP4")
def h264(folder):
    return encode(folder / "h264.mp4", *H264)


@clip("H.264 with open groups of pictures")
def h264_open_gop(folder):
    return encode(folder / "open.mp4", *H264, "-x264-params", OPEN_GOP)


@clip("H.264, one key frame at the beginning", numbers=range(120))
def h264_one_group(folder):
    return encode(folder / "group.mp4", *H264, "-g", "250", num_frames=120)


TENTHS = tuple(place / 10 for place in range(200))


@clip("H.264, 20 seconds", numbers=range(200), times=TENTHS)
def h264_long(folder):
    return encode(folder / "long.mp4", *H264, "-g", "25", num_frames=200, rate=10)


@clip("H.264 in MPEG-TS, 20 seconds", numbers=range(200), times=TENTHS)
def h264_ts_long(folder):
    return encode(folder / "long.ts", *H264, "-g", "25", num_frames=200, rate=10)


@clip("H.264 refreshed bit by bit, key frames whole only some frames later")
def h264_intra_refresh(folder):
    return encode(folder / "refresh.mp4", "-c:v", "libx264", "-x264-params", "intra-refresh=1:keyint=20:bframes=0")


@clip("H.264 in Matroska", tolerance=1e-3)
def h264_mkv(folder):
    return encode(folder / "h264.mkv", *H264)


@clip("H.264 in MPEG-TS whose clock begins at 1400 s")
def h264_ts(folder):
    return encode(folder / "late.ts", *H264, "-output_ts_offset", "1400")


@clip("H.264 in AVI, packets numbered in coded order")
def h264_avi(folder):
    return encode(folder / "coded.avi", *H264, "-x264-params", "b-adapt=0:scenecut=0")


@clip("H.264 in Flash video", tolerance=1e-3)
def h264_flv(folder):
    return encode(folder / "h264.flv", *H264)


@clip("H.264 without a container")
def h264_bare(folder):
    return encode(folder / "bare.h264", *H264)


@clip("H.264, fragmented MP4")
def h264_fragmented(folder):
    return encode(folder / "fragments.mp4", *H264, "-movflags", "frag_keyframe+empty_moov")


@clip("H.264, interlaced")
def h264_interlaced(folder):
    return encode(folder / "fields.mp4", *H264, "-flags", "+ilme+ildct", "-x264-params", "tff=1")


@clip("H.264, the middle third interlaced")
def h264_partly_interlaced(folder):
    fields = ("-flags", "+ilme+ildct", "-x264-params", "tff=1")
    parts = [
        encode(folder / f"{first}.ts", *H264, *arguments, num_frames=20, first=first)
        for first, arguments in ((0, ()), (20, fields), (40, ()))
    ]
    playlist = folder / "parts.txt"
    playlist.write_text("".join(f"file '{part}'\n" for part in parts))
    ffmpeg("-f", "concat", "-safe", "0", "-i", playlist, "-c", "copy", folder / "partly.mp4")
    return folder / "partly.mp4"


@clip("H.264, 10 bit, 4:2:2")
def h264_10bit_422(folder):
    return encode(folder / "deep.mp4", *X264, "-pix_fmt", "yuv422p10le")


@clip("H.264, odd size, 4:4:4", size=(161, 97))
def h264_odd_444(folder):
    return encode(folder / "odd.mp4", *X264, "-pix_fmt", "yuv444p", width=161, height=97)


@clip("H.264, size no multiple of 16", size=(150, 86))
def h264_cropped(folder):
    return encode(folder / "cropped.mp4", *H264, width=150, height=86)


@clip("H.264, pixels twice as wide as high")
def h264_wide_pixels(folder):
    return encode(folder / "wide.mp4", *H264, "-vf", "setsar=2")


@clip("H.264, full range")
def h264_full_range(folder):
    return encode(folder / "full.mp4", *H264, "-vf", "scale=out_range=full", "-color_range", "pc")


@clip("H.264 marked BT.709")
def h264_bt709(folder):
    marks = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709")
    return encode(folder / "bt709.mp4", *H264, "-vf", "scale=out_color_matrix=bt709", *marks)


@clip("H.264, RGB without loss")
def h264_rgb(folder):
    return encode(folder / "rgb.mp4", "-c:v", "libx264rgb", "-preset", "veryfast", "-g", "12", "-pix_fmt", "rgb24")


@clip("HEVC")
def hevc(folder):
    return encode(
        folder / "hevc.mp4", *H265, "-pix_fmt", "yuv420p", "-x265-params", "keyint=12:bframes=3:log-level=error"
    )


@clip("HEVC with open groups of pictures")
def hevc_open_gop(folder):
    return encode(folder / "open.mp4", *H265, "-pix_fmt", "yuv420p", "-x265-params", f"{OPEN_GOP}:log-level=error")


@clip("HEVC, 10 bit")
def hevc_10bit(folder):
    return encode(folder / "deep.mp4", *H265, "-pix_fmt", "yuv420p10le", "-x265-params", "keyint=12:log-level=error")


@clip("HEVC, 10 bit, marked BT.2020 and PQ")
def hevc_hdr(folder):
    marks = (
        "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc:hdr10=1:repeat-headers=1:keyint=12:log-level=error"
    )
    matrix = ("-vf", "scale=out_color_matrix=bt2020nc", "-pix_fmt", "yuv420p10le")
    return encode(folder / "hdr.mp4", *H265, *matrix, "-x265-params", marks)


@clip("AV1 in MP4", numbers=range(40))
def av1(folder):
    return encode(folder / "av1.mp4", "-c:v", "libsvtav1", "-preset", "10", "-g", "20", "-crf", "20", num_frames=40)


@clip("AV1 in WebM", numbers=range(40), tolerance=1e-3)
def av1_webm(folder):
    return encode(folder / "av1.webm", "-c:v", "libsvtav1", "-preset", "10", "-g", "20", "-crf", "20", num_frames=40)


@clip("VP8 with hidden frames in WebM", tolerance=1e-3)
def vp8(folder):
    hidden = ("-auto-alt-ref", "1", "-lag-in-frames", "16")
    return encode(folder / "vp8.webm", "-c:v", "libvpx", "-b:v", "900k", "-g", "20", *hidden)


@clip("VP9 with hidden frames in WebM", tolerance=1e-3)
def vp9(folder):
    hidden = ("-auto-alt-ref", "1", "-lag-in-frames", "12", "-deadline", "realtime")
    return encode(folder / "vp9.webm", "-c:v", "libvpx-vp9", "-b:v", "900k", "-g", "20", *hidden)


@clip("VP9 in MP4")
def vp9_mp4(folder):
    return remux(vp9(folder), folder / "vp9.mp4", "-video_track_timescale", "25000")


@clip("MPEG-4 in AVI")
def mpeg4_avi(folder):
    return encode(folder / "mpeg4.avi", "-c:v", "mpeg4", "-bf", "2", "-g", "12", "-q:v", "2")


@clip("MPEG-2 in MPEG-TS whose clock begins at 300 s")
def mpeg2_ts(folder):
    coding = ("-c:v", "mpeg2video", "-bf", "2", "-g", "12", "-q:v", "2")
    return encode(folder / "mpeg2.ts", *coding, "-output_ts_offset", "300")


@clip("MPEG-2, interlaced, in an MPEG program stream")
def mpeg2_interlaced(folder):
    coding = ("-c:v", "mpeg2video", "-bf", "2", "-g", "12", "-q:v", "2", "-flags", "+ilme+ildct")
    return encode(folder / "fields.mpg", *coding)


@clip("MPEG-1")
def mpeg1(folder):
    return encode(folder / "mpeg1.mpg", "-c:v", "mpeg1video", "-bf", "2", "-g", "12", "-q:v", "2")


@clip("Windows Media 8", tolerance=1e-3)
def wmv(folder):
    return encode(folder / "clip.wmv", "-c:v", "wmv2", "-q:v", "2", "-g", "12")


@clip("Theora")
def theora(folder):
    return encode(folder / "clip.ogv", "-c:v", "libtheora", "-q:v", "9")


@clip("Motion JPEG in AVI", numbers=range(30))
def mjpeg(folder):
    return encode(folder / "mjpeg.avi", "-c:v", "mjpeg", "-q:v", "2", num_frames=30)


@clip("ProRes in QuickTime", numbers=range(20))
def prores(folder):
    return encode(folder / "prores.mov", "-c:v", "prores_ks", num_frames=20)


@clip("FFV1 in Matroska, odd size, 4:2:0", numbers=range(30), size=(161, 97), tolerance=1e-3)
def ffv1_odd(folder):
    return encode(folder / "ffv1.mkv", "-c:v", "ffv1", "-pix_fmt", "yuv420p", num_frames=30, width=161, height=97)


@clip("GIF", numbers=range(12), times=[place / 10 for place in range(12)])
def gif(folder):
    palette = ("-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none")
    return encode(folder / "clip.gif", *palette, num_frames=12, rate=10)


@clip(
    "variable frame rate: 25 fps, then 25/3 fps",
    times=[(place if place < 20 else 20 + (place - 20) * 3) / RATE for place in range(60)],
)
def variable_rate(folder):
    times = "settb=1/90000,setpts='if(lt(N,20),N,20+(N-20)*3)*3600'"
    arguments = ("-vf", times, "-vsync", "vfr", "-video_track_timescale", "90000")
    return encode(folder / "vfr.mp4", *H264, *arguments)


@clip(
    "variable frame rate in Matroska, 30 seconds",
    numbers=range(200),
    times=[(place if place < 100 else 100 + (place - 100) * 2) / 10 for place in range(200)],
    tolerance=1e-3,
)
def variable_rate_long(folder):
    times = "settb=1/1000,setpts='if(lt(N,100),N,100+(N-100)*2)*100'"
    return encode(folder / "vfr.mkv", *H264, "-g", "25", "-vf", times, "-vsync", "vfr", num_frames=200, rate=10)


@clip("half a second of sound before the first frame")
def late_start(folder):
    return sound(folder, "late.mp4", "-itsoffset", "0.5")


@clip("an edit list that begins within a group of pictures", numbers=range(29, 60))
def edit_list(folder):
    ffmpeg("-ss", "1.16", "-i", h264(folder), "-c", "copy", folder / "edited.mp4")
    return folder / "edited.mp4"


@clip("an edit list whose key frame is missing", numbers=range(12, 60))
def edit_list_without_key_frame(folder):
    return remux(h264(folder), folder / "keyless.mp4", "-bsf:v", "noise=drop='eq(n,0)'")


@clip("a cut within an open group of pictures", numbers=range(30, 60))
def cut_open_gop(folder):
    source = encode(folder / "open.ts", *H264, "-x264-params", OPEN_GOP)
    ffmpeg("-ss", "0.9", "-i", source, "-c", "copy", folder / "cut.ts")
    return folder / "cut.ts"


@clip("a recording that begins between two key frames", numbers=range(12, 60), tolerance=1e-3)
def begins_between_key_frames(folder):
    return drop_packets(h264(folder), folder / "late.mkv", 7)


def rotated(folder, degrees):
    """Turned pictures and a display matrix (the nine numbers of a track's header) that turns them back, clockwise."""
    data = bytearray(encode(folder / "turned.mp4", *H264, quarter_turns=degrees // 90).read_bytes())
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one, place = 1 << 16, data.index(b"tkhd") + 44
    data[place : place + 36] = struct.pack(
        ">9i", cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30
    )
    (folder / f"rotated{degrees}.mp4").write_bytes(data)
    return folder / f"rotated{degrees}.mp4"


@clip("rotated by 90 degrees")
def rotated_90(folder):
    return rotated(folder, 90)


@clip("rotated by 180 degrees")
def rotated_180(folder):
    return rotated(folder, 180)


@clip("rotated by 270 degrees")
def rotated_270(folder):
    return rotated(folder, 270)


def two_streams(folder, *dispositions):
    small = encode(folder / "small.mp4", *H264, width=80, height=48, first=500)
    both = ("-i", small, "-i", h264(folder), "-map", "0", "-map", "1", "-c", "copy")
    ffmpeg(*both, *dispositions, folder / "two.mp4")
    return folder / "two.mp4"


@clip("two video streams, the first marked as default", numbers=range(500, 560), size=(80, 48))
def two_streams_first(folder):
    return two_streams(folder, "-disposition:v:0", "default", "-disposition:v:1", "0")


@clip("two video streams, the second marked as default")
def two_streams_second(folder):
    return two_streams(folder, "-disposition:v:0", "0", "-disposition:v:1", "default")


@clip("one frame", numbers=range(1))
def one_frame(folder):
    return encode(folder / "one.mp4", *H264, num_frames=1)


def sound(folder, name, *offset):
    tone = folder / "tone.m4a"
    ffmpeg("-f", "lavfi", "-i", "sine=d=3", "-c:a", "aac", tone)
    ffmpeg("-i", tone, *offset, "-i", h264(folder), "-map", "0:a", "-map", "1:v", "-c", "copy", folder / name)
    return folder / name


@clip("with sound")
def with_sound(folder):
    return sound(folder, "sound.mp4")


@clip("two recordings joined byte by byte, the clock begins anew")
def appended(folder):
    halves = [encode(folder / f"half{i}.ts", *H264, num_frames=30, first=30 * i) for i in range(2)]
    return append(folder / "appended.ts", *halves)


@clip("Matroska cut off after 40 frames", numbers=range(40), tolerance=1e-3)
def truncated(folder):
    source = encode(folder / "whole.mkv", *X264, "-pix_fmt", "yuv420p", "-bf", "0", "-g", "10")
    (position, size) = packets(source)[39]
    cut = folder / "truncated.mkv"
    cut.write_bytes(source.read_bytes()[: position + size])
    return cut


@clip(
    "a damaged group of pictures in Matroska",
    tolerance=1e-3,
    replaced=[(place, 19) for place in range(20, 30)],
)
def damaged(folder):
    source = encode(folder / "whole.mkv", *H264, "-g", "10", "-x264-params", "scenecut=0")
    broken = folder / "damaged.mkv"
    broken.write_bytes(blank(source.read_bytes(), packets(source)[20:30]))
    return broken


def main(folder):
    """Make every clip in a folder of its own."""
    for name, described in CLIPS.items():
        place = Path(folder) / name
        place.mkdir(parents=True, exist_ok=True)
        print(described.make(place))


if __name__ == "__main__":
    main(sys.argv[1])
