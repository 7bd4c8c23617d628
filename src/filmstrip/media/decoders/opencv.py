"""Videos through OpenCV's VideoCapture and its own FFmpeg, from a stream buffer; knows nothing of how frames are checked."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np

from filmstrip.media.decoders.base import CONTAINER_FORMATS
from filmstrip.media.decoders.checked import Check, CheckedReader, DecodedFrame, References, as_array, sample

_SEEK_SECONDS = 4.0
"""Frames this far ahead are sought, nearer ones are reached by decoding."""
_SEEK_MARGIN_SECONDS = 1.0
_ENVIRONMENT = {
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": f"format_whitelist;{CONTAINER_FORMATS}|protocol_whitelist;none",
    "OPENCV_FFMPEG_LOGLEVEL": "-8",
}
_OPENING = threading.Lock()
_LOGGING: Any = getattr(cv2.utils, "logging", cv2)
"""Up to OpenCV 4.12 the functions that set the level are at the top."""
_LOG_LEVEL_SILENT = 0
_SWSCALE_PROGRESSIVE_ONLY = 9
"""Major version of FFmpeg's libswscale in OpenCV from 4.13 on, which refuses to convert an interlaced picture to RGB. OpenCV
then reports success and gives what its buffer held before. Up to OpenCV 4.12 (6.7) it converts them."""


@functools.cache
def _converts_interlaced() -> bool:
    """Whether this build of OpenCV turns interlaced pictures into RGB; yes where it does not tell its versions."""
    version = re.search(r"swscale:\s+YES \((\d+)", cv2.getBuildInformation())
    return version is None or int(version[1]) < _SWSCALE_PROGRESSIVE_ONLY


class OpenCVReader(CheckedReader):
    """Frames in sequence, with seeks over long stretches; a frame is known by the time of its picture.

    Times count from the first picture that comes out, which is compared with PyAV's first frame. The number of frames is not
    compared: OpenCV computes it from duration and rate.
    """

    name: ClassVar[str] = "opencv"
    label: ClassVar[str] = "OpenCV"

    def frames(
        self, frame_indices: Sequence[int], num_threads: int, references: References, check: Check
    ) -> Generator[DecodedFrame, None, None]:
        """See :meth:`CheckedReader.frames`."""
        if self.truth.is_interlaced and not _converts_interlaced():
            raise self.refuse("cannot convert interlaced pictures")
        film = _Film(self, num_threads, references, check)
        try:
            for index in frame_indices:
                film.go_to(index)
                yield film.frame(index)
        finally:
            film.close()


class _Film:
    """An open VideoCapture and the time of the picture it is at."""

    def __init__(self, reader: OpenCVReader, num_threads: int, references: References, check: Check) -> None:
        self._reader, self._num_threads, self._references, self._check = reader, num_threads, references, check
        self._times = reader.metadata.timestamps
        self._zero_seconds = 0.0
        self._open()
        self.frame(0)

    def _open(self) -> None:
        self._last: np.ndarray | None = None
        self._file = self._reader.source.open()
        with _settings(), self._reader.failing_on("cannot open this video", self._check):
            self._capture = cv2.VideoCapture(
                self._file,  # type: ignore[call-overload]
                cv2.CAP_FFMPEG,
                [
                    *(cv2.CAP_PROP_N_THREADS, self._num_threads),
                    *(cv2.CAP_PROP_HW_ACCELERATION, cv2.VIDEO_ACCELERATION_NONE),
                ],
            )
        if not self._capture.isOpened():
            raise self._reader.refuse("cannot open this video")
        self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        if not self._capture.grab():
            raise self._reader.refuse("cannot decode this video")
        self._zero_seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000

    def _now(self) -> float:
        return self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 - self._zero_seconds

    def go_to(self, index: int) -> None:
        """Grab pictures until the one of frame ``index`` or one that is not earlier."""
        target, around = float(self._times[index]), self._reader.seconds_around(index)
        if target - self._now() > _SEEK_SECONDS:
            self._seek(target - _SEEK_MARGIN_SECONDS, before=target - around)
        while (now := self._now()) < target - around:
            self._check()
            if not self._capture.grab():
                raise self._reader.refuse(f"cannot decode frame {index}")
            if not self._now() > now:
                raise self._reader.refuse("does not tell the times of this video's frames")

    def _seek(self, seconds: float, *, before: float) -> None:
        """Go near a time, but to no picture past ``before``; where that fails, begin anew, to decode up to there.

        OpenCV seeks by frame number, computed from the average rate: in video of variable rate it lands anywhere.
        """
        self._capture.set(cv2.CAP_PROP_POS_MSEC, (self._zero_seconds + seconds) * 1000)
        if not self._capture.grab() or self._now() > before:
            self.close()
            self._open()

    def frame(self, index: int) -> DecodedFrame:
        """The picture it is at, BGR turned to RGB; it should be that of frame ``index``.

        Where OpenCV fails to convert a picture its buffer stays as it was, so one that may not be new is compared.
        """
        is_whole, bgr = self._capture.retrieve()
        if not is_whole:
            raise ValueError("the picture cannot be converted")
        rgb = as_array(bgr[..., ::-1])
        if self._last is None or np.array_equal(self._last, rgb):
            self._references.compare(index, sample(rgb))
        self._last = rgb
        return DecodedFrame(rgb, self._now())

    def close(self) -> None:
        """Free the decoder and the file."""
        self._capture.release()
        self._file.close()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """The demuxer list, no protocols and no printing: OpenCV takes them from the environment when it opens a video."""
    with _OPENING:
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        level = _LOGGING.getLogLevel()
        os.environ.update(_ENVIRONMENT)
        _LOGGING.setLogLevel(_LOG_LEVEL_SILENT)
        try:
            yield
        finally:
            _LOGGING.setLogLevel(level)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
