"""What goes between the loader and a worker process: one item to open, one plan to carry out; typed, never pickled.

A worker may have been taken over by the file it read. What it says is therefore checked here before anybody uses it.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from filmstrip import errors
from filmstrip.errors import FilmstripError, MediaDecodeError
from filmstrip.types import FramePlan, FrameTiming, ImageMetadata, TimeSeriesMetadata, VideoMetadata

MAX_REPLY_BYTES = 256 << 20
"""Longest answer that is read: the times of tens of millions of frames."""

_ERRORS: dict[str, type[FilmstripError]] = {
    kind.__name__: kind
    for kind in (
        errors.InvalidRequestError,
        errors.MediaError,
        errors.MediaDecodeError,
        errors.MediaTooLargeError,
        errors.FilmstripError,
    )
}
_MAX_MESSAGE_CHARS = 1000


class OpenVideo(msgspec.Struct, tag="open_video"):
    """Scan a video's index. The file's descriptor comes with it; ``is_remote``: and the socket to ask for its bytes on."""

    decoder: str
    max_pixels: int
    content_hash: str
    is_remote: bool = False


class OpenFrames(msgspec.Struct, tag="open_frames"):
    """Look at pictures that make a video, packed behind one descriptor."""

    spans: list[tuple[int, int]]
    timing: FrameTiming
    max_pixels: int
    max_frames: int
    param: str | None


class OpenImage(msgspec.Struct, tag="open_image"):
    """Look at a picture's header."""

    max_pixels: int


class OpenTimeSeries(msgspec.Struct, tag="open_time_series"):
    """Look at a time series' header."""

    max_values: int
    max_channels: int
    sampling_rate: float | None


class CheckDecoders(msgspec.Struct, tag="check_decoders"):
    """Say whether these can be used."""

    names: tuple[str, ...]


class ReadPatches(msgspec.Struct, tag="read_patches"):
    """Write the patches of ``plan`` into the shared memory whose descriptor comes with it."""

    plan: FramePlan
    num_threads: int


class ReadSamples(msgspec.Struct, tag="read_samples"):
    """Write a time series' samples, float32 of ``shape``, into the shared memory whose descriptor comes with it."""

    shape: tuple[int, int]


class VideoOpened(msgspec.Struct, tag="video"):
    """A video's metadata; ``timestamps`` is float64 as bytes."""

    total_num_frames: int
    fps: float
    duration: float
    height: int
    width: int
    timestamps: bytes
    video_backend: str
    codec: str
    rotation_degrees: int
    timing_assumed: bool
    has_audio: bool
    is_mirrored: bool


class ImageOpened(msgspec.Struct, tag="image"):
    """A picture's metadata."""

    height: int
    width: int
    format: str


class TimeSeriesOpened(msgspec.Struct, tag="time_series"):
    """A time series' metadata."""

    num_samples: int
    num_channels: int
    sampling_rate: float | None
    format: str


class Done(msgspec.Struct, tag="done"):
    """What was asked for is written; ``delivered`` are the frames.

    ``peak_memory_bytes`` is the most resident memory so far, shared memory included, above what the process began with.
    """

    delivered: tuple[int, ...]
    peak_memory_bytes: int = 0


class Failed(msgspec.Struct, tag="failed"):
    """An error of the item, by the name of its class."""

    kind: str
    message: str
    param: str | None
    code: str


ToWorker = OpenVideo | OpenFrames | OpenImage | OpenTimeSeries | CheckDecoders | ReadPatches | ReadSamples
FromWorker = VideoOpened | ImageOpened | TimeSeriesOpened | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode


def failed(error: FilmstripError) -> Failed:
    """The message for an error."""
    kind = next(each.__name__ for each in type(error).__mro__ if each.__name__ in _ERRORS)
    return Failed(kind, error.message, error.param, error.code)


def error_of(message: Failed) -> FilmstripError:
    """The error of a message."""
    kind = _ERRORS.get(message.kind, MediaDecodeError)
    return kind(message.message[:_MAX_MESSAGE_CHARS], param=message.param, code=message.code)


def opened(metadata: VideoMetadata | ImageMetadata | TimeSeriesMetadata) -> FromWorker:
    """The message for what a header says."""
    if isinstance(metadata, ImageMetadata):
        return ImageOpened(metadata.height, metadata.width, metadata.format)
    if isinstance(metadata, TimeSeriesMetadata):
        return TimeSeriesOpened(metadata.num_samples, metadata.num_channels, metadata.sampling_rate, metadata.format)
    fields: dict[str, Any] = dict(vars(metadata))
    fields["timestamps"] = np.ascontiguousarray(metadata.timestamps, np.float64).tobytes()
    return VideoOpened(**fields)


def metadata_of(message: FromWorker, opening: ToWorker) -> VideoMetadata | ImageMetadata | TimeSeriesMetadata:
    """What a header says, checked against what was asked; raises ValueError for what no honest worker sends."""
    if isinstance(opening, OpenImage) and isinstance(message, ImageOpened):
        _check(_is_size(message.height, message.width, opening.max_pixels))
        return ImageMetadata(message.height, message.width, message.format[:40])
    if isinstance(opening, OpenTimeSeries) and isinstance(message, TimeSeriesOpened):
        return _time_series(message, opening)
    _check(isinstance(opening, OpenVideo | OpenFrames) and isinstance(message, VideoOpened))
    assert isinstance(opening, OpenVideo | OpenFrames)
    assert isinstance(message, VideoOpened)
    return _video(message, opening.max_pixels)


def _time_series(message: TimeSeriesOpened, opening: OpenTimeSeries) -> TimeSeriesMetadata:
    num_samples, num_channels, rate = message.num_samples, message.num_channels, message.sampling_rate
    _check(num_samples >= 1 and 1 <= num_channels <= opening.max_channels)
    _check(num_samples * num_channels <= opening.max_values)
    _check(rate is None or 0 < rate < math.inf)
    return TimeSeriesMetadata(num_samples, num_channels, rate, message.format[:40])


def _video(message: VideoOpened, max_pixels: int) -> VideoMetadata:
    timestamps = np.frombuffer(message.timestamps, np.float64)
    _check(len(timestamps) == message.total_num_frames > 0 and bool(np.isfinite(timestamps).all()))
    _check(bool((np.diff(timestamps) >= 0).all()))
    _check(_is_size(message.height, message.width, max_pixels))
    _check(0 < message.fps < math.inf and 0 < message.duration < math.inf)
    return VideoMetadata(
        message.total_num_frames,
        message.fps,
        message.duration,
        message.height,
        message.width,
        timestamps,
        message.video_backend[:40],
        message.codec[:40],
        message.rotation_degrees,
        message.timing_assumed,
        message.has_audio,
        message.is_mirrored,
    )


def _is_size(height: int, width: int, max_pixels: int) -> bool:
    return height >= 1 and width >= 1 and height * width <= max_pixels


def _check(is_right: bool) -> None:
    if not is_right:
        raise ValueError("a worker described an item in a way that cannot be")
