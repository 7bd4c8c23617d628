"""Llama 4: tiles of an image on a canvas that fits it, and their words; knows no weights.

Source: Transformers' ``Llama4Processor`` and ``Llama4ImageProcessor``; the tests hold this file to them value by value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import ModelLoadError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Piece, Placeholder
from filmstrip.processing.tiles import (
    PixelSettings,
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
    "size": {"height": 336, "width": 336},
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "resample": 2,
    "max_patches": 16,
    "resize_to_max_canvas": False,
}
"""Class defaults of the reference processor, for keys that a checkpoint's files leave out."""


class Llama4Processor(TileProcessor):
    """An image lies in the upper left corner of a canvas of tiles; if that has more than one, the whole follows as a tile.

    ``mm_processor_kwargs`` ``max_pixels`` lowers the number of the canvas' tiles.
    """

    modalities = frozenset({Modality.IMAGE})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, config, media)
        settings = _settings(image_section(files))
        self.settings = {Modality.IMAGE: settings}
        own, vision = files.json("processor_config.json"), files.json("config.json").get("vision_config") or {}
        self._tokens_per_tile = _tokens_per_tile(settings.size, own)
        size = square_side(vision.get("image_size", 448), "image_size in config.json")
        if (size, _tokens_per_tile(size, vision)) != (settings.size, self._tokens_per_tile):
            raise ModelLoadError(
                f"config.json has tiles of {size} pixels and {_tokens_per_tile(size, vision)} tokens (vision_config), but "
                f"preprocessor_config.json and processor_config.json have {settings.size} and {self._tokens_per_tile}",
                param="model",
            )
        # The reference writes these, whatever the tokenizer's files call them.
        self._start = token_id(tokenizer, "<|image_start|>")
        self._end = token_id(tokenizer, "<|image_end|>")
        self._patch = token_id(tokenizer, "<|patch|>")
        self._column_end = token_id(tokenizer, "<|tile_x_separator|>")
        self._row_end = token_id(tokenizer, "<|tile_y_separator|>")
        self._whole = token_id(tokenizer, "<|image|>")
        self.tokens = {token_id(tokenizer, own.get("image_token") or "<|image|>"): Modality.IMAGE}

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """The canvas on which the image loses least; it is enlarged on it only up to a tile's size."""
        settings = self.settings[Modality.IMAGE]
        size, values = settings.size, settings.values
        shape, enlarge = (metadata.height, metadata.width), values["resize_to_max_canvas"]
        canvas = best_canvas(shape, size, max_tiles(pixels, size, values["max_patches"]), enlarge=enlarge)
        resized_height, resized_width = fitted_size(shape, canvas, size, enlarge=enlarge)
        height, width = canvas.tolist()
        views = [View(height, width, resized_height, resized_width)]
        num_tiles = height // size * (width // size)
        if num_tiles > 1:
            views.append(View(size, size, size, size))
            num_tiles += 1
        num_tokens = num_tiles * self._tokens_per_tile
        return FramePlan((0,), height, width, settings.layout, tuple(views), settings.resample, num_tokens)

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """Tiles of the canvas, row by row, with words between them and behind each row; then the whole."""
        size = self.settings[Modality.IMAGE].size
        rows, columns = media.height // size, media.width // size
        tile = Placeholder(item, self._patch, 1, self._tokens_per_tile)
        yield self._start
        if rows * columns > 1:
            for _ in range(rows):
                for column in range(columns):
                    yield tile
                    if column < columns - 1:
                        yield self._column_end
                yield self._row_end
        yield from (self._whole, tile, self._end)


def best_canvas(shape: tuple[int, int], size: int, most: int, *, enlarge: bool) -> torch.Tensor:
    """Height and width, int64 (2,), of the canvas of at most ``most`` tiles that suits an image of ``shape``.

    Of those that hold the image whole the one with least room to spare, or with ``enlarge`` the one with most; if there is
    none, the one on which it shrinks least. Of equal ones the smallest.
    """
    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    canvases = size * torch.tensor(grids)
    # In the reference's own arithmetic, which is float32: scales that differ by less are equal.
    scales = (canvases / torch.tensor(shape)).amin(dim=1)
    holding = scales[scales >= 1]
    if len(holding):
        chosen = holding.max() if enlarge else holding.min()
    else:
        chosen = scales.max()
    equal = canvases[scales == chosen]
    return equal[equal.prod(dim=1).argmin()]


def fitted_size(shape: tuple[int, int], canvas: torch.Tensor, size: int, *, enlarge: bool) -> tuple[int, int]:
    """Height and width of an image of ``shape`` on its ``canvas``; without ``enlarge`` it grows only up to ``size``."""
    # The reference takes sides of the canvas from a tensor, whose quotients are float32, and others as numbers, whose
    # quotients are float64; the size is cut down to whole pixels, so that this shows.
    bounds = [
        limit if enlarge else min(max(side, size), limit) for side, limit in zip(shape, canvas.unbind(), strict=True)
    ]
    scale_height, scale_width = (bound / side for bound, side in zip(bounds, shape, strict=True))
    height, width = bounds
    if scale_width < scale_height:
        height = min(math.floor(shape[0] * scale_width), height)
    else:
        width = min(math.floor(shape[1] * scale_height), width)
    return max(int(height), 1), max(int(width), 1)


def _settings(values: Mapping[str, Any]) -> PixelSettings:
    """The image processor's settings; it normalises in bfloat16."""
    settings = parse_pixel_settings(values, _DEFAULTS, "preprocessor_config.json")
    most = settings.values["max_patches"]
    if not isinstance(most, int) or most < 1:
        raise ModelLoadError(
            f"preprocessor_config.json sets max_patches to {most!r}; it must be at least 1", param="model"
        )
    normalization = dataclasses.replace(settings.normalization, dtype="bfloat16")
    return dataclasses.replace(settings, normalization=normalization)


def _tokens_per_tile(size: int, values: Mapping[str, Any]) -> int:
    """Patches of a tile, put together by ``pixel_shuffle_ratio``."""
    patch_size = square_side(values.get("patch_size", 14), "patch_size")
    return (size // patch_size) ** 2 // round(1 / values.get("pixel_shuffle_ratio", 0.5) ** 2)
