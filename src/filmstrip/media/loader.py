"""Media items to patches, many at a time: fetch, open, read; knows no prompts and no engine.

The three steps of an item are apart because something is decided between them: after :meth:`MediaLoader.fetch` whether the
bytes are known already, after :meth:`MediaLoader.open` which frames a model wants. All decoding of a process runs in the
threads of one loader, so that a hundred requests do not start a hundred decoders.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import numpy as np

from filmstrip.config import MediaConfig
from filmstrip.errors import InvalidRequestError, MediaDecodeError
from filmstrip.media.data_url import parse_data_url
from filmstrip.media.fetch import Fetcher, about, is_frames_url
from filmstrip.media.frames import check_frame_array, open_frame_array, open_frames
from filmstrip.media.image import image_from_data, open_image, probe_image
from filmstrip.media.patches import write_patches
from filmstrip.media.sniff import sniff
from filmstrip.media.source import MediaSource
from filmstrip.media.video import VideoReader, open_video, read_patches
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import FramePlan, ImageMetadata, MediaItem, Modality, VideoMetadata

T = TypeVar("T")

Content = MediaSource | tuple[MediaSource, ...] | np.ndarray
_Read = Callable[[FramePlan, int, threading.Event], tuple[SharedTensor, tuple[int, ...]]]


@dataclass(frozen=True)
class FetchedMedia:
    """Bytes (or pixels given as an object) of ``item``, not looked at yet.

    ``content_hash`` is over all of them and over the timing of frames sampled by the client; two items with the same hash
    and type show the same pictures at the same times.
    """

    item: MediaItem
    content: Content
    content_hash: str
    num_bytes: int


class OpenedMedia:
    """An item whose header is known; made by :meth:`MediaLoader.open`, ended by :meth:`close`."""

    def __init__(
        self,
        item: MediaItem,
        metadata: VideoMetadata | ImageMetadata,
        read: _Read,
        release: Callable[[], None] | None = None,
    ) -> None:
        """``read`` decodes what a plan wants; ``release`` is called once, when nobody reads any more."""
        self.item = item
        self.metadata = metadata
        self._read, self._release = read, release
        self._lock = threading.Lock()
        self._num_readers = 0
        self._closed = False

    def close(self) -> None:
        """Release what is open, at once or when a read under way has ended; may be called twice, from any thread."""
        with self._lock:
            self._closed = True
        self._release_if_unused()

    def read(self, plan: FramePlan, num_threads: int, cancel: threading.Event) -> tuple[SharedTensor, tuple[int, ...]]:
        """Decode what ``plan`` wants, in this thread and others; raises InterruptedError if closed or cancelled."""
        with self._lock:
            if self._closed:
                raise InterruptedError("the media was closed before it was read")
            self._num_readers += 1
        try:
            return self._read(plan, num_threads, cancel)
        finally:
            with self._lock:
                self._num_readers -= 1
            self._release_if_unused()

    def _release_if_unused(self) -> None:
        with self._lock:
            if not self._closed or self._num_readers:
                return
            release, self._release = self._release, None
        if release is not None:
            release()


class MediaLoader:
    """Fetches, opens and reads items for all requests of a process, from one or several event loops.

    At most ``num_decode_threads`` items are worked on at the same time; the threads are shared out evenly between those that
    are being read. An item that starts while others hold all threads gets one at once all the same, so that a small image
    never waits for a long video: in the worst moment twice as many threads run as were asked for, less one.
    """

    def __init__(self, config: MediaConfig, fetcher: Fetcher | None = None) -> None:
        """``fetcher`` replaces the one made from ``config``; it is closed with the loader."""
        self._config = config
        self._fetcher = fetcher or Fetcher(config)
        self._num_threads = config.num_decode_threads or _num_usable_cores()
        self._budget = _ThreadBudget(self._num_threads)
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="filmstrip-media")
        self._cancels: set[threading.Event] = set()

    async def fetch(self, item: MediaItem) -> FetchedMedia:
        """Get the bytes of ``item``; raises the MediaError family with the item's ``param``."""
        with about(item.param):
            if item.type not in (Modality.IMAGE, Modality.VIDEO):
                raise InvalidRequestError(f"media of type {item.type} are not supported", param=item.param)
            if item.url is None:
                return await self._run(lambda _: self._take_object(item))
            _check_data_type(item.url, item.type)
            if is_frames_url(item.url):
                frames = tuple(await self._fetcher.fetch_frames(item.url))
                hashes = [frame.content_hash for frame in frames]
                return FetchedMedia(item, frames, _hash_frames(hashes, item), sum(frame.num_bytes for frame in frames))
            source = await self._fetcher.fetch(item.url)
            return FetchedMedia(item, source, source.content_hash, source.num_bytes)

    async def open(self, fetched: FetchedMedia) -> OpenedMedia:
        """Read the header in a decode thread; raises MediaDecodeError, MediaTooLargeError, InvalidRequestError (timing)."""
        with about(fetched.item.param):
            return await self._run(lambda cancel: self._open(fetched, cancel), undo=OpenedMedia.close)

    async def read(self, opened: OpenedMedia, plan: FramePlan) -> tuple[SharedTensor, tuple[int, ...]]:
        """Decode what ``plan`` wants: uint8 patches of ``plan.patches_shape`` and the frames really delivered.

        An image has the one frame 0. Cancelling stops the decoder soon. Raises MediaDecodeError if not a single frame can be
        decoded.
        """
        with about(opened.item.param), self._budget.item():
            # Items of one request begin together; all must be counted before threads are shared out.
            await asyncio.sleep(0)
            return await self._run(lambda cancel: self._read(opened, plan, cancel))

    async def close(self) -> None:
        """Stop all work and wait for the threads to end; items that are still being loaded fail."""
        for cancel in list(self._cancels):
            cancel.set()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        await self._fetcher.close()

    async def _run(self, job: Callable[[threading.Event], T], undo: Callable[[T], None] | None = None) -> T:
        """Run ``job`` in a decode thread; cancelling sets its event, and ``undo`` gets a result that nobody waits for."""
        cancel = threading.Event()
        self._cancels.add(cancel)
        future = self._threads.submit(job, cancel)
        future.add_done_callback(lambda _: self._cancels.discard(cancel))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            cancel.set()
            if undo is not None:
                future.add_done_callback(lambda done: _undo(done, undo))
            raise

    # In a decode thread

    def _take_object(self, item: MediaItem) -> FetchedMedia:
        """Pixels given as an object."""
        if item.type is Modality.IMAGE:
            pixels = np.array(image_from_data(item.data, self._config.max_image_pixels))
            return FetchedMedia(item, pixels, _hash_array(pixels), pixels.nbytes)
        check_frame_array(item.data)
        return FetchedMedia(item, item.data, _hash_frames([_hash_array(item.data)], item), item.data.nbytes)

    def _open(self, fetched: FetchedMedia, cancel: threading.Event) -> OpenedMedia:
        item, content = fetched.item, fetched.content
        if isinstance(content, np.ndarray):
            return self._open_object(item, content)
        if isinstance(content, tuple):
            frames = open_frames(content, item.timing, **self._frame_limits(item), cancel=cancel)
            return _opened_video(item, frames)
        if item.type is Modality.IMAGE:
            max_pixels = self._config.max_image_pixels
            header = probe_image(content, max_pixels)
            return _opened_image(item, header, lambda: np.array(open_image(content, max_pixels)))
        return self._open_video(item, content)

    def _open_object(self, item: MediaItem, pixels: np.ndarray) -> OpenedMedia:
        if item.type is Modality.IMAGE:
            height, width = pixels.shape[:2]
            return _opened_image(item, ImageMetadata(height=height, width=width), lambda: pixels)
        return _opened_video(item, open_frame_array(pixels, item.timing, **self._frame_limits(item)))

    def _open_video(self, item: MediaItem, source: MediaSource) -> OpenedMedia:
        kind = sniff(source)
        if kind.kind == "image" and kind.format != "GIF":  # FFmpeg would take a picture for a video of one frame
            raise MediaDecodeError(f"this is {kind}, not a video; send it as image_url")
        if kind.kind == "audio":
            raise MediaDecodeError(f"this is {kind}: it has no video")
        if kind.kind == "other":
            raise MediaDecodeError(f"this is {kind}, not a video")
        return _opened_video(item, open_video(source, max_pixels=self._config.max_image_pixels))

    def _frame_limits(self, item: MediaItem) -> _FrameLimits:
        return {
            "max_pixels": self._config.max_image_pixels,
            "max_frames": self._config.max_video_frames,
            "param": item.param,
        }

    def _read(
        self, opened: OpenedMedia, plan: FramePlan, cancel: threading.Event
    ) -> tuple[SharedTensor, tuple[int, ...]]:
        with self._budget.share() as num_threads:
            return opened.read(plan, num_threads, cancel)


def is_presampled(item: MediaItem) -> bool:
    """Whether ``item`` is a video whose frames were chosen by the client: a list of pictures or an array."""
    return item.type is Modality.VIDEO and (item.url is None or is_frames_url(item.url))


class _FrameLimits(TypedDict):
    max_pixels: int
    max_frames: int
    param: str | None


def _opened_video(item: MediaItem, reader: VideoReader) -> OpenedMedia:
    return OpenedMedia(item, reader.metadata, functools.partial(read_patches, reader), reader.close)


def _opened_image(item: MediaItem, metadata: ImageMetadata, pixels: Callable[[], np.ndarray]) -> OpenedMedia:
    def read(plan: FramePlan, num_threads: int, cancel: threading.Event) -> tuple[SharedTensor, tuple[int, ...]]:
        return write_patches(lambda _: pixels(), plan, num_threads, cancel), plan.frame_indices

    return OpenedMedia(item, metadata, read)


class _ThreadBudget:
    """Shares ``num_threads`` between the items being read."""

    def __init__(self, num_threads: int) -> None:
        self._lock = threading.Lock()
        self._num_threads = self._num_free = num_threads
        self._num_items = 0

    @contextlib.contextmanager
    def item(self) -> Iterator[None]:
        """Count one item as being read, or waiting to be."""
        with self._lock:
            self._num_items += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_items -= 1

    @contextlib.contextmanager
    def share(self) -> Iterator[int]:
        """Threads for one item: an even share of what there is and no more than is free, but at least one."""
        with self._lock:
            share = max(1, min(self._num_free, self._num_threads // max(self._num_items, 1)))
            self._num_free -= share
        try:
            yield share
        finally:
            with self._lock:
                self._num_free += share


def _num_usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_data_type(url: str, modality: Modality) -> None:
    """Raise if a data URL says that it is of another kind than the part it stands in."""
    if url[:5].lower() != "data:":
        return
    media_type = parse_data_url(url).media_type
    family = media_type.split("/")[0]
    if family in ("image", "video", "audio", "text") and family != modality.value:
        advice = f"; send it as {family}_url" if family in ("image", "video") else ""
        raise MediaDecodeError(f"data of type {media_type[:80]} in a part of type {modality}_url{advice}")


def _hash_array(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _hash_frames(hashes: list[str], item: MediaItem) -> str:
    """Hash of frames whose times are not in their bytes."""
    return hashlib.sha256("\n".join([*hashes, repr(item.timing)]).encode()).hexdigest()


def _undo(future: Future[T], undo: Callable[[T], None]) -> None:
    if not future.cancelled() and future.exception() is None:
        undo(future.result())
