"""DeepSeek-VL and its hybrid: an image padded to a square, at one or two resolutions, and its tokens; knows no weights.

Source: Transformers' ``DeepseekVLProcessor`` and ``DeepseekVLHybridProcessor`` with their image processors; the tests hold
this file to them value by value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import DeepseekVLConfig, DeepseekVLHybridConfig

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import ModelLoadError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Piece, Placeholder
from filmstrip.processing.tiles import (
    CLIP_MEAN,
    CLIP_STD,
    PixelSettings,
    TileProcessor,
    image_section,
    parse_pixel_settings,
    square_side,
    token_id,
)
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FramePlan, ImageMetadata, Modality, PatchLayout, PixelLimits, View

_FILE = "preprocessor_config.json"
# Class defaults of the reference processors, for keys that a checkpoint's files leave out.
_DEFAULTS: dict[str, Any] = {
    "size": {"height": 384, "width": 384},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "resample": 3,
    "min_size": 14,
    "do_pad": True,
}
_HIGH_RES_DEFAULTS = _DEFAULTS | {"size": {"height": 1024, "width": 1024}}
_HIGH_RES_KEYS = ("size", "image_mean", "image_std", "resample")


class DeepseekVLProcessor(TileProcessor):
    """An image is one tile: its longer side resized to the tile's, the rest filled with the mean colour on both sides."""

    modalities = frozenset({Modality.IMAGE})
    config_class: type[Any] = DeepseekVLConfig
    """Transformers' configuration of the model."""

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they, the model or the control tokens do not fit."""
        super().__init__(tokenizer, config, media)
        section = image_section(files)
        settings = _parse(section, _DEFAULTS, _FILE)
        self.settings = {Modality.IMAGE: settings}
        model_config = self.config_class.from_dict(dict(files.json("config.json")))
        _check_size(settings, model_config.vision_config, "vision_config")
        self._read_high_res(section, model_config)
        self._num_tokens = int(files.json("processor_config.json").get("num_image_tokens") or 576)
        patch_size = square_side(model_config.vision_config.patch_size, "patch_size of vision_config in config.json")
        num_patches = (settings.size // patch_size) ** 2
        if self._num_tokens != num_patches:
            raise ModelLoadError(
                f"processor_config.json sets num_image_tokens to {self._num_tokens}, but the vision tower makes "
                f"{num_patches} of an image",
                param="model",
            )
        self._image_token = token_id(tokenizer, tokenizer.named_tokens.get("image_token", "<image_placeholder>"))
        self.tokens = {self._image_token: Modality.IMAGE}

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:  # noqa: ARG002 - one size for all
        """One tile."""
        settings = self.settings[Modality.IMAGE]
        size = settings.size
        views = (_padded_view(metadata, settings),)
        return FramePlan((0,), size, size, settings.layout, views, settings.resample, self._num_tokens)

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """One run of tokens, without words around it."""
        yield Placeholder(item, self._image_token, 1, media.plan.num_tokens)

    def _read_high_res(self, section: Mapping[str, Any], model_config: Any) -> None:
        """Settings that a subclass has beyond these."""


class DeepseekVLHybridProcessor(DeepseekVLProcessor):
    """An image is a large square, padded as DeepSeek-VL's, and the same square once more, made small."""

    config_class = DeepseekVLHybridConfig

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:  # noqa: ARG002 - two sizes for all
        """The large square, then the small one made from it; their patches are the largest that divide both."""
        large, small = self._high_res, self.settings[Modality.IMAGE].size
        views = (_padded_view(metadata, large), View(small, small, small, small, of_previous=True))
        layout = PatchLayout(math.gcd(large.size, small), 1, 1)
        return FramePlan((0,), large.size, large.size, layout, views, large.resample, self._num_tokens)

    def _read_high_res(self, section: Mapping[str, Any], model_config: Any) -> None:
        values = dict(section) | {key: section.get(f"high_res_{key}") for key in _HIGH_RES_KEYS}
        large = _parse(values, _HIGH_RES_DEFAULTS, f"the high_res_ part of {_FILE}")
        small = self.settings[Modality.IMAGE]
        if large.resample != small.resample:
            raise ModelLoadError(
                f"{_FILE} sets high_res_resample to {large.values['resample']} and resample to {small.values['resample']}; "
                "only equal values are supported",
                param="model",
            )
        _check_size(large, model_config.high_res_vision_config, "high_res_vision_config")
        self._high_res = large
        # The large square is the first view.
        normalization = dataclasses.replace(large.normalization, later_views=small.normalization)
        self.settings = {Modality.IMAGE: dataclasses.replace(small, normalization=normalization)}


def _parse(values: Mapping[str, Any], defaults: Mapping[str, Any], file: str) -> PixelSettings:
    settings = parse_pixel_settings(values, defaults, file)
    if settings.values["do_pad"] is not True:
        raise ModelLoadError(
            f"{file} sets do_pad to {settings.values['do_pad']!r}; only True is supported", param="model"
        )
    if settings.values["min_size"] > settings.size:
        raise ModelLoadError(
            f"{file} sets min_size to {settings.values['min_size']}, which is more than its size, {settings.size}",
            param="model",
        )
    return settings


def _check_size(settings: PixelSettings, tower: Any, name: str) -> None:
    expected = square_side(tower.image_size, f"image_size of {name} in config.json")
    if settings.size != expected:
        raise ModelLoadError(
            f"{_FILE} shows images of {settings.size} pixels to a vision tower that takes {expected} "
            f"(image_size of {name} in config.json)",
            param="model",
        )


def _padded_view(metadata: ImageMetadata, settings: PixelSettings) -> View:
    """The whole image in the middle of a square of the mean colour."""
    size, values = settings.size, settings.values
    scale = size / max(metadata.height, metadata.width)
    height, width = (max(round(side * scale), values["min_size"]) for side in (metadata.height, metadata.width))
    red, green, blue = (int(mean * 255) for mean in settings.normalization.mean)
    return View(size, size, height, width, (size - height) // 2, (size - width) // 2, (red, green, blue))
