"""Phi-4-multimodal: the crops of an image and its tokens; knows no weights.

Source: Transformers' ``Phi4MultimodalProcessor`` and ``Phi4MultimodalImageProcessor``; the tests hold this file to them
value by value. The whole as one crop is made from the others by the model. Audio is not offered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import MediaError, ModelLoadError
from filmstrip.models.dynamic_hd import choose_grid
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
    "size": {"height": 448, "width": 448},
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "resample": 3,
    "patch_size": 14,
    "dynamic_hd": 36,
}
"""Class defaults of the reference processor, for keys that a checkpoint's files leave out."""
_MIN_SIDE = 10
"""Pixels that each side of a resized image must have, in the reference, too."""
_WHITE = 255


class Phi4MultimodalProcessor(TileProcessor):
    """An image lies on a canvas of square crops, padded with white; ``max_pixels`` lowers the number of crops."""

    modalities = frozenset({Modality.IMAGE})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, config, media)
        settings = parse_pixel_settings(image_section(files), _DEFAULTS, "preprocessor_config.json")
        if settings.resample != "bicubic":
            raise ModelLoadError(
                f"preprocessor_config.json sets resample to {settings.values['resample']}; only 3 (bicubic) is supported "
                "for this architecture",
                param="model",
            )
        self.settings = {Modality.IMAGE: settings}
        self._patch_size, self._max_crops = int(settings.values["patch_size"]), int(settings.values["dynamic_hd"])
        vision = files.json("config.json").get("vision_config") or {}
        for name, given in (
            ("crop_size", settings.size),
            ("image_size", settings.size),
            ("patch_size", self._patch_size),
        ):
            default = _DEFAULTS["patch_size"] if name == "patch_size" else _DEFAULTS["size"]
            wanted = square_side(vision.get(name, default), f"{name} in config.json")
            if wanted != given:
                raise ModelLoadError(
                    f"config.json has a {name} of {wanted} pixels, but preprocessor_config.json makes it {given}",
                    param="model",
                )
        self._image_token = token_id(tokenizer, tokenizer.named_tokens.get("image_token", "<|endoftext10|>"))
        self.tokens = {self._image_token: Modality.IMAGE}

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """The crops that cover an image, or a grid of about its shape where they would be too many."""
        settings = self.settings[Modality.IMAGE]
        size, shape = settings.size, (metadata.height, metadata.width)
        grid = choose_grid(*shape, size, self._patch_size, max_tiles(pixels, size, self._max_crops))
        height, width = grid.canvas_size
        resized_height, resized_width = grid.resized_size(*shape)
        if min(resized_height, resized_width) < _MIN_SIDE:
            raise MediaError(
                f"an image of {metadata.width} x {metadata.height} pixels is shown as {resized_width} x {resized_height}; "
                f"each side must have at least {_MIN_SIDE}"
            )
        view = View(height, width, resized_height, resized_width, fill=_WHITE)
        # The crops are always resized so; the settings' own rule is that of the whole as one crop.
        return FramePlan((0,), height, width, settings.layout, (view,), "bilinear", grid.num_tokens(*shape))

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """One run of tokens."""
        yield Placeholder(item, self._image_token, 1, media.plan.num_tokens)
