"""A video's bytes to patches or frames through the chosen decoder; knows no prompts.

Both ways share one decode path: frames come one by one from the decoder's threads and are written where they belong; no
list of frames ever exists.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from filmstrip.errors import MediaDecodeError
from filmstrip.media.decoders.base import VideoReader
from filmstrip.media.decoders.registry import open_reader
from filmstrip.media.patches import PatchWriter
from filmstrip.media.sniff import sniff
from filmstrip.media.source import MediaSource
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import FramePlan

__all__ = ["VideoReader", "open_video", "read_frames", "read_patches"]


def open_video(source: MediaSource, *, max_pixels: int | None = None, decoder: str = "pyav") -> VideoReader:
    """Scan a video's index; raises MediaDecodeError, or MediaTooLargeError for frames of more than ``max_pixels``.

    A GIF is a video, moving or not; any other picture is refused with the advice to send it as one. ``decoder`` is a name of
    :data:`~filmstrip.config.VIDEO_DECODERS`; raises InvalidRequestError if it is none or not installed.
    """
    kind = sniff(source)
    if kind.kind == "image" and kind.format != "GIF":
        raise MediaDecodeError(f"this is {kind}, not a video; send it as image_url")
    if kind.kind == "audio":
        raise MediaDecodeError(f"this is {kind}: it has no video")
    if kind.kind == "other":
        raise MediaDecodeError(f"this is {kind}, not a video")
    return open_reader(decoder, source, max_pixels=max_pixels)


def read_patches(
    reader: VideoReader, plan: FramePlan, num_threads: int, cancel: threading.Event | None = None
) -> tuple[SharedTensor, tuple[int, ...]]:
    """Decode what ``plan`` wants: uint8 patches of ``plan.patches_shape`` and the frame indices really delivered."""
    output = SharedTensor.create(plan.patches_shape)
    writer = PatchWriter(plan, output.torch())
    return output, reader.read(plan.frame_indices, writer.write, num_threads, cancel)


def read_frames(
    reader: VideoReader, frame_indices: Sequence[int], num_threads: int, cancel: threading.Event | None = None
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Frames at full size, uint8 (num_frames, height, width, 3), and the frame indices really delivered."""
    metadata = reader.metadata
    frames = np.empty((len(frame_indices), metadata.height, metadata.width, 3), np.uint8)

    def put(position: int, rgb: np.ndarray) -> None:
        frames[position] = rgb

    return frames, reader.read(frame_indices, put, num_threads, cancel)
