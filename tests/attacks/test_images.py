"""Attack case A44: pictures that are bombs, of formats that run programs, or broken in ways that readers stumble over."""

import asyncio
import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError
from filmstrip.media.loader import MediaLoader
from filmstrip.types import FramePlan, MediaItem, Modality
from tests.attacks.forge import picture, png, png_chunk
from tests.attacks.harness import Case, attacks, data_url, question
from tests.attacks.test_decoders import LAYOUT, frames_of
from tests.media.numbered import numbered_frame, read_number

PICTURE = ("image_url",)
SMALL_ROWS = (b"\0" + bytes(3 * 8)) * 8


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def text_bomb():
    """A PNG whose comment is 200 MB when it is inflated."""
    body = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    return png(8, 8, 8, 2, SMALL_ROWS, before=png_chunk(b"zTXt", body))


def profile_bomb():
    """A PNG whose colour profile is 200 MB when it is inflated."""
    body = b"icc\0\0" + zlib.compress(bytes(200_000_000), 9)
    return png(8, 8, 8, 2, SMALL_ROWS, before=png_chunk(b"iCCP", body))


def tiff_with(tag, value):
    """A small TIFF whose directory says ``value`` for ``tag`` (a 32-bit number)."""
    entries = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 8, 279: 64} | {tag: value}
    directory = struct.pack("<H", len(entries))
    for number, content in sorted(entries.items()):
        directory += struct.pack("<HHII", number, 4, 1, content)
    head = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)
    return head.ljust(200, b"\0") + bytes(64)


def huge_bmp():
    data = picture(format="BMP")
    return data[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + data[26:]


def pillow_can_write(format):
    Image.init()
    return format in Image.SAVE


REFUSED = {
    "png-50000x50000-1-bit": (png(50_000, 50_000, 1, 0, bytes(6251 * 10)), "media_too_large"),
    "png-2-billion": (png(2**31 - 1, 2**31 - 1, 8, 2, b"\0" * 100), "media_too_large"),
    "png-wide": (png(2**31 - 1, 1, 8, 2, b"\0" * 100), "media_too_large"),
    "png-empty": (png(0, 0, 8, 2, b""), "media_decode_failed"),
    "png-rows-missing": (png(4000, 4000, 8, 2, b"\0" * 50), "media_decode_failed"),
    "png-bad-depth": (png(8, 8, 3, 2, SMALL_ROWS), "media_decode_failed"),
    "png-bad-checksum": (picture().replace(b"IDAT", b"IDAt"), "media_decode_failed"),
    "png-no-pixels": (picture()[:33] + png_chunk(b"IEND", b""), "media_decode_failed"),
    "png-broken-stream": (picture()[:60] + b"\xff" * 40 + picture()[100:], "media_decode_failed"),
    "png-cut": (picture()[:70], "media_decode_failed"),
    "png-huge-chunk": (picture()[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT" + bytes(50), "media_decode_failed"),
    "jpeg-65535": (picture(format="JPEG").replace(b"\0\x30\0\x40", b"\xff\xff\xff\xff"), "media_too_large"),
    "jpeg-cut": (picture(format="JPEG")[:400], "media_decode_failed"),
    "jpeg-2-bytes": (b"\xff\xd8\xff", "media_decode_failed"),
    "gif-65535": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(20), "media_too_large"),
    "gif-cut": (picture(format="GIF")[:30], "media_decode_failed"),
    "webp-cut": (picture(format="WEBP")[:40], "media_decode_failed"),
    "bmp-huge": (huge_bmp(), "media_too_large"),
    "tiff-huge": (tiff_with(256, 2**32 - 1), "media_too_large"),
    "tiff-strip-outside": (tiff_with(273, 2**31), "media_decode_failed"),
    "tiff-many-samples": (tiff_with(277, 2**31), "media_decode_failed"),
    "tiff-own-directory": (b"II*\0" + struct.pack("<I", 0), "media_decode_failed"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n", "media_decode_failed"),
    "eps-binary": (b"\xc5\xd0\xd3\xc6" + bytes(100), "media_decode_failed"),
    "psd": (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(500), "media_decode_failed"),
    "ico": (saved(Image.new("RGB", (16, 16)), "ICO"), "media_decode_failed"),
    "pcx": (saved(Image.new("RGB", (16, 16)), "PCX"), "media_decode_failed"),
    "ppm": (saved(Image.new("RGB", (16, 16)), "PPM"), "media_decode_failed"),
    "pdf": (saved(Image.new("RGB", (16, 16)), "PDF"), "media_decode_failed"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "media_decode_failed"),
    "wmf": (b"\xd7\xcd\xc6\x9a" + bytes(100), "media_decode_failed"),
    "xbm": (b"#define a_width 9\n#define a_height 9\nstatic char a_bits[] = {0};", "media_decode_failed"),
    "fits": (b"SIMPLE  =                    T".ljust(2880), "media_decode_failed"),
    "mpo-of-nothing": (b"\xff\xd8\xff\xe2\0\x10MPF\0II*\0" + bytes(50), "media_decode_failed"),
}
if pillow_can_write("JPEG2000"):
    REFUSED["jpeg2000"] = (saved(Image.new("RGB", (16, 16)), "JPEG2000"), "media_decode_failed")


@attacks(Case(f"A44-{name}", codes=(code,), modalities=PICTURE) for name, (_, code) in REFUSED.items())
def test_pictures_that_are_refused(server, case, kind, stream):
    data, _ = REFUSED[case.name.removeprefix("A44-")]
    server.check_answer(case, kind, stream, url=data_url(data, "image/png"))
    server.check_still_decodes()


@attacks(Case(f"A44-{name}", modalities=("video_url", "time_series_url")) for name in REFUSED)
def test_nor_are_they_videos_or_series(server, case, kind, stream):
    data, _ = REFUSED[case.name.removeprefix("A44-")]
    server.check_refused(case, kind, stream, url=data_url(data, "application/octet-stream"))


PLAIN = Image.fromarray(numbered_frame(5, 64, 48))


def gif_of_100_000_frames():
    """A GIF that begins with the number 5 and goes on for 100,000 frames of one pixel."""
    data = saved(PLAIN, "GIF")
    dot = b"\x21\xf9\x04\x08\0\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return data[:-1] + dot * 100_000 + b";"


def sixteen_bit_grey():
    return Image.fromarray(np.asarray(PLAIN.convert("L")).astype(np.uint16) * 257)


ANSWERED = {
    "png": saved(PLAIN, "PNG"),
    "gif-100000-frames": gif_of_100_000_frames(),
    "animated-png": saved(PLAIN, "PNG", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 3),
    "animated-webp": saved(PLAIN, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 3, quality=90),
    "tiff-pages": saved(PLAIN, "TIFF", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 500),
    "cmyk": saved(PLAIN.convert("CMYK"), "JPEG", quality=95),
    "palette": saved(PLAIN.quantize(16), "PNG"),
    "grey-alpha": saved(PLAIN.convert("LA"), "PNG"),
    "grey-16-bit": saved(sixteen_bit_grey(), "PNG"),
    "progressive": saved(PLAIN, "JPEG", progressive=True, quality=95),
    "trailing-bytes": saved(PLAIN, "PNG") + b"<html>" + bytes(1000),
}


@attacks(Case(f"A44-{name}", modalities=PICTURE) for name in ANSWERED)
def test_pictures_that_are_answered(server, case, kind, stream):
    url = data_url(ANSWERED[case.name.removeprefix("A44-")], "image/png")
    answer = server.post(question(url, kind), stream=stream)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("make", [text_bomb, profile_bomb])
@pytest.mark.parametrize("stream", [False, True])
def test_a44_what_is_inflated_beside_the_pixels_is_bounded(server, make, stream):
    """The picture itself is sound: it may be shown or refused, but not with 200 MB in memory for its comment."""
    answer = server.post(question(data_url(make(), "image/png"), "image_url"), stream=stream)
    assert answer.status_code in (200, 400), answer.text
    server.check_still_decodes()


async def load_picture(loader, data):
    """The picture as uint8 (64, 64, 3), or the error."""
    url = f"data:;base64,{base64.b64encode(data).decode()}"
    plan = FramePlan((0,), 64, 64, LAYOUT)
    try:
        opened = await loader.open(await loader.fetch(MediaItem(Modality.IMAGE, url=url)))
    except FilmstripError as error:
        return error
    try:
        tensor, _ = await loader.read(opened, plan)
        return frames_of(np.array(tensor.array), plan)[0]
    finally:
        opened.close()


@pytest.fixture(scope="module")
def loaded():
    async def load_all():
        loader = MediaLoader(MediaConfig(num_decode_threads=2))
        try:
            return {name: await load_picture(loader, data) for name, data in ANSWERED.items()}
        finally:
            await loader.close()

    return asyncio.run(load_all())


@pytest.mark.parametrize("name", ANSWERED)
def test_the_first_picture_is_the_one_that_is_shown(loaded, name):
    assert isinstance(loaded[name], np.ndarray), loaded[name]
    assert read_number(loaded[name]) == 5
