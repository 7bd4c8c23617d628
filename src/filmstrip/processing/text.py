"""Checkpoints that read text only: prompts as the chat template writes them; takes no media."""

# ruff: noqa: ARG002  the arguments are the protocol's; without media none of them matters

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from filmstrip.config import MediaConfig, ProcessorConfig
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
    PixelLimits,
    VideoMetadata,
)


class TextProcessor:
    """Implements :class:`filmstrip.processing.base.Processor` for no modality: media are refused before they are fetched."""

    modalities: frozenset[Modality] = frozenset()

    def __init__(
        self,
        tokenizer: Tokenizer,
        files: CheckpointFiles,
        config: ProcessorConfig,
        media: MediaConfig,
    ) -> None:
        """Nothing to read: tokenizer and chat template are loaded beside."""

    def plan_image(self, metadata: ImageMetadata, pixels: PixelLimits) -> FramePlan:
        """Raises TypeError: nothing asks for a modality that is not in ``modalities``."""
        _refuse()

    def plan_video(
        self, metadata: VideoMetadata, sampling: FrameSampling, pixels: PixelLimits, *, presampled: bool
    ) -> FramePlan:
        """Raises TypeError, as :meth:`plan_image`."""
        _refuse()

    def normalization(self, modality: Modality) -> Normalization:
        """Raises TypeError, as :meth:`plan_image`."""
        _refuse()

    def expand(self, pieces: Sequence[str | int], media: Sequence[PlannedMedia]) -> list[Piece]:
        """The template's pieces, unchanged."""
        if media:
            _refuse()
        return list(pieces)

    def positions(self, assembled: Assembled) -> tuple[None, int]:
        """One position a token, which the engine counts itself."""
        return None, 0


def _refuse() -> NoReturn:
    raise TypeError("this model reads text only")
