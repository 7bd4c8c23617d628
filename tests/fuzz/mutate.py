"""Bytes of a media file in, damaged bytes out, by a seeded generator; the same seed gives the same damage. Decodes nothing.

Blind damage (bits, runs, blocks, cuts) mostly ends at the first check of a parser. The edits of structure keep a file
plausible: they change one length, one field or the order of boxes, and repair a PNG's checksums, so that the damage gets
past the first check. Formats: ISO/IEC 14496-12 (boxes), RFC 8794 (EBML), RFC 2083 (PNG), RIFF, NumPy's NEP 1 (npy).
"""

from __future__ import annotations

import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_BYTES = 1 << 20
"""No mutation grows a file beyond this."""

Mutator = Callable[[bytearray, random.Random], None]

_NUMBERS = (0, 1, 2, 7, 8, 15, 16, 255, 256, 32767, 32768, 65535, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_WIDE_NUMBERS = (*_NUMBERS, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_BOXES_WITH_BOXES = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta", b"moof", b"traf", b"mvex"}
_EBML_MASTERS = {
    0x1A45DFA3,  # EBML
    0x18538067,  # Segment
    0x1549A966,  # Info
    0x1654AE6B,  # Tracks
    0xAE,  # TrackEntry
    0xE0,  # Video
    0x1F43B675,  # Cluster
    0xA0,  # BlockGroup
    0x1C53BB6B,  # Cues
    0x114D9B74,  # SeekHead
}
_NPY_HEADERS = (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (65536, 65536, 65536, 65536), }",
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 2), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 0), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    b"{'descr': '<U9', 'fortran_order': False, 'shape': (3,), }",
    b"{'descr': '<c16', 'fortran_order': False, 'shape': (3,), }",
    b"{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (3,), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'more': 1}",
    b"{'descr': '<m8[ns]', 'fortran_order': True, 'shape': (3,), }",
    b"__import__('os').abort()",
    b"(" * 5000,
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 6000 + b",), }",
)


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """``data`` with one to four kinds of damage; ``others`` are files whose headers and blocks may be spliced in."""
    damaged = bytearray(data)
    mutators = _mutators_for(data, others)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice(mutators)(damaged, rng)
        del damaged[MAX_BYTES:]
    return bytes(damaged)


def _mutators_for(data: bytes, others: Sequence[bytes]) -> list[Mutator]:
    """Blind damage, and as many chances again for edits of the structure that ``data`` has."""
    blind: list[Mutator] = [
        _flip_bits,
        _set_run,
        _set_number,
        _truncate,
        _insert_block,
        _remove_block,
        _duplicate_block,
        lambda damaged, rng: _splice_header(damaged, rng, rng.choice(others)),
        lambda damaged, rng: _splice_block(damaged, rng, rng.choice(others)),
    ]
    editor = _editor_of(data)
    return blind if editor is None else blind + [editor] * len(blind)


def _editor_of(data: bytes) -> Mutator | None:
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return _edit_box
    if data[:4] == b"\x1aE\xdf\xa3":
        return _edit_ebml
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _edit_png
    if data[:4] == b"RIFF":
        return _edit_riff
    if data[:6] == b"\x93NUMPY":
        return _edit_npy
    return None


# Blind damage


def _flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64)) if data else 0):
        # Half of the flips hit the first part, where headers are.
        position = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 256))
        data[position] ^= 1 << rng.randrange(8)


def _set_run(data: bytearray, rng: random.Random) -> None:
    start, end = _block(data, rng)
    fill = rng.choice((b"\0", b"\xff", None))
    data[start:end] = rng.randbytes(end - start) if fill is None else fill * (end - start)


def _set_number(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    if len(data) >= size:
        position = rng.randrange(len(data) - size + 1)
        number = rng.choice(_WIDE_NUMBERS) % (1 << (8 * size))
        data[position : position + size] = number.to_bytes(size, rng.choice(("big", "little")))


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _insert_block(data: bytearray, rng: random.Random) -> None:
    position = rng.randrange(len(data) + 1)
    data[position:position] = rng.randbytes(rng.choice((1, 2, 7, 64, 1000)))


def _remove_block(data: bytearray, rng: random.Random) -> None:
    start, end = _block(data, rng)
    del data[start:end]


def _duplicate_block(data: bytearray, rng: random.Random) -> None:
    start, end = _block(data, rng)
    data[end:end] = data[start:end] * rng.choice((1, 1, 3, 100))


def _splice_header(data: bytearray, rng: random.Random, other: bytes) -> None:
    """The beginning of another file before, or instead of, the beginning of this one."""
    size = rng.choice((4, 8, 12, 32, 64, 256))
    data[: rng.choice((0, size))] = other[:size]


def _splice_block(data: bytearray, rng: random.Random, other: bytes) -> None:
    start, end = _block(other, rng)
    position = rng.randrange(len(data) + 1)
    data[position : position + rng.choice((0, end - start))] = other[start:end]


def _block(data: bytes | bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(start + rng.choice((1, 4, 16, 100, 1000)), len(data))


# Edits of structure


@dataclass(frozen=True)
class _Piece:
    """A box, element or chunk: its size field, its payload, and where the whole of it begins and ends."""

    start: int
    size_at: int
    size_bytes: int
    body: int
    end: int


def _edit_box(data: bytearray, rng: random.Random) -> None:
    boxes = list(_boxes(data, 0, len(data)))
    if boxes:
        _edit_piece(data, rng, boxes, "big")


def _boxes(data: bytearray, position: int, end: int) -> list[_Piece]:
    """All boxes of an MP4, those inside others included."""
    found = []
    while position + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, position)
        if size < 8 or position + size > end:
            break
        found.append(_Piece(position, position, 4, position + 8, position + size))
        if kind in _BOXES_WITH_BOXES:
            found += _boxes(data, position + 8, position + size)
        position += size
    return found


def _edit_ebml(data: bytearray, rng: random.Random) -> None:
    elements = _elements(data, 0, len(data))
    if elements:
        _edit_piece(data, rng, elements, "big")


def _elements(data: bytearray, position: int, end: int) -> list[_Piece]:
    """All elements of an EBML file, those inside master elements included."""
    found = []
    while position + 2 <= end:
        id_bytes = 9 - data[position].bit_length()
        size_at = position + id_bytes
        if id_bytes > 4 or size_at >= end or not data[size_at]:
            break
        size_bytes = 9 - data[size_at].bit_length()
        body = size_at + size_bytes
        size = int.from_bytes(data[size_at:body], "big") & ((1 << (7 * size_bytes)) - 1)
        is_unknown = size == (1 << (7 * size_bytes)) - 1
        stop = min(end, len(data) if is_unknown else body + size)
        found.append(_Piece(position, size_at, size_bytes, body, stop))
        if int.from_bytes(data[position:size_at], "big") in _EBML_MASTERS:
            found += _elements(data, body, stop)
        position = stop
    return found


def _edit_riff(data: bytearray, rng: random.Random) -> None:
    chunks, position = [_Piece(0, 4, 4, 12, len(data))], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"LIST":
            chunks.append(_Piece(position, position + 4, 4, position + 12, position + 12))
            position += 12
            continue
        end = min(position + 8 + size + size % 2, len(data))
        chunks.append(_Piece(position, position + 4, 4, position + 8, end))
        position = end
    _edit_piece(data, rng, chunks, "little")


def _edit_piece(data: bytearray, rng: random.Random, pieces: Sequence[_Piece], order: str) -> None:
    """Change the size, a field near the front, or the number and order of one piece."""
    piece = rng.choice(pieces)
    what = rng.randrange(6)
    if what == 0:
        bits = 8 * piece.size_bytes
        number = rng.choice(_WIDE_NUMBERS) % (1 << bits)
        data[piece.size_at : piece.size_at + piece.size_bytes] = number.to_bytes(piece.size_bytes, order)  # type: ignore[arg-type]
    elif what == 1:
        _nudge(data, rng, piece, order)
    elif what in (2, 3):
        _edit_field(data, rng, piece, order)
    elif what == 4:
        copy = data[piece.start : piece.end]
        data[piece.end : piece.end] = copy * rng.choice((1, 1, 2, 50))
    else:
        other = rng.choice(pieces)
        data[piece.start : piece.end] = data[other.start : other.end] if rng.random() < 0.5 else b""


def _nudge(data: bytearray, rng: random.Random, piece: _Piece, order: str) -> None:
    """A size that is wrong by a little."""
    field = data[piece.size_at : piece.size_at + piece.size_bytes]
    size = int.from_bytes(field, order) + rng.choice((-16, -8, -4, -1, 1, 4, 8, 16))  # type: ignore[arg-type]
    size %= 1 << (8 * piece.size_bytes)
    data[piece.size_at : piece.size_at + piece.size_bytes] = size.to_bytes(piece.size_bytes, order)  # type: ignore[arg-type]


def _edit_field(data: bytearray, rng: random.Random, piece: _Piece, order: str) -> None:
    """A number among the first of the payload set to one that is likely to be taken badly."""
    size = rng.choice((1, 2, 4, 8))
    places = range(piece.body, min(piece.end, piece.body + 128) - size + 1)
    if places:
        at = rng.choice(places)
        number = rng.choice(_WIDE_NUMBERS) % (1 << (8 * size))
        data[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]


def _edit_png(data: bytearray, rng: random.Random) -> None:
    """Damage one chunk and make its checksum right again."""
    chunks, position = [], 8
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if position + 12 + size > len(data):
            break
        chunks.append(_Piece(position, position, 4, position + 8, position + 12 + size))
        position += 12 + size
    if not chunks:
        return
    piece = rng.choice(chunks)
    if rng.random() < 0.4:
        _edit_piece(data, rng, chunks, "big")
        return
    body = bytearray(data[piece.body : piece.end - 4])
    rng.choice((_flip_bits, _set_run, _set_number, _truncate, _insert_block))(body, rng)
    kind = bytes(data[piece.start + 4 : piece.body])
    checksum = zlib.crc32(kind + body)
    data[piece.start : piece.end] = len(body).to_bytes(4, "big") + kind + body + checksum.to_bytes(4, "big")


def _edit_npy(data: bytearray, rng: random.Random) -> None:
    """Another header text, another version, or a wrong length of the header."""
    what = rng.randrange(4)
    if what == 0 and len(data) > 10:
        data[6] = rng.choice((0, 1, 2, 3, 4, 255))
    elif what == 1 and len(data) > 10:
        data[8:10] = (rng.choice(_NUMBERS) % 65536).to_bytes(2, "little")
    elif what == 2:
        header = rng.choice(_NPY_HEADERS) + b"\n"
        end = 10 + int.from_bytes(data[8:10], "little")
        data[8:end] = len(header).to_bytes(2, "little") + header
    else:
        numbers = list(re.finditer(rb"\d+", data[10:128]))
        if numbers:
            number = rng.choice(numbers)
            start, end = number.span()
            data[10 + start : 10 + end] = str(rng.choice(_WIDE_NUMBERS)).encode()[: end - start].ljust(end - start)
