"""Qwen3-VL (dense and MoE): which frames, what size, which words and positions; knows no weights.

Source: Transformers' ``Qwen3VLProcessor``, ``Qwen3VLVideoProcessor``, ``Qwen2VLImageProcessor``; the tests hold this file to
them value by value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import InvalidRequestError, ModelLoadError
from filmstrip.media.sampling import candidate_range, given_frame_indices, is_explicit, sample_frame_indices
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Assembled, Piece, Placeholder, mrope_positions
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.processing.vision import VisionSettings, parse_vision_settings, resize_image, resize_video
from filmstrip.types import (
    FramePlan,
    FrameSampling,
    ImageMetadata,
    Modality,
    Normalization,
    PixelLimits,
    VideoMetadata,
)

# Class defaults of the reference processors, for keys that a checkpoint's files leave out.
_IMAGE_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}
_VIDEO_DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "fps": 2,
    "min_frames": 4,
    "max_frames": 768,
}


class Qwen3VLProcessor:
    """Implements :class:`filmstrip.processing.base.Processor`."""

    modalities = frozenset({Modality.IMAGE, Modality.VIDEO})
    image_defaults: Mapping[str, Any] = _IMAGE_DEFAULTS
    video_defaults: Mapping[str, Any] = _VIDEO_DEFAULTS
    """Settings of the family's image and video processor that a checkpoint's files leave out."""
    control_tokens: tuple[tuple[str, str], ...] = (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    )
    """An image's token, a video's, the start and the end of either: the field of config.json, and the token."""

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they or the control tokens do not fit."""
        model_config = files.model_config()
        image_file = files.processor_section("image_processor", "preprocessor_config.json")
        # As in Transformers: without a file of their own, videos are shown by the settings for images.
        video_file = files.processor_section("video_processor", "video_preprocessor_config.json") or image_file
        self._image = parse_vision_settings(image_file, self.image_defaults, "preprocessor_config.json")
        self._video = parse_vision_settings(video_file, self.video_defaults, "video_preprocessor_config.json")
        self._max_video_frames = media.max_video_frames
        self._image_pad, self._video_pad, self._vision_start, self._vision_end = (
            _token_id(tokenizer, model_config, key, token) for key, token in self.control_tokens
        )
        self._nested = _is_nested(config.video_prompt_form)

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """One frame at the size ``smart_resize`` gives."""
        height, width = resize_image(metadata.height, metadata.width, self._image, pixels)
        return FramePlan((0,), height, width, self._image.layout)

    def plan_video(
        self, metadata: VideoMetadata, sampling: FrameSampling, pixels: PixelLimits, *, presampled: bool
    ) -> FramePlan:
        """Frames by what was asked for, else by the checkpoint's own rule; a one-frame clip counts as two equal frames."""
        indices = self._frame_indices(metadata, sampling, presampled)
        num_frames = max(len(indices), self._video.layout.temporal_patch_size)
        height, width = self._frame_size(num_frames, metadata, pixels)
        return FramePlan(indices, height, width, self._video.layout)

    def normalization(self, modality: Modality) -> Normalization:
        """Mean and deviation of the modality's preprocessor."""
        return (self._image if modality is Modality.IMAGE else self._video).normalization

    def expand(self, pieces: Sequence[str | int], media: Sequence[PlannedMedia]) -> list[Piece]:
        """Replace each pad token of the template by its item's placeholders.

        An image becomes one block. A video becomes, per temporal group, its time, vision start, one block, vision end; the
        template's own start and end around it stay ("nested", as Transformers does since 5.10) or go ("flat", the original
        release).
        """
        images = iter([i for i, item in enumerate(media) if item.modality is Modality.IMAGE])
        videos = iter([i for i, item in enumerate(media) if item.modality is Modality.VIDEO])
        expanded: list[Piece] = []
        skip_end = False
        for piece in pieces:
            if piece == self._image_pad:
                item = _next_item(images, "image")
                expanded.append(self._placeholder(item, media[item].plan, self._image_pad, self._image))
            elif piece == self._video_pad:
                item = _next_item(videos, "video")
                if not self._nested and expanded and expanded[-1] == self._vision_start:
                    expanded.pop()
                    skip_end = True
                expanded.extend(self._video_pieces(item, media[item]))
            elif piece == self._vision_end and skip_end:
                skip_end = False
            else:
                expanded.append(piece)
        if next(images, None) is not None or next(videos, None) is not None:
            raise InvalidRequestError(
                "the chat template does not show all media of the messages; attach them to user messages",
                param="messages",
            )
        return expanded

    def positions(self, assembled: Assembled) -> tuple[np.ndarray | None, float]:
        """Three-axis positions of the whole prompt."""
        return mrope_positions(len(assembled.token_ids), assembled.placed)

    def _frame_indices(self, metadata: VideoMetadata, sampling: FrameSampling, presampled: bool) -> tuple[int, ...]:
        if presampled:
            return given_frame_indices(metadata, sampling, max_frames=self._max_video_frames)
        if is_explicit(sampling):
            return sample_frame_indices(metadata, sampling, max_frames=self._max_video_frames)
        first, last = candidate_range(metadata, sampling)
        low = self._video.min_frames if sampling.min_frames is None else sampling.min_frames
        high = self._video.max_frames if sampling.max_frames is None else sampling.max_frames
        if sampling.min_frames is None:
            low = min(low, high)
        chosen = self._default_frames(last - first + 1, metadata.fps, low, min(high, self._max_video_frames))
        return tuple((first + chosen).tolist())

    def _default_frames(self, count: int, fps: float, low: int, high: int) -> np.ndarray:
        """The checkpoint's own choice among ``count`` frames at ``fps``: at least ``low``, at most ``high``; int (n,)."""
        num_frames = self._video.num_frames or int(count / fps * self._video.fps)
        num_frames = min(max(num_frames, low), high, count)
        return np.linspace(0, count - 1, max(num_frames, 1)).round().astype(int)

    def _frame_size(self, num_frames: int, metadata: VideoMetadata, pixels: PixelLimits) -> tuple[int, int]:
        """Height and width at which ``num_frames`` frames are shown."""
        return resize_video(num_frames, metadata.height, metadata.width, self._video, pixels)

    def _video_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        group = media.plan.layout.temporal_patch_size
        times = list(media.timestamps)
        times.extend(times[-1:] * (-len(times) % group))
        for start in range(0, len(times), group):
            yield f"<{(times[start] + times[start + group - 1]) / 2:.1f} seconds>"
            yield self._vision_start
            yield self._placeholder(item, media.plan, self._video_pad, self._video)
            yield self._vision_end

    @staticmethod
    def _placeholder(item: int, plan: FramePlan, token_id: int, settings: VisionSettings) -> Placeholder:
        _, height, width = plan.grid_thw
        merge = settings.layout.merge_size
        return Placeholder(item, token_id, height // merge, width // merge)


def _next_item(items: Iterator[int], what: str) -> int:
    item = next(items, None)
    if item is None:
        raise InvalidRequestError(f"the chat template shows an {what} that the messages do not have", param="messages")
    return item


def _token_id(tokenizer: Tokenizer, config: dict[str, Any], key: str, token: str) -> int:
    token_id = config.get(key, tokenizer.special_tokens.get(token))
    if token_id is None or token_id not in tokenizer.special_tokens.values():
        raise ModelLoadError(f"the tokenizer has no control token for {key} ({token})", param="model")
    return token_id


def _is_nested(form: str) -> bool:
    if form == "auto":
        major, minor = (int(part) for part in version("transformers").split(".")[:2])
        return (major, minor) >= (5, 10)
    if form not in {"nested", "flat"}:
        raise InvalidRequestError(
            f"video_prompt_form must be auto, nested or flat, not {form!r}", param="video_prompt_form"
        )
    return form == "nested"
