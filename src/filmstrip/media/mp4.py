"""The boxes of an MP4 or QuickTime file (ISO/IEC 14496-12), as far as safety and fetching in parts need them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_MAX_BOXES = 1024
"""Boxes looked at in one place; a file in thousands of fragments has more, and is read as a whole."""
_MAX_TRACKS = 64
_SELF_CONTAINED = 1
_TOP_LEVEL = (
    b"ftyp",
    b"moov",
    b"mdat",
    b"free",
    b"skip",
    b"wide",
    b"uuid",
    b"pdin",
    b"meta",
    b"moof",
    b"sidx",
    b"styp",
)


@dataclass(frozen=True)
class _Box:
    """Type, first byte of the contents, end."""

    kind: bytes
    start: int
    stop: int


def media_data_ranges(file: BinaryIO, num_bytes: int) -> list[tuple[int, int]] | None:
    """Where the pictures and sounds stand of a file whose tables stand apart from them.

    None for a file of another kind: not MP4, in fragments, or with more than 1,024 boxes.
    """
    boxes = list(_boxes(file, 0, num_bytes))
    kinds = [box.kind for box in boxes]
    if not boxes or kinds[0] not in _TOP_LEVEL or kinds.count(b"moov") != 1 or b"moof" in kinds:
        return None
    if len(boxes) >= _MAX_BOXES or boxes[-1].stop < num_bytes:
        return None
    return [(box.start, box.stop) for box in boxes if box.kind == b"mdat"]


def refers_to_other_files(file: BinaryIO, num_bytes: int) -> bool:
    """Whether a track's data reference (``dref``) names data outside the file. False for files of another kind."""
    boxes = _boxes(file, 0, num_bytes)
    first = next(boxes, None)
    if first is None or first.kind not in _TOP_LEVEL:
        return False
    for movie in (box for box in (first, *boxes) if box.kind == b"moov"):
        tracks = [box for box in _boxes(file, movie.start, movie.stop) if box.kind == b"trak"]
        if any(_has_outside_reference(file, track) for track in tracks[:_MAX_TRACKS]):
            return True
    return False


def _has_outside_reference(file: BinaryIO, track: _Box) -> bool:
    inner = [track]
    for kind in (b"mdia", b"minf", b"dinf", b"dref"):
        inner = [box for outer in inner for box in _boxes(file, outer.start, outer.stop) if box.kind == kind]
    for table in inner:
        for entry in _boxes(file, table.start + 8, table.stop):  # after version, flags and number of entries
            file.seek(entry.start)
            flags = file.read(4)
            if len(flags) == 4 and not struct.unpack(">I", flags)[0] & _SELF_CONTAINED:
                return True
    return False


def _boxes(file: BinaryIO, start: int, stop: int) -> Iterator[_Box]:
    """The boxes between two places, until one is broken or there are too many."""
    for _ in range(_MAX_BOXES):
        if start + 8 > stop:
            return
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            return
        size, kind = struct.unpack(">I4s", header[:8])
        length = 8
        if size == 1 and len(header) == 16:
            size, length = struct.unpack(">Q", header[8:])[0], 16
        elif size == 0:  # to the end of the file
            size = stop - start
        if size < length:
            return
        yield _Box(kind, start + length, min(start + size, stop))
        start += size
