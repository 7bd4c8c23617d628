"""Images: every format, orientation, odd and hostile files (attack case A44), objects; samples: test_image_formats."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from filmstrip.errors import MediaDecodeError, MediaTooLargeError
from filmstrip.media.image import image_from_data, open_image, probe_image
from filmstrip.media.source import BytesSource
from tests.media.pictures import encoded, png, png_chunk

LIMIT = 10**6
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def gradient(width=48, height=32):
    """A smooth RGB picture that lossy formats keep almost unchanged."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def data_of(source):
    with source.open() as file:
        return file.read()


def pixels(image):
    return np.asarray(image).astype(int)


FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"] + ["AVIF"] * bool(features.check("avif"))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_decoded(format):
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(format, {})
    source = encoded(gradient(), format, **options)
    metadata = probe_image(source, LIMIT)
    assert (metadata.width, metadata.height, metadata.format) == (48, 32, format)
    image = open_image(source, LIMIT)
    assert (image.mode, image.size) == ("RGB", (48, 32))
    assert abs(pixels(image) - pixels(gradient())).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", *["AVIF"] * bool(features.check("avif"))])
def test_orientation_is_applied_once_and_known_from_the_header(format, orientation):
    # Left to right and top to bottom all four quarters differ, so each of the eight turns shows.
    shown = np.zeros((32, 48, 3), np.uint8)
    shown[:16, :24], shown[:16, 24:], shown[16:, :24] = 255, (255, 0, 0), (0, 255, 0)
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = Image.fromarray(shown) if turn_back is None else Image.fromarray(shown).transpose(turn_back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encoded(stored, format, exif=exif.tobytes(), **({} if format in ("PNG", "TIFF") else {"quality": 95}))
    metadata = probe_image(source, LIMIT)
    assert (metadata.width, metadata.height) == (48, 32)
    image = open_image(source, LIMIT)
    assert image.size == (48, 32)
    assert abs(pixels(image) - shown).mean() < 6


def test_orientation_of_a_png_may_stand_behind_the_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = data_of(encoded(gradient(), "PNG"))
    payload = exif.tobytes().removeprefix(b"Exif\0\0")
    source = BytesSource(data[:-12] + png_chunk(b"eXIf", payload) + data[-12:])
    assert (probe_image(source, LIMIT).width, probe_image(source, LIMIT).height) == (32, 48)
    assert open_image(source, LIMIT).size == (32, 48)
    assert (pixels(open_image(source, LIMIT)) == pixels(gradient().transpose(Image.Transpose.ROTATE_270))).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_exif_is_ignored(exif):
    assert open_image(encoded(gradient(), "JPEG", exif=exif), LIMIT).size == (48, 32)
    assert open_image(encoded(gradient(), "PNG", exif=exif), LIMIT).size == (48, 32)


def test_probing_a_png_decodes_nothing():
    source = BytesSource(png(40, 30, rows=b"far too short"))
    assert probe_image(source, LIMIT).width == 40
    with pytest.raises(MediaDecodeError, match="PNG image is broken"):
        open_image(source, LIMIT)


# Samples of objects


def test_big_endian_grey_of_16_bits_is_scaled():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    assert pixels(image_from_data(image, LIMIT))[0, :, 0].tolist() == [1, 255]


@pytest.mark.parametrize(
    "array", [np.full((2, 2), 70_000, np.int32), np.full((2, 2), -1, np.int32), np.ones((2, 2), np.float32)]
)
def test_samples_of_unknown_range_are_refused(array):
    with pytest.raises(MediaDecodeError, match="range is unknown"):
        image_from_data(Image.fromarray(array), LIMIT)


# Limits and hostile files


@pytest.mark.parametrize("size", [(50_000, 50_000), (1001, 1000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_decoding(size):
    source = BytesSource(png(*size, bit_depth=1, color=0))
    for function in (probe_image, open_image):
        with pytest.raises(MediaTooLargeError, match=rf"{size[0] * size[1]} pixels.*1000000 .*--max-image-pixels"):
            function(source, LIMIT)


def test_as_many_pixels_as_allowed_are_decoded():
    source = encoded(gradient(10, 10), "PNG")
    assert open_image(source, 100).size == (10, 10)
    with pytest.raises(MediaTooLargeError, match=r"10 x 10 = 100 pixels; the limit is 99"):
        open_image(source, 99)


@pytest.mark.parametrize("size", [(1, 1), (8, 100_000), (100_000, 1)])
def test_odd_shapes_are_fine(size):
    assert open_image(encoded(Image.new("L", size), "PNG"), LIMIT).size == size


@pytest.mark.parametrize("format", FORMATS)
def test_cut_off_images_are_errors_at_every_length(format):
    rng = np.random.default_rng(0)
    data = data_of(encoded(Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)), format))
    refused = 0
    for length in range(0, len(data) - 1, max(1, len(data) // 60)):
        try:
            open_image(BytesSource(data[:length]), LIMIT)
        except MediaDecodeError:
            refused += 1
    assert refused >= 40  # some formats end with bytes that nobody needs


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_images_decode_or_are_refused(format):
    rng = np.random.default_rng(1)
    data = np.frombuffer(data_of(encoded(gradient(), format)), np.uint8)
    for _ in range(60):
        broken = data.copy()
        places = rng.integers(0, len(broken), 8)
        broken[places] = rng.integers(0, 256, 8)
        with contextlib.suppress(MediaDecodeError, MediaTooLargeError):
            assert open_image(BytesSource(broken.tobytes()), LIMIT).mode == "RGB"


def test_a_broken_png_chunk_is_an_error():
    data = bytearray(png(2, 2, chunks=[(b"gAMA", struct.pack(">I", 45455))], rows=bytes(14)))
    assert open_image(BytesSource(bytes(data)), LIMIT).size == (2, 2)
    data[data.index(b"gAMA") + 4] ^= 0xFF  # its check sum is wrong now
    with pytest.raises(MediaDecodeError, match="PNG image is broken"):
        open_image(BytesSource(bytes(data)), LIMIT)


def test_a_compressed_text_bomb_is_an_error():
    bomb = b"comment\0\0" + zlib.compress(bytes(100_000_000))
    with pytest.raises(MediaDecodeError):
        open_image(BytesSource(png(1, 1, chunks=[(b"zTXt", bomb)], rows=b"\0\0\0\0")), LIMIT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"\0" * 1000, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"8BPS\0\1" + bytes(30), "Photoshop"),
        (b"\0\0\1\0\1\0" + bytes(30), "icon"),
        (b"<!DOCTYPE html>", "text"),
        (b"#EXTM3U\n", "text"),
        (b"\0\0\0\x18ftypheic" + bytes(30), "HEIC"),
        (b"\0\0\0\x18ftypisom" + bytes(30), "MP4 video.*video_url"),
        (b"\x1aE\xdf\xa3" + bytes(30), "Matroska or WebM video.*video_url"),
        (b"RIFF\0\0\0\0AVI LIST", "an AVI video.*video_url"),
        (b"G" + bytes(187) + b"G" + bytes(187), "an MPEG-TS video.*video_url"),
        (b"\x89PNG\r\n\x1a\n", "PNG image is broken"),
        (b"\xff\xd8\xff\xe0", "JPEG image is broken"),
        (b"BM" + bytes(60), "BMP image is broken"),
    ],
)
def test_other_files_are_refused_and_named(data, message):
    for function in (probe_image, open_image):
        with pytest.raises(MediaDecodeError, match=message):
            function(BytesSource(data), LIMIT)


@pytest.mark.parametrize("format", ["ICO", "PPM", "TGA", "PCX", "EPS", "SGI", "JPEG2000", "DDS"])
def test_rare_formats_are_refused_though_pillow_reads_them(format):
    with pytest.raises(MediaDecodeError, match="supported image formats are JPEG, PNG"):
        open_image(encoded(gradient(), format), LIMIT)


# Objects


def test_arrays_are_images():
    array = np.asarray(gradient())
    assert (pixels(image_from_data(array, LIMIT)) == array).all()
    assert (pixels(image_from_data(array[:, ::-1], LIMIT)) == array[:, ::-1]).all()
    assert (pixels(image_from_data(array[..., 0], LIMIT))[..., 1] == array[..., 0]).all()
    transparent = np.concatenate([array, np.zeros_like(array[..., :1])], axis=-1)
    assert (pixels(image_from_data(transparent, LIMIT)) == 255).all()


def test_pil_images_are_converted_as_files_are():
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(encoded(gradient(), "JPEG", exif=exif).open()) as image:
        assert image_from_data(image, LIMIT).size == (32, 48)
    assert (pixels(image_from_data(Image.new("LA", (2, 2)), LIMIT)) == 255).all()


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((2, 2, 3)),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        b"bytes",
        [[1, 2], [3, 4]],
        None,
    ],
)
def test_other_objects_are_refused(data):
    with pytest.raises(MediaDecodeError, match="image"):
        image_from_data(data, LIMIT)


def test_objects_have_the_same_limits():
    with pytest.raises(MediaTooLargeError, match="48 x 32 = 1536 pixels; the limit is 1535"):
        image_from_data(gradient(), 1535)
    with pytest.raises(MediaDecodeError):
        image_from_data(Image.new("RGB", (0, 5)), LIMIT)
