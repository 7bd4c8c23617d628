"""Qwen3-Omni's thinker: which frames, what size, which words and positions; knows no weights and hears nothing.

Source: Transformers' ``Qwen3OmniMoeProcessor``, ``Qwen2VLVideoProcessor`` and
``Qwen3OmniMoeThinkerForConditionalGeneration.get_rope_index``; the tests hold this file to them value by value. Where the
reference leaves a choice, this is what happens here:

- Frames are sampled as for Qwen2-VL. A frame's size in pixels is bounded by the family's own limits: the reference's
  processor puts them over those that a checkpoint's files name for videos.
- Time between frames: frames asked for by a rate, the checkpoint's or the request's, are that far apart for the model, as
  in the reference, even where limits (``min_frames``, ``max_frames``, whole temporal groups) led to another number of
  them. Frames asked for by their number, or picked by the client, are as far apart as they are: the length of the part that
  is shown over their number. The reference, which then must be told a rate (``fps``), takes 1 a second if it is not.
- A video's sound is not looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import InvalidRequestError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.qwen2_vl import MAX_PLACE, Qwen2VLProcessor
from filmstrip.processing.tokenizer import Tokenizer

_MIN_FRAME_PIXELS, _MAX_FRAME_PIXELS = 128 * 32 * 32, 768 * 32 * 32
"""``Qwen3OmniMoeProcessor.videos_kwargs``."""
_PLACES_PER_SECOND = 25
"""Default of ``position_id_per_seconds`` in ``Qwen3OmniMoeThinkerConfig``."""


class Qwen3OmniProcessor(Qwen2VLProcessor):
    """A video is one run of tokens, whose temporal groups stand apart by the time between them.

    A second is so many places; a group may stand between two of them. Text behind a picture or a video goes on behind
    whatever of it reaches furthest, time included.
    """

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, files, config, media)
        self._beyond_time = True
        self._video = dataclasses.replace(self._video, min_pixels=_MIN_FRAME_PIXELS, max_pixels=_MAX_FRAME_PIXELS)
        self._places_per_second = files.model_config().get("position_id_per_seconds", _PLACES_PER_SECOND)

    def _group_times(self, media: PlannedMedia) -> Sequence[float]:
        """In float32 and in the reference's order, whole or not."""
        num_groups = media.plan.grid_thw[0]
        seconds_per_group = np.float32(media.plan.layout.temporal_patch_size * self._seconds_per_frame(media))
        places = np.arange(num_groups, dtype=np.float32) * seconds_per_group * np.float32(self._places_per_second)
        if places[-1] > MAX_PLACE:
            raise InvalidRequestError(
                f"the video's frames are {self._seconds_per_frame(media):g} seconds apart, and this model counts time up "
                f"to {MAX_PLACE / self._places_per_second:g} seconds; say shorter times (timestamps, fps)",
                param="messages",
            )
        return places.tolist()

    def _seconds_per_frame(self, media: PlannedMedia) -> float:
        sampling = media.sampling
        if sampling is None or sampling.num_frames is not None:
            return media.seconds_per_frame
        if sampling.fps is not None:
            return 1 / sampling.fps if sampling.fps > 0 else media.seconds_per_frame
        return media.seconds_per_frame if self._video.num_frames else 1 / self._video.fps
