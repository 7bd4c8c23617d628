"""What a family's processor does: plan what to look at, and say how media stand in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from filmstrip.processing.placeholders import Assembled, Piece
from filmstrip.types import (
    FramePlan,
    FrameSampling,
    ImageMetadata,
    Modality,
    Normalization,
    PixelLimits,
    SeriesPlan,
    TimeSeriesMetadata,
    VideoMetadata,
)


@dataclass(frozen=True)
class PlannedMedia:
    """One media item between planning and decoding; ``timestamps`` are seconds, one per frame of the plan.

    ``seconds_per_frame`` is a video's: the length of what is shown over the number of frames that show it. ``sampling``
    is what was asked of its frames; None if the client picked them.
    """

    modality: Modality
    shown: FramePlan | SeriesPlan
    timestamps: tuple[float, ...] = ()
    seconds_per_frame: float = 0.0
    sampling: FrameSampling | None = None

    @property
    def plan(self) -> FramePlan:
        """What is shown of a picture or a video; TypeError for a time series."""
        if not isinstance(self.shown, FramePlan):
            raise TypeError(f"a {self.modality} has no frames")
        return self.shown

    @property
    def series(self) -> SeriesPlan:
        """What is shown of a time series; TypeError for anything else."""
        if not isinstance(self.shown, SeriesPlan):
            raise TypeError(f"a {self.modality} has no samples")
        return self.shown

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens of the item."""
        return self.shown.num_tokens

    @property
    def num_frames(self) -> int:
        """Frames that are shown: 1 of a picture, none of a time series."""
        return len(self.shown.frame_indices) if isinstance(self.shown, FramePlan) else 0

    @property
    def height(self) -> int:
        """Height at which pixels are shown; 0 for a time series."""
        return self.shown.height if isinstance(self.shown, FramePlan) else 0

    @property
    def width(self) -> int:
        """Width at which pixels are shown; 0 for a time series."""
        return self.shown.width if isinstance(self.shown, FramePlan) else 0


class Processor(Protocol):
    """One model family's view of pixels, tokens and positions; knows no weights and opens no file."""

    modalities: frozenset[Modality]
    """Kinds of media that the model takes."""

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """Size at which an image is shown. Raises MediaError for a shape the model cannot take."""
        ...

    def plan_video(
        self, metadata: VideoMetadata, sampling: FrameSampling, pixels: PixelLimits, *, presampled: bool
    ) -> FramePlan:
        """Frames to show, and at which size. ``presampled``: the client chose the frames, all it wants are shown."""
        ...

    def normalization(self, modality: Modality) -> Normalization:
        """How the model's pixels are normalised."""
        ...

    def expand(self, pieces: Sequence[str | int], media: Sequence[PlannedMedia]) -> list[Piece]:
        """Put every item's placeholders (and words, e.g. times) where the chat template left its mark.

        Raises InvalidRequestError when the template shows another number of items than there are.
        """
        ...

    def positions(self, assembled: Assembled) -> tuple[np.ndarray | None, float]:
        """M-RoPE positions, int32 or float32 (3, num_tokens), and generated tokens' delta; (None, 0) if there are none."""
        ...


class TimeSeriesProcessor(Processor, Protocol):
    """The processor of a family that takes time series; it has that modality."""

    def plan_time_series(self, metadata: TimeSeriesMetadata) -> SeriesPlan:
        """How much of a series is shown, in which windows. Raises MediaError for one that the model cannot take."""
        ...

    def normalize_time_series(self, samples: np.ndarray, out: np.ndarray) -> None:
        """Write as many of the ``samples``, float32 (num_samples, num_channels), as ``out`` has room for, normalised."""
        ...
