"""Encoded still images to RGB pixels: header first, limits before decoding; knows no model and no patches."""

from __future__ import annotations

import re
import struct
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

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


def probe_image(source: MediaSource, max_pixels: int) -> ImageMetadata:
    """Size as displayed and format, from the header alone.

    Raises MediaTooLargeError over ``max_pixels`` and MediaDecodeError if it is no image of a supported format.
    """
    with source.open() as file:
        image = _open_header(file, source, max_pixels)
        width, height = _stored_size(image)
        if _orientation(image, file) >= 5:  # these four swap the axes
            width, height = height, width
        return ImageMetadata(height=height, width=width, format=image.format or "")


def open_image(source: MediaSource, max_pixels: int) -> Image.Image:
    """Decode to mode RGB as displayed: first frame, EXIF orientation applied, transparency on white.

    Raises MediaTooLargeError over ``max_pixels`` (before decoding) and MediaDecodeError if it cannot be decoded.
    ``max_pixels`` above Pillow's own limit of 178,956,970 has no effect.
    """
    with source.open() as file:
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
            raise MediaDecodeError(f"the {image.format} image is broken or cut off and cannot be decoded") from error


def image_from_data(data: Any, max_pixels: int) -> Image.Image:
    """An image given as an object, as :func:`open_image` would give it.

    ``data`` is a PIL image of any mode, or a uint8 array of shape (height, width, 3), (height, width, 4) with alpha, or
    (height, width) grey. Raises MediaDecodeError for anything else and MediaTooLargeError over ``max_pixels``.
    """
    image = data if isinstance(data, Image.Image) else _image_from_array(data)
    _check_size(image.size, max_pixels)
    try:
        return _to_displayed_rgb(image, _tagged_orientation(image))
    except MediaDecodeError:
        raise
    except Exception as error:
        raise MediaDecodeError("the image is broken and cannot be decoded") from error


def _open_header(file: BinaryIO, source: MediaSource, max_pixels: int) -> Image.Image:
    """Let Pillow read the header; nothing of the pixels is decoded."""
    try:
        image = Image.open(file, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(_bomb_size(error), max_pixels) from None
    except Exception as error:
        raise _not_an_image(source) from error
    _check_size(image.size, max_pixels)
    return image


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaDecodeError(f"the image is empty: {width}x{height} pixels")
    if width * height > max_pixels:
        raise _too_many_pixels(f"{width}x{height} = {width * height}", max_pixels)


def _not_an_image(source: MediaSource) -> MediaDecodeError:
    kind = sniff(source)
    if kind.kind == "video":
        return MediaDecodeError(f"this is {kind}, not an image; send it as video_url")
    if kind.format.upper() in _FORMATS:
        return MediaDecodeError(f"the {kind.format} image is broken or cut off and cannot be decoded")
    what = "the bytes are not an image" if kind.kind == "unknown" else f"this is {kind}"
    return MediaDecodeError(f"{what}; supported image formats are {_FORMATS_TEXT}")


def _too_many_pixels(size: str, max_pixels: int) -> MediaTooLargeError:
    limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
    return MediaTooLargeError(
        f"the image has {size} pixels; the limit is {limit} (max_image_pixels, --max-image-pixels)"
    )


def _bomb_size(error: Exception) -> str:
    """The number of pixels in Pillow's own message."""
    number = re.search(r"\d+", str(error))
    return number.group() if number else "too many"


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
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGB", rgba.size, (255, 255, 255))
        background.paste(rgba, mask=rgba.getchannel("A"))
        return background
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey samples of 16 bits scaled to 8, which Pillow's own conversion would clip at 255."""
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > 0xFFFF:
        raise MediaDecodeError("the image has 32-bit samples, whose range is unknown; send 8 or 16 bits")
    scaled = samples.astype(np.uint32)
    scaled *= 255
    scaled += 0x7FFF
    scaled //= 0xFFFF
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
