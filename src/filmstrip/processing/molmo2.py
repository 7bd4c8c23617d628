"""Molmo 2: overlapping crops of an image, frames of a video, and their words; knows no weights.

Source: Transformers' ``Molmo2Processor``, ``Molmo2ImageProcessor`` and ``Molmo2VideoProcessor``; the tests hold this file to
them value by value. There a prompt has one video and no image beside it; here any number of both.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
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
    token_id,
    video_section,
)
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import (
    FramePlan,
    FrameSampling,
    ImageMetadata,
    Modality,
    Normalization,
    PatchLayout,
    PixelLimits,
    VideoMetadata,
    View,
)

# Class defaults of the reference processors, for keys that a checkpoint's files leave out.
_DEFAULTS: dict[str, Any] = {
    "size": {"height": 378, "width": 378},
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "resample": 2,
    "patch_size": 14,
}
_IMAGE_DEFAULTS = _DEFAULTS | {"max_crops": 8, "overlap_margins": [4, 4], "pooling_size": [2, 2]}
_VIDEO_DEFAULTS = _DEFAULTS | {"num_frames": 64, "max_fps": 2, "pooling_size": [3, 3]}
_AS_IT_IS = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
"""Leaves values of 0 to 255 what they are."""
_TOO_SMALL = np.float32(10e9)
"""Stands for scales below 1 where the reference looks for the least above."""


@dataclasses.dataclass(frozen=True)
class _Words:
    """Ids of the control tokens around patches."""

    patch: int
    row_end: int
    image: tuple[int, int]
    """Start and end of an image's crops."""
    whole: tuple[int, int]
    """Start and end of the whole image once more."""
    frame: tuple[int, int]
    image_rows_end: bool
    """Whether rows of an image's crops have an end."""
    whole_rows_end: bool
    frame_rows_end: bool


class Molmo2Processor(TileProcessor):
    """An image is the whole as one crop, then overlapping crops of a larger canvas; a video is a crop for each frame.

    Tokens are pooled from windows of patches, on the canvas across the borders of crops.
    """

    modalities = frozenset({Modality.IMAGE, Modality.VIDEO})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's preprocessor files; ModelLoadError if they or the control tokens do not fit."""
        super().__init__(tokenizer, config, media)
        self.settings = {
            Modality.IMAGE: _settings(image_section(files), _IMAGE_DEFAULTS, "preprocessor_config.json"),
            Modality.VIDEO: _video_settings(video_section(files)),
        }
        self._check_margins()
        named = tokenizer.named_tokens
        self.tokens = {
            token_id(tokenizer, named.get("image_token", "<|image|>")): Modality.IMAGE,
            token_id(tokenizer, named.get("video_token", "<|video|>")): Modality.VIDEO,
        }
        self._words = _read_words(tokenizer, files.json("processor_config.json"))
        # Every prompt begins with this token, whether the template writes it or not.
        first = named.get("bos_token") or named.get("eos_token")
        if first is None:
            raise ModelLoadError("the tokenizer names neither a bos_token nor an eos_token", param="model")
        self._first_ids = [token_id(tokenizer, first)]

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """As many crops as show the image at its size, if that may be; ``max_pixels`` lowers their number."""
        settings = self.settings[Modality.IMAGE]
        size, values = settings.size, settings.values
        most = max_tiles(pixels, size, values["max_crops"])
        step, overlap = self._crop_step(), sum(values["overlap_margins"]) * values["patch_size"]
        rows, columns = select_tiling(metadata.height - overlap, metadata.width - overlap, step, most)
        height, width = rows * step + overlap, columns * step + overlap
        places = itertools.product(range(rows), range(columns))
        crops = (View(size, size, height, width, -row * step, -column * step) for row, column in places)
        views = (View(size, size, size, size), *crops)
        layout = PatchLayout(values["patch_size"], 1, 1)
        num_tokens = len(self._image_segment(rows, columns)[0])
        return FramePlan((0,), height, width, layout, views, settings.resample, num_tokens)

    def plan_video(
        self, metadata: VideoMetadata, sampling: FrameSampling, pixels: PixelLimits, *, presampled: bool
    ) -> FramePlan:
        """Frames by what was asked for, else by the checkpoint's own rule; each is one crop, resized without its shape."""
        plan = super().plan_video(metadata, sampling, pixels, presampled=presampled)
        layout = PatchLayout(self.settings[Modality.VIDEO].values["patch_size"], 1, 1)
        return dataclasses.replace(plan, layout=layout)

    def num_video_tokens(self, num_frames: int) -> int:
        """Of all frames, each with its start and end."""
        return num_frames * len(self._frame_segment()[0])

    def default_frames(self, count: int, fps: float) -> np.ndarray:
        """At most ``num_frames``, evenly spread from the first, and of a clip with more no more than ``max_fps`` a second.

        ``fps``, if a checkpoint sets it, is the rate instead (``Molmo2VideoProcessor.sample_frames``).
        """
        values = self.settings[Modality.VIDEO].values
        duration, max_fps = count / fps, values["max_fps"]
        if values.get("fps"):
            wanted = int(duration * values["fps"])
        else:
            wanted = values["num_frames"] if fps <= max_fps else min(values["num_frames"], int(duration * max_fps))
        wanted = max(min(wanted, count), 1)
        # In the reference's own arithmetic; its rounding may make it count one beyond the end.
        frames = torch.arange(0, count, count / wanted).int().numpy()
        return frames[frames < count]

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """An image is one run of tokens; before each frame of a video stands its time in seconds."""
        if media.modality is Modality.IMAGE:
            step, overlap = self._crop_step(), self.settings[Modality.IMAGE].size - self._crop_step()
            rows, columns = ((side - overlap) // step for side in (media.plan.height, media.plan.width))
            yield self._placeholder(item, *self._image_segment(rows, columns))
            return
        for number, time in enumerate(media.timestamps):
            yield f"{time:.1f} " if number == 0 else f" {time:.1f} "
            yield self._placeholder(item, *self._frame_segment())

    def _placeholder(self, item: int, token_ids: tuple[int, ...], pooling: np.ndarray) -> Placeholder:
        return Placeholder(item, self._words.patch, 1, len(token_ids), token_ids=token_ids, pooling=pooling)

    def _image_segment(self, rows: int, columns: int) -> tuple[tuple[int, ...], np.ndarray]:
        """Tokens of an image of ``rows`` x ``columns`` crops, and which patches each is pooled from."""
        settings, words = self.settings[Modality.IMAGE], self._words
        side, (height, width) = self._patches_per_side(Modality.IMAGE), settings.values["pooling_size"]
        left, right = settings.values["overlap_margins"]
        whole = pooled(np.arange(side**2).reshape(side, side), height, width)
        canvas = pooled(canvas_patches(rows, columns, side, left, right) + side**2, height, width)
        return _joined(
            _with_ends(whole, words.whole, words.patch, words.row_end if words.whole_rows_end else None),
            _with_ends(canvas, words.image, words.patch, words.row_end if words.image_rows_end else None),
        )

    def _frame_segment(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Tokens of a video's frame, and which patches each is pooled from."""
        words, side = self._words, self._patches_per_side(Modality.VIDEO)
        height, width = self.settings[Modality.VIDEO].values["pooling_size"]
        frame = pooled(np.arange(side**2).reshape(side, side), height, width)
        return _with_ends(frame, words.frame, words.patch, words.row_end if words.frame_rows_end else None)

    def _patches_per_side(self, modality: Modality) -> int:
        settings = self.settings[modality]
        return settings.size // settings.values["patch_size"]

    def _crop_step(self) -> int:
        """Pixels between the beginnings of crops."""
        settings = self.settings[Modality.IMAGE]
        return settings.size - sum(settings.values["overlap_margins"]) * settings.values["patch_size"]

    def _check_margins(self) -> None:
        values = self.settings[Modality.IMAGE].values
        left, right = values["overlap_margins"]
        if left < 0 or right < 0 or self._crop_step() <= 0:
            raise ModelLoadError(
                f"preprocessor_config.json sets overlap_margins to {values['overlap_margins']}, which leaves nothing of "
                f"crops of {self._patches_per_side(Modality.IMAGE)} patches",
                param="model",
            )


def _settings(values: Mapping[str, Any], defaults: Mapping[str, Any], file: str) -> PixelSettings:
    """Settings of one modality; the reference resizes without antialiasing."""
    settings = parse_pixel_settings(values, defaults, file)
    if settings.resample != "bilinear":
        raise ModelLoadError(
            f"{file} sets resample to {settings.values['resample']!r}; only 2 (bilinear) is supported for Molmo 2",
            param="model",
        )
    patch_size = settings.values["patch_size"]
    if settings.size % patch_size:
        raise ModelLoadError(f"{file} has crops of {settings.size} pixels in patches of {patch_size}", param="model")
    return dataclasses.replace(settings, resample="bilinear_plain")


def _video_settings(values: Mapping[str, Any]) -> PixelSettings:
    """Settings of videos, which the reference neither rescales nor normalises unless the checkpoint says so."""
    file = "video_preprocessor_config.json"
    switches = {name: bool(values.get(name)) for name in ("do_rescale", "do_normalize")}
    settings = _settings({name: v for name, v in values.items() if name not in switches}, _VIDEO_DEFAULTS, file)
    if all(switches.values()):
        return settings
    if any(switches.values()):
        raise ModelLoadError(f"{file} sets {switches}; only both or neither is supported for Molmo 2", param="model")
    return dataclasses.replace(settings, normalization=_AS_IT_IS)


def _read_words(tokenizer: Tokenizer, values: Mapping[str, Any]) -> _Words:
    """Control tokens as ``processor_config.json`` wants them."""
    image_rows_end = values.get("image_use_col_tokens", True)
    whole_rows_end = values.get("use_single_crop_col_tokens")
    image = (token_id(tokenizer, "<im_start>"), token_id(tokenizer, "<im_end>"))
    has_own_start = values.get("use_single_crop_start_token", True)
    has_own_frame = values.get("use_frame_special_tokens", True)
    frame_tokens = ("<frame_start>", "<frame_end>")
    return _Words(
        patch=token_id(tokenizer, "<im_patch>"),
        row_end=token_id(tokenizer, "<im_col>"),
        image=image,
        whole=(token_id(tokenizer, "<low_res_im_start>"), image[1]) if has_own_start else image,
        frame=(token_id(tokenizer, frame_tokens[0]), token_id(tokenizer, frame_tokens[1])) if has_own_frame else image,
        image_rows_end=bool(image_rows_end),
        whole_rows_end=bool(image_rows_end if whole_rows_end is None else whole_rows_end),
        frame_rows_end=bool(values.get("video_use_col_tokens", False)),
    )


def select_tiling(height: int, width: int, size: int, most: int) -> tuple[int, int]:
    """Rows and columns of at most ``most`` tiles of ``size`` pixels to which an image is scaled up least.

    If it must be scaled down for all of them, those for which least. In the reference's arithmetic of float32, for sides of
    0 and less, too, which images smaller than the overlap of crops come to.
    """
    tilings = [
        (rows, columns) for rows, columns in itertools.product(range(1, most + 1), repeat=2) if rows * columns <= most
    ]
    tilings.sort(key=lambda tiling: (math.prod(tiling), tiling[0]))
    with np.errstate(divide="ignore"):
        scales = (np.array(tilings, np.float32) * size / np.array([height, width], np.float32)).min(axis=1)
    if (scales < 1).all():
        return tilings[int(scales.argmax())]
    return tilings[int(np.where(scales < 1, _TOO_SMALL, scales).argmin())]


def canvas_patches(rows: int, columns: int, side: int, left: int, right: int) -> np.ndarray:
    """Numbers of the patches that make a canvas of ``rows`` x ``columns`` crops of ``side`` x ``side`` patches; int (h, w).

    Of patches that neighbouring crops share, ``left`` are taken from the crop that ends there, ``right`` from the one that
    begins.
    """
    numbers = np.arange(rows * columns * side**2).reshape(rows, columns, side, side)

    def shown(index: int, count: int) -> slice:
        return slice(left if index else 0, side - (right if index < count - 1 else 0))

    return np.block(
        [
            [numbers[row, column, shown(row, rows), shown(column, columns)] for column in range(columns)]
            for row in range(rows)
        ]
    )


def pooled(numbers: np.ndarray, height: int, width: int) -> np.ndarray:
    """Windows of ``height`` x ``width`` in a grid of patch numbers: int32 (rows, columns, height * width).

    Where the grid is no multiple of windows, those at its edges have -1, one more behind than before.
    """
    missing = [-side % window for side, window in zip(numbers.shape, (height, width), strict=True)]
    padded = np.pad(numbers, [(total // 2, total - total // 2) for total in missing], constant_values=-1)
    rows, columns = padded.shape[0] // height, padded.shape[1] // width
    windows = padded.reshape(rows, height, columns, width).transpose(0, 2, 1, 3)
    return windows.reshape(rows, columns, height * width).astype(np.int32)


def _with_ends(
    windows: np.ndarray, around: tuple[int, int], patch: int, row_end: int | None
) -> tuple[tuple[int, ...], np.ndarray]:
    """Tokens for a grid of windows (rows, columns, patches) and their table, with a start, an end and ends of rows."""
    rows, columns, num_patches = windows.shape
    if row_end is not None:
        windows = np.concatenate([windows, np.full((rows, 1, num_patches), -1, np.int32)], axis=1)
    row = [patch] * columns + ([] if row_end is None else [row_end])
    nothing = np.full((1, num_patches), -1, np.int32)
    table = np.concatenate([nothing, windows.reshape(-1, num_patches), nothing])
    return (around[0], *row * rows, around[1]), table


def _joined(*parts: tuple[tuple[int, ...], np.ndarray]) -> tuple[tuple[int, ...], np.ndarray]:
    """One after the other."""
    token_ids = tuple(itertools.chain.from_iterable(ids for ids, _ in parts))
    return token_ids, np.concatenate([table for _, table in parts])
