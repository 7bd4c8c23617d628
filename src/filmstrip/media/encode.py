"""For scripts: load a picture, a clip or a time series, and make the base64 that ``data:`` URLs take; knows no model."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from filmstrip.config import MediaConfig
from filmstrip.errors import InvalidRequestError, MediaDecodeError
from filmstrip.media.frames import TIMING_FIELDS, parse_frame_timing
from filmstrip.media.modalities import ImageIO, MediaIO, T_co, TimeSeriesIO, VideoFrames, VideoIO, evenly_spread
from filmstrip.media.sampling import parse_frame_sampling

DEFAULT_NUM_FRAMES = 32

_Input = str | bytes | os.PathLike[str]


def load_image(image: _Input, config: MediaConfig | None = None) -> Image.Image:
    """A picture from an address, a path, a ``data:`` URL or encoded bytes, as RGB, upright.

    Raises the MediaError family.
    """
    return _load(ImageIO(config), image)


def load_video(
    video: _Input,
    num_frames: int = DEFAULT_NUM_FRAMES,
    fps: float = -1,
    *,
    config: MediaConfig | None = None,
    video_decoder: str | None = None,
    **sampling: Any,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames of a clip and what they are.

    The count is the lower of ``num_frames`` and ``floor(duration * fps)``, -1 meaning no limit; ``sampling`` may add
    ``start`` and ``end`` seconds, ``min_frames`` and ``max_frames``, and for frames sampled by the client
    (``data:video/jpeg``) ``timestamps``, or ``frames_indices`` with ``total_num_frames`` and ``duration``. Returns uint8
    (num_frames, height, width, 3) and a dict: total_num_frames, fps, duration (seconds), video_backend, frames_indices,
    timestamps (seconds, one per frame), height, width. Raises the MediaError family, and InvalidRequestError for a wrong
    setting or a ``video_decoder`` that is not installed.
    """
    loaded = _load_video(video, {"num_frames": num_frames, "fps": fps, **sampling}, config, video_decoder)
    metadata = loaded.metadata
    return loaded.frames, {
        "total_num_frames": metadata.total_num_frames,
        "fps": metadata.fps,
        "duration": metadata.duration,
        "video_backend": metadata.video_backend,
        "frames_indices": list(loaded.frame_indices),
        "timestamps": loaded.timestamps,
        "height": metadata.height,
        "width": metadata.width,
    }


def load_time_series(time_series: _Input, config: MediaConfig | None = None) -> np.ndarray:
    """A time series from an address, a path, a ``data:`` URL or bytes: .npy, .csv, .wav, .mp3, .flac or Ogg.

    Returns float32 (num_samples, num_channels); integers of a sound are scaled to [-1, 1). Raises the MediaError family.
    """
    return _load(TimeSeriesIO(config), time_series)


def encode_image_base64(image: Any, format: str = "PNG", *, quality: int = 95) -> str:
    """Base64 of a picture (address, path, bytes, PIL image or uint8 array); ``"data:image/png;base64," + it`` loads back.

    ``format`` is JPEG, PNG or WEBP, ``quality`` that of the two that lose some. Raises InvalidRequestError for another, and
    the MediaError family.
    """
    return ImageIO(format=format, quality=quality).encode_base64(image)


def encode_video_base64(
    video: Any, num_frames: int = DEFAULT_NUM_FRAMES, format: str = "JPEG", *, quality: int = 95, **sampling: Any
) -> str:
    """Comma-joined base64 pictures of a clip's frames, each in ``format``.

    ``video`` is what :func:`load_video` takes, or frames already chosen: an array (num_frames, height, width, 3) or a list
    of pictures, of which at most ``num_frames``, evenly spread, are taken (-1: all). ``"data:video/jpeg;base64," + it``
    loads back as a video; send ``timestamps`` with it, or ``frames_indices`` and the rate, or 2 fps is assumed.
    ``sampling`` is that of :func:`load_video` and takes a clip. Raises InvalidRequestError for a wrong setting, and the
    MediaError family.
    """
    frames = VideoIO(format=format, quality=quality)
    if isinstance(video, str | bytes | os.PathLike):
        return frames.encode_base64(_load_video(video, {"num_frames": num_frames, **sampling}, None, None))
    if sampling:
        raise InvalidRequestError(
            f"{', '.join(sampling)} cannot choose among frames that were given; only num_frames can",
            param=next(iter(sampling)),
        )
    parse_frame_sampling({"num_frames": num_frames}, "encode_video_base64")
    if isinstance(video, np.ndarray) and video.ndim != 4:
        raise MediaDecodeError(
            f"an array of frames must be of shape (num_frames, height, width, 3), not {video.shape}; "
            "encode_image_base64 takes one picture"
        )
    given = list(video)
    if not given:
        raise MediaDecodeError("there are no frames to encode")
    return frames.encode_base64(evenly_spread(given, num_frames))


def encode_time_series_base64(time_series: Any) -> str:
    """Base64 of a time series as a ``.npy`` file; ``"data:application/octet-stream;base64," + it`` loads back.

    ``time_series`` is an array (num_samples,) or (num_samples, num_channels), or what :func:`load_time_series` takes.
    Raises the MediaError family.
    """
    return TimeSeriesIO().encode_base64(time_series)


def _load(modality: MediaIO[T_co], media: _Input) -> T_co:
    return modality.load_bytes(media) if isinstance(media, bytes) else modality.load(media)


def _load_video(
    video: _Input, settings: dict[str, Any], config: MediaConfig | None, decoder: str | None
) -> VideoFrames:
    timing = {name: settings.pop(name) for name in TIMING_FIELDS if name in settings}
    sampling = parse_frame_sampling(settings, "load_video")
    fps = sampling.fps if sampling.fps is not None and sampling.fps > 0 else None
    modality = VideoIO(
        config, sampling=sampling, timing=parse_frame_timing(timing, "load_video", fps=fps), decoder=decoder
    )
    return _load(modality, video)
