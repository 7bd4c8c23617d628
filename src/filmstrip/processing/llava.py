"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: tiles of an image, frames of a video, and their tokens; knows no weights.

Source: Transformers' ``LlavaProcessor``, ``LlavaNextProcessor`` and ``LlavaOnevisionProcessor`` with their image and video
processors; the tests hold this file to them value by value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from transformers.image_processing_utils import select_best_resolution

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
    video_section,
)
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FramePlan, ImageMetadata, Modality, PixelLimits, View

_CLIP: dict[str, Any] = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
_CROPPED: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP | _CROPPED,
    "LlavaImageProcessor": _CLIP | _CROPPED,
    "SiglipImageProcessor": {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "resample": 3,
        "size": {"height": 224, "width": 224},
    },
}
"""Class defaults of the image processors that LLaVA checkpoints name, for keys that their files leave out."""
_NEXT_DEFAULTS = (
    _CLIP | _CROPPED | {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
)
_ONEVISION_DEFAULTS = _CLIP | {"size": {"height": 384, "width": 384}}


class LlavaProcessor(TileProcessor):
    """An image is one tile: its shorter side resized to the tile's and its middle cut out, or squeezed into the square."""

    modalities = frozenset({Modality.IMAGE})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, config, media)
        self.settings = {Modality.IMAGE: self._image_settings(image_section(files))}
        self._image_token = token_id(tokenizer, tokenizer.named_tokens.get("image_token", "<image>"))
        self.tokens = {self._image_token: Modality.IMAGE}
        self._files = files
        model_config, own = files.json("config.json"), files.json("processor_config.json")
        vision = model_config.get("vision_config") or {}
        self._patch_size = square_side(vision.get("patch_size", 14), "patch_size in config.json")
        strategy = own.get("vision_feature_select_strategy") or model_config.get("vision_feature_select_strategy")
        drops_first = (strategy or self.default_strategy) == "default"
        # A tower with a class token has one feature more than patches; "default" drops the first, whatever it is. Files
        # that do not say come from before this was a setting, when dropping meant that there is such a token.
        num_additional = own.get("num_additional_image_tokens")
        self._num_extra = (int(drops_first) if num_additional is None else num_additional) - int(drops_first)

    default_strategy = "default"
    """``vision_feature_select_strategy`` of the family's configuration class."""

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:  # noqa: ARG002 - one size for all
        """One tile."""
        settings = self.settings[Modality.IMAGE]
        size = settings.size
        view = _image_view(metadata.height, metadata.width, settings, size)
        num_tokens = (size // self._patch_size) ** 2 + self._num_extra
        return FramePlan((0,), size, size, settings.layout, (view,), settings.resample, num_tokens)

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """One run of tokens for the whole item."""
        token = next(token for token, modality in self.tokens.items() if modality is media.modality)
        yield Placeholder(item, token, 1, media.plan.num_tokens)

    def _image_settings(self, values: Mapping[str, Any]) -> Any:
        name = str(values.get("image_processor_type", "CLIPImageProcessor"))
        defaults = _DEFAULTS.get(name.removesuffix("Fast").removesuffix("Pil"))
        if defaults is None:
            known = ", ".join(sorted(_DEFAULTS))
            raise ModelLoadError(
                f"preprocessor_config.json names the image processor {name!r}; supported for this architecture are {known}",
                param="model",
            )
        if values.get("do_pad") and name.removesuffix("Fast").removesuffix("Pil") != "LlavaImageProcessor":
            raise ModelLoadError(
                "preprocessor_config.json sets do_pad to True; only False is supported but for LlavaImageProcessor",
                param="model",
            )
        return parse_pixel_settings(values, defaults, "preprocessor_config.json", size_key=_size_key(defaults, values))


class LlavaNextProcessor(LlavaProcessor):
    """An image is one small tile of the whole and the tiles of the best of some sizes; features of padding are dropped.

    Each image is shown so, however many there are; ``max_pixels`` changes nothing.
    """

    image_defaults: Mapping[str, Any] = _NEXT_DEFAULTS

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """As :class:`LlavaProcessor`."""
        super().__init__(tokenizer, files, config, media)
        values = self.settings[Modality.IMAGE].values
        pinpoints = files.json("config.json").get("image_grid_pinpoints") or values.get("image_grid_pinpoints")
        if not pinpoints:
            raise ModelLoadError(
                "neither config.json nor preprocessor_config.json has image_grid_pinpoints", param="model"
            )
        self._pinpoints = [tuple(point) for point in pinpoints]

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:  # noqa: ARG002 - the model's choice
        """The whole as one tile, then the tiles of the size that keeps most of it and wastes least."""
        settings = self.settings[Modality.IMAGE]
        size, shape = settings.size, (metadata.height, metadata.width)
        height, width = select_best_resolution(shape, self._pinpoints)
        resized_height, resized_width = _fitted(shape, height, width)
        views = (
            View(size, size, size, size),
            View(
                height,
                width,
                resized_height,
                resized_width,
                top=(height - resized_height) // 2,
                left=(width - resized_width) // 2,
            ),
        )
        num_tokens = self._num_image_tokens(shape, height // size, width // size)
        return FramePlan((0,), height, width, settings.layout, views, settings.resample, num_tokens)

    def _image_settings(self, values: Mapping[str, Any]) -> Any:
        key = _size_key(self.image_defaults, values)
        settings = parse_pixel_settings(values, self.image_defaults, "preprocessor_config.json", size_key=key)
        size = settings.values["size"]
        given = size.get("shortest_edge", size.get("height")) if isinstance(size, Mapping) else size
        if given != settings.size:
            raise ModelLoadError(
                f"preprocessor_config.json has tiles of {settings.size} pixels but resizes to {given}; only equal sizes are "
                "supported",
                param="model",
            )
        return settings

    def _num_image_tokens(self, shape: tuple[int, int], num_rows: int, num_columns: int) -> int:
        """Tokens of the small tile, of what is left of the large ones without padding, and of each of its lines' ends."""
        side = self.settings[Modality.IMAGE].size // self._patch_size
        rows, columns = self._packed_size(shape, num_rows * side, num_columns * side)
        return side * side + self._num_extra + rows * columns + rows

    def _packed_size(self, shape: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of features that are left of ``rows`` x ``columns`` when the padding is dropped."""
        height, width = shape
        if width / height > columns / rows:
            return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
        return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


class LlavaOnevisionProcessor(LlavaNextProcessor):
    """Images as LLaVA-NeXT, with a bound on the tokens of the large tiles; a video is one tile for each frame, pooled."""

    modalities = frozenset({Modality.IMAGE, Modality.VIDEO})
    image_defaults = _ONEVISION_DEFAULTS
    default_strategy = "full"

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """As :class:`LlavaProcessor`."""
        super().__init__(tokenizer, files, config, media)
        self.settings[Modality.VIDEO] = parse_pixel_settings(
            video_section(files), _ONEVISION_DEFAULTS, "video_preprocessor_config.json"
        )
        video_token = token_id(tokenizer, tokenizer.named_tokens.get("video_token", "<video>"))
        self.tokens[video_token] = Modality.VIDEO
        aspect = files.json("config.json").get("vision_aspect_ratio", "anyres_max_9")
        number = str(aspect).removeprefix("anyres_max_")
        if not number.isdecimal():
            raise ModelLoadError(
                f"config.json sets vision_aspect_ratio to {aspect!r}; only anyres_max_N is supported", param="model"
            )
        self._max_tiles = int(number)

    def num_video_tokens(self, num_frames: int) -> int:
        """A quarter of each frame's patches, rounded up by side, and the end of the line."""
        side = self.settings[Modality.VIDEO].size // self._patch_size
        return num_frames * math.ceil(side / 2) ** 2 + 1

    def _packed_size(self, shape: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
        rows, columns = super()._packed_size(shape, rows, columns)
        side = self.settings[Modality.IMAGE].size // self._patch_size
        ratio = math.sqrt(rows * columns / (self._max_tiles * side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _size_key(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The setting that says how large a tile is in the end."""
    crops = values.get("do_center_crop")
    return "crop_size" if (defaults.get("do_center_crop") if crops is None else crops) else "size"


def _image_view(height: int, width: int, settings: PixelSettings, size: int) -> View:
    """An image as :func:`_tile_view`, before which bars of the mean color make it a square if the settings say so."""
    if not settings.values.get("do_pad"):
        return _tile_view(height, width, settings.values, size)
    side = max(height, width)
    red, green, blue = (int(value * 255) for value in settings.normalization.mean)
    return replace(_tile_view(side, side, settings.values, size), square_color=(red, green, blue))


def _tile_view(height: int, width: int, values: Mapping[str, Any], size: int) -> View:
    """An image resized by ``size`` of the settings and, where they say so, cropped or padded around its middle."""
    wanted = values["size"]
    shortest = wanted.get("shortest_edge") if isinstance(wanted, Mapping) else wanted
    if shortest is None or not values.get("do_center_crop"):
        return View(size, size, size, size)
    short = min(height, width)
    height, width = (shortest if side == short else int(shortest * side / short) for side in (height, width))
    top, left = ((size - side) // 2 if side < size else -int((side - size) / 2) for side in (height, width))
    return View(size, size, height, width, top, left)


def _fitted(shape: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """The largest size of about this shape inside ``height`` x ``width`` (``get_patch_output_size``)."""
    scale_width, scale_height = width / shape[1], height / shape[0]
    if scale_width < scale_height:
        return min(math.ceil(shape[0] * scale_width), height), width
    return height, min(math.ceil(shape[1] * scale_height), width)
