"""Encoded still images to RGB pixels: header first, limits before decoding; knows no model and no patches.

What differs from Transformers' ``load_image``, which turns by EXIF as we do and then calls Pillow's ``convert("RGB")``:

- Transparent parts become white, as in Qwen's own utilities; ``convert`` shows the colours hidden there, mostly black.
- Grey of 12 or 16 bits is scaled to 8; ``convert`` clips it at 255, which leaves nearly all of it white.
- TIFF whose zero is white is right with 16 bits, too, and PNG's one transparent grey with 2, 4 and 16 bits.
- Samples that are signed, floating-point or of 32 bits are refused, since nothing says which value is white.

All else is Pillow's: colour of 16 bits keeps its high bytes, profiles (ICC) are not applied, and CMYK becomes
R = (1 - C)(1 - K), G = (1 - M)(1 - K), B = (1 - Y)(1 - K), where JPEG's four channels are taken for inverted (Adobe's way).
"""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    YCBCRSUBSAMPLING,
    TiffImageFile,
)

from filmstrip.errors import MediaDecodeError, MediaTooLargeError
from filmstrip.media.sniff import sniff
from filmstrip.media.source import MediaSource
from filmstrip.types import ImageMetadata

# What is not here is refused unopened: Pillow's rarer readers are little tested, and EPS runs a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_FORMATS_TEXT = "JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF"
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A PNG's orientation may stand behind its pixels; looking for it must stay cheap.
_MAX_PNG_CHUNKS = 1 << 16
_SAMPLES_16_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_HEAD_BYTES = 1 << 16
"""Enough of a file to know its size in pixels; AVIF says it in a box of its index, which stands first."""
# libavif's own limits, which Pillow has no setting for (AVIF_DEFAULT_IMAGE_SIZE_LIMIT and _DIMENSION_LIMIT of avif.h).
_MAX_AVIF_PIXELS, _MAX_AVIF_SIDE = 16384 * 16384, 32768
_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
_AVIF_SIZE_BOX = re.compile(rb"\0\0\0\x14ispe\0\0\0\0(.{8})", re.DOTALL)
_WHITE_OF_RAW_MODE: dict[object, int] = {"L;2": 3, "L;4": 15}
_TIFF_WHITE_IS_ZERO, _TIFF_YCBCR = 0, 6
_TIFF_UNCOMPRESSED = _TIFF_UNSIGNED = 1
_TIFF_SEPARATE_PLANES = 2


def probe_image(source: MediaSource, max_pixels: int) -> ImageMetadata:
    """Size as displayed and format, from the header alone.

    Raises MediaTooLargeError over ``max_pixels`` and MediaDecodeError if it is no image of a supported format.
    """
    with source.open() as file, _PILLOW_LIMIT.raised_to(max_pixels):
        image = _open_header(file, source, max_pixels)
        width, height = _stored_size(image)
        if _orientation(image, file) >= 5:  # these four swap the axes
            width, height = height, width
        return ImageMetadata(height=height, width=width, format=_format(image))


def open_image(source: MediaSource, max_pixels: int) -> Image.Image:
    """Decode to mode RGB as displayed: first frame, EXIF orientation applied, transparency on white.

    Raises MediaTooLargeError over ``max_pixels`` (before decoding) and MediaDecodeError if it cannot be decoded.
    Pillow's own limit of pixels is out of force meanwhile if it is lower. The module's text says how each kind of sample
    becomes RGB.
    """
    with source.open() as file, _PILLOW_LIMIT.raised_to(max_pixels):
        image = _open_header(file, source, max_pixels)
        orientation = _orientation(image, file)
        try:
            image.load()
            if image.format == "TIFF":  # of all formats, Pillow turns only this one by itself
                orientation = 1
            return _to_displayed_rgb(image, orientation)
        except (MediaDecodeError, MediaTooLargeError):
            raise
        except Image.DecompressionBombError as error:
            raise _too_many_pixels(_bomb_size(error), max_pixels) from None
        # Pillow's readers raise nearly anything on broken data: OSError, SyntaxError, ValueError, struct.error, ...
        except Exception as error:
            raise MediaDecodeError(f"the {_format(image)} image is broken or cut off and cannot be decoded") from error


def image_from_data(data: Any, max_pixels: int) -> Image.Image:
    """An image given as an object, as :func:`open_image` would give it.

    ``data`` is a PIL image of any mode, or a uint8 array of shape (height, width, 3), (height, width, 4) with alpha, or
    (height, width) grey. Raises MediaDecodeError for anything else and MediaTooLargeError over ``max_pixels``.
    """
    image = data if isinstance(data, Image.Image) else _image_from_array(data)
    _check_size(image.size, max_pixels)
    if isinstance(image, TiffImageFile):
        _check_tiff(image)
    try:
        with _PILLOW_LIMIT.raised_to(max_pixels):
            image.load()  # of a file that was only opened; a TIFF is upright after it and says so
        return _to_displayed_rgb(image, _tagged_orientation(image))
    except MediaDecodeError:
        raise
    except Exception as error:
        raise MediaDecodeError("the image is broken and cannot be decoded") from error


class _PillowLimit:
    """Pillow's limit of pixels, one number for the whole process, raised while somebody reads under a higher one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_readers = 0
        self._own_limit: int | None = None

    @contextlib.contextmanager
    def raised_to(self, max_pixels: int) -> Iterator[None]:
        """Inside, Pillow refuses nothing of up to ``max_pixels``; after the last reader its limit is what it was."""
        with self._lock:
            if self._num_readers == 0:
                self._own_limit = Image.MAX_IMAGE_PIXELS
            self._num_readers += 1
            if Image.MAX_IMAGE_PIXELS is not None:
                Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
        try:
            yield
        finally:
            with self._lock:
                self._num_readers -= 1
                if self._num_readers == 0:
                    Image.MAX_IMAGE_PIXELS = self._own_limit


_PILLOW_LIMIT = _PillowLimit()


def _open_header(file: BinaryIO, source: MediaSource, max_pixels: int) -> Image.Image:
    """Let Pillow read the header; nothing of the pixels is decoded."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    _check_stated_size(head, max_pixels)
    try:
        image = Image.open(file, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(_bomb_size(error), max_pixels) from None
    except Exception as error:
        raise _not_an_image(source) from error
    _check_size(image.size, max_pixels)
    if isinstance(image, TiffImageFile):
        _check_tiff(image)
    elif image.format == "PNG" and image.tile:
        _correct_transparent_colour(image, raw_mode=image.tile[0].args)
    return image


def _check_stated_size(head: bytes, max_pixels: int) -> None:
    """Check the size before Pillow sees the file: its WebP reader has room for all pixels once it is open.

    It also tells a size that a reader does not take from a file that is broken.
    """
    size = _stated_size(head)
    if size is None:
        return
    _check_size(size, max_pixels)
    width, height = size
    if head[8:12] in _AVIF_BRANDS and (width * height > _MAX_AVIF_PIXELS or max(size) > _MAX_AVIF_SIDE):
        raise MediaTooLargeError(
            f"the AVIF image has {width} x {height} pixels; its decoder takes at most {_MAX_AVIF_PIXELS} pixels and"
            f" {_MAX_AVIF_SIDE} on a side, which no option changes"
        )


def _stated_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of a PNG, BMP, WebP or AVIF file; None if it is not there.

    https://www.w3.org/TR/png-3/#11IHDR, the BITMAPCOREHEADER and BITMAPINFOHEADER of Windows,
    https://developers.google.com/speed/webp/docs/riff_container, and the ``ispe`` box of ISO/IEC 23008-12, of which an AVIF
    file has one for each picture in it.
    """
    if head.startswith(b"\x89PNG") and head[12:16] == b"IHDR" and len(head) >= 26:
        return struct.unpack_from(">II", head, 16)
    if head.startswith(b"BM") and len(head) >= 26:
        header_bytes = int.from_bytes(head[14:18], "little")
        if header_bytes == 12:
            return struct.unpack_from("<HH", head, 18)
        if 40 <= header_bytes <= 124:
            width, height = struct.unpack_from("<Ii", head, 18)
            return width, abs(height)  # a negative height means rows from the top
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _stated_size_of_webp(head)
    if head[4:8] == b"ftyp" and head[8:12] in _AVIF_BRANDS:
        sizes = [struct.unpack(">II", size) for size in _AVIF_SIZE_BOX.findall(head)]
        return max(sizes, key=lambda size: size[0] * size[1], default=None)
    return None


def _stated_size_of_webp(head: bytes) -> tuple[int, int] | None:
    kind, data = head[12:16], head[20:30]
    if len(data) < 10:
        return None
    if kind == b"VP8X":
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _check_tiff(image: TiffImageFile) -> None:
    """Refuse what Pillow reads wrongly, or what has no known white; raises MediaDecodeError."""
    tags = image.tag_v2
    bits, sample_format = max(tags.get(BITSPERSAMPLE, (1,))), tags.get(SAMPLEFORMAT, (_TIFF_UNSIGNED,))
    uncompressed = tags.get(COMPRESSION, _TIFF_UNCOMPRESSED) == _TIFF_UNCOMPRESSED
    if bits > 16 or any(form != _TIFF_UNSIGNED for form in sample_format):
        raise MediaDecodeError(
            "the TIFF image has samples that are signed, floating-point or of 32 bits, whose range is unknown;"
            " send 8 or 16 bits without a sign"
        )
    # Pillow takes each plane for one of 8 bits, and each pixel for one with colours of its own.
    if uncompressed and bits > 8 and tags.get(PLANAR_CONFIGURATION) == _TIFF_SEPARATE_PLANES:
        raise MediaDecodeError(
            "the TIFF image has uncompressed planes of 16 bits, which cannot be decoded; send it compressed or interleaved"
        )
    is_ycbcr = tags.get(PHOTOMETRIC_INTERPRETATION) == _TIFF_YCBCR
    if uncompressed and is_ycbcr and tags.get(YCBCRSUBSAMPLING, (2, 2)) != (1, 1):
        raise MediaDecodeError(
            "the TIFF image has uncompressed, subsampled colours, which cannot be decoded; send it compressed or as RGB"
        )


def _correct_transparent_colour(image: Image.Image, raw_mode: object) -> None:
    """Bring a PNG's one transparent colour (tRNS) to the scale of the samples that Pillow gives.

    Samples of 2 and 4 bits are given as 8, and so are colours of 16 bits, of which only the high bytes can be compared.
    """
    transparent = image.info.get("transparency")
    if raw_mode in _WHITE_OF_RAW_MODE and isinstance(transparent, int):
        white = _WHITE_OF_RAW_MODE[raw_mode]
        image.info["transparency"] = (transparent & white) * 255 // white
    elif raw_mode == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaDecodeError(f"the image is empty: {width} x {height} pixels")
    if width * height > max_pixels:
        raise _too_many_pixels(f"{width} x {height} = {width * height}", max_pixels)


def _not_an_image(source: MediaSource) -> MediaDecodeError:
    kind = sniff(source)
    if kind.kind == "video":
        return MediaDecodeError(f"this is {kind}, not an image; send it as video_url")
    if kind.format.upper() in _FORMATS:
        return MediaDecodeError(f"the {kind.format} image is broken, cut off or of a kind that cannot be decoded")
    what = "the bytes are not an image" if kind.kind == "unknown" else f"this is {kind}"
    return MediaDecodeError(f"{what}; supported image formats are {_FORMATS_TEXT}")


def _too_many_pixels(size: str, max_pixels: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"the image has {size} pixels; the limit is {max_pixels} (max_image_pixels, --max-image-pixels)"
    )


def _bomb_size(error: Exception) -> str:
    """The number of pixels in Pillow's own message."""
    number = re.search(r"\d+", str(error))
    return number.group() if number else "too many"


def _format(image: Image.Image) -> str:
    """The name on our list; Pillow calls a JPEG with further pictures behind the first one MPO."""
    return "JPEG" if image.format == "MPO" else image.format or ""


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before any orientation is applied; Pillow's ``size`` of a TIFF is after it."""
    if isinstance(image, TiffImageFile):
        return image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return image.size


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """EXIF orientation 1..8 of an image of which only the header was read."""
    if image.format == "PNG" and "exif" not in image.info:
        # Asking Pillow for it would decode the whole file, since a PNG's EXIF may stand behind its pixels.
        position = file.tell()
        exif = _png_exif(file)
        file.seek(position)
        if exif is not None:
            image.info["exif"] = exif
    return _tagged_orientation(image)


def _png_exif(file: BinaryIO) -> bytes | None:
    """Contents of a PNG's eXIf chunk, wherever it stands."""
    position = 8
    for _ in range(_MAX_PNG_CHUNKS):
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return None
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IEND":
            return None
        if kind == b"eXIf":
            return b"Exif\0\0" + file.read(min(length, 1 << 20))
        position += 12 + length
    return None


def _tagged_orientation(image: Image.Image) -> int:
    """EXIF or XMP orientation 1..8 from what was read of ``image`` so far."""
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG)  # the PNG reader's own getexif would decode
    except Exception:  # unreadable EXIF is no reason to refuse the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_displayed_rgb(image: Image.Image, orientation: int) -> Image.Image:
    image = _to_rgb(image)
    method = _TRANSPOSITIONS.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB of any mode; transparent parts become white."""
    if image.mode in _SAMPLES_16_BIT:
        return _from_16_bit(image)
    if image.mode == "F":
        raise MediaDecodeError("the image has floating-point samples, whose range is unknown; send 8 or 16 bits")
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    if image.has_transparency_data and not _is_alpha_unused(image):
        rgba = image.convert("RGBA")
        background = Image.new("RGB", rgba.size, (255, 255, 255))
        background.paste(rgba, mask=rgba.getchannel("A"))
        return background
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_alpha_unused(image: Image.Image) -> bool:
    """Whether it is a bitmap whose fourth byte is zero everywhere: most programs leave it so, and show such a picture."""
    return image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey samples of up to 16 bits scaled to 8 and rounded, which Pillow's own conversion would clip at 255."""
    samples, white, inverted = np.asarray(image), 0xFFFF, False
    if isinstance(image, TiffImageFile):
        white = (1 << image.tag_v2[BITSPERSAMPLE][0]) - 1
        inverted = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == _TIFF_WHITE_IS_ZERO
    if samples.min() < 0 or samples.max() > white:
        raise MediaDecodeError("the image has samples of more than 16 bits, whose range is unknown; send 8 or 16 bits")
    scaled = samples.astype(np.uint32)
    if inverted:
        np.subtract(white, scaled, out=scaled)
    scaled *= 255
    scaled += white // 2
    scaled //= white
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[samples == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _image_from_array(data: Any) -> Image.Image:
    if not isinstance(data, np.ndarray):
        raise MediaDecodeError(f"an image object must be a PIL image or a numpy array, not {type(data).__name__}")
    shape_is_right = data.ndim == 2 or (data.ndim == 3 and data.shape[2] in (3, 4))
    if data.dtype != np.uint8 or not shape_is_right or 0 in data.shape:
        raise MediaDecodeError(
            f"an image array must be uint8 of shape (height, width, 3), not {data.dtype} of shape {data.shape}"
        )
    return Image.fromarray(np.ascontiguousarray(data))
