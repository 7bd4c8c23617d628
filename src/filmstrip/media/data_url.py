"""``data:`` URLs (RFC 2397, base64 only): text to bytes, in small steps and under a byte limit; knows no media."""

from __future__ import annotations

import binascii
import threading
from dataclasses import dataclass

from filmstrip.errors import MediaFetchError, MediaTooLargeError
from filmstrip.media.source import MediaSource, SpooledBytes

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_WHITE_SPACE = b" \t\r\n"
_MAX_HEADER_CHARS = 1024
_STEP_CHARS = 1 << 20


@dataclass(frozen=True)
class DataUrl:
    """A data URL with its payload still encoded: ``url[start:]``.

    ``media_type`` is in lower case without parameters, "" if the URL has none.
    """

    url: str
    media_type: str
    start: int

    def parts(self) -> list[tuple[int, int]]:
        """Start and end of each comma-separated piece of the payload."""
        bounds, start = [], self.start
        while (comma := self.url.find(",", start)) >= 0:
            bounds.append((start, comma))
            start = comma + 1
        return [*bounds, (start, len(self.url))]


def parse_data_url(url: str) -> DataUrl:
    """Split a data URL without touching its payload; raises MediaFetchError."""
    comma = url.find(",", 0, _MAX_HEADER_CHARS)
    if url[:5].lower() != "data:" or comma < 0:
        raise MediaFetchError("not a data URL of the form data:<media type>;base64,<data>: it has no comma")
    media_type, *parameters = [field.strip().lower() for field in url[5:comma].split(";")]
    if "base64" not in parameters:
        raise MediaFetchError("not a data URL of the form data:<media type>;base64,<data>: ;base64 is missing")
    return DataUrl(url, media_type, comma + 1)


def decode_base64(
    text: str,
    start: int,
    end: int,
    *,
    max_bytes: int,
    max_memory_bytes: int,
    cancel: threading.Event | None = None,
) -> MediaSource:
    """Decode ``text[start:end]`` strictly; only spaces, tabs and line ends are skipped.

    Decoded piece by piece, so that a large payload never exists twice in memory. Raises MediaTooLargeError before decoding
    if the result could be over ``max_bytes``, MediaFetchError if the text is empty or not base64, InterruptedError once
    ``cancel`` is set.
    """
    if (end - start) // 4 * 3 - 2 > max_bytes:
        raise too_large((end - start) // 4 * 3, max_bytes)
    spool = SpooledBytes(max_memory_bytes)
    pending, num_padding = b"", 0
    for position in range(start, end, _STEP_CHARS):
        if cancel is not None and cancel.is_set():
            raise InterruptedError("decoding the data URL was cancelled")
        piece = _ascii(text[position : min(position + _STEP_CHARS, end)]).translate(None, _WHITE_SPACE)
        num_padding = _check_alphabet(piece, num_padding)
        pending += piece
        whole = len(pending) // 4 * 4
        spool.write(_decode(pending[:whole]))
        pending = pending[whole:]
    if pending:
        raise MediaFetchError("the data URL is not valid base64: its length is not a multiple of 4 (cut off?)")
    if spool.num_bytes == 0:
        raise MediaFetchError("the data URL is empty: nothing follows ;base64,")
    return spool.finish()


def too_large(num_bytes: int, max_bytes: int) -> MediaTooLargeError:
    """The error for media over the byte limit."""
    return MediaTooLargeError(
        f"the media has {num_bytes} bytes; the limit is {max_bytes} (max_media_bytes, --max-media-bytes)"
    )


def _ascii(text: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError:
        raise MediaFetchError("the data URL is not valid base64: it has characters that are not ASCII") from None


def _check_alphabet(piece: bytes, num_padding: int) -> int:
    """Raise unless ``piece`` is base64 with padding only at its end; the number of padding characters so far."""
    body = piece.rstrip(b"=")
    if num_padding and body:
        raise MediaFetchError("the data URL is not valid base64: data follows the padding")
    num_padding += len(piece) - len(body)
    if num_padding > 2:
        raise MediaFetchError("the data URL is not valid base64: its padding is wrong")
    wrong = body.translate(None, _ALPHABET)
    if wrong:
        char = chr(wrong[0])
        hint = ""
        if char == "%":
            hint = "; send the payload without percent-encoding"
        elif char in "-_":
            hint = "; send the standard alphabet (+ and /), not the URL-safe one"
        elif char == ",":
            hint = "; several pieces are only for frames of a video (data:video/jpeg;base64,...)"
        raise MediaFetchError(f"the data URL is not valid base64: it has the character {char!r}{hint}")
    return num_padding


def _decode(quads: bytes) -> bytes:
    try:
        return binascii.a2b_base64(quads)
    except binascii.Error:
        raise MediaFetchError("the data URL is not valid base64: its padding is wrong") from None
