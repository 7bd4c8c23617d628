"""Each kind of media behind one small protocol: an address, bytes, a file or base64 in; pixels or samples out, and back.

For scripts and tools, in the caller's own process. The server loads through :mod:`filmstrip.media.loader`, whose workers
call the same functions below these.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from filmstrip.config import MediaConfig
from filmstrip.errors import InvalidRequestError, MediaDecodeError
from filmstrip.media.decoders.base import VideoReader
from filmstrip.media.fetch import Fetcher
from filmstrip.media.frames import is_frames_url, open_frames
from filmstrip.media.image import image_from_data, open_image
from filmstrip.media.sampling import sample_frame_indices
from filmstrip.media.source import BytesSource, MediaSource
from filmstrip.media.time_series import read_time_series, time_series_from_data
from filmstrip.media.video import open_video, read_frames
from filmstrip.types import FrameSampling, FrameTiming, VideoMetadata

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
_UNBOUNDED = 2**63

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class MediaIO(Protocol[T_co]):
    """Loads and encodes one kind of media. All methods raise the MediaError family."""

    def load(self, address: str | os.PathLike[str]) -> T_co:
        """From anything that stands in a request: http, https, ``file://``, a path or a ``data:`` URL."""
        ...

    def load_bytes(self, data: bytes) -> T_co:
        """From the bytes of a file."""
        ...

    def load_file(self, path: str | os.PathLike[str]) -> T_co:
        """From a local file; ``path`` is never taken for an address."""
        ...

    def load_base64(self, media_type: str, data: str) -> T_co:
        """From base64 of type ``media_type`` (e.g. ``video/mp4``)."""
        ...

    def encode_base64(self, media: Any) -> str:
        """Base64 that :meth:`load_base64` loads back; ``media`` is what was loaded, or anything that can be."""
        ...


class _Loading(Generic[T]):
    """What the kinds have in common: all forms of input become a source of bytes."""

    def __init__(self, config: MediaConfig | None = None) -> None:
        """``config`` has limits and rights; by default everything local may be read."""
        self.config = config or MediaConfig()

    def load(self, address: str | os.PathLike[str]) -> T:
        return self._decode(self._fetch(lambda fetcher: fetcher.fetch_sync(address)))

    def load_bytes(self, data: bytes) -> T:
        return self._decode(BytesSource(data))

    def load_file(self, path: str | os.PathLike[str]) -> T:
        return _Loading.load(self, os.path.abspath(os.fspath(path)))

    def load_base64(self, media_type: str, data: str) -> T:
        return self.load(f"data:{media_type};base64,{data}")

    @abstractmethod
    def _decode(self, source: MediaSource) -> T: ...

    def _fetch(self, fetch: Callable[[Fetcher], Any]) -> Any:
        """What ``fetch`` gets with a fetcher of its own, which is closed after."""
        fetcher = Fetcher(self.config)
        try:
            return fetch(fetcher)
        finally:
            with ThreadPoolExecutor(1) as thread:  # the caller may be inside an event loop (a notebook)
                thread.submit(lambda: asyncio.run(fetcher.close())).result()


class ImageIO(_Loading[Image.Image]):
    """Pictures as RGB, upright, what is transparent on white."""

    def __init__(self, config: MediaConfig | None = None, *, format: str = "PNG", quality: int = 95) -> None:
        """``format`` of what is encoded is JPEG, PNG or WEBP, ``quality`` that of the two that lose some.

        Raises InvalidRequestError for another format.
        """
        super().__init__(config)
        self._format, self._quality = _checked_format(format), quality

    def encode_base64(self, media: Any) -> str:
        """``media`` is an address, bytes, a PIL image or a uint8 array (height, width, 3)."""
        if isinstance(media, bytes):
            media = self.load_bytes(media)
        elif isinstance(media, str | os.PathLike):
            media = self.load(media)
        return _encode_picture(image_from_data(media, _UNBOUNDED), self._format, self._quality)

    def _decode(self, source: MediaSource) -> Image.Image:
        return open_image(source, self.config.max_image_pixels)


@dataclass(frozen=True)
class VideoFrames:
    """Chosen frames of a clip, uint8 (num_frames, height, width, 3), their indices, and what the file says."""

    frames: np.ndarray
    frame_indices: tuple[int, ...]
    metadata: VideoMetadata

    @property
    def timestamps(self) -> list[float]:
        """When each frame is shown, in seconds."""
        return self.metadata.timestamps[list(self.frame_indices)].tolist()


class VideoIO(_Loading[VideoFrames]):
    """Chosen frames of a clip; frames sampled by the client (``data:video/jpeg``) come as they are sent, or fewer."""

    def __init__(
        self,
        config: MediaConfig | None = None,
        *,
        sampling: FrameSampling | None = None,
        timing: FrameTiming | None = None,
        decoder: str | None = None,
        format: str = "JPEG",
        quality: int = 95,
    ) -> None:
        """``decoder`` is that of ``config`` if not given; ``timing`` is for frames sampled by the client.

        Raises InvalidRequestError for a ``format`` (of encoded frames) other than JPEG, PNG and WEBP.
        """
        super().__init__(config)
        self._sampling, self._timing = sampling or FrameSampling(), timing or FrameTiming()
        self._decoder = decoder or self.config.video_decoder
        self._format, self._quality = _checked_format(format), quality

    def load(self, address: str | os.PathLike[str]) -> VideoFrames:
        if isinstance(address, str) and is_frames_url(address):
            pictures = self._fetch(lambda fetcher: fetcher.fetch_frames_sync(address))
            max_pixels, max_frames = self.config.max_image_pixels, self.config.max_video_frames
            return self._read(open_frames(pictures, self._timing, max_pixels=max_pixels, max_frames=max_frames))
        return super().load(address)

    def encode_base64(self, media: Any) -> str:
        """Comma-joined base64 of a picture for each frame, for ``data:video/jpeg``.

        ``media`` is an address, bytes, or frames already chosen: :class:`VideoFrames`, an array (num_frames, height, width,
        3) or a list of pictures, of which all are taken.
        """
        frames: Iterable[Any]
        if isinstance(media, bytes):
            frames = self.load_bytes(media).frames
        elif isinstance(media, str | os.PathLike):
            frames = self.load(media).frames
        else:
            frames = media.frames if isinstance(media, VideoFrames) else media
        encoded = [_encode_picture(image_from_data(frame, _UNBOUNDED), self._format, self._quality) for frame in frames]
        if not encoded:
            raise MediaDecodeError("there are no frames to encode")
        return ",".join(encoded)

    def _decode(self, source: MediaSource) -> VideoFrames:
        return self._read(open_video(source, max_pixels=self.config.max_image_pixels, decoder=self._decoder))

    def _read(self, reader: VideoReader) -> VideoFrames:
        with contextlib.closing(reader):
            indices = sample_frame_indices(reader.metadata, self._sampling, max_frames=self.config.max_video_frames)
            frames, delivered = read_frames(reader, indices, self.config.num_decode_threads or os.cpu_count() or 1)
        return VideoFrames(frames, delivered, reader.metadata)


class TimeSeriesIO(_Loading[np.ndarray]):
    """Samples, float32 (num_samples, num_channels)."""

    def __init__(self, config: MediaConfig | None = None) -> None:
        super().__init__(config)
        self._max_values = self.config.max_time_series_values
        self._max_channels = self.config.max_time_series_channels

    def encode_base64(self, media: Any) -> str:
        """Base64 of a ``.npy`` file; ``media`` is an address, bytes, or an array (num_samples[, num_channels])."""
        if isinstance(media, bytes):
            media = self.load_bytes(media)
        elif isinstance(media, str | os.PathLike):
            media = self.load(media)
        else:
            media = time_series_from_data(media, max_values=self._max_values, max_channels=self._max_channels)
        file = io.BytesIO()
        np.save(file, media, allow_pickle=False)
        return base64.b64encode(file.getbuffer()).decode("ascii")

    def _decode(self, source: MediaSource) -> np.ndarray:
        return read_time_series(source, max_values=self._max_values, max_channels=self._max_channels)


def _checked_format(format: str) -> str:
    if format.upper() not in PICTURE_FORMATS:
        raise InvalidRequestError(
            f"format must be one of {', '.join(PICTURE_FORMATS)}, not {format!r:.40}", param="format"
        )
    return format.upper()


def _encode_picture(picture: Image.Image, format: str, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format, **({} if format == "PNG" else {"quality": quality}))
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def evenly_spread(given: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of ``given`` (-1: all), the first and the last among them."""
    count = len(given) if count < 0 else min(count, len(given))
    return [given[i] for i in np.linspace(0, len(given) - 1, count).astype(int)]
