"""Media items to features: fetch, plan, and read pixels, sharing work between requests; knows no engine.

Two phases, so that a prompt's length is known before anything is decoded: :meth:`MediaPipeline.plan` fetches and looks at
the header, :meth:`MediaPipeline.read` decodes. What was read is kept, up to a byte budget, under the hash of the bytes and
of every option that changes pixels or tokens; a second question about a clip opens and decodes nothing. Requests that want
the same pixels at the same time wait for one decode.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from filmstrip.errors import InvalidRequestError, MediaTooLargeError
from filmstrip.media.frames import is_presampled
from filmstrip.media.loader import FetchedMedia, MediaLoader, Metadata, OpenedMedia
from filmstrip.media.sampling import candidate_range, shown_seconds
from filmstrip.processing.base import PlannedMedia, Processor, TimeSeriesProcessor
from filmstrip.shared_tensor import SharedTensor, max_kept_tensors
from filmstrip.types import FramePlan, ImageMetadata, MediaItem, Modality, SeriesPlan, TimeSeriesMetadata, VideoMetadata


@dataclass(frozen=True)
class ProcessedMedia:
    """One item's pixels and what they show; ``frame_indices`` and ``timestamps`` are of the frames really delivered."""

    media: PlannedMedia
    metadata: Metadata
    media_hash: str
    frame_indices: tuple[int, ...]
    patches: SharedTensor
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Memory it keeps."""
        timestamps = self.metadata.timestamps.nbytes if isinstance(self.metadata, VideoMetadata) else 0
        return self.patches.num_bytes + timestamps


@dataclass
class PlannedItem:
    """One item of a request after planning; ``processed`` is set when it came from the cache.

    ``notes`` is what people should know of how it was planned.
    """

    item: MediaItem
    media: PlannedMedia
    metadata: Metadata
    fetched: FetchedMedia
    cache_key: str
    media_hash: str
    opened: OpenedMedia | None = None
    processed: ProcessedMedia | None = None
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        """Release the open file, if any; may be called twice."""
        opened, self.opened = self.opened, None
        if opened is not None:
            opened.close()


@dataclass
class _Decode:
    """A decode under way and how many requests wait for it."""

    task: asyncio.Task[ProcessedMedia]
    num_waiting: int = 0


@dataclass
class MediaCacheStats:
    """Counters of the processed-media cache; items that are refused count as neither hit nor miss."""

    hits: int = 0
    misses: int = 0
    num_bytes: int = 0
    num_items: int = 0


class MediaPipeline:
    """Runs on one event loop; ``max_cache_bytes`` bounds what is kept between requests.

    ``max_video_duration_seconds`` bounds the part of a video that is looked at.
    """

    def __init__(
        self,
        loader: MediaLoader,
        processor: Processor,
        max_cache_bytes: int,
        max_video_duration_seconds: float | None = None,
    ) -> None:
        self.stats = MediaCacheStats()
        self._max_video_duration_seconds = max_video_duration_seconds
        self.loader, self._processor, self._max_cache_bytes = loader, processor, max_cache_bytes
        self._max_cache_items = max_kept_tensors()
        self._cache: OrderedDict[str, ProcessedMedia] = OrderedDict()
        self._decodes: dict[str, _Decode] = {}

    async def close(self) -> None:
        """Stop what is under way and drop what is kept."""
        for decode in list(self._decodes.values()):
            decode.task.cancel()
        self._cache.clear()
        await self.loader.close()

    async def plan(self, item: MediaItem, *, fit: bool = False) -> PlannedItem:
        """Fetch ``item`` and decide what of it is shown; raises the MediaError family.

        ``fit``: look at the beginning of a part that is longer than the server allows, instead of refusing it.
        """
        if item.type not in self._processor.modalities:
            taken = " and ".join(sorted(f"{modality}_url" for modality in self._processor.modalities))
            message = f"the model takes no {item.type}_url; it takes {taken or 'text only'}"
            raise InvalidRequestError(message, param=item.param)
        fetched = await self.loader.fetch(item)
        processed = self._cached(_cache_key(fetched))
        if processed is not None:
            self.stats.hits += 1
            return _planned(fetched, processed.media, processed.metadata, processed=processed)
        opened = await self.loader.open(fetched)
        try:
            item, notes = self._within_duration(item, opened.metadata, fit=fit)
            fetched = dataclasses.replace(fetched, item=item)
            # Of a video that is cut it is known only now what is asked for.
            processed = self._cached(_cache_key(fetched)) if notes else None
            media = self.plan_media(item, opened.metadata) if processed is None else processed.media
        except BaseException:
            opened.close()
            raise
        if processed is not None:
            opened.close()
            self.stats.hits += 1
            return _planned(fetched, media, processed.metadata, processed=processed, notes=notes)
        self.stats.misses += 1
        return _planned(fetched, media, opened.metadata, opened=opened, notes=notes)

    def replan(self, planned: PlannedItem, item: MediaItem, note: str) -> PlannedItem:
        """The same bytes with other wishes, which takes over the open file; ``note`` says so in the item's record."""
        if item == planned.item:
            return planned
        fetched = dataclasses.replace(planned.fetched, item=item)
        media = self.plan_media(item, planned.metadata)
        processed = self._cached(_cache_key(fetched))
        opened, planned.opened = planned.opened, None
        notes = (*planned.notes, note)
        again = _planned(fetched, media, planned.metadata, opened=opened, processed=processed, notes=notes)
        if processed is not None:
            again.close()
        return again

    def _within_duration(self, item: MediaItem, metadata: Metadata, *, fit: bool) -> tuple[MediaItem, tuple[str, ...]]:
        """``item`` as it may be looked at, and what was changed; MediaTooLargeError if nothing may be changed."""
        limit = self._max_video_duration_seconds
        if limit is None or not isinstance(metadata, VideoMetadata) or is_presampled(item):
            return item, ()
        with _about(item):
            seconds = shown_seconds(metadata, item.sampling)
        if seconds <= limit:
            return item, ()
        if not fit:
            raise MediaTooLargeError(
                f"the part of the video to look at is {seconds:.1f} seconds long; the limit is {limit:g} "
                "(max_video_duration_seconds, --max-video-duration-seconds); choose a part with start and end",
                param=item.param,
            )
        start = item.sampling.start_seconds or 0.0
        sampling = dataclasses.replace(item.sampling, end_seconds=start + limit)
        note = f"only {limit:g} of {seconds:.1f} seconds are looked at (max_video_duration_seconds)"
        return dataclasses.replace(item, sampling=sampling), (note,)

    def plan_media(self, item: MediaItem, metadata: Metadata) -> PlannedMedia:
        """The model's choice of frames and size, or of samples, for ``item``, from what its header says."""
        with _about(item):
            if isinstance(metadata, TimeSeriesMetadata):
                return PlannedMedia(Modality.TIME_SERIES, self._time_series.plan_time_series(metadata))
            if isinstance(metadata, ImageMetadata):
                plan = self._processor.plan_image(metadata, item.pixels)
                return PlannedMedia(Modality.IMAGE, plan, ())
            plan = self._processor.plan_video(metadata, item.sampling, item.pixels, presampled=is_presampled(item))
        times = _timestamps(metadata, plan.frame_indices)
        sampling = None if is_presampled(item) else item.sampling
        return PlannedMedia(Modality.VIDEO, plan, times, _seconds_per_frame(metadata, item, plan), sampling)

    async def read(self, planned: PlannedItem) -> ProcessedMedia:
        """Pixels of a planned item, whose open file it takes over. Requests for the same pixels share one decode."""
        if planned.processed is not None:
            return planned.processed
        ready = self._cached(planned.cache_key)
        if ready is not None:
            planned.close()
            return ready
        if planned.opened is None and planned.cache_key not in self._decodes:
            planned.opened = await self.loader.open(planned.fetched)  # what was cached is not what is wanted now
        decode = self._decodes.get(planned.cache_key)
        if decode is None:
            decode = self._start_decode(planned)
        else:
            planned.close()
        decode.num_waiting += 1
        try:
            return await asyncio.shield(decode.task)
        finally:
            decode.num_waiting -= 1
            if decode.num_waiting == 0:  # nobody is left to want it
                self._forget(planned.cache_key, decode)
                decode.task.cancel()

    def _start_decode(self, planned: PlannedItem) -> _Decode:
        # The open file belongs to the decode from here on: the request that brought it may go while others wait.
        opened, planned.opened = planned.opened, None
        assert opened is not None
        decode = _Decode(asyncio.create_task(self._decode(planned, opened)))
        self._decodes[planned.cache_key] = decode

        def ended(_: asyncio.Task[ProcessedMedia]) -> None:  # a callback, because a task may be cancelled unstarted
            opened.close()
            self._forget(planned.cache_key, decode)

        decode.task.add_done_callback(ended)
        return decode

    def _forget(self, key: str, decode: _Decode) -> None:
        if self._decodes.get(key) is decode:
            del self._decodes[key]

    async def _decode(self, planned: PlannedItem, opened: OpenedMedia) -> ProcessedMedia:
        if isinstance(planned.metadata, TimeSeriesMetadata):
            return await self._decode_series(planned, planned.metadata, opened)
        plan = planned.media.plan
        patches, frame_indices = await self.loader.read(opened, plan)
        media, notes = planned.media, []
        if isinstance(planned.metadata, VideoMetadata):
            media = dataclasses.replace(media, timestamps=_timestamps(planned.metadata, frame_indices))
            if planned.metadata.timing_assumed:
                notes.append("no timing was given for the frames; 2 frames per second are assumed")
            if planned.metadata.has_audio:
                notes.append("the sound track was not used")
            missing = sum(wanted != got for wanted, got in zip(plan.frame_indices, frame_indices, strict=True))
            if missing:
                notes.append(f"{missing} frames could not be decoded; the last good frame before each stands in")
        processed = ProcessedMedia(media, planned.metadata, planned.media_hash, frame_indices, patches, tuple(notes))
        self._keep(planned.cache_key, processed)
        return processed

    async def _decode_series(
        self, planned: PlannedItem, metadata: TimeSeriesMetadata, opened: OpenedMedia
    ) -> ProcessedMedia:
        plan = planned.media.series
        samples = await self.loader.read_samples(opened)
        normalised = SharedTensor.create((plan.num_samples, plan.num_channels), "float32")
        await asyncio.to_thread(self._time_series.normalize_time_series, samples.array, normalised.array)
        notes = []
        if metadata.sampling_rate is None:
            notes.append("no sampling_rate was given; a quarter of the number of samples stands in for it")
        if plan.num_samples < metadata.num_samples:
            notes.append(f"only the first {plan.num_samples} of {metadata.num_samples} samples are looked at")
        processed = ProcessedMedia(planned.media, metadata, planned.media_hash, (), normalised, tuple(notes))
        self._keep(planned.cache_key, processed)
        return processed

    @property
    def _time_series(self) -> TimeSeriesProcessor:
        """The processor of a model that takes time series: of no other are they fetched."""
        return cast(TimeSeriesProcessor, self._processor)

    def _cached(self, key: str) -> ProcessedMedia | None:
        processed = self._cache.get(key)
        if processed is not None:
            self._cache.move_to_end(key)
        return processed

    def _keep(self, key: str, processed: ProcessedMedia) -> None:
        if processed.num_bytes > self._max_cache_bytes or key in self._cache:
            return
        self._cache[key] = processed
        self.stats.num_bytes += processed.num_bytes
        while self.stats.num_bytes > self._max_cache_bytes or len(self._cache) > self._max_cache_items:
            _, oldest = self._cache.popitem(last=False)
            self.stats.num_bytes -= oldest.num_bytes
        self.stats.num_items = len(self._cache)


def _planned(
    fetched: FetchedMedia,
    media: PlannedMedia,
    metadata: Metadata,
    *,
    opened: OpenedMedia | None = None,
    processed: ProcessedMedia | None = None,
    notes: tuple[str, ...] = (),
) -> PlannedItem:
    media_hash = processed.media_hash if processed is not None else _media_hash(fetched, media.shown)
    key = _cache_key(fetched)
    return PlannedItem(fetched.item, media, metadata, fetched, key, media_hash, opened, processed, notes)


@contextlib.contextmanager
def _about(item: MediaItem) -> Iterator[None]:
    """Errors raised inside are about the request field of ``item``; only where it has none do they name what they would."""
    try:
        yield
    except InvalidRequestError as error:
        error.param = item.param or error.param
        raise


def _timestamps(metadata: VideoMetadata, frame_indices: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(metadata.timestamps[list(frame_indices)].tolist())


def _seconds_per_frame(metadata: VideoMetadata, item: MediaItem, plan: FramePlan) -> float:
    """Frames picked by the client say when they were taken, not how long the clip was: their mean rate counts."""
    if is_presampled(item):
        first, last = candidate_range(metadata, item.sampling)
        seconds = (last - first + 1) / metadata.fps
    else:
        seconds = shown_seconds(metadata, item.sampling)
    return seconds / len(plan.frame_indices)


def _cache_key(fetched: FetchedMedia) -> str:
    item = fetched.item
    options = repr((item.type.value, item.sampling, item.timing, item.pixels, item.video_decoder, item.sampling_rate))
    return hashlib.sha256(f"{fetched.content_hash}\n{options}".encode()).hexdigest()


def _media_hash(fetched: FetchedMedia, plan: FramePlan | SeriesPlan) -> str:
    # Decoders differ in the last bits of colours, so each has features of its own.
    what = (fetched.item.type.value, fetched.item.video_decoder, plan)
    return hashlib.sha256(f"{fetched.content_hash}\n{what!r}".encode()).hexdigest()
