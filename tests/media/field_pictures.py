"""H.264 whose two fields are pictures of their own (PAFF), which no encoder at hand writes; decodes nothing.

Every macroblock is I_PCM: the samples stand in the stream as they are. Syntax: ITU-T H.264, 7.3.
"""

from fractions import Fraction

import av
import numpy as np

from tests.media.numbered import numbered_frame

WIDTH, HEIGHT, RATE = 160, 96, 25
_CLOCK = Fraction(1, 90_000)
_SLICE, _IDR_SLICE, _SEQUENCE_SET, _PICTURE_SET = 1, 5, 7, 8
_LOG2_MAX_FRAME_NUM = 4
_I_SLICE, _I_PCM = 7, 25
_ACCESS_UNIT_DELIMITER = b"\0\0\0\1\x09\x10"


class _Bits:
    """Syntax elements, written bit by bit."""

    def __init__(self):
        self._bits = []

    def u(self, num_bits, value):
        """Unsigned, of a fixed length."""
        self._bits += [value >> place & 1 for place in reversed(range(num_bits))]
        return self

    def ue(self, *values):
        """Exp-Golomb codes."""
        for value in values:
            length = (value + 1).bit_length()
            self.u(2 * length - 1, value + 1)
        return self

    def aligned(self, *, stop_bit):
        """All of it as bytes, with a one behind it first where the syntax wants that."""
        self.u(int(stop_bit), 1)
        self.u(-len(self._bits) % 8, 0)
        return np.packbits(np.array(self._bits, np.uint8)).tobytes()


def field_pictures(num_frames, gop=10):
    """For each numbered frame the access units of its top and its bottom field, bytes each."""
    for number in range(num_frames):
        picture = av.VideoFrame.from_ndarray(numbered_frame(number, WIDTH, HEIGHT), format="rgb24")
        planes = picture.reformat(format="yuv420p").to_ndarray()
        luma, chroma = planes[:HEIGHT], planes[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
        # A sample of zero is not allowed; a few levels do not matter.
        luma, chroma = np.maximum(luma, 4), np.maximum(chroma, 4)
        yield [
            _access_unit(number, gop, is_bottom, luma[is_bottom::2], chroma[:, is_bottom::2]) for is_bottom in (0, 1)
        ]


def mux(path, *, times_of="frames", num_frames=60):
    """Write the fields into a container, each frame's in one piece ("frames") or each with a time of its own ("fields")."""
    bare = path.with_suffix(".h264")
    units = list(field_pictures(num_frames))
    bare.write_bytes(b"".join(unit for pair in units for unit in pair))
    with av.open(str(bare)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, pair in enumerate(units):
            for place, unit in enumerate([b"".join(pair)] if times_of == "frames" else pair):
                packet = av.Packet(unit)
                packet.stream, packet.time_base = stream, _CLOCK
                packet.pts = packet.dts = int((number + place / 2) / RATE / _CLOCK)
                packet.is_keyframe = number % 10 == 0 and place == 0
                target.mux(packet)
    return path


def _access_unit(number, gop, is_bottom, luma, chroma):
    """Every second frame is one that no other may refer to, which decoders can be told to skip."""
    place = number % gop
    is_idr, is_reference = place == 0 and not is_bottom, place % 2 == 0
    header = _Bits().ue(0, _I_SLICE, 0)  # first macroblock, kind, picture parameter set
    num_references_before = (place + 1) // 2
    header.u(_LOG2_MAX_FRAME_NUM, num_references_before % 2**_LOG2_MAX_FRAME_NUM).u(1, 1).u(1, is_bottom)
    if is_idr:
        header.ue(number // gop % 2)
    header.u(8, 2 * place + is_bottom & 255)  # order of display
    header.u(2 if is_idr else 1 if is_reference else 0, 0)  # marking of references: as usual
    header.ue(0, 1)  # quantizer as in the parameter set, no deblocking
    body = bytearray()
    for top in range(0, HEIGHT // 2, 16):
        for left in range(0, WIDTH, 16):
            body += (header if not body else _Bits()).ue(_I_PCM).aligned(stop_bit=False)
            body += luma[top : top + 16, left : left + 16].tobytes()
            for plane in chroma:
                body += plane[top // 2 : top // 2 + 8, left // 2 : left // 2 + 8].tobytes()
    body.append(0x80)
    sets = _sequence_set() + _picture_set() if is_idr else b""
    return _ACCESS_UNIT_DELIMITER + sets + _nal(_IDR_SLICE if is_idr else _SLICE, bytes(body), is_reference)


def _sequence_set():
    bits = _Bits().u(8, 77).u(8, 0).u(8, 30)  # Main profile, level 3
    bits.ue(0, _LOG2_MAX_FRAME_NUM - 4, 0, 8 - 4, 2).u(1, 0)  # order of display in 8 bits; two reference frames
    bits.ue(WIDTH // 16 - 1, HEIGHT // 32 - 1).u(1, 0).u(1, 0).u(1, 1).u(1, 0)  # fields may be coded; no cropping
    bits.u(1, 1).u(4, 0)  # VUI, without the shape of pixels, overscan, colours and chroma positions
    bits.u(1, 1).u(32, 1).u(32, 2 * RATE).u(1, 1).u(3, 0)  # a fixed rate
    bits.u(1, 1).u(1, 1).ue(0, 0, 10, 10, 0, 2)  # nothing is reordered
    return _nal(_SEQUENCE_SET, bits.aligned(stop_bit=True))


def _picture_set():
    bits = (
        _Bits().ue(0, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0, 0).u(1, 1).u(2, 0)
    )  # CAVLC; deblocking can be switched off
    return _nal(_PICTURE_SET, bits.aligned(stop_bit=True))


def _nal(kind, payload, is_reference=True):
    """A unit with its start code; a byte of three is put wherever the payload would look like another start code."""
    escaped, num_zeros = bytearray(), 0
    for byte in payload:
        if num_zeros >= 2 and byte <= 3:
            escaped.append(3)
            num_zeros = 0
        escaped.append(byte)
        num_zeros = 0 if byte else num_zeros + 1
    return b"\0\0\0\1" + bytes([is_reference << 5 | kind]) + bytes(escaped)
