"""Files made to harm a decoder, as bytes; what each would do to a careless one is said where it is made."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.media.clips import box
from tests.media.numbered import encode, ffmpeg, numbered_frame

X264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-g", "10")


def full_box(kind: bytes, *contents: bytes, version: int = 0, flags: int = 0) -> bytes:
    """An MP4 box with version and flags."""
    return box(kind, bytes([version]), flags.to_bytes(3, "big"), *contents)


def u32(*numbers: int) -> bytes:
    """Big-endian 32-bit numbers."""
    return struct.pack(f">{len(numbers)}I", *numbers)


def with_external_data(location: str, *, width: int = 160, height: int = 96, num_samples: int = 20) -> bytes:
    """A whole MP4 whose samples are said to lie in another file or at another address (a ``dref`` without flag 1)."""
    return _movie(full_box(b"url ", location.encode() + b"\0"), width, height, num_samples)


def with_external_alias(path: str) -> bytes:
    """The same with a QuickTime alias record (``alis``), FFmpeg's other kind of reference to a file.

    Its layout: https://developer.apple.com/library/archive/technotes/tn/tn1188.html; path types 2 (Mac) and 18 (POSIX).
    """
    volume, name = b"disk", path.rpartition("/")[2].encode()
    head = bytes(4) + struct.pack(">HH", 150, 2) + struct.pack(">H", 0)
    head += bytes([len(volume)]) + volume.ljust(27, b"\0") + bytes(12)
    head += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    tags = b""
    for kind in (2, 18):
        text = path.encode()
        tags += struct.pack(">HH", kind, len(text)) + text + bytes(len(text) % 2)
    return _movie(full_box(b"alis", head + tags + struct.pack(">HH", 0xFFFF, 0)), 160, 96, 20)


def _movie(reference: bytes, width: int, height: int, num_samples: int) -> bytes:
    entry = box(
        b"mp4v",
        bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HH", width, height),
        u32(0x480000, 0x480000, 0) + struct.pack(">H", 1) + bytes(32) + struct.pack(">Hh", 24, -1),
    )
    tables = box(
        b"stbl",
        full_box(b"stsd", u32(1), entry),
        full_box(b"stts", u32(1, num_samples, 512)),
        full_box(b"stsc", u32(1, 1, 1, 1)),
        full_box(b"stsz", u32(0, num_samples), u32(*[400] * num_samples)),
        full_box(b"stco", u32(num_samples), u32(*range(0, 400 * num_samples, 400))),
    )
    media_info = box(
        b"minf",
        full_box(b"vmhd", bytes(8), flags=1),
        box(b"dinf", full_box(b"dref", u32(1), reference)),
        tables,
    )
    duration = 512 * num_samples
    handler = full_box(b"hdlr", bytes(4) + b"vide" + bytes(12) + b"v\0")
    media = box(b"mdia", full_box(b"mdhd", u32(0, 0, 12800, duration, 0x55C40000)), handler, media_info)
    matrix = u32(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    track = full_box(b"tkhd", u32(0, 0, 1, 0, duration), bytes(16), matrix, u32(width << 16, height << 16), flags=3)
    header = full_box(b"mvhd", u32(0, 0, 12800, duration, 0x10000), bytes(12), matrix, bytes(24), u32(2))
    return box(b"ftyp", b"isom" + u32(512) + b"isomiso2") + box(b"moov", header, box(b"trak", track, media))


def boxes(data: bytes) -> list[tuple[bytes, int, int]]:
    """(kind, start, end) of the outermost boxes of an MP4."""
    found, position = [], 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        found.append((data[position + 4 : position + 8], position, position + size))
        position += max(size, 8)
    return found


def set_u32(data: bytes, kind: bytes, offset: int, *numbers: int) -> bytes:
    """``data`` with numbers written ``offset`` bytes behind the four letters of every box ``kind``."""
    changed, at = bytearray(data), data.find(kind)
    assert at >= 0, kind
    while at >= 0:
        changed[at + 4 + offset : at + 4 + offset + 4 * len(numbers)] = u32(*numbers)
        at = data.find(kind, at + 4)
    return bytes(changed)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *, before: bytes = b"") -> bytes:
    """A PNG of the given header whatever ``rows`` (compressed here) has; ``before`` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + pixels + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk with a right checksum."""
    return u32(len(body)) + kind + body + u32(zlib.crc32(kind + body))


def picture(width: int = 64, height: int = 48, format: str = "PNG", **options: Any) -> bytes:
    """One encoded picture with the number 5 in it."""
    file = io.BytesIO()
    Image.fromarray(numbered_frame(5, width, height)).save(file, format, **options)
    return file.getvalue()


def moving_picture(format: str, num_frames: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """An animation or a document of many pages."""
    file = io.BytesIO()
    frames = [Image.new("P", size, number % 251) for number in range(num_frames)]
    if format != "GIF":
        frames = [frame.convert("RGB") for frame in frames]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return file.getvalue()


def clip(folder: Path, name: str, *arguments: str, num_frames: int = 20, **frames: Any) -> bytes:
    """A clip of numbered frames by ffmpeg; ``name`` has the container, ``arguments`` the codec."""
    return encode(folder / name, *arguments, num_frames=num_frames, **frames).read_bytes()


def sound(folder: Path, name: str, *arguments: str) -> bytes:
    """Half a second of a tone."""
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.5:r=8000", *arguments, folder / name)
    return (folder / name).read_bytes()


def sound_with_cover(folder: Path) -> bytes:
    """An M4A-like MP4 whose only picture is the cover."""
    (folder / "cover.png").write_bytes(picture())
    inputs = ("-f", "lavfi", "-i", "sine=d=0.5:r=8000", "-i", folder / "cover.png", "-map", "0", "-map", "1")
    ffmpeg(*inputs, "-c:a", "aac", "-c:v", "copy", "-disposition:v:0", "attached_pic", folder / "cover.mp4")
    return (folder / "cover.mp4").read_bytes()


def two_sizes(folder: Path) -> bytes:
    """H.264 in MPEG-TS that changes from 160x96 to 96x64 after 20 frames, as broadcasts do."""
    first = clip(folder, "first.ts", *X264, "-bsf:v", "dump_extra")
    second = clip(folder, "second.ts", *X264, "-output_ts_offset", "0.8", first=20, width=96, height=64)
    return first + second


def far_jump(folder: Path) -> bytes:
    """A Matroska clip whose second half comes 10 years (3.2e8 s) after the first."""
    encode(folder / "near.mkv", *X264, num_frames=20)
    jump = "setts=pts='if(lt(N,10),PTS,PTS+315360000/TB)':dts='if(lt(N,10),DTS,DTS+315360000/TB)'"
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-y",
        "-i",
        folder / "near.mkv",
        "-c",
        "copy",
        "-bsf:v",
        jump,
        folder / "far.mkv",
    ]
    subprocess.run(command, check=True, timeout=60)
    return (folder / "far.mkv").read_bytes()


def npy(header: bytes, body: bytes = bytes(1024), *, version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy file with any header text, right or wrong (NumPy's NEP 1)."""
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header) + 1)
    return b"\x93NUMPY" + bytes(version) + length + header + b"\n" + body


def npy_of(array: Any, **options: Any) -> bytes:
    """An array as .npy."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def wav(*, rate: int = 8000, channels: int = 1, data_size: int | None = None, samples: bytes = bytes(1600)) -> bytes:
    """16-bit PCM whose header may lie about rate, channels and size."""
    size = len(samples) if data_size is None else data_size
    format_chunk = struct.pack(
        "<HHIIHH", 1, channels, rate % 2**32, 2 * rate * channels % 2**32, 2 * channels % 65536, 16
    )
    body = b"WAVEfmt " + struct.pack("<I", 16) + format_chunk + b"data" + struct.pack("<I", size % 2**32) + samples
    return b"RIFF" + struct.pack("<I", (size + 36) % 2**32) + body
