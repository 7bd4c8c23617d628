"""What families that see pictures as square tiles have in common: settings, frames, placeholders; knows no family.

Reference: Transformers' image and video processors on torchvision, whose settings the checkpoint's files hold.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import InvalidRequestError, ModelLoadError
from filmstrip.media.sampling import candidate_range, given_frame_indices, is_explicit, sample_frame_indices
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Assembled, Piece
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import (
    FramePlan,
    FrameSampling,
    ImageMetadata,
    Modality,
    Normalization,
    PatchLayout,
    PixelLimits,
    Resample,
    VideoMetadata,
    View,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_NUM_FRAMES = 32
"""Frames of a video where a checkpoint names no rule: the references then show all of a clip, minutes of it, too."""

_RESAMPLES: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
_RESCALE = 1 / 255


@dataclass(frozen=True)
class PixelSettings:
    """A checkpoint's preprocessor settings for one modality; ``values`` are all of them, defaults filled in."""

    size: int
    """Sides of a tile."""
    normalization: Normalization
    resample: Resample
    values: Mapping[str, Any]

    @property
    def layout(self) -> PatchLayout:
        """Each tile is one row."""
        return PatchLayout(self.size, 1, 1)


def parse_pixel_settings(
    values: Mapping[str, Any], defaults: Mapping[str, Any], file: str, *, size_key: str = "size"
) -> PixelSettings:
    """Settings from a preprocessor's JSON, with its class's defaults; ModelLoadError for what cannot be reproduced.

    ``size_key`` names the field with a tile's size: an object with ``height`` and ``width``, or one number.
    """
    merged = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if merged.get(name, True) is not True:
            raise ModelLoadError(f"{file} sets {name} to {merged[name]!r}; only True is supported", param="model")
    if merged["resample"] not in _RESAMPLES:
        raise ModelLoadError(
            f"{file} sets resample to {merged['resample']!r}; only 2 (bilinear) and 3 (bicubic) are supported",
            param="model",
        )
    if not math.isclose(merged.get("rescale_factor", _RESCALE), _RESCALE, rel_tol=1e-6):
        raise ModelLoadError(
            f"{file} sets rescale_factor to {merged['rescale_factor']}; only 1/255 is supported", param="model"
        )
    return PixelSettings(
        square_side(merged[size_key], f"{size_key} in {file}"),
        Normalization(tuple(merged["image_mean"]), tuple(merged["image_std"])),
        _RESAMPLES[merged["resample"]],
        merged,
    )


def square_side(size: Any, what: str) -> int:
    """The side of a square given as a number, a pair or ``{"height", "width"}``; ModelLoadError if it is none."""
    if isinstance(size, Mapping):
        sides = (size.get("height"), size.get("width"))
    elif isinstance(size, Sequence):
        sides = tuple(size)
    else:
        sides = (size, size)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise ModelLoadError(f"{what} must be a square, not {size!r}", param="model")
    return sides[0]


def max_tiles(pixels: PixelLimits, size: int, most: int) -> int:
    """Tiles that an image may have: at most ``most``, fewer where ``max_pixels`` asks for less, but one."""
    return most if pixels.max_pixels is None else min(most, max(1, pixels.max_pixels // size**2))


class TileProcessor:
    """A base for :class:`filmstrip.processing.base.Processor`: subclasses say what a picture becomes and its words.

    Positions are plain. ``mm_processor_kwargs`` ``max_pixels`` bounds the number of an image's tiles where that can be
    chosen; a tile's size is the model's and never changes.
    """

    modalities: frozenset[Modality]
    settings: dict[Modality, PixelSettings]
    """One for each modality, set by the subclass."""
    tokens: dict[int, Modality]
    """What the chat template writes for an item, set by the subclass."""

    def __init__(self, tokenizer: Tokenizer, config: ProcessorConfig, media: MediaConfig) -> None:  # noqa: ARG002
        self._max_video_frames = media.max_video_frames
        self._first_ids = tokenizer.first_ids

    def normalization(self, modality: Modality) -> Normalization:
        """Mean and deviation of the modality's preprocessor."""
        return self.settings[modality].normalization

    def positions(self, assembled: Assembled) -> tuple[np.ndarray | None, int]:  # noqa: ARG002 - the protocol's
        """One position a token, which the engine counts itself."""
        return None, 0

    @abstractmethod
    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """What of an image is shown."""

    def plan_video(
        self,
        metadata: VideoMetadata,
        sampling: FrameSampling,
        pixels: PixelLimits,  # noqa: ARG002 - a frame is always one tile
        *,
        presampled: bool,
    ) -> FramePlan:
        """Frames by what was asked for, else by the checkpoint's own rule; each is one tile, resized without its shape."""
        settings = self.settings[Modality.VIDEO]
        frames = self._frame_indices(metadata, sampling, presampled)
        size = settings.size
        view = View(size, size, size, size)
        num_tokens = self.num_video_tokens(len(frames))
        return FramePlan(frames, size, size, settings.layout, (view,), settings.resample, num_tokens)

    def num_video_tokens(self, num_frames: int) -> int:
        """Placeholder tokens of a video; for families that take videos."""
        raise NotImplementedError

    def item_pieces(self, item: int, media: PlannedMedia) -> Iterator[Piece]:
        """What stands in the prompt for an item."""
        raise NotImplementedError

    def default_frames(self, count: int, fps: float) -> np.ndarray:
        """The checkpoint's own choice among ``count`` frames at ``fps``, ascending; int (n,).

        Transformers' ``default_sample_indices_fn``: ``num_frames`` or else ``fps`` of the video processor.
        """
        values = self.settings[Modality.VIDEO].values
        num_frames = default_num_frames(values, count, fps)
        return np.arange(num_frames) * count // num_frames

    def expand(self, pieces: Sequence[str | int], media: Sequence[PlannedMedia]) -> list[Piece]:
        """Replace each media token of the template by what stands for its item.

        Raises InvalidRequestError when the template shows another number of items than there are.
        """
        waiting = {
            modality: iter([i for i, item in enumerate(media) if item.modality is modality])
            for modality in self.modalities
        }
        first = [] if list(pieces[: len(self._first_ids)]) == self._first_ids else self._first_ids
        expanded: list[Piece] = list(first)
        for piece in pieces:
            modality = self.tokens.get(piece) if isinstance(piece, int) else None
            if modality is None:
                expanded.append(piece)
                continue
            item = next(waiting[modality], None)
            if item is None:
                raise InvalidRequestError(
                    f"the chat template shows an {modality} that the messages do not have", param="messages"
                )
            expanded.extend(self.item_pieces(item, media[item]))
        if any(next(items, None) is not None for items in waiting.values()):
            raise InvalidRequestError(
                "the chat template does not show all media of the messages; attach them to user messages",
                param="messages",
            )
        return expanded

    def _frame_indices(self, metadata: VideoMetadata, sampling: FrameSampling, presampled: bool) -> tuple[int, ...]:
        limit = self._max_video_frames
        if presampled:
            return given_frame_indices(metadata, sampling, max_frames=limit)
        if is_explicit(sampling):
            return sample_frame_indices(metadata, sampling, max_frames=limit)
        first, last = candidate_range(metadata, sampling)
        chosen = self.default_frames(last - first + 1, metadata.fps)
        low, high = sampling.min_frames or 1, min(limit, sampling.max_frames or limit)
        if not low <= len(chosen) <= high:
            explicit = FrameSampling(
                num_frames=min(max(len(chosen), low), high),
                start_seconds=sampling.start_seconds,
                end_seconds=sampling.end_seconds,
            )
            return sample_frame_indices(metadata, explicit, max_frames=limit)
        return tuple((first + chosen).tolist())


def default_num_frames(values: Mapping[str, Any], count: int, fps: float) -> int:
    """Frames that a video processor's settings ask for of ``count`` at ``fps``; at least 1, at most all."""
    num_frames = DEFAULT_NUM_FRAMES
    if values.get("num_frames"):
        num_frames = values["num_frames"]
    elif values.get("fps"):
        num_frames = int(count / fps * values["fps"])
    return min(max(num_frames, 1), count)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a control token; ModelLoadError if the tokenizer has none."""
    if token not in tokenizer.special_tokens:
        raise ModelLoadError(f"the tokenizer has no control token {token}", param="model")
    return tokenizer.special_tokens[token]


def video_section(files: CheckpointFiles) -> dict[str, Any]:
    """A video processor's settings; as in Transformers those for images where a checkpoint has none of their own."""
    return files.processor_section("video_processor", "video_preprocessor_config.json") or image_section(files)


def image_section(files: CheckpointFiles) -> dict[str, Any]:
    """An image processor's settings."""
    return files.processor_section("image_processor", "preprocessor_config.json")
