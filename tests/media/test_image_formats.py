"""Every kind of sample in every format, against what was written: no encoder's and no decoder's word is taken for it.

Truths are computed with numpy from known samples; lossy formats are compared with the picture that went in.
"""

import asyncio
import base64
import shutil
import struct
import subprocess
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from filmstrip.config import MediaConfig
from filmstrip.errors import MediaDecodeError, MediaTooLargeError
from filmstrip.media.image import image_from_data, open_image, probe_image
from filmstrip.media.loader import MediaLoader
from filmstrip.media.source import BytesSource
from filmstrip.types import FramePlan, ImageMetadata, MediaItem, Modality, PatchLayout
from tests.media.pictures import bmp, encoded, file_of, flat_jpeg, png, png_chunk, tiff

LIMIT = 10**6
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),  # of what is then refused
]
RNG = np.random.default_rng(5)
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


def decoded(data):
    """RGB of the bytes of a file, whose header says the same size."""
    source = BytesSource(data)
    image, metadata = open_image(source, LIMIT), probe_image(source, LIMIT)
    assert (image.mode, image.size) == ("RGB", (metadata.width, metadata.height))
    return np.asarray(image).astype(int)


def on_white(colour, alpha):
    """Colour of 8 bits, alpha of 8 bits without a last axis: alpha * colour + (1 - alpha) * white, rounded."""
    alpha = np.asarray(alpha, int)[..., None]
    return (np.asarray(colour, int) * alpha + 255 * (255 - alpha) + 127) // 255


def grey(samples):
    return np.repeat(np.asarray(samples, int)[..., None], 3, axis=-1)


def from_16_bit(samples, white=65535):
    return np.floor(np.asarray(samples, float) * 255 / white + 0.5).astype(int)


def from_cmyk(samples):
    """R = (1 - C)(1 - K) and so on, of 8 bits (..., 4)."""
    cmyk = np.asarray(samples, float)
    return (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255


def filtered(rows):
    """Rows of bytes with the number of PNG's filter "none" before each."""
    return b"".join(b"\0" + as_bytes(row) for row in rows)


def as_bytes(row):
    return row if isinstance(row, bytes) else row.astype(np.uint8).tobytes()


def packed(samples, bits):
    """Rows of samples of fewer than eight bits, the first in the highest bits, each row padded to a byte."""
    as_bits = (np.asarray(samples)[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return [row.tobytes() for row in np.packbits(as_bits.reshape(len(samples), -1), axis=1)]


# PNG


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("with_transparent", [False, True])
def test_png_grey_of_up_to_8_bits(bits, with_transparent):
    white = (1 << bits) - 1
    samples = RNG.integers(0, white + 1, (5, 7))
    samples[0, :2] = 0, white
    transparent = int(samples[2, 3])
    chunks = [(b"tRNS", struct.pack(">H", transparent))] if with_transparent else []
    expected = grey(samples * (255 // white))
    if with_transparent:
        expected[samples == transparent] = 255
    assert (decoded(png(7, 5, bits, 0, chunks, filtered(packed(samples, bits)))) == expected).all()


@pytest.mark.parametrize("with_transparent", [False, True])
def test_png_grey_of_16_bits(with_transparent):
    samples = RNG.integers(0, 65536, (9, 11))
    samples[0, :6] = 0, 65535, 0x1234, 0x1235, 0x12FF, 0x3412  # only one of the four is transparent
    chunks = [(b"tRNS", b"\x12\x34")] if with_transparent else []
    expected = grey(from_16_bit(samples))
    if with_transparent:
        expected[samples == 0x1234] = 255
        assert expected[0, 2:6, 0].tolist() == [255, 18, 19, 52]
    assert (decoded(png(11, 9, 16, 0, chunks, filtered(samples.astype(">u2").view(np.uint8)))) == expected).all()


@pytest.mark.parametrize("with_alpha", [False, True])
@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
def test_png_colour_and_alpha(bits, colour, with_alpha):
    num_samples = (3 if colour else 1) + with_alpha
    samples = RNG.integers(0, 1 << bits, (6, 5, num_samples))
    alphas = [0, (1 << bits) - 1]
    if with_alpha:
        samples[0, :2, -1] = alphas
    rows = samples.reshape(6, -1).astype(">u2").view(np.uint8) if bits == 16 else samples.reshape(6, -1)
    high = samples >> (bits - 8)
    seen = high[..., :3] if colour else grey(from_16_bit(samples[..., 0]) if bits == 16 else samples[..., 0])
    if with_alpha:
        # Pillow keeps the high bytes of 16 bits with alpha, of grey as of colour.
        seen = on_white(high[..., :3] if colour else grey(high[..., 0]), high[..., -1])
    kind = {(True, False): 2, (True, True): 6, (False, False): 0, (False, True): 4}[colour, with_alpha]
    assert (decoded(png(5, 6, bits, kind, (), filtered(rows.astype(np.uint8)))) == seen).all()


def test_png_colour_with_a_transparent_one():
    samples = np.array([[[1, 2, 3], [1, 2, 4], [3, 2, 1]]])
    chunks = [(b"tRNS", struct.pack(">3H", 1, 2, 3))]
    expected = [[255, 255, 255], [1, 2, 4], [3, 2, 1]]
    assert decoded(png(3, 1, 8, 2, chunks, filtered(samples.reshape(1, -1))))[0].tolist() == expected


def test_png_colour_of_16_bits_with_a_transparent_one_is_compared_by_its_high_bytes():
    samples = np.array([[0x1234, 0x5678, 0x9ABC, 0x3434, 0x7878, 0xBCBC]])  # the second has all of its low bytes
    chunks = [(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))]
    rows = filtered(samples.astype(">u2").view(np.uint8))
    assert decoded(png(2, 1, 16, 2, chunks, rows))[0].tolist() == [[255, 255, 255], [0x34, 0x78, 0xBC]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("num_alphas", [0, 1, 2])
def test_png_palette(bits, num_alphas):
    palette = RNG.integers(0, 256, (1 << bits, 3))
    alphas = np.array([128, 0, *[255] * 254])[: 1 << bits]
    alphas[num_alphas:] = 255
    samples = RNG.integers(0, 1 << bits, (4, 9))
    samples[0, :2] = 0, 1
    chunks = [(b"PLTE", palette.astype(np.uint8).tobytes())]
    if num_alphas:
        chunks.append((b"tRNS", bytes(alphas[:num_alphas].tolist())))
    expected = on_white(palette[samples], alphas[samples])
    assert (decoded(png(9, 4, bits, 3, chunks, filtered(packed(samples, bits)))) == expected).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "La", "RGBa", "CMYK", "I;16"])
def test_every_mode_of_a_pillow_image(mode):
    """The same rules as for files, for pictures given as objects."""
    size = (7, 5)
    if mode == "I;16":
        samples = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
        image, expected = Image.fromarray(samples), grey(from_16_bit(samples))
    else:
        bands = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "La": 2, "RGB": 3}.get(mode, 4)
        samples = RNG.integers(0, 256, (5, 7, bands))
        if mode == "1":
            image, expected = Image.fromarray(samples[..., 0] > 127), grey(255 * (samples[..., 0] > 127))
        else:
            premultiplied = mode in ("La", "RGBa")
            if premultiplied:  # no colour is brighter than its alpha
                samples[..., :-1] = samples[..., :-1] * samples[..., -1:] // 255
            image = Image.frombytes(mode, size, samples.astype(np.uint8).tobytes())
            colours = samples[..., :-1] if bands in (2, 4) else samples
            if mode.startswith("P"):
                palette = RNG.integers(0, 256, (256, 3))
                image.putpalette(palette.astype(np.uint8).tobytes())
                if image.mode != mode:
                    pytest.skip("this Pillow makes another mode of a palette")
                colours = palette[samples[..., 0]]
            elif bands < 3:
                colours = grey(samples[..., 0])
            if mode == "CMYK":
                expected = from_cmyk(samples)
            elif premultiplied:
                expected = colours + 255 - samples[..., -1:]
            else:
                expected = on_white(colours, samples[..., -1]) if bands in (2, 4) else colours
    result = np.asarray(image_from_data(image, LIMIT)).astype(int)
    assert result.shape == (5, 7, 3)
    assert abs(result - expected).max() <= (1 if mode in ("CMYK", "La", "RGBa") else 0)


# JPEG


@pytest.mark.parametrize("adobe_transform", [None, 0])
def test_jpeg_with_four_components_is_inverted_cmyk(adobe_transform):
    """What is stored is 255 - ink, as all programs write it that followed Adobe's, whether or not the file says so."""
    for stored in [(255, 255, 255, 255), (200, 100, 50, 150), (0, 255, 255, 255), (255, 255, 255, 0)]:
        expected = from_cmyk(255 - np.array(stored))
        assert abs(decoded(flat_jpeg(stored, adobe_transform)) - expected).max() <= 1


def test_jpeg_ycck():
    """Adobe's transform 2: cyan, magenta and yellow as luma and colour differences (JFIF), black as it is."""
    for luma, blue, red, black in [(200, 100, 50, 150), (90, 140, 170, 255), (30, 128, 128, 200)]:
        red_part = luma + 1.402 * (red - 128)
        green_part = luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128)
        blue_part = luma + 1.772 * (blue - 128)
        ink = np.clip([red_part, green_part, blue_part], 0, 255)  # of which the inverse was transformed
        expected = from_cmyk(np.array([*ink, 255 - black]))
        assert abs(decoded(flat_jpeg((luma, blue, red, black), 2)) - expected).max() <= 2


def test_jpeg_grey_and_ycbcr_and_rgb():
    assert (decoded(flat_jpeg((200,))) == 200).all()
    assert abs(decoded(flat_jpeg((100, 128, 128))) - 100).max() <= 1
    assert (decoded(flat_jpeg((50, 150, 90), adobe_transform=0)) == (50, 150, 90)).all()


def test_jpeg_with_further_pictures_is_a_jpeg_and_shows_the_first():
    first, second = (Image.new("RGB", (24, 16), colour) for colour in ((200, 30, 40), (0, 0, 255)))
    source = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert probe_image(source, LIMIT) == ImageMetadata(height=16, width=24, format="JPEG")
    assert abs(np.asarray(open_image(source, LIMIT)).astype(int) - (200, 30, 40)).max() <= 3


# TIFF: photometric 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_tiff_grey(bits, white_is_zero, order, compression):
    white = (1 << bits) - 1
    samples = RNG.integers(0, white + 1, (4, 6))
    samples[0, :2] = 0, white
    if bits == 16:
        data = samples.astype(f"{order}u2").tobytes()
    else:
        data = b"".join(packed(samples, bits)) if bits < 8 else samples.astype(np.uint8).tobytes()
    strip = zlib.compress(data) if compression == 8 else data
    file = tiff(6, 4, 0 if white_is_zero else 1, [bits], [strip], order, compression=compression)
    if (bits, white_is_zero, order) == (16, True, ">"):
        with pytest.raises(MediaDecodeError, match="of a kind that cannot be decoded"):
            open_image(BytesSource(file), LIMIT)
        return
    shown = white - samples if white_is_zero else samples
    assert (decoded(file) == grey(from_16_bit(shown, white))).all()


def test_tiff_grey_of_12_bits():
    samples = [0, 4095, 2048, 1000]
    data = int("".join(f"{sample:012b}" for sample in samples), 2).to_bytes(6, "big")
    assert (decoded(tiff(4, 1, 1, [12], [data])) == grey(from_16_bit([samples], 4095))).all()


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("extra", [None, 1, 2])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_colour(bits, extra, order, compression):
    """Without alpha, with alpha that colours are multiplied by (1), and with alpha that they are not (2)."""
    samples = RNG.integers(0, 1 << bits, (3, 5, 3 if extra is None else 4))
    if extra == 1:
        samples[..., :3] = samples[..., :3] * samples[..., 3:] // ((1 << bits) - 1)
    data = samples.astype(f"{order}u{bits // 8}").tobytes()
    strip = zlib.compress(data) if compression == 8 else data
    tags = {} if extra is None else {"extra": [extra]}
    result = decoded(tiff(5, 3, 2, [bits] * samples.shape[-1], [strip], order, compression=compression, **tags))
    high = samples >> (bits - 8)
    if extra == 1:
        assert abs(result - (high[..., :3] + 255 - high[..., 3:])).max() <= 2
    else:
        assert (result == (high if extra is None else on_white(high[..., :3], high[..., 3]))).all()


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_planes(bits, compression):
    samples = RNG.integers(0, 1 << bits, (3, 4, 6))
    planes = [plane.astype(f"<u{bits // 8}").tobytes() for plane in samples]
    strips = [zlib.compress(plane) for plane in planes] if compression == 8 else planes
    file = tiff(6, 4, 2, [bits] * 3, strips, compression=compression, planar=2)
    if (bits, compression) == (16, 1):
        for function in (probe_image, open_image):
            with pytest.raises(MediaDecodeError, match="planes of 16 bits"):
                function(BytesSource(file), LIMIT)
        return
    assert (decoded(file) == np.moveaxis(samples >> (bits - 8), 0, -1)).all()


def test_tiff_palette_with_and_without_alpha():
    palette = RNG.integers(0, 256, (3, 256))
    samples = RNG.integers(0, 256, (4, 5, 2))
    tags = {"palette": (palette * 257).reshape(-1).tolist()}
    colours = palette.T[samples[..., 0]]
    plain = tiff(5, 4, 3, [8], [samples[..., 0].astype(np.uint8).tobytes()], **tags)
    assert (decoded(plain) == colours).all()
    with_alpha = tiff(5, 4, 3, [8, 8], [samples.astype(np.uint8).tobytes()], extra=[2], **tags)
    assert (decoded(with_alpha) == on_white(colours, samples[..., 1])).all()


@pytest.mark.parametrize("extra", [1, 2])
def test_tiff_grey_with_alpha(extra):
    samples = RNG.integers(0, 256, (4, 5, 2))
    if extra == 1:
        samples[..., 0] = samples[..., 0] * samples[..., 1] // 255
    result = decoded(tiff(5, 4, 1, [8, 8], [samples.astype(np.uint8).tobytes()], extra=[extra]))
    if extra == 1:
        assert abs(result - grey(samples[..., 0] + 255 - samples[..., 1])).max() <= 1
    else:
        assert (result == on_white(grey(samples[..., 0]), samples[..., 1])).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_cmyk_is_not_inverted(bits):
    samples = RNG.integers(0, 1 << bits, (3, 5, 4))
    result = decoded(tiff(5, 3, 5, [bits] * 4, [samples.astype(f"<u{bits // 8}").tobytes()]))
    assert abs(result - from_cmyk(samples >> (bits - 8))).max() <= 1


def test_tiff_ycbcr():
    """Four lumas and two differences for each 2 x 2 pixels: compressed it is right, uncompressed it is refused."""
    cell = bytes([100, 110, 120, 130, 128, 128])
    compressed = tiff(2, 2, 6, [8] * 3, [zlib.compress(cell)], compression=8, subsampling=[2, 2])
    assert abs(decoded(compressed) - grey([[100, 110], [120, 130]])).max() <= 1
    whole = tiff(2, 1, 6, [8] * 3, [bytes([100, 128, 128, 110, 128, 128])], subsampling=[1, 1])
    assert abs(decoded(whole) - grey([[100, 110]])).max() <= 1
    said = tiff(2, 2, 6, [8] * 3, [cell * 3], subsampling=[2, 2])
    unsaid = tiff(2, 2, 6, [8] * 3, [cell * 3])  # which means 2x2, too
    for file in (said, unsaid):
        with pytest.raises(MediaDecodeError, match="subsampled"):
            open_image(BytesSource(file), LIMIT)


@pytest.mark.parametrize(
    ("bits", "sample_format", "data"),
    [
        (8, 2, struct.pack("<2b", -5, 5)),
        (16, 2, struct.pack("<2h", -5, 5)),
        (32, 1, struct.pack("<2I", 5, 60_000)),
        (32, 2, struct.pack("<2i", -5, 5)),
        (32, 3, struct.pack("<2f", 0.5, 1.0)),
    ],
)
def test_tiff_samples_without_a_known_white_are_refused_by_the_header(bits, sample_format, data):
    source = BytesSource(tiff(2, 1, 1, [bits], [data], sample_format=sample_format))
    for function in (probe_image, open_image):
        with pytest.raises(MediaDecodeError, match=r"range is unknown; send 8 or 16 bits"):
            function(source, LIMIT)
    with source.open() as file, Image.open(file) as image, pytest.raises(MediaDecodeError, match="range is unknown"):
        image_from_data(image, LIMIT)


# BMP


def padded(rows):
    return b"".join(as_bytes(row) + bytes(-len(as_bytes(row)) % 4) for row in rows)


@pytest.mark.parametrize("top_down", [False, True])
def test_bmp_of_24_bits(top_down):
    colours = RNG.integers(0, 256, (3, 5, 3))
    rows = colours[:, :, ::-1].reshape(3, -1)
    data = bmp(5, -3 if top_down else 3, 24, padded(rows if top_down else rows[::-1]))
    assert (decoded(data) == colours).all()


@pytest.mark.parametrize("masks", [(0x7C00, 0x3E0, 0x1F, 0), (0xF800, 0x7E0, 0x1F, 0)])
def test_bmp_of_16_bits(masks):
    samples = RNG.integers(0, 1 << (16 if masks[0] > 0x7C00 else 15), (2, 3))
    parts = [(samples & mask) / mask for mask in masks[:3]]
    result = decoded(bmp(3, 2, 16, padded(samples[::-1].astype("<u2").view(np.uint8)), compression=3, masks=masks))
    assert abs(result - 255 * np.stack(parts, -1)).max() <= 1


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bmp_palette(bits):
    palette = RNG.integers(0, 256, (1 << bits, 3))
    entries = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette.tolist())
    samples = RNG.integers(0, 1 << bits, (3, 10))
    assert (decoded(bmp(10, 3, bits, padded(packed(samples, bits)[::-1]), palette=entries)) == palette[samples]).all()


def test_bmp_alpha_is_used_unless_it_is_zero_everywhere():
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    samples = RNG.integers(0, 256, (2, 3, 4))  # blue, green, red, alpha
    colours = samples[..., 2::-1]

    def rows():
        return samples[::-1].astype(np.uint8).tobytes()

    assert (decoded(bmp(3, 2, 32, rows(), compression=3, masks=masks)) == on_white(colours, samples[..., 3])).all()
    assert (decoded(bmp(3, 2, 32, rows())) == colours).all()  # without masks the fourth byte means nothing
    samples[..., 3] = 0
    assert (decoded(bmp(3, 2, 32, rows(), compression=3, masks=masks)) == colours).all()


# GIF, WebP, AVIF


def test_gif_palette_transparency_and_interlacing():
    palette = RNG.integers(0, 256, (256, 3))
    samples = RNG.integers(0, 256, (20, 30))
    image = Image.fromarray(samples.astype(np.uint8), "P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    expected = palette[samples]
    for interlace in (0, 1):
        assert (decoded(file_of(image, "GIF", interlace=interlace, optimize=False)) == expected).all()
    transparent = file_of(image, "GIF", transparency=7, optimize=False)
    assert (decoded(transparent) == on_white(expected, np.where(samples == 7, 0, 255))).all()


def test_webp_with_and_without_alpha():
    samples = RNG.integers(0, 256, (9, 12, 4)).astype(np.uint8)
    rgba, rgb = Image.fromarray(samples), Image.fromarray(samples[..., :3])
    expected = on_white(samples[..., :3], samples[..., 3])
    assert (decoded(file_of(rgba, "WEBP", lossless=True, exact=True)) == expected).all()
    assert (decoded(file_of(rgb, "WEBP", lossless=True)) == samples[..., :3]).all()


def smooth_picture(width=64, height=48):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)


def test_avif_with_and_without_alpha():
    colours = smooth_picture()
    alpha = np.zeros((48, 64, 1), np.uint8)
    alpha[:, 16:40], alpha[:, 40:] = 128, 255
    options = {"quality": 100, "subsampling": "4:4:4"}
    assert abs(decoded(file_of(Image.fromarray(colours), "AVIF", **options)) - colours).max() <= 4
    rgba = Image.fromarray(np.concatenate([colours, alpha], -1))
    assert abs(decoded(file_of(rgba, "AVIF", **options)) - on_white(colours, alpha[..., 0])).max() <= 4
    black_and_white = Image.fromarray(colours[..., 0])
    assert abs(decoded(file_of(black_and_white, "AVIF", quality=100)) - grey(colours[..., 0])).max() <= 4


@pytest.mark.parametrize("pixel_format", ["yuv444p10le", "yuv420p12le", "yuv420p"])
def test_avif_of_another_encoder_and_more_bits(tmp_path, pixel_format):
    assert shutil.which("ffmpeg"), "the tests need ffmpeg"
    encoders = subprocess.run(
        ["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True, check=True
    ).stdout
    if "libaom-av1" not in encoders:
        pytest.skip("this ffmpeg cannot encode AVIF")
    Image.fromarray(smooth_picture()).save(tmp_path / "picture.png")
    colours = ("-vf", "scale=out_color_matrix=bt601:out_range=full", "-color_range", "pc", "-colorspace", "smpte170m")
    coding = ("-c:v", "libaom-av1", "-crf", "4", "-cpu-used", "8", "-threads", "2", "-still-picture", "1")
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "picture.png", *colours, "-pix_fmt", pixel_format, *coding]
    subprocess.run([*command, tmp_path / "picture.avif"], check=True, timeout=60)
    assert abs(decoded((tmp_path / "picture.avif").read_bytes()) - smooth_picture()).mean() < 3


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("with_alpha", [False, True])
def test_of_several_frames_the_first_is_shown(format, with_alpha):
    frames = [np.full((16, 24, 4), (*colour, 255), np.uint8) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    if with_alpha:
        frames[0][:8, :, 3] = 0
    images = [Image.fromarray(frame if with_alpha else frame[..., :3]) for frame in frames]
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(format, {})
    data = file_of(images[0], format, save_all=True, append_images=images[1:], **options)
    with Image.open(BytesSource(data).open()) as image:
        assert image.n_frames == 3
    expected = on_white(frames[0][..., :3], frames[0][..., 3])
    assert abs(decoded(data) - expected).max() <= (4 if format == "AVIF" else 0)


# Limits


@pytest.fixture
def low_pillow_limit(monkeypatch):
    """Pillow itself refuses more than 200 pixels and warns of more than 100."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.usefixtures("low_pillow_limit")
def test_a_limit_above_pillows_own_takes_effect(format):
    data = file_of(Image.fromarray(smooth_picture(20, 15)), format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor does it warn
        assert decoded(data).shape == (15, 20, 3)
        assert Image.MAX_IMAGE_PIXELS == 100
    for function in (probe_image, open_image):
        with pytest.raises(MediaTooLargeError, match=r"300 pixels; the limit is 299 \(max_image_pixels, --max-image"):
            function(BytesSource(data), 299)
        assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError), BytesSource(data).open() as file:
        Image.open(file)


class Meanwhile(BytesSource):
    """Bytes while whose header is read another reader comes and goes."""

    def open(self):
        file = super().open()
        read_head = file.read

        def read(*arguments):
            file.read = read_head
            assert open_image(encoded(Image.new("RGB", (20, 15)), "TIFF"), LIMIT).size == (20, 15)
            assert Image.MAX_IMAGE_PIXELS == LIMIT  # as for the one who was here first
            return read_head(*arguments)

        file.read = read
        return file


@pytest.mark.usefixtures("low_pillow_limit")
def test_pillows_limit_stays_raised_until_the_last_reader_is_done():
    """Readers at the same time, as of the frames of a video, must not take the limit away from each other."""
    source = Meanwhile(file_of(Image.fromarray(smooth_picture(40, 30)), "TIFF"))
    assert open_image(source, LIMIT).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.usefixtures("low_pillow_limit")
def test_many_readers_leave_pillows_limit_as_it_was():
    source = encoded(Image.fromarray(smooth_picture(40, 30)), "TIFF")
    with ThreadPoolExecutor(2) as threads:
        sizes = list(threads.map(lambda _: open_image(source, LIMIT).size, range(100)))
    assert set(sizes) == {(40, 30)}
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_pillow_image_that_is_not_loaded_yet_has_our_limit_too(monkeypatch):
    with encoded(Image.new("RGB", (20, 15), (9, 8, 7)), "TIFF").open() as file:
        image = Image.open(file)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert image_from_data(image, LIMIT).getpixel((0, 0)) == (9, 8, 7)
        assert Image.MAX_IMAGE_PIXELS == 100


def test_a_pillow_image_that_cannot_be_loaded_is_an_error_here_and_not_later():
    data = file_of(Image.fromarray(smooth_picture(320, 240)), "JPEG", quality=95)
    with BytesSource(data[: len(data) * 9 // 10]).open() as file, pytest.raises(MediaDecodeError, match="broken"):
        image_from_data(Image.open(file), LIMIT)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_pillow_image_is_turned_once(format, loaded):
    shown = np.zeros((16, 24, 3), np.uint8)
    shown[:8, :12], shown[:8, 12:], shown[8:, :12] = 255, (255, 0, 0), (0, 255, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif.tobytes()} | ({} if format in ("PNG", "TIFF") else {"quality": 95})
    with encoded(Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90), format, **options).open() as file:
        image = Image.open(file)
        if loaded:
            image.load()
        result = np.asarray(image_from_data(image, LIMIT)).astype(int)
    assert result.shape == shown.shape
    assert abs(result - shown).mean() < 6


def test_headers_beyond_pillows_default_are_read_if_the_limit_allows():
    source = BytesSource(png(20_000, 15_000, 1, 0))
    assert probe_image(source, 300_000_000) == ImageMetadata(height=15_000, width=20_000, format="PNG")
    with pytest.raises(
        MediaTooLargeError, match=r"20000 x 15000 = 300000000 pixels; the limit is 299999999 .*--max-image"
    ):
        probe_image(source, 299_999_999)


WEBP_KINDS = {
    "lossy": {"quality": 80},
    "lossless": {"lossless": True},
    "extended": {"save_all": True, "append_images": [Image.new("RGB", (20, 15))]},
}


@pytest.mark.parametrize("kind", WEBP_KINDS)
def test_webp_is_measured_before_its_reader_makes_room_for_it(kind, monkeypatch):
    data = file_of(Image.fromarray(smooth_picture(20, 15)), "WEBP", **WEBP_KINDS[kind])
    opened = []
    monkeypatch.setattr(Image, "open", lambda *_, **__: opened.append(1))
    with pytest.raises(MediaTooLargeError, match="20 x 15 = 300 pixels; the limit is 299 "):
        open_image(BytesSource(data), 299)
    assert opened == []


def with_avif_size(width, height):
    data = file_of(Image.new("RGB", (64, 48)), "AVIF")
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (png(0, 5), MediaDecodeError, "empty: 0 x 5"),
        (bmp(0, 5, 24, b""), MediaDecodeError, "empty: 0 x 5"),
        (with_avif_size(0, 48), MediaDecodeError, "empty: 0 x 48"),
        (tiff(0, 5, 1, [8], [b"0"]), MediaDecodeError, "the TIFF image is broken"),
        (
            file_of(Image.new("L", (8, 8)), "JPEG").replace(b"\0\x08\0\x08", b"\0\0\0\x08"),
            MediaDecodeError,
            "the JPEG im",
        ),
        (bmp(2**31 - 1, -(2**31), 24, b""), MediaTooLargeError, "2147483647 x 2147483648 = .* 1000000 .*--max-image"),
        (with_avif_size(40_000, 30_000), MediaTooLargeError, "40000 x 30000 = .* 1000000 .*--max-image-pixels"),
        (tiff(2**31, 2**31, 1, [8], [b"0"]), MediaTooLargeError, "limit is 1000000 .*--max-image-pixels"),
    ],
)
def test_sizes_that_cannot_be(data, error, message):
    for function in (probe_image, open_image):
        with pytest.raises(error, match=message):
            function(BytesSource(data), LIMIT)


@pytest.mark.parametrize("size", [(20_000, 20_000), (40_000, 2)])
def test_what_libavif_does_not_take_is_said_to_be_too_large(size):
    with pytest.raises(MediaTooLargeError, match=rf"{size[0]} x {size[1]} pixels; its decoder takes at most 268435456"):
        probe_image(BytesSource(with_avif_size(*size)), 10**9)


def test_bytes_that_only_look_like_a_size_are_not_taken_for_one():
    data = file_of(Image.new("RGB", (64, 48), (200, 30, 40)), "AVIF")
    assert decoded(data + b"ispe\0\0\0\0" + b"\xff" * 8 + bytes(20)).shape == (48, 64, 3)
    exif = Image.Exif()
    exif[0x010E] = "ispe" + "\x7f" * 20
    assert decoded(file_of(Image.new("RGB", (64, 48)), "AVIF", exif=exif)).shape == (48, 64, 3)


def test_a_png_whose_transparent_colour_comes_late_or_is_cut_is_no_crash():
    rows = filtered(packed(np.zeros((2, 2), int), 2))
    assert decoded(png(2, 2, 2, 0, (), rows)[:-12] + png_chunk(b"tRNS", b"\0\0") + png_chunk(b"IEND", b"")).shape == (
        2,
        2,
        3,
    )
    with pytest.raises(MediaDecodeError, match="PNG"):
        open_image(BytesSource(png(2, 2, 2, 0, [(b"tRNS", b"\0")], rows)), LIMIT)


# Through a worker, whose sandbox must let every reader do its work


LAYOUT = PatchLayout(8, 1, 1)


async def through_worker(loader, data):
    item = MediaItem(Modality.IMAGE, url="data:;base64," + base64.b64encode(data).decode())
    opened = await loader.open(await loader.fetch(item))
    try:
        tensor, _ = await loader.read(opened, FramePlan((0,), 48, 64, LAYOUT))
        blocks = np.array(tensor.array).reshape(6, 8, 3, 8, 8)
        return blocks.transpose(0, 3, 1, 4, 2).reshape(48, 64, 3)
    finally:
        opened.close()


def test_workers_decode_every_format_as_this_process_does():
    files = {format: file_of(Image.fromarray(smooth_picture()), format) for format in FORMATS}
    grey_16 = RNG.integers(0, 65536, (48, 64)).astype(np.uint16)
    files["16-bit PNG"] = file_of(Image.fromarray(grey_16), "PNG")
    files["16-bit TIFF"] = file_of(Image.fromarray(grey_16), "TIFF", compression="tiff_adobe_deflate")
    files["CMYK"] = file_of(Image.fromarray(smooth_picture()).convert("CMYK"), "JPEG")
    files["MPO"] = file_of(
        Image.fromarray(smooth_picture()), "MPO", save_all=True, append_images=[Image.new("L", (8, 8))]
    )

    async def load_all():
        loader = MediaLoader(MediaConfig(num_decode_threads=2))
        try:
            return {name: await through_worker(loader, data) for name, data in files.items()}
        finally:
            await loader.close()

    for name, pixels in asyncio.run(load_all()).items():
        assert (pixels == decoded(files[name])).all(), name


def test_workers_keep_to_a_limit_above_pillows_own():
    url = "data:;base64," + base64.b64encode(png(20_000, 10_000, 1, 0)).decode()

    async def header(**limits):
        loader = MediaLoader(MediaConfig(num_decode_threads=1, **limits))
        try:
            opened = await loader.open(await loader.fetch(MediaItem(Modality.IMAGE, url=url)))
            opened.close()
            return opened.metadata
        finally:
            await loader.close()

    assert asyncio.run(header(max_image_pixels=200_000_000)) == ImageMetadata(height=10_000, width=20_000, format="PNG")
    with pytest.raises(MediaTooLargeError, match=r"200000000 pixels; the limit is 178956970 .*--max-image-pixels"):
        asyncio.run(header())
