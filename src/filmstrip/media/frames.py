"""Frames sampled by the client (encoded pictures or an array) as if they were a video; knows no codec and no model.

The frames say nothing of when they were taken: that comes with the request (:class:`FrameTiming`) or is assumed.
"""

from __future__ import annotations

import contextlib
import itertools
import numbers
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from filmstrip.errors import InvalidRequestError, MediaDecodeError, MediaTooLargeError
from filmstrip.media.decoders.base import Consume
from filmstrip.media.image import open_image, probe_image
from filmstrip.media.source import MediaSource
from filmstrip.types import FrameTiming, MediaItem, Modality, VideoMetadata

ASSUMED_FPS = 2.0
_FPS_RANGE = (1e-6, 1e6)
_SECONDS_RANGE = (1e-6, 1e9)
_MAX_INDEX = 2**31 - 1

_FRAMES_URL = re.compile(r"data:\s*video/(jpeg|jpg|png|webp)\s*[;,]", re.IGNORECASE)

TIMING_FIELDS = ("frames_indices", "total_num_frames", "duration", "timestamps")
"""What can be said of the times of frames sampled by the client, beside fps."""


def is_frames_url(url: str) -> bool:
    """Whether ``url`` is a data URL of frames sampled by the client: ``data:video/jpeg;base64,a,b,c`` (or png, webp)."""
    return _FRAMES_URL.match(url) is not None


def is_presampled(item: MediaItem) -> bool:
    """Whether ``item`` is a video whose frames were chosen by the client: a list of pictures or an array."""
    return item.type is Modality.VIDEO and (item.url is None or is_frames_url(item.url))  # no url: frame_urls or data


def parse_frame_timing(values: Mapping[str, Any], param: str, *, fps: float | None = None) -> FrameTiming:
    """Timing as users write it: ``TIMING_FIELDS`` of ``values``; its other keys are left alone, None means not said.

    ``fps`` goes into the result unchecked: as a wish for sampling it may be any number. Raises InvalidRequestError with
    ``param`` extended by the key for a value of the wrong type or out of range. What depends on the number of frames is
    checked by :func:`frame_times`.
    """
    given: dict[str, Any] = {name: values[name] for name in TIMING_FIELDS if values.get(name) is not None}
    for name in ("frames_indices", "timestamps"):
        if name in given:
            if not isinstance(given[name], Sequence) or isinstance(given[name], str | bytes):
                raise InvalidRequestError(f"{param}.{name} must be a list of numbers", param=f"{param}.{name}")
            given[name] = tuple(given[name])
    try:
        _check_values(FrameTiming(**given))
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{param}.{error.message}", param=f"{param}.{error.param}") from None
    return FrameTiming(fps=fps, **given)


class FrameListReader:
    """Frames in the order they were given, behind the face of a video reader (:class:`~.decoders.base.VideoReader`).

    ``metadata.total_num_frames`` is the number of frames given and indices count these; ``metadata.timestamps`` are their
    times in the clip they were taken from. Safe to read from several threads.
    """

    def __init__(self, frames: Sequence[MediaSource] | np.ndarray, metadata: VideoMetadata, max_pixels: int) -> None:
        self.metadata = metadata
        self._frames = frames
        self._max_pixels = max_pixels

    def frame(self, index: int) -> np.ndarray:
        """Frame ``index`` as uint8 RGB (height, width, 3), decoded anew; raises MediaDecodeError."""
        frame = self._frames[index]
        if isinstance(frame, np.ndarray):
            return frame
        with _numbered(index):
            pixels = np.array(open_image(frame, self._max_pixels))  # a copy, because PyTorch wants it writable
        self._check_shape(index, pixels.shape[:2])
        return pixels

    def read(
        self,
        frame_indices: Sequence[int],
        consume: Consume,
        num_threads: int,
        cancel: threading.Event | None = None,
    ) -> tuple[int, ...]:
        """Decode frames and hand them over as a video's reader does; all are delivered, or MediaDecodeError is raised."""
        positions: dict[int, list[int]] = {}
        for position, index in enumerate(frame_indices):
            positions.setdefault(index, []).append(position)

        def deliver(index: int) -> None:
            if cancel is not None and cancel.is_set():
                raise InterruptedError("reading was cancelled")
            pixels = self.frame(index)
            for position in positions[index]:
                consume(position, pixels)

        with ThreadPoolExecutor(num_threads, thread_name_prefix="filmstrip-frames") as threads:
            for _ in threads.map(deliver, positions):  # an error here cancels what has not begun
                pass
        return tuple(frame_indices)

    def close(self) -> None:
        """Drop the frames; may be called twice."""
        self._frames = ()

    def _check_shape(self, index: int, shape: Sequence[int]) -> None:
        if tuple(shape) != (self.metadata.height, self.metadata.width):
            raise _sizes_differ(index, shape[1], shape[0], self.metadata.width, self.metadata.height)


def open_frames(
    frames: Sequence[MediaSource],
    timing: FrameTiming,
    *,
    max_pixels: int,
    max_frames: int,
    param: str | None = None,
    cancel: threading.Event | None = None,
) -> FrameListReader:
    """Look at the headers of encoded frames and work out their times; nothing is decoded.

    Raises MediaTooLargeError for more than ``max_frames`` or ``max_pixels`` in one, MediaDecodeError if one is no image or
    their sizes differ, InvalidRequestError naming ``param`` for timing that cannot be, InterruptedError once ``cancel`` is
    set.
    """
    _check_count(len(frames), max_frames)
    times = frame_times(len(frames), timing, param)
    height = width = 0
    for index, frame in enumerate(frames):
        if cancel is not None and cancel.is_set():
            raise InterruptedError("opening the frames was cancelled")
        with _numbered(index):
            header = probe_image(frame, max_pixels)
        if index == 0:
            height, width = header.height, header.width
        elif (header.height, header.width) != (height, width):
            raise _sizes_differ(index, header.width, header.height, width, height)
    return FrameListReader(frames, _metadata(times, height, width), max_pixels)


def open_frame_array(
    frames: Any, timing: FrameTiming, *, max_pixels: int, max_frames: int, param: str | None = None
) -> FrameListReader:
    """Frames as a uint8 array (num_frames, height, width, 3), under the same rules as :func:`open_frames`."""
    check_frame_array(frames)
    num_frames, height, width, _ = frames.shape
    _check_count(num_frames, max_frames)
    if height * width > max_pixels:
        raise MediaTooLargeError(
            f"the frames have {width}x{height} = {width * height} pixels; the limit is {max_pixels}"
            " (max_image_pixels, --max-image-pixels)"
        )
    return FrameListReader(frames, _metadata(frame_times(num_frames, timing, param), height, width), max_pixels)


def check_frame_array(frames: Any) -> None:
    """Raise MediaDecodeError unless ``frames`` is a non-empty uint8 array (num_frames, height, width, 3)."""
    if not isinstance(frames, np.ndarray):
        raise MediaDecodeError(f"a video object must be a numpy array of frames, not {type(frames).__name__}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise MediaDecodeError(
            "a video array must be uint8 of shape (num_frames, height, width, 3),"
            f" not {frames.dtype} of shape {frames.shape}"
        )


@dataclass(frozen=True)
class FrameTimes:
    """When frames were taken: ``timestamps`` in seconds, float64 (num_frames,); their mean rate; the clip's length."""

    timestamps: np.ndarray
    fps: float
    duration: float
    assumed: bool


def frame_times(num_frames: int, timing: FrameTiming, param: str | None = None) -> FrameTimes:
    """Times of ``num_frames`` frames.

    ``timestamps`` are taken as they are. With ``frames_indices`` frame i stands at ``frames_indices[i] / fps`` of the
    source, whose fps is given or ``total_num_frames / duration``. Without, the frames are all there is: i / fps, or evenly
    over ``duration``, or at an assumed 2 fps. Raises InvalidRequestError (``param``, else the field's name) for values that
    cannot be or contradict each other.
    """
    _check_values(timing, param)
    _check_against_frames(timing, num_frames, param)
    indices, total = timing.frames_indices, timing.total_num_frames
    source_fps = _source_fps(num_frames, timing)
    assumed = False
    if timing.timestamps is not None:
        timestamps = np.asarray(timing.timestamps, dtype=np.float64)
        fps = _mean_fps(timestamps) or timing.fps or ASSUMED_FPS
    elif indices is None:
        fps, assumed = source_fps or ASSUMED_FPS, source_fps is None
        timestamps = np.arange(num_frames, dtype=np.float64) / fps
    elif source_fps is None:
        raise _invalid(
            "frames_indices", param, "can be turned into times only with fps, or total_num_frames and duration"
        )
    else:
        timestamps = np.asarray(indices, dtype=np.float64) / source_fps
        fps = _mean_fps(timestamps) or source_fps
    if timing.duration is not None:
        duration = float(timing.duration)
    elif total is not None and source_fps is not None:
        duration = total / source_fps
    else:
        duration = float(timestamps[-1]) + 1 / fps
    return FrameTimes(timestamps, float(fps), duration, assumed)


def _mean_fps(timestamps: np.ndarray) -> float | None:
    """Frames per second between the first and the last, if time passes between them."""
    span = float(timestamps[-1] - timestamps[0])
    return (len(timestamps) - 1) / span if span > 0 else None


def _source_fps(num_frames: int, timing: FrameTiming) -> float | None:
    """Frames per second of the clip the frames were taken from, if it follows from what is given."""
    if timing.fps is not None:
        return float(timing.fps)
    if timing.duration is None:
        return None
    if timing.frames_indices is None:
        return num_frames / float(timing.duration)
    return None if timing.total_num_frames is None else timing.total_num_frames / float(timing.duration)


def _check_values(timing: FrameTiming, param: str | None = None) -> None:
    """Raise for what cannot be, whatever the frames are."""
    for name, value, (low, high) in (("fps", timing.fps, _FPS_RANGE), ("duration", timing.duration, _SECONDS_RANGE)):
        if value is not None and not _is_number(value, low, high):
            raise _invalid(name, param, f"must be a number from {low:g} to {high:g}, not {value!r:.80}")
    total = timing.total_num_frames
    if total is not None and not _is_integer(total, 1):
        raise _invalid("total_num_frames", param, f"must be an integer from 1 to {_MAX_INDEX}, not {total!r:.80}")
    if timing.frames_indices is not None:
        _check_ascending("frames_indices", timing.frames_indices, param)
    if timing.timestamps is not None:
        _check_ascending("timestamps", timing.timestamps, param)
        if timing.frames_indices is not None or total is not None:
            raise _invalid("timestamps", param, "and frames_indices or total_num_frames both say when the frames are")


def _check_ascending(name: str, values: Sequence[Any], param: str | None) -> None:
    if name == "timestamps":
        what, is_right = f"numbers of seconds from 0 to {_SECONDS_RANGE[1]:g}", _is_seconds
    else:
        what, is_right = f"integers from 0 to {_MAX_INDEX}", _is_index
    wrong = [value for value in values if not is_right(value)]
    if wrong:
        raise _invalid(name, param, f"must be {what}, not {wrong[0]!r:.80}")
    if any(later < earlier for earlier, later in itertools.pairwise(values)):
        raise _invalid(name, param, "must not decrease")


def _check_against_frames(timing: FrameTiming, num_frames: int, param: str | None) -> None:
    indices, total = timing.frames_indices, timing.total_num_frames
    for name, values in (("frames_indices", indices), ("timestamps", timing.timestamps)):
        if values is not None and len(values) != num_frames:
            raise _invalid(name, param, f"has {len(values)} entries, but {num_frames} frames were sent")
    if total is None:
        return
    if total < num_frames:
        raise _invalid("total_num_frames", param, f"is {total}, but {num_frames} frames were sent")
    if indices is None and total > num_frames:
        raise _invalid(
            "frames_indices", param, f"is needed: total_num_frames is {total} and only {num_frames} frames were sent"
        )
    if indices is not None and indices[-1] >= total:
        raise _invalid("frames_indices", param, f"ends with {indices[-1]}, but total_num_frames is {total}")


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]


def _is_seconds(value: object) -> bool:
    return _is_number(value, 0, _SECONDS_RANGE[1])


def _is_index(value: object) -> bool:
    return _is_integer(value, 0)


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= _MAX_INDEX


def _invalid(field: str, param: str | None, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {what}", param=param or field)


def _check_count(num_frames: int, max_frames: int) -> None:
    if num_frames > max_frames:
        raise MediaTooLargeError(
            f"the video has {num_frames} frames; the limit is {max_frames} (max_video_frames, --max-video-frames)"
        )
    if num_frames == 0:
        raise MediaDecodeError("the video has no frames")


def _metadata(times: FrameTimes, height: int, width: int) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=len(times.timestamps),
        fps=times.fps,
        duration=times.duration,
        height=height,
        width=width,
        timestamps=times.timestamps,
        video_backend="frames",
        timing_assumed=times.assumed,
    )


def _sizes_differ(index: int, width: int, height: int, first_width: int, first_height: int) -> MediaDecodeError:
    return MediaDecodeError(
        f"the frames differ in size: frame {index} is {width}x{height}, frame 0 {first_width}x{first_height}"
    )


@contextlib.contextmanager
def _numbered(index: int) -> Iterator[None]:
    """Errors raised inside say which frame they are about."""
    try:
        yield
    except (MediaDecodeError, MediaTooLargeError) as error:
        raise type(error)(f"frame {index}: {error.message}") from error
