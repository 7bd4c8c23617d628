"""Videos through a library other than PyAV: PyAV's index says which frames there are, the library delivers them, and what it
delivers is checked; knows no library.

Decoders disagree about files more often than one would think: they count frames that an edit list hides, lose the first
group of an MPEG-TS, or turn interlaced pictures black, and report success. So each frame must have the size and the time
that the index gives it, and, for a choice of frames, the picture that PyAV decodes. A library that fails any of it is
refused for the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from filmstrip.errors import FilmstripError, MediaDecodeError
from filmstrip.media.decoders.base import Consume
from filmstrip.media.decoders.pyav import PyAVReader
from filmstrip.media.source import MediaSource

logger = logging.getLogger(__name__)

_MAX_DIFFERENCE = 6.0
"""Mean absolute difference, in grey levels of 255, between the same frame of two decoders. Libraries that agree on frame and
colours differ by up to 1.7 over the conformance suite and by 3.7 over other clips (10-bit video, which one dithers and
another cuts). In the suite, pictures whose HDR colours one of them converts differ by 15, other frames by 16 and more."""
_MAX_NEIGHBOUR_ADVANTAGE = 0.5
"""Grey levels by which a neighbour may fit better than the frame itself: less than one means that they look the same."""
_MIN_CONTRAST = 32
"""A picture whose samples are all this close together shows nothing: it may be a fade, or a decoder that failed."""
_GRID = 128
"""Pictures are compared in so many rows and columns, evenly spread."""
_MAX_REFERENCES = 64

Check = Callable[[], None]
"""Raises InterruptedError once the read was cancelled."""


@dataclass(frozen=True)
class DecodedFrame:
    """What a library says of one frame: uint8 RGB (height, width, 3) as displayed, and its time from the first frame."""

    rgb: np.ndarray
    seconds: float


class CheckedReader(ABC):
    """Implements :class:`filmstrip.media.decoders.base.VideoReader` for a library; subclasses deliver frames.

    A frame that the library cannot decode is refused, not replaced.
    """

    name: ClassVar[str]
    """As in ``--video-decoder``."""
    label: ClassVar[str]
    """The library's name for people."""
    tells_times: ClassVar[bool] = True
    """Whether the times are those of the pictures it decoded; if not, each picture is compared."""

    def __init__(self, source: MediaSource, *, max_pixels: int | None = None) -> None:
        """Scan the index with PyAV; raises what :class:`PyAVReader` raises."""
        self.source = source
        self.truth = PyAVReader(source, max_pixels=max_pixels)
        self.metadata = dataclasses.replace(self.truth.metadata, video_backend=self.name)

    @abstractmethod
    def frames(
        self, frame_indices: Sequence[int], num_threads: int, references: References, check: Check
    ) -> Generator[DecodedFrame, None, None]:
        """The frames of these display indices (ascending, each once), one at a time.

        Calls ``check`` between frames that are decoded on the way. Frees everything when closed.
        """

    def read(
        self,
        frame_indices: Sequence[int],
        consume: Consume,
        num_threads: int,
        cancel: threading.Event | None = None,
    ) -> tuple[int, ...]:
        """See :meth:`filmstrip.media.decoders.base.VideoReader.read`; frames come in order, from the calling thread.

        Raises MediaDecodeError where the library fails on a frame, or delivers another than was asked for.
        """
        total = self.metadata.total_num_frames
        if any(not 0 <= index < total for index in frame_indices):
            raise IndexError(f"frame indices must be from 0 to {total - 1}")

        def check() -> None:
            if cancel is not None and cancel.is_set():
                raise InterruptedError("reading the video was cancelled")

        positions: dict[int, list[int]] = {}
        for position, index in enumerate(frame_indices):
            positions.setdefault(index, []).append(position)
        wanted = sorted(positions)
        references = References(self, wanted, num_threads, cancel)
        sees_something = False
        with contextlib.closing(self.frames(wanted, num_threads, references, check)) as frames:
            for index in wanted:
                check()
                frame = self._next(frames, index, check)
                self.check_form(index, frame)
                samples = sample(frame.rgb)
                is_flat = np.ptp(samples) < _MIN_CONTRAST
                if not self.tells_times or is_flat or not sees_something or index == wanted[-1]:
                    references.compare(index, samples)
                sees_something = sees_something or not is_flat
                for position in positions[index]:
                    consume(position, frame.rgb)
        return tuple(frame_indices)

    def close(self) -> None:
        """Nothing of the library stays open between calls."""
        self.truth.close()

    def refuse(self, problem: str) -> MediaDecodeError:
        """The error that says what the library cannot do with this file."""
        return MediaDecodeError(
            f"{self.label} {problem}; choose another decoder for this video, such as pyav (--video-decoder, "
            "media_io_kwargs.video.backend)"
        )

    def seconds_around(self, index: int) -> float:
        """How far a frame's time may be from the index's: half the way to its nearest neighbour in time."""
        times = self.metadata.timestamps[max(index - 1, 0) : index + 2]
        return float(np.diff(times).min()) / 2 if len(times) > 1 else self.metadata.duration / 2

    def check_form(self, index: int, frame: DecodedFrame) -> None:
        """Raise MediaDecodeError unless a frame has the size and time of the index."""
        height, width = frame.rgb.shape[:2]
        expected = self.metadata
        if (height, width) != (expected.height, expected.width):
            raise self.refuse(f"gives pictures of {width} x {height} instead of {expected.width} x {expected.height}")
        seconds = float(expected.timestamps[index])
        if not abs(frame.seconds - seconds) <= self.seconds_around(index):  # also where it is no number
            raise self.refuse(f"puts frame {index} at {frame.seconds:.3f} s instead of {seconds:.3f} s")

    @contextlib.contextmanager
    def failing_on(self, problem: str, check: Check) -> Generator[None, None, None]:
        """Whatever the library raises within becomes the error that names ``problem``."""
        try:
            yield
        except (FilmstripError, InterruptedError, MemoryError):
            raise
        except Exception as error:
            check()
            # What it says may name places of the machine it was built on, and ours.
            logger.debug("%s %s", self.label, problem, exc_info=True)
            raise self.refuse(problem) from error

    def _next(self, frames: Generator[DecodedFrame, None, None], index: int, check: Check) -> DecodedFrame:
        with self.failing_on(f"cannot decode frame {index}", check):
            return next(frames)


class References:
    """PyAV's pictures of frames and their neighbours, to compare those of a library with; a few at a time."""

    def __init__(
        self, reader: CheckedReader, wanted: Sequence[int], num_threads: int, cancel: threading.Event | None
    ) -> None:
        self._reader, self._wanted, self._num_threads, self._cancel = reader, wanted, num_threads, cancel
        self._samples: dict[int, np.ndarray] = {}
        self._num_ahead = 1

    def compare(self, index: int, samples: np.ndarray) -> None:
        """Raise MediaDecodeError unless ``samples`` are those of frame ``index``, and of no neighbour rather."""
        if index not in self._samples:
            self._load(index)
        if index not in self._samples:
            raise self._reader.refuse(f"cannot be trusted with frame {index}, which is damaged in the file")
        own = self._samples[index]
        if samples.shape != own.shape or _difference(samples, own) > _MAX_DIFFERENCE:
            raise self._reader.refuse(f"gives a wrong picture for frame {index}")
        misfit = _misfit(samples, own) - _MAX_NEIGHBOUR_ADVANTAGE
        for neighbour in (index - 1, index + 1):
            if neighbour in self._samples and _misfit(samples, self._samples[neighbour]) < misfit:
                raise self._reader.refuse(f"gives frame {neighbour} instead of frame {index}")

    def _load(self, index: int) -> None:
        """Decode a frame and its neighbours, and with each call more of those that follow, which are likely next."""
        following = [later for later in self._wanted if later > index][: self._num_ahead - 1]
        self._num_ahead = min(2 * self._num_ahead, _MAX_REFERENCES)
        total = self._reader.metadata.total_num_frames
        around = {near for each in (index, *following) for near in (each - 1, each, each + 1) if 0 <= near < total}
        indices = sorted(around)
        loaded: dict[int, np.ndarray] = {}

        def keep(position: int, rgb: np.ndarray) -> None:
            loaded[position] = sample(rgb)

        delivered = self._reader.truth.read(indices, keep, self._num_threads, self._cancel)
        self._samples = {
            wanted: loaded[position]
            for position, wanted in enumerate(indices)
            if delivered[position] == wanted  # others are damaged, and shown by another in their place
        }


def sample(rgb: np.ndarray) -> np.ndarray:
    """Pixels of an evenly spread grid, uint8 (rows, columns, 3)."""
    height, width = rgb.shape[:2]
    rows = np.linspace(0, height - 1, min(height, _GRID)).astype(np.intp)
    columns = np.linspace(0, width - 1, min(width, _GRID)).astype(np.intp)
    return rgb[rows][:, columns]


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.int16) - second).mean())


def _misfit(given: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square, in grey levels, of what of ``reference`` no brighter or more contrasty ``given`` explains.

    The residual of the least-squares line through the two: ``std(reference) * sqrt(1 - r**2)`` with their correlation r. A
    matrix or range taken for another changes it little, another moment of the scene a lot.
    """
    x, y = (samples.mean(axis=2, dtype=np.float32).ravel() for samples in (given, reference))
    x, y = x - x.mean(), y - y.mean()
    variance = float(x @ x)
    explained = float(x @ y) ** 2 / variance if variance else 0.0
    return float(np.sqrt(max(float(y @ y) - explained, 0.0) / y.size))


def as_array(pixels: Any) -> np.ndarray:
    """uint8 (height, width, 3), contiguous, from what a library calls an image."""
    array = np.ascontiguousarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise TypeError("the decoder gave no RGB picture")
    return array
