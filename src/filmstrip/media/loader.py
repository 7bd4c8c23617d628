"""Media items to patches or samples, many at a time: fetch, open, read; knows no prompts and no engine.

The three steps of an item are apart because something is decided between them: after :meth:`MediaLoader.fetch` whether the
bytes are known already, after :meth:`MediaLoader.open` which frames a model wants. Files are opened and decoded in worker
processes, one for each item (:mod:`filmstrip.media.workers`); pixels that a Python caller gives are only cut, in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import numpy as np

from filmstrip.config import MediaConfig
from filmstrip.errors import InvalidRequestError, MediaDecodeError
from filmstrip.media import worker_messages as messages
from filmstrip.media.data_url import parse_data_url
from filmstrip.media.fetch import Fetcher, about
from filmstrip.media.frames import check_frame_array, is_frames_url, open_frame_array
from filmstrip.media.image import image_from_data
from filmstrip.media.patches import write_patches
from filmstrip.media.remote import RangeServer
from filmstrip.media.source import FileSource, MediaSource, file_source, pack
from filmstrip.media.sparse import SparseFile
from filmstrip.media.time_series import check_sampling_rate, time_series_from_data
from filmstrip.media.video import read_patches
from filmstrip.media.workers import Worker, WorkerPool, WorkerStats
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import FramePlan, ImageMetadata, MediaItem, Modality, TimeSeriesMetadata, VideoMetadata

T = TypeVar("T")

Content = MediaSource | SparseFile | tuple[MediaSource, ...] | np.ndarray
Metadata = VideoMetadata | ImageMetadata | TimeSeriesMetadata
_ReadPixels = Callable[[FramePlan, int, threading.Event], tuple[SharedTensor, tuple[int, ...]]]

_MIN_PARKED = 16
"""Workers that may wait between opening and reading, at least; those that wait longest are let go and start again."""


@dataclass(frozen=True)
class FetchedMedia:
    """Bytes (or an object's pixels or samples) of ``item``, not looked at yet.

    ``content_hash`` is over all of them and over the timing of frames sampled by the client; two items with the same hash
    and type show the same pictures at the same times.
    """

    item: MediaItem
    content: Content
    content_hash: str
    num_bytes: int


class OpenedMedia:
    """An item whose header is known; made by :meth:`MediaLoader.open`, ended by :meth:`close`."""

    def __init__(self, item: MediaItem, metadata: Metadata) -> None:
        self.item = item
        self.metadata = metadata
        self.is_closed = False

    def close(self) -> None:
        """Release what is open; may be called twice. A read under way fails."""
        self.is_closed = True


class _OpenedPixels(OpenedMedia):
    """Pixels given as an object: nothing is open."""

    def __init__(self, item: MediaItem, metadata: Metadata, read: _ReadPixels) -> None:
        super().__init__(item, metadata)
        self.read = read


class _OpenedSamples(OpenedMedia):
    """A time series given as an object: float32 (num_samples, num_channels)."""

    def __init__(self, item: MediaItem, samples: np.ndarray) -> None:
        num_samples, num_channels = samples.shape
        super().__init__(item, TimeSeriesMetadata(num_samples, num_channels, item.sampling_rate, "array"))
        self.samples = samples


class _OpenedFile(OpenedMedia):
    """An item in a worker of its own, which may be let go and started again: ``source`` has its bytes all the time."""

    def __init__(self, item: MediaItem, opening: messages.ToWorker, source: FileSource | SparseFile) -> None:
        self.item = item
        self.is_closed = False
        self.opening, self.source = opening, source
        self._worker: Worker | None = None
        self._ranges: RangeServer | None = None

    @property
    def worker(self) -> Worker | None:
        """The worker that has it open, if there is one."""
        return self._worker

    def give_to(self, worker: Worker) -> None:
        """Let ``worker`` open it from here on."""
        self._worker = worker

    async def ask(self, message: messages.ToWorker, descriptors: Sequence[int] = ()) -> messages.FromWorker:
        """The worker's answer; raises as :meth:`Worker.ask`, and what goes wrong when missing parts are fetched for it."""
        assert self._worker is not None
        asking = asyncio.ensure_future(self._worker.ask(message, descriptors))
        try:
            if self._ranges is not None:
                await asyncio.wait({asking, self._ranges.failed}, return_when=asyncio.FIRST_COMPLETED)
                if self._ranges.failed.done() and not asking.done():
                    await self._ranges.failed
            return await asking
        finally:
            if not asking.done():
                asking.cancel()
                await asyncio.wait({asking})

    async def open(self) -> messages.FromWorker:
        """Let the worker open it."""
        if not isinstance(self.source, SparseFile):
            return await self.ask(self.opening, [self.source.fd])
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._ranges = RangeServer(self.source.another_reader(), ours)
            return await self.ask(self.opening, [self.source.fd, theirs.fileno()])

    def close(self) -> None:
        super().close()
        self.let_go()

    def let_go(self) -> None:
        """End the worker, if there is one."""
        worker, self._worker = self._worker, None
        ranges, self._ranges = self._ranges, None
        if worker is not None:
            worker.kill()
        if ranges is not None:
            ranges.close()


class MediaLoader:
    """Fetches, opens and reads items for all requests of a process, on one event loop.

    At most ``num_decode_threads`` videos are worked on at the same time, and beside them as many pictures, so that a small
    image never waits for long videos. The threads are shared out evenly between the videos that are being read; one that
    starts while others hold all threads gets one at once all the same: in the worst moment twice as many threads run as were
    asked for, less one.
    """

    def __init__(self, config: MediaConfig, fetcher: Fetcher | None = None, *, faults: str | None = None) -> None:
        """``fetcher`` replaces the one made from ``config``; it is closed with the loader. ``faults``: see WorkerPool."""
        self._config = config
        self._fetcher = fetcher or Fetcher(config)
        self._num_threads = config.num_decode_threads or _num_usable_cores()
        self._budget = _ThreadBudget(self._num_threads)
        self._lanes = {
            modality: asyncio.Semaphore(self._num_threads)
            for modality in (Modality.VIDEO, Modality.IMAGE, Modality.TIME_SERIES)
        }
        self._pool = WorkerPool(config, faults=faults)
        self._parked: dict[int, _OpenedFile] = {}
        self._max_parked = max(_MIN_PARKED, 2 * self._num_threads)
        self._asking: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="filmstrip-media")
        self._cancels: set[threading.Event] = set()
        self._is_closed = False

    @property
    def worker_stats(self) -> WorkerStats:
        """Counters of the worker processes."""
        return self._pool.stats

    async def start(self) -> None:
        """Get ready to decode, so that the first item need not wait for it.

        Raises InvalidRequestError if a decoder of the settings cannot be used.
        """
        await self._pool.start()

    async def fetch(self, item: MediaItem) -> FetchedMedia:
        """Get the bytes of ``item``; raises the MediaError family with the item's ``param``."""
        with about(item.param):
            self._check_decoder(item)
            check_sampling_rate(item.sampling_rate)
            if item.frame_urls:
                return _fetched_frames(item, await self._fetcher.fetch_frame_urls(item.frame_urls))
            if item.url is None:
                return await self._in_thread(lambda _: self._take_object(item))
            _check_data_type(item.url, item.type)
            if is_frames_url(item.url):
                return _fetched_frames(item, await self._fetcher.fetch_frames(item.url))
            source = await self._fetcher.fetch(item.url, sparse=item.type is Modality.VIDEO)
            return FetchedMedia(item, source, source.content_hash, source.num_bytes)

    async def open(self, fetched: FetchedMedia) -> OpenedMedia:
        """Read the header in a worker; raises MediaDecodeError, MediaTooLargeError, InvalidRequestError (timing)."""
        item, content = fetched.item, fetched.content
        with about(item.param):
            if isinstance(content, np.ndarray):
                return await self._in_thread(lambda _: self._open_object(item, content))
            opening, source = await self._in_thread(lambda _: self._opening(item, content))
            async with self._lanes[item.type]:
                opened = _OpenedFile(item, opening, source)
                try:
                    opened.metadata = await self._start(opened)
                except BaseException:
                    opened.close()
                    raise
            self._park(opened)
            return opened

    async def read(self, opened: OpenedMedia, plan: FramePlan) -> tuple[SharedTensor, tuple[int, ...]]:
        """Decode what ``plan`` wants: uint8 patches of ``plan.patches_shape`` and the frames really delivered.

        An image has the one frame 0. Cancelling stops the decoder at once. Raises MediaDecodeError if not a single frame can
        be decoded, InterruptedError if ``opened`` is closed.
        """
        async with self._reading(opened) as num_threads:
            if isinstance(opened, _OpenedPixels):
                return await self._in_thread(lambda cancel: opened.read(plan, num_threads, cancel))
            output = SharedTensor.create(plan.patches_shape)
            done = await self._read_in_worker(
                opened,
                messages.ReadPatches(plan, num_threads),
                output,
                lambda delivered: _can_be_delivered(delivered, plan, opened.metadata),
            )
            return output, done.delivered

    async def read_samples(self, opened: OpenedMedia) -> SharedTensor:
        """The samples of a time series, float32 (num_samples, num_channels), all finite.

        Cancelling stops the decoder at once. Raises MediaDecodeError for samples that cannot be read, InterruptedError if
        ``opened`` is closed.
        """
        metadata = opened.metadata
        assert isinstance(metadata, TimeSeriesMetadata)
        shape = (metadata.num_samples, metadata.num_channels)
        output = SharedTensor.create(shape, "float32")
        async with self._reading(opened):
            if isinstance(opened, _OpenedSamples):
                output.array[...] = opened.samples
            else:
                await self._read_in_worker(opened, messages.ReadSamples(shape), output, lambda delivered: not delivered)
                # A worker may have been taken over by the file it read.
                if not await self._in_thread(lambda _: bool(np.isfinite(output.array).all())):
                    raise MediaDecodeError("the time series has values that are not finite")
        return output

    @contextlib.asynccontextmanager
    async def _reading(self, opened: OpenedMedia) -> AsyncIterator[int]:
        """A place in the lane of ``opened``, and its share of the threads."""
        with about(opened.item.param), self._budget.item():
            # Items of one request begin together; all must be counted before threads are shared out.
            await asyncio.sleep(0)
            async with self._lanes[opened.item.type]:
                if opened.is_closed:
                    raise InterruptedError("the media was closed before it was read")
                with self._budget.share() as num_threads:
                    yield num_threads

    async def close(self) -> None:
        """Stop all work and end all workers; items that are still being loaded fail."""
        self._is_closed = True
        for cancel in list(self._cancels):
            cancel.set()
        for task in list(self._asking):
            task.cancel()
        for opened in list(self._parked.values()):
            opened.close()
        self._parked.clear()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        await self._pool.close()
        await self._fetcher.close()

    def _check_decoder(self, item: MediaItem) -> None:
        allowed = (self._config.video_decoder, *self._config.allowed_video_decoders)
        if item.video_decoder is not None and item.video_decoder not in allowed:
            raise InvalidRequestError(
                f"the video decoder {item.video_decoder!r:.80} is not open to requests here; {', '.join(allowed)} can be "
                "chosen (allowed_video_decoders, --allowed-video-decoders)",
                param=item.param,
            )

    # Files, in workers

    def _opening(
        self, item: MediaItem, content: MediaSource | SparseFile | tuple[MediaSource, ...]
    ) -> tuple[messages.ToWorker, FileSource | SparseFile]:
        """What a worker is told first, and the bytes it gets."""
        config = self._config
        if isinstance(content, tuple):
            whole, spans = pack(content)
            opening = messages.OpenFrames(
                spans, item.timing, config.max_image_pixels, config.max_video_frames, item.param
            )
            return opening, whole
        if item.type is Modality.IMAGE:
            return messages.OpenImage(config.max_image_pixels), file_source(content)
        if item.type is Modality.TIME_SERIES:
            limits = (config.max_time_series_values, config.max_time_series_channels)
            return messages.OpenTimeSeries(*limits, item.sampling_rate), file_source(content)
        decoder = item.video_decoder or config.video_decoder
        is_remote = isinstance(content, SparseFile)
        opening = messages.OpenVideo(decoder, config.max_image_pixels, content.content_hash, is_remote)
        return opening, content if is_remote else file_source(content)

    async def _start(self, opened: _OpenedFile) -> Metadata:
        """Let a fresh worker open the item."""
        worker = await self._asked(self._pool.take())
        opened.give_to(worker)
        answer = await self._asked(opened.open())
        try:
            return messages.metadata_of(answer, opened.opening)
        except ValueError as error:
            worker.crashed(error)

    async def _read_in_worker(
        self,
        opened: OpenedMedia,
        question: messages.ReadPatches | messages.ReadSamples,
        output: SharedTensor,
        can_be: Callable[[tuple[int, ...]], bool],
    ) -> messages.Done:
        """Let the worker write to ``output``; what it says it delivered is believed if it ``can_be``."""
        assert isinstance(opened, _OpenedFile)
        self._parked.pop(id(opened), None)
        try:
            if opened.worker is None and not _is_same(await self._start(opened), opened.metadata):
                raise MediaDecodeError("the file does not open the same way twice")
            worker = opened.worker
            assert worker is not None
            answer = await self._asked(opened.ask(question, [output.fd]))
            if not isinstance(answer, messages.Done) or not can_be(answer.delivered):
                worker.crashed(ValueError("it says that it delivered what cannot be"))
            stats = self._pool.stats
            stats.peak_memory_bytes = max(stats.peak_memory_bytes, answer.peak_memory_bytes)
            return answer
        finally:
            opened.let_go()  # nothing of one item is left for the next

    async def _asked(self, question: Coroutine[Any, Any, T]) -> T:
        """The result of ``question``, which :meth:`close` cancels."""
        task = asyncio.ensure_future(question)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if self._is_closed:
                raise InterruptedError("the loader was closed") from None
            raise

    def _park(self, opened: _OpenedFile) -> None:
        """Remember a worker that waits for its plan; there must not be too many, and they hold memory."""
        self._parked = {key: each for key, each in self._parked.items() if not each.is_closed}
        self._parked[id(opened)] = opened
        while len(self._parked) > self._max_parked:
            self._parked.pop(next(iter(self._parked))).let_go()

    # Objects, in threads

    async def _in_thread(self, job: Callable[[threading.Event], T]) -> T:
        """Run ``job`` in a thread; cancelling sets its event."""
        cancel = threading.Event()
        self._cancels.add(cancel)
        future = self._threads.submit(job, cancel)
        future.add_done_callback(lambda _: self._cancels.discard(cancel))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            cancel.set()
            raise

    def _take_object(self, item: MediaItem) -> FetchedMedia:
        """Pixels or samples given as an object."""
        if item.type is Modality.TIME_SERIES:
            config = self._config
            samples = time_series_from_data(
                item.data, max_values=config.max_time_series_values, max_channels=config.max_time_series_channels
            )
            return FetchedMedia(item, samples, _hash_array(samples), samples.nbytes)
        if item.type is Modality.IMAGE:
            pixels = np.array(image_from_data(item.data, self._config.max_image_pixels))
            return FetchedMedia(item, pixels, _hash_array(pixels), pixels.nbytes)
        check_frame_array(item.data)
        return FetchedMedia(item, item.data, _hash_frames([_hash_array(item.data)], item), item.data.nbytes)

    def _open_object(self, item: MediaItem, pixels: np.ndarray) -> OpenedMedia:
        if item.type is Modality.TIME_SERIES:
            return _OpenedSamples(item, pixels)
        if item.type is Modality.IMAGE:
            height, width = pixels.shape[:2]

            def read(
                plan: FramePlan, num_threads: int, cancel: threading.Event
            ) -> tuple[SharedTensor, tuple[int, ...]]:
                return write_patches(lambda _: pixels, plan, num_threads, cancel), plan.frame_indices

            return _OpenedPixels(item, ImageMetadata(height=height, width=width), read)
        limits: _FrameLimits = {
            "max_pixels": self._config.max_image_pixels,
            "max_frames": self._config.max_video_frames,
            "param": item.param,
        }
        reader = open_frame_array(pixels, item.timing, **limits)
        return _OpenedPixels(item, reader.metadata, functools.partial(read_patches, reader))


def _fetched_frames(item: MediaItem, frames: Sequence[MediaSource]) -> FetchedMedia:
    hashes = [frame.content_hash for frame in frames]
    return FetchedMedia(item, tuple(frames), _hash_frames(hashes, item), sum(frame.num_bytes for frame in frames))


class _FrameLimits(TypedDict):
    max_pixels: int
    max_frames: int
    param: str | None


class _ThreadBudget:
    """Shares ``num_threads`` between the items being read."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = self._num_free = num_threads
        self._num_items = 0

    @contextlib.contextmanager
    def item(self) -> Iterator[None]:
        """Count one item as being read, or waiting to be."""
        self._num_items += 1
        try:
            yield
        finally:
            self._num_items -= 1

    @contextlib.contextmanager
    def share(self) -> Iterator[int]:
        """Threads for one item: an even share of what there is and no more than is free, but at least one."""
        share = max(1, min(self._num_free, self._num_threads // max(self._num_items, 1)))
        self._num_free -= share
        try:
            yield share
        finally:
            self._num_free += share


def _num_usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_same(now: Metadata, before: Metadata) -> bool:
    """Whether a plan made for one still fits the other."""
    if isinstance(now, VideoMetadata) and isinstance(before, VideoMetadata):
        return np.array_equal(now.timestamps, before.timestamps) and (now.height, now.width) == (
            before.height,
            before.width,
        )
    return now == before


def _can_be_delivered(delivered: Sequence[int], plan: FramePlan, metadata: Metadata) -> bool:
    if len(delivered) != len(plan.frame_indices):
        return False
    total = metadata.total_num_frames if isinstance(metadata, VideoMetadata) else 1
    return all(0 <= index < total for index in delivered)


def _check_data_type(url: str, modality: Modality) -> None:
    """Raise if a data URL says that it is of another kind than the part it stands in."""
    if url[:5].lower() != "data:":
        return
    media_type = parse_data_url(url).media_type
    family = media_type.split("/")[0]
    expected = ("audio", "text") if modality is Modality.TIME_SERIES else (modality.value,)
    if family in ("image", "video", "audio", "text") and family not in expected:
        advice = f"; send it as {family}_url" if family in ("image", "video") else ""
        raise MediaDecodeError(f"data of type {media_type[:80]} in a part of type {modality}_url{advice}")


def _hash_array(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _hash_frames(hashes: list[str], item: MediaItem) -> str:
    """Hash of frames whose times are not in their bytes."""
    return hashlib.sha256("\n".join([*hashes, repr(item.timing)]).encode()).hexdigest()
