"""Gemma 3: one tile for an image, and its words; knows no weights.

Source: Transformers' ``Gemma3Processor`` and ``Gemma3ImageProcessor``; the tests hold this file to them value by value.
Crops of long images ("pan and scan") are off there unless a caller asks for them, and not offered here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Piece, Placeholder
from filmstrip.processing.tiles import TileProcessor, image_section, parse_pixel_settings, token_id
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FramePlan, ImageMetadata, Modality, PixelLimits, View

_DEFAULTS: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "resample": 2,
}
"""Class defaults of the reference processor, for keys that a checkpoint's files leave out."""


class Gemma3Processor(TileProcessor):
    """An image is one tile, squeezed into its square, between a start and an end token on a paragraph of its own."""

    modalities = frozenset({Modality.IMAGE})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, config, media)
        self.settings = {
            Modality.IMAGE: parse_pixel_settings(image_section(files), _DEFAULTS, "preprocessor_config.json")
        }
        self._num_tokens = int(files.json("config.json").get("mm_tokens_per_image", 256))
        named = tokenizer.named_tokens
        self._start = token_id(tokenizer, named.get("boi_token", "<start_of_image>"))
        self._end = token_id(tokenizer, named.get("eoi_token", "<end_of_image>"))
        self._image_token = token_id(tokenizer, named.get("image_token", "<image_soft_token>"))
        self.tokens = {self._start: Modality.IMAGE}

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:  # noqa: ARG002 - one size for all
        """One tile."""
        settings = self.settings[Modality.IMAGE]
        size = settings.size
        views = (View(size, size, size, size),)
        return FramePlan((0,), size, size, settings.layout, views, settings.resample, self._num_tokens)

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """The image's tokens between its start and end, with an empty line before and behind."""
        yield "\n\n"
        yield from (self._start, Placeholder(item, self._image_token, 1, media.plan.num_tokens), self._end)
        yield "\n\n"
