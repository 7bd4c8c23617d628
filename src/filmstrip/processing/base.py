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
    VideoMetadata,
)


@dataclass(frozen=True)
class PlannedMedia:
    """One media item between planning and decoding; ``timestamps`` are seconds, one per frame of the plan.

    ``seconds_per_frame`` is a video's: the length of what is shown over the number of frames that show it.
    """

    modality: Modality
    plan: FramePlan
    timestamps: tuple[float, ...]
    seconds_per_frame: float = 0.0


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
        """Frames to show, and at which size. ``presampled``: the client chose the frames, all are shown."""
        ...

    def normalization(self, modality: Modality) -> Normalization:
        """How the model's pixels are normalised."""
        ...

    def expand(self, pieces: Sequence[str | int], media: Sequence[PlannedMedia]) -> list[Piece]:
        """Put every item's placeholders (and words, e.g. times) where the chat template left its mark.

        Raises InvalidRequestError when the template shows another number of items than there are.
        """
        ...

    def positions(self, assembled: Assembled) -> tuple[np.ndarray | None, int]:
        """M-RoPE positions (3, num_tokens) and the delta for generated tokens; (None, 0) where the model uses none."""
        ...
