"""Messages to a prompt the engine can run: the template's words, the media's pixels, positions; knows no engine.

Phase one loads headers and plans; then the prompt's length is known and checked; phase two decodes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from filmstrip.config import LLMConfig
from filmstrip.errors import ContextLengthError, InvalidRequestError
from filmstrip.media.loader import MediaLoader
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.chat_template import ChatTemplate
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.fitting import Fitting
from filmstrip.processing.media_pipeline import MediaPipeline, PlannedItem, ProcessedMedia
from filmstrip.processing.messages import Conversation, MediaOptions, parse_media_options, parse_messages
from filmstrip.processing.placeholders import Assembled, assemble, count_prompt_tokens
from filmstrip.processing.registry import create_processor
from filmstrip.processing.tasks import gather_or_cancel
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import (
    MediaFeature,
    MediaItem,
    MediaRecord,
    Modality,
    ProcessedPrompt,
    Progress,
    ProgressStage,
    TimeSeriesMetadata,
)

T = TypeVar("T")


class PromptBuilder:
    """Everything between a request's messages and the engine, for one checkpoint; runs on one event loop."""

    def __init__(self, config: LLMConfig) -> None:
        """Load tokenizer, chat template and preprocessor settings; raises ModelLoadError."""
        files = CheckpointFiles(config.engine.model, config.engine.revision)
        self.tokenizer = Tokenizer(config.engine.model, config.engine.revision, files.translation.control_tokens)
        self.generation_config = files.json("generation_config.json")
        # Before the template: files of what cannot be served may have none, which is then not the reason.
        self._processor = create_processor(self.tokenizer, files, config.processor, config.media)
        self._template = ChatTemplate(self.tokenizer, files, config.processor.chat_template)
        self._loader = MediaLoader(config.media)
        self.pipeline = MediaPipeline(
            self._loader,
            self._processor,
            int(config.media.media_cache_gb * 1024**3),
            config.media.max_video_duration_seconds,
        )
        self._max_items, self._limits = config.media.max_items_per_request, config.media.limit_mm_per_prompt
        self._default_options = MediaOptions(
            config.media.video, image_pixels=config.processor.image, video_pixels=config.processor.video
        )

    async def build(
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
        report: Callable[[Progress], None],
    ) -> ProcessedPrompt:
        """The prompt of a conversation, its media decoded; all of them at the same time.

        ``media_overflow`` "error" (or None) refuses media that do not fit the context, "fit" shows less of them.
        Raises the InvalidRequestError family, ContextLengthError before anything is decoded.
        """
        conversation = self.parse(messages, media_io_kwargs, mm_processor_kwargs)
        pieces = await self.render(
            conversation,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        fit = is_fit(media_overflow)
        return await self._prepare(pieces, conversation.items, max_model_len, report, fit=fit)

    def parse(
        self,
        messages: Sequence[Mapping[str, Any]],
        media_io_kwargs: Mapping[str, Any] | None,
        mm_processor_kwargs: Mapping[str, Any] | None,
    ) -> Conversation:
        """Messages and settings as a request gives them, checked; raises InvalidRequestError."""
        options = parse_media_options(media_io_kwargs, mm_processor_kwargs, self._default_options)
        return parse_messages(messages, options, max_items=self._max_items, limits=self._limits)

    async def render(
        self,
        conversation: Conversation,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[str | int]:
        """What the chat template makes of a conversation: texts, and one token for each media item."""
        return await asyncio.to_thread(
            self._template.render,
            conversation.messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )

    @contextlib.asynccontextmanager
    async def planned(
        self,
        pieces: list[str | int],
        items: Sequence[MediaItem],
        max_model_len: int,
        *,
        fit: bool,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> AsyncIterator[list[PlannedItem]]:
        """The items fetched and planned, with ``fit`` so that they fit the context; closed at the end."""
        fetched = _Counter("fetch", len(items), report)
        planned = await gather_or_cancel(
            [fetched.count(self.pipeline.plan(item, fit=fit)) for item in items], discard=PlannedItem.close
        )
        try:
            if fit and planned:
                less = await asyncio.to_thread(self._fitting_items, pieces, planned, max_model_len)
                for place, item in enumerate(less):
                    if item != planned[place].item:
                        note = _fit_note(planned[place], max_model_len)
                        planned[place] = self.pipeline.replan(planned[place], item, note)
            yield planned
        finally:
            for item in planned:
                item.close()

    def num_prompt_tokens(self, pieces: Sequence[str | int], media: Sequence[PlannedMedia]) -> int:
        """Tokens of a prompt, counted without laying it out: it may be far longer than any context."""
        expanded = self._processor.expand(list(pieces), media)
        return count_prompt_tokens(expanded, lambda text: len(self.tokenizer.encode_text(text)))

    async def start(self) -> None:
        """Get the decoders ready."""
        await self._loader.start()

    def stats(self) -> dict[str, Any]:
        """Counters of the media cache and the decoder processes."""
        return {
            "media_cache": vars(self.pipeline.stats).copy(),
            "media_workers": vars(self._loader.worker_stats).copy(),
        }

    async def close(self) -> None:
        """Stop downloads and decodes, drop what is cached."""
        await self.pipeline.close()

    async def _prepare(
        self,
        pieces: list[str | int],
        items: list[MediaItem],
        max_model_len: int,
        report: Callable[[Progress], None],
        *,
        fit: bool,
    ) -> ProcessedPrompt:
        async with self.planned(pieces, items, max_model_len, fit=fit, report=report) as planned:
            assembled = await asyncio.to_thread(self._assemble_checked, pieces, planned, max_model_len)
            amounts = [item.media.num_frames or 1 for item in planned]  # a time series counts as one frame
            decoded = _Counter("decode", sum(amounts), report)
            ready = await gather_or_cancel(
                [decoded.count(self.pipeline.read(item), amount) for item, amount in zip(planned, amounts, strict=True)]
            )
        if any(now.media != before.media for now, before in zip(ready, planned, strict=True)):
            # A damaged clip showed other frames than planned: the prompt must name their times.
            for item, shown in zip(planned, ready, strict=True):
                item.media = shown.media
            assembled = await asyncio.to_thread(self._assemble_checked, pieces, planned, max_model_len)
        features = tuple(self._feature(item, assembled, i) for i, item in enumerate(ready))
        records = tuple(
            _record(item, feature, cached=before.processed is not None, notes=before.notes)
            for item, feature, before in zip(ready, features, planned, strict=True)
        )
        positions, delta = self._processor.positions(assembled)
        return ProcessedPrompt(assembled.token_ids, features, positions, delta, records)

    def _feature(self, item: ProcessedMedia, assembled: Assembled, number: int) -> MediaFeature:
        modality, segments = item.media.modality, assembled.segments(number)
        if isinstance(item.metadata, TimeSeriesMetadata):
            hop = item.media.series.hop
            return MediaFeature(modality, item.patches, (1, 1, 1), None, item.media_hash, segments, hop=hop)
        plan = item.media.plan
        return MediaFeature(
            modality,
            item.patches,
            plan.grid_thw,
            self._processor.normalization(modality),
            item.media_hash,
            segments,
            source_size=(item.metadata.height, item.metadata.width),
            segment_grids=plan.segment_grids,
            pooling=assembled.pooling(number),
        )

    def _assemble(self, pieces: list[str | int], media: Sequence[PlannedMedia]) -> Assembled:
        return assemble(self._processor.expand(pieces, media), self.tokenizer.encode_text)

    def _assemble_checked(self, pieces: list[str | int], planned: list[PlannedItem], max_model_len: int) -> Assembled:
        """The prompt's tokens; raises ContextLengthError, at once if the media alone are too many to lay them out."""
        media_tokens = sum(item.media.num_tokens for item in planned)
        num_tokens = media_tokens
        if media_tokens < max_model_len:
            assembled = self._assemble(pieces, [item.media for item in planned])
            num_tokens = len(assembled.token_ids)
            if num_tokens < max_model_len:
                return assembled
        message = (
            f"the prompt has {num_tokens} tokens ({media_tokens} of them media), but prompt and answer together may have "
            f"{max_model_len} (--max-model-len)"
            if num_tokens > media_tokens
            else f"the media alone have {media_tokens} tokens, but prompt and answer together may have {max_model_len} "
            "(--max-model-len)"
        )
        if planned:
            message += "; " + self._fitting(pieces, planned, max_model_len).advice()
        raise ContextLengthError(message, param="messages")

    def _fitting(self, pieces: list[str | int], planned: list[PlannedItem], max_model_len: int) -> Fitting:
        def plan(item: MediaItem, before: PlannedItem) -> PlannedMedia:
            return self.pipeline.plan_media(item, before.metadata)

        def fits(media: Sequence[PlannedMedia]) -> bool:
            if sum(each.num_tokens for each in media) >= max_model_len:
                return False
            return len(self._assemble(pieces, media).token_ids) < max_model_len

        return Fitting(planned, plan, fits)

    def _fitting_items(
        self, pieces: list[str | int], planned: list[PlannedItem], max_model_len: int
    ) -> list[MediaItem]:
        """The items, asking for less where that makes them fit; unchanged if they fit already, or never do."""
        fitting = self._fitting(pieces, planned, max_model_len)
        fitted = None if fitting.fits_now() else fitting.fit()
        return fitted or [item.item for item in planned]


class _Counter:
    """Reports how much of a stage is done as its parts complete."""

    def __init__(self, stage: ProgressStage, total: int, report: Callable[[Progress], None]) -> None:
        self._stage: ProgressStage = stage
        self._total, self._report, self._done = total, report, 0
        if total:
            report(Progress(stage, 0, total))

    async def count(self, awaitable: Awaitable[T], amount: int = 1) -> T:
        result = await awaitable
        self._done += amount
        self._report(Progress(self._stage, self._done, self._total))
        return result


def is_fit(media_overflow: str | None) -> bool:
    """Whether a request asks to be shown less rather than refused; raises InvalidRequestError for other words."""
    if media_overflow not in (None, "error", "fit"):
        raise InvalidRequestError(
            f'media_overflow must be "error" or "fit", not {media_overflow!r:.80}', param="media_overflow"
        )
    return media_overflow == "fit"


def _fit_note(before: PlannedItem, max_model_len: int) -> str:
    plan = before.media.plan
    frames = f"{len(plan.frame_indices)} frames of " if before.media.modality is Modality.VIDEO else ""
    return (
        f"shown with less than the {frames}{plan.width} x {plan.height} pixels planned, to fit the context of "
        f"{max_model_len} tokens (media_overflow)"
    )


def _record(item: ProcessedMedia, feature: MediaFeature, *, cached: bool, notes: tuple[str, ...]) -> MediaRecord:
    is_video = item.media.modality is Modality.VIDEO
    series = item.media.series if item.media.modality is Modality.TIME_SERIES else None
    return MediaRecord(
        type=item.media.modality.value,
        num_frames=len(item.frame_indices),
        frame_indices=list(item.frame_indices) if is_video else [],
        timestamps=list(item.media.timestamps),
        height=item.media.height,
        width=item.media.width,
        num_tokens=sum(segment.length for segment in feature.segments),
        cached=cached,
        notes=[*item.notes, *notes],
        num_samples=None if series is None else series.num_samples,
        num_channels=None if series is None else series.num_channels,
    )
