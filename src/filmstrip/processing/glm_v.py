"""GLM-4.1V, GLM-4.5V and GLM-4.6V: which frames, what size, which words and positions; knows no weights.

Source: Transformers' ``Glm4vProcessor`` and ``Glm46VProcessor`` with their image and video processors; the tests hold this
file to them value by value. A clip of one frame is shown as two equal ones, which the reference refuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Piece
from filmstrip.processing.qwen3_vl import Qwen3VLProcessor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.processing.vision import resize_video
from filmstrip.types import FramePlan, ImageMetadata, PixelLimits

# Class defaults of the reference processors, for keys that a checkpoint's files leave out.
_IMAGE_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000},
}
_VIDEO_DEFAULTS = _IMAGE_DEFAULTS | {
    "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000},
    "fps": 2,
    "min_frames": 1,
    "max_frames": 2**31 - 1,
}
_LATER = "Glm46V"
_MAX_DURATION_SECONDS = 300
_MAX_DYNAMIC_SECONDS, _MAX_DYNAMIC_FRAMES = 2400, 640


class GlmVProcessor(Qwen3VLProcessor):
    """Behind each temporal group of a video stands its time in words.

    The processors of GLM-4.6V write tenths of a second and choose frames by a later rule. Checkpoints of any architecture
    name the processors that they were made for; those that name none get their architecture's.
    """

    image_defaults = _IMAGE_DEFAULTS
    video_defaults = _VIDEO_DEFAULTS
    control_tokens = (
        ("image_token_id", "<|image|>"),
        ("video_token_id", "<|video|>"),
        ("image_start_token_id", "<|begin_of_image|>"),
        ("image_end_token_id", "<|end_of_image|>"),
    )

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, files, config, media)
        self._nested = True  # the start and the end around a video are its own, in every form
        image_file = files.processor_section("image_processor", "preprocessor_config.json")
        video_file = files.processor_section("video_processor", "video_preprocessor_config.json") or image_file
        self._max_duration_seconds = video_file.get("max_duration", _MAX_DURATION_SECONDS)
        named = [file.get("processor_class") for file in (files.json("processor_config.json"), image_file)]
        name = next(filter(None, [*named, *(files.json("config.json").get("architectures") or ())]), "")
        self._writes_tenths = name.startswith(_LATER)
        self._is_later_rule = str(video_file.get("video_processor_type", name)).startswith(_LATER)

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """As a video of one temporal group: the checkpoint's limits count its frames, those of a request the image once."""
        group = self._image.layout.temporal_patch_size
        low, high = (None if limit is None else limit * group for limit in (pixels.min_pixels, pixels.max_pixels))
        height, width = resize_video(group, metadata.height, metadata.width, self._image, PixelLimits(low, high))
        return FramePlan((0,), height, width, self._image.layout)

    def _default_frames(self, count: int, fps: float, low: int, high: int) -> np.ndarray:
        if self._is_later_rule:
            frames = _later_rule(count, fps, self._video.layout.temporal_patch_size)
        else:
            frames = _rule(count, fps, self._video.fps, self._max_duration_seconds)
        if len(frames) % 2:
            frames = np.append(frames, frames[-1])
        if not low <= len(frames) <= high:
            number = min(max(len(frames), low), high, count)
            frames = np.linspace(0, count - 1, number).round().astype(int)
        return frames

    def _video_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        for time in media.timestamps[:: media.plan.layout.temporal_patch_size]:
            yield self._vision_start
            yield self._placeholder(item, media.plan, self._image_pad, self._video)
            yield self._vision_end
            yield f"{time:.1f} seconds" if self._writes_tenths else str(int(time))


def _rule(count: int, fps: float, rate: float, max_duration_seconds: float) -> np.ndarray:
    """The first frame at or behind each of even times, from a long clip as many as from the longest; int (n,)."""
    duration = count / fps
    if duration <= max_duration_seconds:
        places = [i * fps / rate for i in range(max(math.floor(duration * rate), 1))]
    else:
        number = int(max_duration_seconds * rate)
        if number >= count:
            return np.arange(count)
        places = [time * fps for time in np.linspace(0, duration, number)]
    return np.unique(np.minimum(np.ceil(places).astype(int), count - 1))


def _later_rule(count: int, fps: float, group: int) -> np.ndarray:
    """Temporal groups of ``group`` frames: three a second of a short clip, one of up to five minutes, else one in two."""
    duration = count / fps
    shown = min(duration, _MAX_DYNAMIC_SECONDS)
    rate = 3 if shown <= 30 else 1 if shown <= 300 else 0.5
    wanted = min(int(shown * rate * group), _MAX_DYNAMIC_FRAMES)
    if wanted == 0:
        return np.zeros(1, dtype=int)
    first, last = 0, count - 1
    if count >= wanted:
        frames = _frames_by_time(count, 1 / fps, 1 / (group * rate), int(duration))
        if len(frames) == wanted:
            return np.array(frames)
        if len(frames) < wanted:
            first, last = frames[0], frames[-1]
    return np.unique(np.linspace(first, last, wanted, dtype=int))


def _frames_by_time(count: int, seconds_per_frame: float, step_seconds: float, end_seconds: int) -> list[int]:
    """The first frame at or behind each step of time, until the steps reach the end."""
    frames, next_seconds = [], 0.0
    for index in range(count):
        if index * seconds_per_frame >= next_seconds:
            next_seconds += step_seconds
            frames.append(index)
            if next_seconds >= end_seconds:
                break
    return frames
