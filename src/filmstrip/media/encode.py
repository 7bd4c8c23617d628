"""For scripts: load a picture or a clip, and make the base64 that ``data:`` URLs take; knows no model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from filmstrip.config import MediaConfig
from filmstrip.errors import InvalidRequestError, MediaDecodeError
from filmstrip.media.decoders.base import VideoReader
from filmstrip.media.fetch import Fetcher, is_frames_url
from filmstrip.media.frames import open_frames
from filmstrip.media.image import image_from_data, open_image
from filmstrip.media.sampling import parse_frame_sampling, sample_frame_indices
from filmstrip.media.source import BytesSource, MediaSource
from filmstrip.media.video import open_video, read_frames
from filmstrip.types import FrameTiming

DEFAULT_NUM_FRAMES = 32
_FORMATS = ("JPEG", "PNG", "WEBP")

T = TypeVar("T")


def load_image(image: str | bytes | os.PathLike[str], config: MediaConfig | None = None) -> Image.Image:
    """A picture from an address, a path, a ``data:`` URL or encoded bytes, as RGB, upright.

    Raises the MediaError family.
    """
    config = config or MediaConfig()
    return open_image(_source(image, config), config.max_image_pixels)


def load_video(
    video: str | bytes | os.PathLike[str],
    num_frames: int = DEFAULT_NUM_FRAMES,
    fps: float = -1,
    *,
    config: MediaConfig | None = None,
    **sampling: Any,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames of a clip and what they are.

    The count is the lower of ``num_frames`` and ``floor(duration * fps)``, -1 meaning no limit; ``sampling`` may add
    ``start`` and ``end`` seconds, ``min_frames`` and ``max_frames``. Returns uint8 (num_frames, height, width, 3) and a
    dict: total_num_frames, fps, duration (seconds), video_backend, frames_indices, timestamps (seconds, one per frame),
    height, width. Raises the MediaError family, and InvalidRequestError for a wrong setting.
    """
    config = config or MediaConfig()
    wanted = parse_frame_sampling({"num_frames": num_frames, "fps": fps, **sampling}, "load_video")
    with contextlib.closing(_open_reader(video, config)) as reader:
        metadata = reader.metadata
        indices = sample_frame_indices(metadata, wanted, max_frames=config.max_video_frames)
        frames, delivered = read_frames(reader, indices, config.num_decode_threads or os.cpu_count() or 1)
    return frames, {
        "total_num_frames": metadata.total_num_frames,
        "fps": metadata.fps,
        "duration": metadata.duration,
        "video_backend": metadata.video_backend,
        "frames_indices": list(delivered),
        "timestamps": metadata.timestamps[list(delivered)].tolist(),
        "height": metadata.height,
        "width": metadata.width,
    }


def encode_image_base64(image: Any, format: str = "PNG", *, quality: int = 95) -> str:
    """Base64 of a picture (address, path, bytes, PIL image or uint8 array); ``"data:image/png;base64," + it`` loads back.

    ``format`` is JPEG, PNG or WEBP, ``quality`` that of the two that lose some. Raises InvalidRequestError for another, and
    the MediaError family.
    """
    _check_format(format)
    picture = load_image(image) if isinstance(image, str | bytes | os.PathLike) else image_from_data(image, 2**63)
    return _encode(picture, format, quality)


def encode_video_base64(
    video: Any, num_frames: int = DEFAULT_NUM_FRAMES, format: str = "JPEG", *, quality: int = 95, **sampling: Any
) -> str:
    """Comma-joined base64 pictures of a clip's frames, each in ``format``.

    ``video`` is what :func:`load_video` takes, or frames already chosen: an array (num_frames, height, width, 3) or a list
    of pictures, of which at most ``num_frames``, evenly spread, are taken (-1: all). ``"data:video/jpeg;base64," + it``
    loads back as a video; send ``frames_indices`` and the rate with it, or 2 fps is assumed. ``sampling`` is that of
    :func:`load_video` and takes a clip. Raises InvalidRequestError for a wrong setting, and the MediaError family.
    """
    _check_format(format)
    if isinstance(video, str | bytes | os.PathLike):
        frames: Iterable[Any] = load_video(video, num_frames, **sampling)[0]
    else:
        if sampling:
            raise InvalidRequestError(
                f"{', '.join(sampling)} cannot choose among frames that were given; only num_frames can",
                param=next(iter(sampling)),
            )
        parse_frame_sampling({"num_frames": num_frames}, "encode_video_base64")
        given = list(video)
        if not given:
            raise MediaDecodeError("there are no frames to encode")
        count = len(given) if num_frames < 0 else min(num_frames, len(given))
        frames = [given[i] for i in np.linspace(0, len(given) - 1, count).astype(int)]
    return ",".join(_encode(image_from_data(frame, 2**63), format, quality) for frame in frames)


def _check_format(format: str) -> None:
    if format.upper() not in _FORMATS:
        raise InvalidRequestError(f"format must be one of {', '.join(_FORMATS)}, not {format!r:.40}", param="format")


def _encode(picture: Image.Image, format: str, quality: int) -> str:
    buffer = io.BytesIO()
    options = {"quality": quality} if format.upper() in {"JPEG", "WEBP"} else {}
    picture.save(buffer, format, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _open_reader(video: str | bytes | os.PathLike[str], config: MediaConfig) -> VideoReader:
    if isinstance(video, str) and is_frames_url(video):
        frames = _fetch(config, lambda fetcher: fetcher.fetch_frames_sync(video))
        return open_frames(
            frames, FrameTiming(), max_pixels=config.max_image_pixels, max_frames=config.max_video_frames
        )
    return open_video(_source(video, config), max_pixels=config.max_image_pixels)


def _source(media: str | bytes | os.PathLike[str], config: MediaConfig) -> MediaSource:
    if isinstance(media, bytes):
        return BytesSource(media)
    return _fetch(config, lambda fetcher: fetcher.fetch_sync(os.fspath(media)))


def _fetch(config: MediaConfig, fetch: Callable[[Fetcher], T]) -> T:
    """What ``fetch`` gets with a fetcher of its own, which is closed after."""
    fetcher = Fetcher(config)
    try:
        return fetch(fetcher)
    finally:
        with ThreadPoolExecutor(1) as thread:  # the caller may be inside an event loop (a notebook)
            thread.submit(lambda: asyncio.run(fetcher.close())).result()
