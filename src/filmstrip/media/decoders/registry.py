"""Video decoders by name: loads the library when it is asked for, and says what to install; knows nothing of decoding."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

import av.logging

from filmstrip.config import VIDEO_DECODERS
from filmstrip.errors import InvalidRequestError
from filmstrip.media.decoders.base import VideoReader
from filmstrip.media.decoders.pyav import PyAVReader
from filmstrip.media.source import MediaSource

__all__ = ["import_decoder", "open_reader"]

_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class _Decoder:
    """The class that reads, the library it needs, and from which version on."""

    reader: str
    library: str
    min_version: tuple[int, ...]


_DECODERS = {
    "torchcodec": _Decoder("TorchCodecReader", "torchcodec", (0, 7)),
    "decord": _Decoder("DecordReader", "decord", (0, 6)),
    "opencv": _Decoder("OpenCVReader", "cv2", (4, 11)),  # the first that reads from a stream buffer
    "torchvision": _Decoder("TorchVisionReader", "torchvision", (0, 24)),
}


def import_decoder(name: str) -> None:
    """Load a decoder and its library, so that :func:`open_reader` opens no file any more.

    Raises InvalidRequestError if there is no such decoder, or if its library is not installed, does not load, or is too old
    or too new.
    """
    _reader_class(name)


def open_reader(name: str, source: MediaSource, *, max_pixels: int | None = None) -> VideoReader:
    """A reader of ``source`` through the decoder ``name``.

    Raises InvalidRequestError as :func:`import_decoder` does, MediaDecodeError if the file cannot be read, and
    MediaTooLargeError for frames of more than ``max_pixels``.
    """
    return _reader_class(name)(source, max_pixels=max_pixels)


def _reader_class(name: str) -> type:
    if name == "pyav":
        return PyAVReader
    if name not in VIDEO_DECODERS:
        raise InvalidRequestError(f"the video decoder must be one of {', '.join(VIDEO_DECODERS)}, not {name!r:.80}")
    decoder = _DECODERS[name]
    _check_library(name, decoder)
    return getattr(importlib.import_module(f"{_PACKAGE}.{name}"), decoder.reader)


def _check_library(name: str, decoder: _Decoder) -> None:
    advice = f"pip install 'filmstrip[{name}]'"
    level = av.logging.get_level()
    try:
        library = importlib.import_module(decoder.library)
    except ModuleNotFoundError as error:
        if error.name == decoder.library:
            raise InvalidRequestError(f"the video decoder {name} is not installed: {advice}") from error
        raise _does_not_load(name) from error
    except Exception as error:  # what a library raises that finds its shared libraries missing is up to it
        raise _does_not_load(name) from error
    finally:
        av.logging.set_level(level)  # torchvision makes PyAV print to standard error
    version = getattr(library, "__version__", "0")
    if tuple(map(int, re.findall(r"\d+", version)[: len(decoder.min_version)])) < decoder.min_version:
        needed = ".".join(map(str, decoder.min_version))
        raise InvalidRequestError(f"the video decoder {name} is too old: {version}, where {needed} is needed: {advice}")
    if name == "torchvision" and not hasattr(importlib.import_module("torchvision.io"), "VideoReader"):
        raise InvalidRequestError(
            f"torchvision {version} has no video decoder any more (0.27 was the last that had one); use torchcodec, which "
            "took its place: pip install 'filmstrip[torchcodec]'"
        )


def _does_not_load(name: str) -> InvalidRequestError:
    needs = {
        "torchcodec": "it needs FFmpeg's shared libraries and the PyTorch version it was built for",
        "torchvision": "it needs the PyTorch version it was built for",
    }.get(name, "its own dependencies are missing or of another version")
    return InvalidRequestError(f"the video decoder {name} is installed but does not load: {needs}")
