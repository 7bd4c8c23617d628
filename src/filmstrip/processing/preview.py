"""Messages to what would be looked at and what it would cost: planned from headers alone; and small pictures of it.

Asks :mod:`filmstrip.processing.prompt_builder` and :mod:`filmstrip.processing.media_pipeline` what an answer would ask, so a
preview says what an answer shows. Knows no HTTP and no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from filmstrip.media.contact_sheet import frames_from, thumbnail_plan
from filmstrip.media.loader import Metadata
from filmstrip.media.modalities import evenly_spread
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.fitting import Fitting
from filmstrip.processing.media_pipeline import MediaPipeline, PlannedItem
from filmstrip.processing.prompt_builder import PromptBuilder, is_fit
from filmstrip.processing.tasks import gather_or_cancel
from filmstrip.types import FramePlan, MediaItem, Modality, VideoMetadata

_CONSTANT_RATE_SECONDS = 1e-3
"""Frames of a constant rate stand this near to ``index / fps``, whatever unit the container counts time in."""


@dataclass(frozen=True)
class ItemPreview:
    """One media item: what its header says, and what of it would be shown to the model.

    ``is_cached``: its pixels or samples are ready, nothing would be decoded.
    """

    item: MediaItem
    media: PlannedMedia
    metadata: Metadata
    num_bytes: int
    is_cached: bool
    notes: tuple[str, ...]

    @property
    def modality(self) -> Modality:
        """What kind of media it is."""
        return self.media.modality

    @property
    def plan(self) -> FramePlan:
        """Which frames would be shown, and how large; TypeError for a time series."""
        return self.media.plan

    @property
    def timestamps(self) -> tuple[float, ...]:
        """Seconds, one for each frame of a video; else empty."""
        return self.media.timestamps

    @property
    def num_tokens(self) -> int:
        """Placeholders, without the words around them."""
        return self.media.num_tokens

    @property
    def frame_indices(self) -> tuple[int, ...]:
        """Frames of a video that would be shown; else empty."""
        return self.plan.frame_indices if self.modality is Modality.VIDEO else ()

    def description(self) -> dict[str, Any]:
        """All of it as JSON takes it; what does not apply to this kind of media is left out of ``facts``."""
        return {
            "type": self.modality.value,
            "facts": {"num_bytes": self.num_bytes, **_facts(self.metadata)},
            "num_frames": self.media.num_frames,
            "frame_indices": list(self.frame_indices),
            "timestamps": list(self.timestamps),
            "width": self.media.width,
            "height": self.media.height,
            "num_tokens": self.num_tokens,
            "cached": self.is_cached,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class FittedItem:
    """What ``media_overflow`` "fit" would show of an item instead."""

    num_frames: int
    height: int
    width: int
    num_tokens: int


@dataclass(frozen=True)
class PromptPreview:
    """What a conversation would cost.

    ``num_prompt_tokens`` counts everything: words, media, the template's own. It ``fits`` if at least one token is left for
    an answer. If it does not, ``advice`` says what to change, and ``fitted`` what the server would show if it may choose
    (None: nothing would help).
    """

    items: tuple[ItemPreview, ...]
    num_prompt_tokens: int
    num_media_tokens: int
    max_model_len: int
    fits: bool
    advice: str | None = None
    fitted: tuple[FittedItem, ...] | None = None


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures of frames that a plan has: all of them, or ``num_planned`` evenly thinned out.

    ``frames`` is uint8 (num_frames, height, width, 3); ``frame_indices`` and ``timestamps`` (seconds) are of the frames
    really delivered, both empty for a picture. A time series has no frames.
    """

    modality: Modality
    frames: np.ndarray
    frame_indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    num_planned: int


def is_variable_rate(metadata: VideoMetadata) -> bool:
    """Whether the clip's frames stand elsewhere than at ``index / fps``."""
    expected = np.arange(metadata.total_num_frames) / metadata.fps
    return bool(np.abs(metadata.timestamps - expected).max() > _CONSTANT_RATE_SECONDS)


def _facts(metadata: Metadata) -> dict[str, Any]:
    """What a header says, as JSON takes it: without the times of all frames."""
    facts = {name: value for name, value in vars(metadata).items() if name != "timestamps"}
    if isinstance(metadata, VideoMetadata):
        facts["variable_frame_rate"] = is_variable_rate(metadata)
    return facts


def preview_item(planned: PlannedItem) -> ItemPreview:
    """What is known of an item once it is planned."""
    return ItemPreview(
        planned.item,
        planned.media,
        planned.metadata,
        planned.fetched.num_bytes,
        planned.processed is not None,
        planned.notes,
    )


async def read_thumbnails(
    pipeline: MediaPipeline, planned: PlannedItem, *, max_edge: int, max_frames: int
) -> Thumbnails:
    """Decode the planned frames small, at most ``max_frames`` of them; raises as :meth:`MediaLoader.read`.

    They are never larger than what the model sees, so nothing shows here that the model could not see. A time series has
    no pictures.
    """
    if planned.media.modality is Modality.TIME_SERIES:
        return Thumbnails(planned.media.modality, np.empty((0, 0, 0, 3), np.uint8), (), (), 0)
    plan = planned.media.plan
    wanted = evenly_spread(plan.frame_indices, max_frames)
    small = thumbnail_plan(wanted, plan.height, plan.width, max_edge)
    loader = pipeline.loader
    opened = planned.opened or await loader.open(planned.fetched)  # what is cached has no open file
    try:
        patches, delivered = await loader.read(opened, small)
    finally:
        opened.close()
    timestamps: tuple[float, ...] = ()
    if isinstance(planned.metadata, VideoMetadata):
        timestamps = tuple(planned.metadata.timestamps[list(delivered)].tolist())
    return Thumbnails(
        planned.media.modality,
        frames_from(patches, small),
        delivered if timestamps else (),
        timestamps,
        len(plan.frame_indices),
    )


class Previewer:
    """Plans requests as a :class:`PromptBuilder` would, and stops there. Runs on the builder's event loop."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts

    async def preview(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_model_len: int,
        media_io_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        media_overflow: str | None = None,
    ) -> PromptPreview:
        """What an answer to ``messages`` would look at, and whether that fits ``max_model_len`` tokens.

        Fetches the media and reads their headers; decodes nothing. Raises the InvalidRequestError family for what an answer
        would be refused for, except for a prompt that is too long.
        """
        conversation = self._prompts.parse(messages, media_io_kwargs, mm_processor_kwargs)
        pieces = await self._prompts.render(
            conversation,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        fit = is_fit(media_overflow)
        async with self._prompts.planned(pieces, conversation.items, max_model_len, fit=fit) as planned:
            return await asyncio.to_thread(self._preview, pieces, planned, max_model_len)

    async def thumbnails(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_model_len: int,
        max_edge: int,
        max_thumbnails: int,
        media_io_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        media_overflow: str | None = None,
    ) -> list[Thumbnails]:
        """Small pictures of the frames that :meth:`preview` names, item by item; all items are decoded at the same time.

        ``max_thumbnails`` are shared out evenly, at least one for each item. Raises as :meth:`preview`, and the MediaError
        family for what cannot be decoded.
        """
        conversation = self._prompts.parse(messages, media_io_kwargs, mm_processor_kwargs)
        pieces: list[str | int] = []
        fit = is_fit(media_overflow)
        if fit:  # only then the words have a say in which frames are shown
            pieces = await self._prompts.render(
                conversation,
                chat_template_kwargs=chat_template_kwargs,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        share = max(1, max_thumbnails // max(len(conversation.items), 1))
        async with self._prompts.planned(pieces, conversation.items, max_model_len, fit=fit) as planned:
            reads = [
                read_thumbnails(self._prompts.pipeline, item, max_edge=max_edge, max_frames=share) for item in planned
            ]
            return await gather_or_cancel(reads)

    def _preview(self, pieces: list[str | int], planned: list[PlannedItem], max_model_len: int) -> PromptPreview:
        media = [item.media for item in planned]
        num_tokens = self._prompts.num_prompt_tokens(pieces, media)
        fits = num_tokens < max_model_len
        advice, fitted = None, None
        if not fits and planned:
            fitting = Fitting(
                planned,
                lambda item, before: self._prompts.pipeline.plan_media(item, before.metadata),
                lambda less: self._prompts.num_prompt_tokens(pieces, less) < max_model_len,
            )
            advice = fitting.advice()
            fitted = self._fitted(fitting.fit(), planned)
        items = tuple(preview_item(item) for item in planned)
        num_media_tokens = sum(item.num_tokens for item in items)
        return PromptPreview(items, num_tokens, num_media_tokens, max_model_len, fits, advice, fitted)

    def _fitted(self, items: list[MediaItem] | None, planned: list[PlannedItem]) -> tuple[FittedItem, ...] | None:
        if items is None:
            return None
        media = [
            self._prompts.pipeline.plan_media(item, before.metadata)
            for item, before in zip(items, planned, strict=True)
        ]
        return tuple(FittedItem(each.num_frames, each.height, each.width, each.num_tokens) for each in media)
