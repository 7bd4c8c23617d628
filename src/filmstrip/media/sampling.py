"""Which frames of a video are looked at: pure arithmetic on what was asked and what the file says; opens nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from filmstrip.errors import InvalidRequestError
from filmstrip.types import FrameSampling, VideoMetadata

_FIELDS = {
    "num_frames": "num_frames",
    "fps": "fps",
    "min_frames": "min_frames",
    "max_frames": "max_frames",
    "start": "start_seconds",
    "end": "end_seconds",
}
_UNLIMITED = -1
_MAX_COUNT = 2**31 - 1
_MAX_SECONDS = 1e9


def parse_frame_sampling(values: Mapping[str, Any], param: str) -> FrameSampling:
    """Sampling as users write it: num_frames, fps, min_frames, max_frames, start, end (seconds); None means not said.

    Raises InvalidRequestError with ``param`` extended by the key for an unknown key, a value of the wrong type or out of
    range, and for a ``start`` that is not before ``end``. -1 in num_frames or fps means no limit.
    """
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _FIELDS:
            raise InvalidRequestError(
                f"{param} has no setting {name!r:.80}; it takes {', '.join(_FIELDS)}", param=f"{param}.{name}"
            )
        if value is not None:
            fields[_FIELDS[name]] = _check_value(name, value, f"{param}.{name}")
    sampling = FrameSampling(**fields)
    _check_order(sampling, param)
    return sampling


def is_explicit(sampling: FrameSampling) -> bool:
    """Whether a number or a rate of frames was asked for; else the model's own rule applies."""
    return sampling.num_frames is not None or sampling.fps is not None


def candidate_range(metadata: VideoMetadata, sampling: FrameSampling) -> tuple[int, int]:
    """First and last frame index between ``start_seconds`` and ``end_seconds``, both included.

    Raises InvalidRequestError, naming the clip's length, if there is no frame between them.
    """
    start = 0.0 if sampling.start_seconds is None else sampling.start_seconds
    end = math.inf if sampling.end_seconds is None else sampling.end_seconds
    # A time typed by a person should hit the frame it names in spite of binary fractions.
    first = int(np.searchsorted(metadata.timestamps, start - 1e-6))
    last = int(np.searchsorted(metadata.timestamps, end + 1e-6, side="right")) - 1
    if first > last:
        part = f"from start {start:g} s on" if end == math.inf else f"between start {start:g} s and end {end:g} s"
        raise InvalidRequestError(
            f"no frame lies {part}; the clip is {metadata.duration:.3f} s long and its "
            f"last frame stands at {metadata.timestamps[-1]:.3f} s",
            param="start" if first >= metadata.total_num_frames else "end",
        )
    return first, last


def sample_frame_indices(
    metadata: VideoMetadata, sampling: FrameSampling, *, max_frames: int | None = None
) -> tuple[int, ...]:
    """Frames for an explicit ``num_frames`` and/or ``fps``: the lower count of the two, evenly over the candidates.

    The count is ``min(num_frames, floor(duration * fps))`` (-1: no limit), then at least ``min_frames`` and 1, at most
    ``max_frames`` of the request, ``max_frames`` of the server and the clip. Indices are
    ``numpy.linspace(first, last, count)`` truncated to integers.
    """
    first, last = candidate_range(metadata, sampling)
    num_candidates = last - first + 1
    duration = _shown_seconds(metadata, first, last)
    counts = [num_candidates]
    if sampling.num_frames is not None and sampling.num_frames != _UNLIMITED:
        counts.append(sampling.num_frames)
    if sampling.fps is not None and sampling.fps != _UNLIMITED:
        counts.append(_floor(duration * sampling.fps))
    count = max(min(counts), sampling.min_frames or 1, 1)
    upper = [num_candidates, *(limit for limit in (sampling.max_frames, max_frames) if limit is not None)]
    count = min(count, *upper)
    return tuple(np.linspace(first, last, count).astype(int).tolist())


def given_frame_indices(metadata: VideoMetadata, sampling: FrameSampling, *, max_frames: int) -> tuple[int, ...]:
    """Of frames that the client chose all candidates, or if fewer are asked for or allowed so many, evenly over them.

    ``fps`` of such frames says when they were taken; it and ``min_frames`` ask for nothing.
    """
    first, last = candidate_range(metadata, sampling)
    num_candidates = last - first + 1
    limits = (max_frames, sampling.max_frames, None if sampling.num_frames == _UNLIMITED else sampling.num_frames)
    count = min(num_candidates, *(limit for limit in limits if limit is not None))
    return tuple(np.linspace(first, last, count).round().astype(int).tolist())


def shown_seconds(metadata: VideoMetadata, sampling: FrameSampling) -> float:
    """Length in seconds of the part between ``start_seconds`` and ``end_seconds``; raises as :func:`candidate_range`."""
    return _shown_seconds(metadata, *candidate_range(metadata, sampling))


def _shown_seconds(metadata: VideoMetadata, first: int, last: int) -> float:
    """How long frames ``first`` to ``last`` are shown; at a variable rate that does not follow from their number."""
    if last - first + 1 == metadata.total_num_frames:
        return metadata.duration
    has_next = last + 1 < metadata.total_num_frames
    end = metadata.timestamps[last + 1] if has_next else max(metadata.duration, metadata.timestamps[last])
    return float(end - metadata.timestamps[first])


def _floor(value: float) -> int:
    """``floor`` that takes 29.999999999 (a duration times a rate, both rounded) for 30."""
    return math.floor(value + 1e-6)


def _check_value(name: str, value: object, param: str) -> float | int:
    is_count = name in {"num_frames", "min_frames", "max_frames"}
    if isinstance(value, bool) or not isinstance(value, int if is_count else (int, float)):
        what = "an integer" if is_count else "a number"
        raise InvalidRequestError(f"{param} must be {what}, not {value!r:.80}", param=param)
    if value == _UNLIMITED and name in {"num_frames", "fps"}:
        return value
    low, high = (1, _MAX_COUNT) if is_count else (0.0, _MAX_SECONDS)
    is_time = name in {"start", "end"}
    # A negated comparison, because NaN fails every comparison.
    if not (low <= value <= high and (is_count or is_time or value > 0)):
        allowed = ">= 0" if is_time else ("> 0, or -1 for no limit" if name == "fps" else ">= 1")
        if name == "num_frames":
            allowed += ", or -1 for no limit"
        raise InvalidRequestError(f"{param} must be {allowed} and at most {high:g}, not {value!r:.80}", param=param)
    return value


def _check_order(sampling: FrameSampling, param: str) -> None:
    named = dataclasses.asdict(sampling)
    for low, high, key in (("start_seconds", "end_seconds", "start"), ("min_frames", "max_frames", "min_frames")):
        if named[low] is not None and named[high] is not None and named[low] > named[high]:
            raise InvalidRequestError(f"{param}.{key} {named[low]} is above {named[high]}", param=f"{param}.{key}")
