"""Mllama (Llama 3.2 Vision): tiles of an image, and the one token that stands for it; knows no weights.

Source: Transformers' ``MllamaProcessor`` and ``MllamaImageProcessor``; the tests hold this file to them value by value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import ModelLoadError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Piece, Placeholder
from filmstrip.processing.tiles import (
    TileProcessor,
    image_section,
    max_tiles,
    parse_pixel_settings,
    square_side,
    token_id,
)
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FramePlan, ImageMetadata, Modality, PixelLimits, View

_DEFAULTS: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "resample": 2,
    "max_image_tiles": 4,
}
"""Class defaults of the reference processor, for keys that a checkpoint's files leave out."""
_NUM_EXTRA_EMBEDDINGS = 8
"""Rows of the table of embeddings beyond the vocabulary, among them the image token's."""


class MllamaProcessor(TileProcessor):
    """An image is a grid of tiles that it fits into with its shape kept, at the upper left; its words are one token."""

    modalities = frozenset({Modality.IMAGE})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, config, media)
        settings = parse_pixel_settings(image_section(files), _DEFAULTS, "preprocessor_config.json")
        self.settings = {Modality.IMAGE: settings}
        self._image_token = token_id(tokenizer, tokenizer.named_tokens.get("image_token", "<|image|>"))
        self.tokens = {self._image_token: Modality.IMAGE}
        model_config = files.json("config.json")
        vision, text = model_config.get("vision_config") or {}, model_config.get("text_config") or {}
        if settings.values.get("do_pad") is False:
            raise ModelLoadError("preprocessor_config.json sets do_pad to False; only True is supported", param="model")
        shown = (settings.values["max_image_tiles"], settings.size)
        made_for = (
            vision.get("max_num_tiles", 4),
            square_side(vision.get("image_size", 448), "image_size in config.json"),
        )
        if shown != made_for:
            raise ModelLoadError(
                f"preprocessor_config.json makes up to {shown[0]} tiles of {shown[1]} pixels (max_image_tiles, size), but "
                f"the model was made for up to {made_for[0]} of {made_for[1]} (max_num_tiles, image_size in config.json)",
                param="model",
            )
        num_embeddings = text.get("vocab_size", 128256) + _NUM_EXTRA_EMBEDDINGS
        if self._image_token >= num_embeddings:
            raise ModelLoadError(
                f"the tokenizer's image token has the id {self._image_token}, but the model has {num_embeddings} embeddings",
                param="model",
            )

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """The grid that the image is enlarged least or shrunk least for; ``max_pixels`` lowers the number of its tiles."""
        settings = self.settings[Modality.IMAGE]
        size = settings.size
        most = max_tiles(pixels, size, settings.values["max_image_tiles"])
        shape = (metadata.height, metadata.width)
        height, width = (int(side) for side in get_optimal_tiled_canvas(*shape, most, size))
        fitted = get_image_size_fit_to_canvas(*shape, height, width, size)
        views = (View(height, width, int(fitted[0]), int(fitted[1])),)
        return FramePlan((0,), height, width, settings.layout, views, settings.resample, num_embeddings=1)

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:  # noqa: ARG002 - one token for any image
        """The image's token."""
        yield Placeholder(item, self._image_token, 1, 1)
