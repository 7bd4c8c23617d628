"""Pictures written by hand, so that every sample in them is known and every header can lie; decodes nothing."""

import io
import struct
import zlib

from filmstrip.media.source import BytesSource


def encoded(image, format, **options):
    """A Pillow image as a source of the bytes of a file."""
    return BytesSource(file_of(image, format, **options))


def file_of(image, format, **options):
    """The bytes of a file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind, data):
    """One chunk with a right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bit_depth=8, color=2, chunks=(), rows=b""):
    """A PNG of the given header; ``chunks`` (kind, data) stand before the pixels, each of ``rows`` begins with a zero."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, color, 0, 0, 0))
    body = b"".join(png_chunk(kind, data) for kind, data in chunks) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + png_chunk(b"IEND", b"")


TIFF_SHORT, TIFF_LONG = 3, 4


def tiff(width, height, photometric, bits, strips, order="<", **tags):
    """A TIFF whose directory is this one and whose ``strips`` (or planes) are these bytes.

    ``bits`` is a number for each sample; ``tags`` may say compression, planar, sample_format, extra, subsampling, palette.
    """
    num_samples = len(bits)
    shorts = {258: [*bits], 259: [tags.get("compression", 1)], 262: [photometric], 277: [num_samples]}
    shorts[284] = [tags.get("planar", 1)]
    longs = {256: [width], 257: [height], 273: [0] * len(strips), 278: [height], 279: list(map(len, strips))}
    fields = {tag: (TIFF_SHORT, values) for tag, values in shorts.items()}
    fields |= {tag: (TIFF_LONG, values) for tag, values in longs.items()}
    if "sample_format" in tags:
        fields[339] = (TIFF_SHORT, [tags["sample_format"]] * num_samples)
    for name, tag in (("extra", 338), ("subsampling", 530), ("palette", 320)):
        if name in tags:
            fields[tag] = (TIFF_SHORT, list(tags[name]))
    head_bytes = len(_tiff_head(fields, order))
    offsets = [head_bytes + sum(map(len, strips[:number])) for number in range(len(strips))]
    return _tiff_head(fields | {273: (TIFF_LONG, offsets)}, order) + b"".join(strips)


def _tiff_head(fields, order):
    directory, beyond = struct.pack(order + "H", len(fields)), b""
    start = 8 + 2 + 12 * len(fields) + 4
    for tag, (kind, values) in sorted(fields.items()):
        value = struct.pack(order + ("H" if kind == TIFF_SHORT else "I") * len(values), *values)
        if len(value) > 4:
            value, beyond = struct.pack(order + "I", start + len(beyond)), beyond + value + b"\0" * (len(value) % 2)
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + directory + bytes(4) + beyond


def bmp(width, height, bits, rows, *, compression=0, palette=b"", masks=()):
    """A bitmap with a BITMAPV4HEADER; ``rows`` are padded to four bytes, the lowest row first unless ``height`` < 0."""
    masks = struct.pack("<4I", *masks) if masks else bytes(16)
    info = struct.pack("<IiiHHIIiiII", 108, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    info = (info + masks).ljust(108, b"\0")
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + palette + rows


def flat_jpeg(samples, adobe_transform=None):
    """A baseline JPEG of 8x8 pixels whose stored components are all ``samples``; no encoder has seen it.

    Each component has one block that holds only its mean: with a quantiser of 1 the coefficient is 8 * (sample - 128),
    Huffman-coded with the example table K.3 of ITU-T T.81. ``adobe_transform`` adds the APP14 segment of Adobe.
    """
    components = range(1, len(samples) + 1)
    segments = [(0xDB, b"\0" + b"\1" * 64)]
    if adobe_transform is not None:
        segments.insert(0, (0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, adobe_transform)))
    frame = struct.pack(">BHHB", 8, 8, 8, len(samples)) + b"".join(bytes([number, 0x11, 0]) for number in components)
    lengths = bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    tables = b"\0" + lengths + bytes(range(12)) + b"\x10" + bytes([1, *[0] * 15]) + b"\0"  # AC: "0" ends the block
    scan = bytes([len(samples), *(byte for number in components for byte in (number, 0)), 0, 63, 0])
    segments += [(0xC0, frame), (0xC4, tables), (0xDA, scan)]
    codes = ["00", "010", "011", "100", "101", "110", *("1" * ones + "0" for ones in range(3, 9))]
    bits = ""
    for sample in samples:
        value = 8 * (sample - 128)
        size = abs(value).bit_length()
        bits += codes[size] + (f"{value if value > 0 else value + (1 << size) - 1:0{size}b}" if size else "") + "0"
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    body = b"".join(bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content for kind, content in segments)
    return b"\xff\xd8" + body + data + b"\xff\xd9"
