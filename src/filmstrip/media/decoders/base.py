"""What a video decoder does: say what a file holds, hand over chosen frames one by one; and what it may open at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from filmstrip.types import VideoMetadata

CONTAINER_FORMATS = (
    "mov,matroska,mpegts,mpeg,mpegvideo,avi,flv,asf,ogg,ivf,mxf,nut,gif,m4v,h264,hevc,av1,obu,rm,wtv,dv,mjpeg"
)
"""Demuxers of FFmpeg (its option ``format_whitelist``) for containers that hold all they show.

Playlists, concatenation scripts and image sequences name other files, so their demuxers are not here.
"""

Consume = Callable[[int, np.ndarray], None]
"""Called with a position in the request and the frame, uint8 RGB (height, width, 3), rotation applied."""


@runtime_checkable
class VideoReader(Protocol):
    """An open video."""

    metadata: VideoMetadata

    def read(
        self,
        frame_indices: Sequence[int],
        consume: Consume,
        num_threads: int,
        cancel: threading.Event | None = None,
    ) -> tuple[int, ...]:
        """Decode frames (ascending indices, repeats allowed) and call ``consume`` for each, from several threads.

        Returns the indices really delivered: a frame that cannot be decoded is replaced by the last good one before it, or
        else by the next after it. Raises MediaDecodeError if none can be decoded, InterruptedError soon after ``cancel`` is
        set, and what ``consume`` raises.
        """
        ...

    def close(self) -> None:
        """Release the file; may be called twice."""
        ...
