"""MiniCPM-V 4.6: slices of an image or a frame, which frames, and their words; knows no weights.

Source: Transformers' ``MiniCPMV4_6Processor``, ``MiniCPMV4_6ImageProcessor`` and ``MiniCPMV4_6VideoProcessor``; the tests
hold this file to them value by value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import ModelLoadError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Piece, Placeholder
from filmstrip.processing.tiles import (
    PixelSettings,
    TileProcessor,
    image_section,
    parse_pixel_settings,
    square_side,
    token_id,
    video_section,
)
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import (
    FramePlan,
    FrameSampling,
    ImageMetadata,
    Modality,
    PatchLayout,
    PixelLimits,
    VideoMetadata,
    View,
)

# Class defaults of the reference processors, for keys that a checkpoint's files leave out.
_DEFAULTS: dict[str, Any] = {
    "scale_resolution": 448,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "resample": 3,
    "patch_size": 14,
    "max_slice_nums": 9,
    "slice_mode": True,
    "downsample_mode": "16x",
    "use_image_id": True,
}
_VIDEO_DEFAULTS = _DEFAULTS | {"max_num_frames": 128, "stack_frames": 1}
_MERGED_SIDES = {"4x": 2, "16x": 4}
"""Patches by side of a tile that become one token, by ``downsample_mode``."""
_STEPS_PER_SECOND = 10
"""Times that frames of a long video are chosen from."""


class MiniCPMVProcessor(TileProcessor):
    """A picture is shown as a whole and, if it is large, in a grid of slices of about its shape; each is a tile.

    A video is a picture for each frame; nothing in words says when it was. ``max_pixels`` lowers the number of slices.
    """

    modalities = frozenset({Modality.IMAGE, Modality.VIDEO})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's files; ModelLoadError if they do not fit each other or the control tokens."""
        super().__init__(tokenizer, config, media)
        named = {
            Modality.IMAGE: ("preprocessor_config.json", image_section(files), _DEFAULTS),
            Modality.VIDEO: ("video_preprocessor_config.json", video_section(files), _VIDEO_DEFAULTS),
        }
        self.settings = {
            modality: parse_pixel_settings(values, defaults, file, size_key="scale_resolution")
            for modality, (file, values, defaults) in named.items()
        }
        model_config = files.json("config.json")
        for modality, (file, _, _) in named.items():
            _check_settings(self.settings[modality], model_config, file)
        image = self.settings[Modality.IMAGE].values
        self._merged_side = _MERGED_SIDES[image["downsample_mode"]]
        self._numbers_items = bool(image["use_image_id"])
        # Its sizes are arithmetic on the numbers that it is given; pixels are none of its business here.
        self._sizes = MiniCPMV4_6ImageProcessorPil()
        role = tokenizer.named_tokens.get
        self._start = token_id(tokenizer, role("image_start_token", "<image>"))
        self._end = token_id(tokenizer, role("image_end_token", "</image>"))
        self._slice_start = token_id(tokenizer, role("slice_start_token", "<slice>"))
        self._slice_end = token_id(tokenizer, role("slice_end_token", "</slice>"))
        self._number_start = token_id(tokenizer, role("image_id_start_token", "<image_id>"))
        self._number_end = token_id(tokenizer, role("image_id_end_token", "</image_id>"))
        self._pads = {
            Modality.IMAGE: token_id(tokenizer, role("image_token", "<|image_pad|>")),
            Modality.VIDEO: token_id(tokenizer, role("video_token", "<|video_pad|>")),
        }
        self.tokens = {pad: modality for modality, pad in self._pads.items()}

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """The whole and its slices; fewer than allowed where the slices are more than ``max_pixels``."""
        return self._plan(Modality.IMAGE, (0,), (metadata.height, metadata.width), pixels.max_pixels)

    def plan_video(
        self, metadata: VideoMetadata, sampling: FrameSampling, pixels: PixelLimits, *, presampled: bool
    ) -> FramePlan:
        """Frames by what was asked for, else by the checkpoint's own rule; each has an even share of ``max_pixels``."""
        frames = self._frame_indices(metadata, sampling, presampled)
        share = None if pixels.max_pixels is None else pixels.max_pixels // len(frames)
        return self._plan(Modality.VIDEO, frames, (metadata.height, metadata.width), share)

    def default_frames(self, count: int, fps: float) -> np.ndarray:
        """One frame a second; of a clip with more seconds than frames allowed so many, evenly over its tenths of seconds.

        ``MiniCPMV4_6VideoProcessor.sample_frames``, whose rounding at each step is kept.
        """
        most = self.settings[Modality.VIDEO].values["max_num_frames"]
        duration = count / fps
        if duration <= most:
            times = np.arange(math.ceil(duration))
        else:
            times = np.arange(int(duration / (1 / _STEPS_PER_SECOND))) / _STEPS_PER_SECOND
            if len(times) > most:
                times = times[np.linspace(0, len(times) - 1, most, dtype=int)]
        return np.minimum((times * fps).astype(int), count - 1)

    def expand(self, pieces: Sequence[str | int], media: Sequence[PlannedMedia]) -> list[Piece]:
        """Replace each media token of the template by its item's tiles and, if the checkpoint says so, number it.

        Raises InvalidRequestError when the template shows another number of items than there are.
        """
        return super().expand(list(self._numbered(pieces)) if self._numbers_items else pieces, media)

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """Each picture's whole between its start and end, then its slices between theirs, a line for each row of them."""
        pad = self._pads[media.modality]
        _, *sliced = media.plan.views
        num_columns = sliced[0].tiles[1] if sliced and sliced[0].tiles else 0
        grids = media.plan.segment_grids
        tiles_per_frame = len(grids) // media.num_frames
        for number, (height, width) in enumerate(grids):
            placeholder = Placeholder(item, pad, height // self._merged_side, width // self._merged_side)
            slice_number = number % tiles_per_frame - 1
            if slice_number < 0:
                yield from (self._start, placeholder, self._end)
                continue
            if slice_number and slice_number % num_columns == 0:
                yield "\n"
            yield from (self._slice_start, placeholder, self._slice_end)

    def _numbered(self, pieces: Sequence[str | int]) -> Iterator[str | int]:
        """Before each media token its number in words, counted from 0 for each kind of media."""
        counts = dict.fromkeys(self.modalities, 0)
        for piece in pieces:
            modality = self.tokens.get(piece) if isinstance(piece, int) else None
            if modality is not None:
                yield from (self._number_start, str(counts[modality]), self._number_end)
                counts[modality] += 1
            yield piece

    def _plan(
        self, modality: Modality, frames: tuple[int, ...], shape: tuple[int, int], max_pixels: int | None
    ) -> FramePlan:
        """Pictures of ``shape`` (height, width), in fewer slices than allowed where theirs are more than ``max_pixels``."""
        settings = self.settings[modality]
        values = settings.values
        most = max(1, values["max_slice_nums"]) if values["slice_mode"] else 1
        views = self._views(shape, settings, most)
        # With one slice at most there is none, and nothing smaller.
        while most > 1 and max_pixels is not None and views[-1].height * views[-1].width > max_pixels:
            most -= 1
            views = self._views(shape, settings, most)
        layout = PatchLayout(values["patch_size"], 1, 1)
        plan = FramePlan(frames, views[-1].height, views[-1].width, layout, views, settings.resample)
        num_tokens = plan.patches_shape[0] // self._merged_side**2
        return dataclasses.replace(plan, num_embeddings=num_tokens)

    def _views(self, shape: tuple[int, int], settings: PixelSettings, max_slices: int) -> tuple[View, ...]:
        """The whole and, if the picture is large enough to be sliced, its slices side by side."""
        rule = {key: settings.values[key] for key in ("scale_resolution", "patch_size", "downsample_mode")}
        grid = self._sizes.get_sliced_grid(shape, max_slices, settings.size)
        height, width = self._sizes.find_best_resize(shape, allow_upscale=grid is None, **rule)
        whole = View(height, width, height, width, tiles=(1, 1))
        if grid is None:
            return (whole,)
        num_rows, num_columns = grid
        height, width = self._sizes.get_refine_size(shape, grid, allow_upscale=True, **rule)
        return (whole, View(height, width, height, width, tiles=(num_rows, num_columns)))


def _check_settings(settings: PixelSettings, model_config: Mapping[str, Any], file: str) -> None:
    """Raise ModelLoadError for what the model does not make of patches, or cannot be reproduced."""
    values, vision = settings.values, model_config.get("vision_config") or {}
    wanted = {
        "downsample_mode": model_config.get("downsample_mode", "16x"),
        "patch_size": square_side(vision.get("patch_size", 16), "patch_size in config.json"),
    }
    for name, value in wanted.items():
        if values[name] != value:
            raise ModelLoadError(f"{file} sets {name} to {values[name]!r}, but config.json to {value!r}", param="model")
    if values["downsample_mode"] not in _MERGED_SIDES:
        known = " and ".join(_MERGED_SIDES)
        raise ModelLoadError(
            f"{file} sets downsample_mode to {values['downsample_mode']!r}; only {known} are supported", param="model"
        )
    if values.get("stack_frames", 1) != 1:
        raise ModelLoadError(
            f"{file} sets stack_frames to {values['stack_frames']}; only 1 (a frame is a picture) is supported",
            param="model",
        )
    if model_config.get("merger_times", 1) != 1:
        raise ModelLoadError(
            f"config.json sets merger_times to {model_config['merger_times']}; only 1 is supported", param="model"
        )
