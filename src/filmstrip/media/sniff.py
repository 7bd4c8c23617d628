"""What a media file is, by its first bytes; used only to say what is wrong, never to choose a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from filmstrip.media.source import MediaSource

_NUM_BYTES = 64
_MPEG_TS_PACKET = 188

# (offset, bytes, kind, name)
_SIGNATURES: tuple[tuple[int, bytes, Literal["image", "video", "audio", "other"], str], ...] = (
    (0, b"\xff\xd8\xff", "image", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "image", "PNG"),
    (0, b"GIF87a", "image", "GIF"),
    (0, b"GIF89a", "image", "GIF"),
    (8, b"WEBP", "image", "WebP"),
    (0, b"II*\0", "image", "TIFF"),
    (0, b"MM\0*", "image", "TIFF"),
    (4, b"ftypavif", "image", "AVIF"),
    (4, b"ftypavis", "image", "AVIF"),
    (4, b"ftyphei", "image", "HEIC"),
    (4, b"ftypmif1", "image", "HEIF"),
    (0, b"\xff\x0a", "image", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "image", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "image", "JPEG 2000"),
    (0, b"8BPS", "image", "Photoshop"),
    (0, b"\0\0\x01\0", "image", "icon"),
    (4, b"ftypM4A", "audio", "MPEG-4 audio"),
    (4, b"ftyp", "video", "MP4"),
    (4, b"moov", "video", "MP4"),
    (4, b"mdat", "video", "MP4"),
    (0, b"\x1aE\xdf\xa3", "video", "Matroska or WebM"),
    (8, b"AVI ", "video", "AVI"),
    (0, b"FLV\x01", "video", "FLV"),
    (0, b"\0\0\x01\xba", "video", "MPEG"),
    (0, b"\0\0\x01\xb3", "video", "MPEG"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "video", "ASF or WMV"),
    (8, b"WAVE", "audio", "WAV"),
    (0, b"fLaC", "audio", "FLAC"),
    (0, b"ID3", "audio", "MP3"),
    (0, b"OggS", "video", "Ogg"),
    (0, b"%PDF-", "other", "PDF document"),
    (0, b"%!PS", "other", "PostScript document"),
    (0, b"PK\x03\x04", "other", "ZIP archive"),
)


@dataclass(frozen=True)
class FileKind:
    """``kind`` is image, video, audio, other or unknown; ``format`` is a name for people, "" if unknown."""

    kind: Literal["image", "video", "audio", "other", "unknown"]
    format: str = ""

    def __str__(self) -> str:
        """With its article, for the middle of a sentence: "a PNG image"."""
        if self.kind == "unknown":
            return "not a known media file"
        noun = {"other": "", "audio": " file"}.get(self.kind, f" {self.kind}")
        article = "an" if self.format.startswith(("A", "E", "I", "O", "U", "MP")) else "a"
        return f"{article} {self.format}{noun}"


def sniff(source: MediaSource) -> FileKind:
    """What the first bytes of ``source`` say it is."""
    with source.open() as file:
        head = file.read(_NUM_BYTES)
        file.seek(_MPEG_TS_PACKET)
        next_packet = file.read(1)
    for offset, signature, kind, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return FileKind(kind, name)
    if head[:1] == next_packet == b"G":
        return FileKind("video", "MPEG-TS")
    # A bitmap's two letters could begin any text; the reserved fields after its size are zero.
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0":
        return FileKind("image", "BMP")
    if _is_text(head):
        return FileKind("other", "text or web page")
    return FileKind("unknown")


def _is_text(head: bytes) -> bool:
    return bool(head) and all(byte >= 0x20 or byte in b"\t\r\n\x0c" for byte in head) and head.isascii()
