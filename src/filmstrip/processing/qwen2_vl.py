"""Qwen2-VL and Qwen2.5-VL: which frames, what size, which words and positions; knows no weights.

Source: Transformers' ``Qwen2VLVideoProcessor``, ``Qwen2VLProcessor``, ``Qwen2_5_VLProcessor`` and the position functions of
both models; the tests hold this file to them value by value. Where the reference leaves a choice, or cannot go on, this is
what happens here:

- Frames are sampled, at the rate in the checkpoint's file or else 2 a second; ``do_sample_frames`` is not asked, whose
  default shows every frame. A clip of one frame is shown; the reference divides by zero.
- ``min_pixels`` and ``max_pixels`` of a request count all frames, as for every family; those in the checkpoint's files are
  of one frame, as in the reference.
- Text behind a video goes on where the installed Transformers puts it: behind the picture's height or width. With
  ``video_prompt_form`` "flat" it goes on behind the video's time where that reaches further, as it did in the families'
  first releases (Transformers 4).
- The time between frames (``second_per_grid_ts``) is the length of the part that is shown, however uneven its frame rate,
  over the number of frames; the reference takes the number of all frames over an average rate, which is the same for a
  whole clip. Frames picked by the client count by the mean rate of their own times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import InvalidRequestError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Assembled, Piece, Placeholder, mrope_positions
from filmstrip.processing.qwen3_vl import Qwen3VLProcessor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.processing.vision import resize_video_frame
from filmstrip.types import PixelLimits, VideoMetadata

# Class defaults of the reference, for keys that a checkpoint's files leave out.
_VIDEO_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "min_frames": 4,
    "max_frames": 768,
    "max_video_tokens": 128_000,
}
_TOKENS_PER_SECOND = 4
"""Default of ``tokens_per_second`` in ``Qwen2_5_VLVisionConfig``."""
MAX_PLACE = 2**24
"""Beyond, float32 does not tell one place from the next."""


class Qwen2VLProcessor(Qwen3VLProcessor):
    """Qwen2-VL: a video is one run of tokens, whose temporal groups stand one place apart on the temporal axis."""

    video_defaults = _VIDEO_DEFAULTS

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, files, config, media)
        self._beyond_time = not self._nested
        self._nested = True  # the start and the end around a video are its only ones, in every form

    def positions(self, assembled: Assembled) -> tuple[np.ndarray | None, float]:
        """Three-axis positions of the whole prompt."""
        return mrope_positions(len(assembled.token_ids), assembled.placed, beyond_time=self._beyond_time)

    def _default_frames(self, count: int, fps: float, low: int, high: int) -> np.ndarray:
        """Evenly spread, in whole temporal groups where there are so many frames (``sample_frames`` of the reference)."""
        group = self._video.layout.temporal_patch_size
        high = min(high, count)
        if self._video.num_frames:
            wanted = round(self._video.num_frames / group) * group
        else:
            wanted = max(count / fps * self._video.fps, low)
        num_frames = int(min(wanted, high) // group * group) or 1
        # PyTorch's arange, because its rounding decides at places that are a frame but for a binary fraction.
        return torch.arange(0, count, count / num_frames).int().numpy()[:num_frames]

    def _frame_size(self, num_frames: int, metadata: VideoMetadata, pixels: PixelLimits) -> tuple[int, int]:
        return resize_video_frame(num_frames, metadata.height, metadata.width, self._video, pixels)

    def _video_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """One block for each temporal group with nothing between them."""
        times = self._group_times(media)
        _, height, width = media.plan.grid_thw
        merge = media.plan.layout.merge_size
        for time in times:
            yield Placeholder(item, self._video_pad, height // merge, width // merge, time)

    def _group_times(self, media: PlannedMedia) -> Sequence[float]:
        """Places of a video's temporal groups on the temporal axis, counted from the first."""
        return range(media.plan.grid_thw[0])


class Qwen25VLProcessor(Qwen2VLProcessor):
    """Qwen2.5-VL: temporal groups stand apart by the time between them, so many places a second."""

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, files, config, media)
        vision = files.json("config.json").get("vision_config") or {}
        self._tokens_per_second = vision.get("tokens_per_second", _TOKENS_PER_SECOND)

    def _group_times(self, media: PlannedMedia) -> Sequence[int]:
        """In float32 and cut off, as ``Qwen2_5_VLModel.get_vision_position_ids`` computes them."""
        num_groups = media.plan.grid_thw[0]
        seconds_per_group = np.float32(media.plan.layout.temporal_patch_size * media.seconds_per_frame)
        places_per_group = np.float32(self._tokens_per_second) * seconds_per_group
        places = np.arange(num_groups, dtype=np.float32) * places_per_group
        if places[-1] > MAX_PLACE:
            raise InvalidRequestError(
                f"the video's frames are {media.seconds_per_frame:g} seconds apart, and this model counts time up to "
                f"{MAX_PLACE / self._tokens_per_second:g} seconds; say shorter times (timestamps, fps)",
                param="messages",
            )
        return places.astype(np.int64).tolist()
