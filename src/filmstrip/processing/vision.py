"""Sizes: how large an image or a video frame is shown to a Qwen-style vision tower; pure arithmetic.

The formulas are those of Transformers' ``Qwen2VLImageProcessor``, ``Qwen2VLVideoProcessor`` and ``Qwen3VLVideoProcessor``
(``smart_resize``), kept exactly, rounding included: Python's ``round`` takes halves to the even neighbour.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from filmstrip.errors import MediaError, ModelLoadError
from filmstrip.types import Normalization, PatchLayout, PixelLimits

MAX_ASPECT_RATIO = 200
_BICUBIC = 3
_RESCALE = 1 / 255
_VIDEO_CONTEXT_SHARE = 0.9
"""Part of a context that ``Qwen2VLVideoProcessor`` lets a video fill."""


@dataclass(frozen=True)
class VisionSettings:
    """A checkpoint's preprocessor settings for one modality.

    ``min_pixels`` and ``max_pixels`` are areas in pixels: of an image, of all frames of a video together, or (Qwen2-VL) of
    one frame. The last five fields are for video only.
    """

    layout: PatchLayout
    normalization: Normalization
    min_pixels: int
    max_pixels: int
    fps: float = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    max_video_tokens: int | None = None
    """What ``cap_pixels_per_frame`` goes by, None where it is off: a frame's tokens, or (Qwen2-VL) a context's."""

    @property
    def factor(self) -> int:
        """Sides are multiples of this: patch size times merge size."""
        return self.layout.patch_size * self.layout.merge_size


def parse_vision_settings(values: Mapping[str, Any], defaults: Mapping[str, Any], file: str) -> VisionSettings:
    """Settings from a preprocessor's JSON, with its class's defaults; ModelLoadError for what cannot be reproduced."""
    merged = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    for name, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", _BICUBIC)):
        if merged.get(name, wanted) != wanted:
            raise ModelLoadError(f"{file} sets {name} to {merged[name]!r}; only {wanted!r} is supported", param="model")
    if not math.isclose(merged.get("rescale_factor", _RESCALE), _RESCALE, rel_tol=1e-6):
        raise ModelLoadError(f"{file} sets rescale_factor to {merged['rescale_factor']}; only 1/255 is supported")
    size = {**defaults["size"], **(merged["size"] or {})}
    return VisionSettings(
        PatchLayout(merged["patch_size"], merged["temporal_patch_size"], merged["merge_size"]),
        Normalization(tuple(merged["image_mean"]), tuple(merged["image_std"])),
        min_pixels=int(merged.get("min_pixels") or size["shortest_edge"]),
        max_pixels=int(merged.get("max_pixels") or size["longest_edge"]),
        fps=float(merged.get("fps") or 2.0),
        num_frames=merged.get("num_frames"),
        min_frames=int(merged.get("min_frames", 4)),
        max_frames=int(merged.get("max_frames", 768)),
        max_video_tokens=int(merged.get("max_video_tokens", 768)) if merged.get("cap_pixels_per_frame") else None,
    )


def limits_of(settings: VisionSettings, wanted: PixelLimits) -> tuple[int, int]:
    """(min_pixels, max_pixels) for one item: what was asked for, else the checkpoint's; the asked one wins a conflict."""
    low = settings.min_pixels if wanted.min_pixels is None else wanted.min_pixels
    high = settings.max_pixels if wanted.max_pixels is None else wanted.max_pixels
    if wanted.min_pixels is None:
        low = min(low, high)
    if wanted.max_pixels is None:
        high = max(low, high)
    return low, high


def resize_image(height: int, width: int, settings: VisionSettings, wanted: PixelLimits) -> tuple[int, int]:
    """Displayed (height, width) of an image: multiples of the factor, area within the limits, about the same shape."""
    _check_aspect_ratio(height, width)
    min_pixels, max_pixels = limits_of(settings, wanted)
    factor = settings.factor
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        return _shrink(height, width, math.sqrt(height * width / max_pixels), factor)
    if new_height * new_width < min_pixels:
        return _grow(height, width, math.sqrt(min_pixels / (height * width)), factor)
    return new_height, new_width


def resize_video(
    num_frames: int, height: int, width: int, settings: VisionSettings, wanted: PixelLimits
) -> tuple[int, int]:
    """Displayed (height, width) of a video's frames; the limits count the pixels of all ``num_frames`` (at least 2)."""
    min_pixels, max_pixels = limits_of(settings, wanted)
    factor, temporal = settings.factor, settings.layout.temporal_patch_size
    if settings.max_video_tokens is not None:
        cap = min(settings.max_video_tokens * factor**2, max_pixels // num_frames)
        max_pixels = max(cap, int(min_pixels * 1.05)) * num_frames
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(num_frames / temporal) * temporal * new_height * new_width
    if pixels > max_pixels:
        return _shrink(height, width, math.sqrt(num_frames * height * width / max_pixels), factor)
    if pixels < min_pixels:
        return _grow(height, width, math.sqrt(min_pixels / (num_frames * height * width)), factor)
    return new_height, new_width


def resize_video_frame(
    num_frames: int, height: int, width: int, settings: VisionSettings, wanted: PixelLimits
) -> tuple[int, int]:
    """Displayed (height, width) of one of ``num_frames`` frames, where the settings' limits are those of one frame.

    ``wanted`` counts the pixels of all frames, as for every family; each frame gets an even share of it.
    """
    factor, temporal = settings.factor, settings.layout.temporal_patch_size
    if settings.max_video_tokens is not None:
        total = int(settings.max_video_tokens * factor * factor * _VIDEO_CONTEXT_SHARE)
        cap = max(min(settings.max_pixels, total * temporal // num_frames), int(settings.min_pixels * 1.05))
        settings = dataclasses.replace(settings, max_pixels=cap)
    low, high = (
        None if limit is None else max(1, limit // num_frames) for limit in (wanted.min_pixels, wanted.max_pixels)
    )
    return resize_image(height, width, settings, PixelLimits(low, high))


def _shrink(height: int, width: int, beta: float, factor: int) -> tuple[int, int]:
    return (
        max(factor, math.floor(height / beta / factor) * factor),
        max(factor, math.floor(width / beta / factor) * factor),
    )


def _grow(height: int, width: int, beta: float, factor: int) -> tuple[int, int]:
    return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor


def _check_aspect_ratio(height: int, width: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise MediaError(
            f"the sides {width} x {height} differ {ratio:.0f}-fold; at most {MAX_ASPECT_RATIO} is supported"
        )
