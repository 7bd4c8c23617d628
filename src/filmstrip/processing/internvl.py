"""InternVL (3 and others in Transformers' format): tiles of an image, frames of a video, and their words; knows no weights.

Source: Transformers' ``InternVLProcessor``, ``GotOcr2ImageProcessor`` (tiles) and ``InternVLVideoProcessor``; the tests hold
this file to them value by value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Piece, Placeholder
from filmstrip.processing.tiles import (
    CLIP_MEAN,
    CLIP_STD,
    TileProcessor,
    default_num_frames,
    image_section,
    max_tiles,
    parse_pixel_settings,
    square_side,
    token_id,
    video_section,
)
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FramePlan, ImageMetadata, Modality, PixelLimits, View

# Class defaults of the reference processors, for keys that a checkpoint's files leave out.
_DEFAULTS: dict[str, Any] = {
    "size": {"height": 384, "width": 384},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "resample": 3,
}
_IMAGE_DEFAULTS = _DEFAULTS | {"min_patches": 1, "max_patches": 12}
_VIDEO_DEFAULTS = _DEFAULTS | {"initial_shift": True}


class InternVLProcessor(TileProcessor):
    """An image is a grid of tiles of about its shape and, if that has more than one, the whole once more as a small tile."""

    modalities = frozenset({Modality.IMAGE, Modality.VIDEO})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, config, media)
        image = parse_pixel_settings(image_section(files), _IMAGE_DEFAULTS, "preprocessor_config.json")
        video = parse_pixel_settings(video_section(files), _VIDEO_DEFAULTS, "video_preprocessor_config.json")
        self.settings = {Modality.IMAGE: image, Modality.VIDEO: video}
        model_config = files.json("config.json")
        vision = model_config.get("vision_config") or {}
        self._patch_size = square_side(vision.get("patch_size", 14), "patch_size in config.json")
        self._downsample_ratio = float(model_config.get("downsample_ratio", 0.5))
        named = tokenizer.named_tokens
        self._context = token_id(tokenizer, named.get("context_image_token", "<IMG_CONTEXT>"))
        self._start = token_id(tokenizer, named.get("start_image_token", "<img>"))
        self._end = token_id(tokenizer, named.get("end_image_token", "</img>"))
        video_token = token_id(tokenizer, named.get("video_token", "<video>"))
        self.tokens = {self._context: Modality.IMAGE, video_token: Modality.VIDEO}

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """The grid whose shape is nearest to the image's; ``max_pixels`` lowers the number of its tiles."""
        settings = self.settings[Modality.IMAGE]
        size, values = settings.size, settings.values
        most = max_tiles(pixels, size, values["max_patches"])
        shape = (metadata.height, metadata.width)
        columns, rows = get_optimal_tiled_canvas(shape, (size, size), min(values["min_patches"], most), most)
        height, width = rows * size, columns * size
        views = [View(height, width, height, width)]
        if rows * columns > 1:
            views.append(View(size, size, size, size))
        num_tiles = rows * columns + len(views) - 1
        num_tokens = num_tiles * self._tokens_per_tile(Modality.IMAGE)
        return FramePlan((0,), height, width, settings.layout, tuple(views), settings.resample, num_tokens)

    def num_video_tokens(self, num_frames: int) -> int:
        """Of all frames, each one tile."""
        return num_frames * self._tokens_per_tile(Modality.VIDEO)

    def default_frames(self, count: int, fps: float) -> np.ndarray:
        """Evenly spread, the first in the middle of its part of the clip (``initial_shift``); else from the beginning on."""
        values = self.settings[Modality.VIDEO].values
        num_frames = default_num_frames(values, count, fps)
        shift = values["initial_shift"]
        first = count / num_frames / 2 if shift is True else float(shift)
        # In the reference's own arithmetic, which rounds to float32 before it truncates.
        return torch.arange(first, count, count / num_frames).int().numpy()

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """An image is one run of tokens between its start and end; a video is a line for each frame: ``Frame1: ...``."""
        num_frames = len(media.plan.frame_indices)
        placeholder = Placeholder(item, self._context, 1, media.plan.num_tokens // num_frames)
        for number in range(1, num_frames + 1):
            if media.modality is Modality.VIDEO:
                yield f"Frame{number}: " if number == 1 else f"\nFrame{number}: "
            yield from (self._start, placeholder, self._end)

    def _tokens_per_tile(self, modality: Modality) -> int:
        return int(self.settings[modality].size // self._patch_size * self._downsample_ratio) ** 2
