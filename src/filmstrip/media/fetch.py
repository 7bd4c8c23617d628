"""A URL or path in, encoded bytes out: the one fetcher of every modality and API; knows nothing of what it fetches.

Rules for downloads. Only hosts that are allowed are asked, at addresses that are allowed (:mod:`.http_client`), for the
first URL and every redirect alike; limits hold while bytes arrive, and one deadline covers everything. What was
downloaded is kept for the next question about the same URL (:mod:`.http_cache`), and of large files on servers that can
send parts only the parts that are needed are fetched (:mod:`.sparse`).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpcore2

from filmstrip.config import MediaConfig
from filmstrip.errors import MediaBlockedError, MediaError, MediaFetchError, MediaTooLargeError
from filmstrip.media.address import HttpTarget, parse_http_url, parse_redirect, url_scheme
from filmstrip.media.data_url import DataUrl, decode_base64, parse_data_url, too_large
from filmstrip.media.http_cache import CacheEntry, HttpCache
from filmstrip.media.http_client import HttpClient, Resolver, deadline, storage_errors
from filmstrip.media.http_fields import Fields, Validator, fresh_seconds, may_be_shared, validator_of
from filmstrip.media.local_files import CLOSED_MESSAGE, file_url_path, open_anywhere, open_inside
from filmstrip.media.source import FileSource, MediaSource, SpanSource, SpooledBytes
from filmstrip.media.sparse import MIN_SPARSE_BYTES, SparseContent, SparseFile

T = TypeVar("T")
Downloaded = FileSource | SparseContent

MAX_MEMORY_BYTES = 32 * 1024**2
"""Downloads and data URLs up to this size stay in memory, larger ones go to a nameless temporary file."""
MAX_FRAMES_AT_ONCE = 8
"""Frames of one video that are fetched at the same time, each from a URL of its own."""

_DATA_FAMILIES = ("", "image", "video", "audio", "application")
_DATA_TEXT_TYPES = ("text/plain", "text/csv")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_BATCH_BYTES = 1 << 20


@dataclass
class FetchStats:
    """What a fetcher has done so far; only http and https count."""

    num_downloads: int = 0
    """Files downloaded whole."""
    num_sparse: int = 0
    """Files opened to fetch only parts of them."""
    num_range_requests: int = 0
    """Parts of such files that were asked for."""
    num_bytes: int = 0
    """Bytes of files that arrived, whole files and parts."""
    num_revalidated: int = 0
    """Kept downloads used again after their server said that they are still right."""
    num_fresh: int = 0
    """Kept downloads used again unasked, as their server allowed."""
    num_shared: int = 0
    """Requests that waited for another one's download of the same URL and got it, too."""


class Fetcher:
    """Fetches for any number of requests at once, from any event loop.

    Between two fetches nothing is kept but downloads, and those only as their servers allow: no connection, no cookie, no
    name. ``resolver``, ``network`` and ``ssl_context`` are those of :class:`~filmstrip.media.http_client.HttpClient`.
    """

    def __init__(
        self,
        config: MediaConfig,
        resolver: Resolver | None = None,
        *,
        network: httpcore2.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._client = HttpClient(config, resolver, network, ssl_context)
        self._cache = HttpCache(int(config.download_cache_gb * 1024**3))
        self._under_way: dict[tuple[Any, ...], _SharedDownload] = {}
        self._sparse: weakref.WeakSet[SparseContent] = weakref.WeakSet()
        self._stats = FetchStats()
        self._stats_lock = threading.Lock()

    @property
    def stats(self) -> FetchStats:
        """Counters up to now."""
        with self._stats_lock:
            return copy.copy(self._stats)

    @property
    def num_cached_bytes(self) -> int:
        """Bytes of downloads that are kept."""
        return self._cache.num_bytes_held

    async def fetch(
        self, url: str | os.PathLike[str], *, param: str | None = None, sparse: bool = False
    ) -> MediaSource:
        """The bytes behind ``url``: http, https, file, data (base64) or a plain path.

        With ``sparse`` the result may be a :class:`~filmstrip.media.sparse.SparseFile`, of which nothing has been fetched
        yet, where the server can send parts of a large file; the caller closes it. Otherwise all bytes are there.

        Raises MediaBlockedError where policy forbids the address, scheme or path, MediaTooLargeError over
        ``max_media_bytes``, MediaFetchError for everything that fails; ``param`` is set on each. Cancelling stops at once.
        """
        url = os.fspath(url)
        with about(param):
            if url_scheme(url) not in ("http", "https"):
                return await self._in_thread(self._load, url, self._budget())
            content = await self._download_shared(url, sparse=sparse)
            return SparseFile(content) if isinstance(content, SparseContent) else content

    async def fetch_frame_urls(self, urls: Sequence[str], *, param: str | None = None) -> list[MediaSource]:
        """The frames of a video behind a URL each (as :meth:`fetch` takes them), in order, in one file.

        At most ``MAX_FRAMES_AT_ONCE`` are fetched at a time; all of them share one deadline and one byte limit, and the
        first error stops all. Raises MediaTooLargeError over ``max_video_frames`` before anything is fetched, else as
        :meth:`fetch`, with the number of the frame (from 0) in the message.
        """
        with about(param):
            self._check_num_frames(len(urls))
            return await self._in_time(self._fetch_in_order(urls))

    async def fetch_frames(self, url: str, *, param: str | None = None) -> list[MediaSource]:
        """The frames of a ``data:video/jpeg;base64,a,b,c`` URL (see :func:`filmstrip.media.frames.is_frames_url`), in order.

        Raises MediaTooLargeError over ``max_video_frames`` or ``max_media_bytes`` before anything is decoded, else as
        :meth:`fetch`.
        """
        with about(param):
            return await self._in_thread(self._load_frames, url)

    def fetch_sync(self, url: str | os.PathLike[str]) -> MediaSource:
        """:meth:`fetch` for code that is not async; works inside a running event loop (a notebook), too, but blocks it."""
        url = os.fspath(url)
        if url_scheme(url) not in ("http", "https"):
            return self._load(url, self._budget(), threading.Event())
        with ThreadPoolExecutor(1, thread_name_prefix="filmstrip-fetch") as thread:
            return thread.submit(lambda: asyncio.run(self.fetch(url))).result()

    def fetch_frames_sync(self, url: str) -> list[MediaSource]:
        """:meth:`fetch_frames` for code that is not async."""
        return self._load_frames(url, threading.Event())

    async def close(self) -> None:
        """Let go of the threads and of all that is kept; nothing can be fetched after, sparse files get nothing more."""
        self._cache.clear()
        loop = asyncio.get_running_loop()
        for content in [content for content in self._sparse if content.loop is loop]:
            content.remove_all_readers()
            await content.wait_idle()
        self._client.close()

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run ``function(*args, cancel)`` in a thread; cancelling sets the event, at which it soon ends."""
        cancel = threading.Event()
        try:
            return await self._client.in_thread(function, *args, cancel)
        finally:
            cancel.set()

    async def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        timeout = self._config.fetch_timeout_seconds
        error = MediaFetchError(
            f"the download took longer than {timeout:g} seconds (fetch_timeout_seconds, --fetch-timeout-seconds)",
            code="media_fetch_timeout",
        )
        async with deadline(timeout, error):
            return await work

    def _budget(self) -> _ByteBudget:
        return _ByteBudget(self._config.max_media_bytes)

    def _check_num_frames(self, num_frames: int) -> None:
        limit = self._config.max_video_frames
        if num_frames > limit:
            raise MediaTooLargeError(
                f"the video has {num_frames} frames; the limit is {limit} (max_video_frames, --max-video-frames)"
            )

    # Data URLs and files

    def _load(self, url: str, budget: _ByteBudget, cancel: threading.Event) -> MediaSource:
        scheme = url_scheme(url)
        if scheme == "data":
            return self._load_data(url, budget, cancel)
        if scheme in ("file", ""):
            if not (self._config.allow_local_files or self._config.allowed_local_media_path):
                raise MediaBlockedError(CLOSED_MESSAGE)
            return self._load_file(file_url_path(url) if scheme else url, budget, cancel)
        message = f"the scheme {scheme[:40]!r} is not supported; media can be http://, https:// or data:...;base64,"
        if self._config.allow_local_files:
            message += ", file:// or a path (./ before a file name with a colon)"
        raise MediaBlockedError(message)

    def _load_file(self, path: str, budget: _ByteBudget, cancel: threading.Event) -> MediaSource:
        # A directory that was named holds for everyone, even where files are open in general.
        root = self._config.allowed_local_media_path
        fd = open_inside(root, path) if root else open_anywhere(path)
        try:
            num_bytes = os.fstat(fd).st_size
            budget.take(num_bytes)
            if num_bytes == 0:
                raise MediaFetchError("the file is empty")
        except BaseException:
            os.close(fd)
            raise
        try:
            return FileSource(fd, cancel=cancel)
        except InterruptedError:
            raise
        except OSError as error:
            raise MediaFetchError(f"the file cannot be read: {error.strerror}") from None

    def _load_data(self, url: str, budget: _ByteBudget, cancel: threading.Event) -> MediaSource:
        data = self._parse_data(url)
        # Checked before decoding as what is surely in it, counted as what was.
        budget.check((len(url) - data.start) // 4 * 3 - 2)
        source = self._decode(data, data.start, len(url), cancel)
        budget.take(source.num_bytes)
        return source

    def _load_frames(self, url: str, cancel: threading.Event) -> list[MediaSource]:
        data = self._parse_data(url)
        self._check_num_frames(url.count(",", data.start) + 1)
        self._budget().take((len(url) - data.start) // 4 * 3)
        packer = _Packer()
        for number, (start, end) in enumerate(data.parts()):
            try:
                packer.add(self._decode(data, start, end, cancel), cancel)
            except MediaFetchError as error:
                raise MediaFetchError(f"frame {number}: {error.message}") from None
        return packer.finish()

    def _parse_data(self, url: str) -> DataUrl:
        data = parse_data_url(url)
        if data.media_type.split("/")[0] not in _DATA_FAMILIES and data.media_type not in _DATA_TEXT_TYPES:
            raise MediaFetchError(f"a data URL of type {data.media_type[:80]!r} is not media")
        return data

    def _decode(self, data: DataUrl, start: int, end: int, cancel: threading.Event) -> MediaSource:
        with storage_errors():
            return decode_base64(
                data.url,
                start,
                end,
                max_bytes=self._config.max_media_bytes,
                max_memory_bytes=MAX_MEMORY_BYTES,
                cancel=cancel,
            )

    # Frames behind a URL each

    async def _fetch_in_order(self, urls: Sequence[str]) -> list[MediaSource]:
        # Put into one file as they come, in order: thousands of frames must not take a descriptor each.
        packer, budget = _Packer(), self._budget()
        left = iter(enumerate(urls))
        tasks: list[asyncio.Task[MediaSource]] = []
        try:
            while True:
                for number, url in itertools.islice(left, MAX_FRAMES_AT_ONCE - len(tasks)):
                    tasks.append(asyncio.ensure_future(self._fetch_frame(number, url, budget)))
                if not tasks:
                    return await self._in_thread(lambda _: packer.finish())
                pending = [task for task in tasks if not task.done()]
                if pending:
                    await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():
                        task.result()  # raises the first frame's error at once
                while tasks and tasks[0].done():
                    await self._in_thread(packer.add, tasks.pop(0).result())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch_frame(self, number: int, url: str, budget: _ByteBudget) -> MediaSource:
        try:
            if url_scheme(url) not in ("http", "https"):
                return await self._in_thread(self._load, url, budget)
            answer = await self._answer(parse_http_url(url), False, budget)
        except MediaError as error:
            raise type(error)(f"frame {number}: {error.message}", param=error.param, code=error.code) from None
        assert isinstance(answer.content, FileSource)
        return answer.content

    # Downloads

    async def _download_shared(self, url: str, *, sparse: bool) -> Downloaded:
        """Download ``url``, or wait for another request's download of it if that may be shared."""
        target = parse_http_url(url)
        self._client.check(target)
        key = (asyncio.get_running_loop(), target.url, sparse)
        download = self._under_way.get(key)
        if download is None:
            download = self._under_way[key] = _SharedDownload(
                self._in_time(self._answer(target, sparse, self._budget())), lambda: self._under_way.pop(key, None)
            )
        answer = await download.wait()
        if not download.is_taken:
            download.is_taken = True
            return answer.content
        if answer.may_be_shared:
            self._count(num_shared=1)
            return answer.content
        return (await self._in_time(self._answer(target, sparse, self._budget()))).content

    async def _answer(self, target: HttpTarget, sparse: bool, budget: _ByteBudget) -> _Answer:
        """What ``target`` leads to: what is kept of it, if that is still right, or else a download."""
        self._client.check(target)
        job = _Job(target.url, self._kept(target.url, sparse), sparse, budget)
        if job.entry is not None and job.entry.is_fresh:
            budget.take(job.entry.content.num_bytes)
            self._count(num_fresh=1)
            return _Answer(job.entry.content, True)
        # A pool for each fetch: a handshake is short beside a video, and nothing of one request is left for the next.
        async with await self._client.pool(1) as pool:
            for _ in range(self._config.max_redirects + 1):
                with self._client.errors():
                    answer = await self._get(pool, target, job)
                if not isinstance(answer, HttpTarget):
                    return answer
                target = answer
        raise MediaFetchError(
            f"the media server redirects more than {self._config.max_redirects} times (max_redirects, --max-redirects)"
        )

    def _kept(self, url: str, sparse: bool) -> CacheEntry | None:
        """What is kept of ``url`` if it is of use: parts only for who asks for parts, on the loop that fetches them."""
        entry = self._cache.get(url)
        if entry is None or not isinstance(entry.content, SparseContent):
            return entry
        content = entry.content
        is_usable = sparse and content.loop is asyncio.get_running_loop() and not content.is_changed
        return entry if is_usable else None

    async def _get(self, pool: httpcore2.AsyncConnectionPool, target: HttpTarget, job: _Job) -> _Answer | HttpTarget:
        """One request: the content, or the target of the next."""
        # The condition goes only to the place that what is kept came from: elsewhere it means nothing.
        entry = job.entry if job.entry is not None and job.entry.final_url == target.url else None
        async with self._client.get(pool, target, entry.validator.condition() if entry else ()) as response:
            fields = Fields(response.headers)
            if response.status in _REDIRECT_STATUSES:
                location = fields.get("location")
                if not location:
                    raise MediaFetchError("the media server redirects to nowhere")
                same_port_only = not self._config.allow_private_media_urls
                return parse_redirect(location, target, same_port_only=same_port_only)
            if response.status == 304 and entry is not None:
                if entry.validator.is_unchanged_in(fields):
                    return self._use_again(job, entry, fields)
                job.entry = None
                return target  # "not changed", it says, of another version than ours: ask for that one
            self._check_answer(response.status, fields, job.budget)
            validator = validator_of(fields)
            if job.sparse and validator is not None and _serves_parts(fields):
                content = self._open_sparse(target, validator, fields)
            else:
                content = await self._receive(response, job.budget)
            return self._keep(job, target, fields, validator, content)

    def _check_answer(self, status: int, fields: Fields, budget: _ByteBudget) -> None:
        """Raise for what can be refused before the body."""
        if status != 200:
            raise MediaFetchError(f"the media server answered with HTTP status {status}")
        encoding = fields.get("content-encoding").lower()
        if encoding not in ("", "identity"):
            raise MediaFetchError(f"the media server sent the encoding {encoding[:40]!r}, which was not asked for")
        if fields.get("content-type").split(";")[0].strip().lower() in _HTML_TYPES:
            raise MediaFetchError("the URL leads to a web page (HTML), not to a media file")
        budget.check(fields.number("content-length") or 0)

    async def _receive(self, response: httpcore2.Response, budget: _ByteBudget) -> FileSource:
        """The body, cut off at the byte limit."""
        spool = SpooledBytes(MAX_MEMORY_BYTES)
        batch: list[bytes] = []
        num_received = num_in_batch = 0
        try:
            async with contextlib.aclosing(response.aiter_stream()) as chunks:
                async for chunk in chunks:
                    num_received += len(chunk)
                    num_in_batch += len(chunk)
                    budget.take(len(chunk))
                    batch.append(chunk)
                    if num_in_batch >= _BATCH_BYTES:
                        await self._in_thread(_write_batch, spool, batch)
                        batch, num_in_batch = [], 0
        finally:
            self._count(num_bytes=num_received)
        if num_received == 0:
            raise MediaFetchError("the media server sent an empty file")
        await self._in_thread(_write_batch, spool, batch)
        self._count(num_downloads=1)
        return spool.finish()

    def _open_sparse(self, target: HttpTarget, validator: Validator, fields: Fields) -> SparseContent:
        """The file that this answer is the beginning of; its body is left unread."""
        num_bytes = fields.number("content-length") or 0
        content = SparseContent(
            self._client, self._config, target, validator, num_bytes, self._count_parts, self._cache.trim
        )
        self._sparse.add(content)
        self._count(num_sparse=1)
        return content

    def _count_parts(self, num_requests: int, num_bytes: int) -> None:
        self._count(num_range_requests=num_requests, num_bytes=num_bytes)

    # Keeping

    def _keep(
        self, job: _Job, target: HttpTarget, fields: Fields, validator: Validator | None, content: Downloaded
    ) -> _Answer:
        """Keep what arrived, if its server lets us and it can be told from other versions."""
        shared = may_be_shared(fields)
        if shared and validator is not None:
            self._cache.put(job.url, CacheEntry(target.url, validator, content, _fresh_until(job, target.url, fields)))
        elif job.entry is not None:
            self._cache.drop(job.url, job.entry)
        return _Answer(content, shared)

    def _use_again(self, job: _Job, entry: CacheEntry, fields: Fields) -> _Answer:
        """What is kept is still right."""
        job.budget.take(entry.content.num_bytes)
        self._count(num_revalidated=1)
        shared = may_be_shared(fields)
        if shared:
            fresh_until = _fresh_until(job, entry.final_url, fields)
            self._cache.put(job.url, CacheEntry(entry.final_url, entry.validator, entry.content, fresh_until))
        else:
            self._cache.drop(job.url, entry)
        return _Answer(entry.content, shared)

    def _count(self, **counts: int) -> None:
        with self._stats_lock:
            for name, count in counts.items():
                setattr(self._stats, name, getattr(self._stats, name) + count)


@contextlib.contextmanager
def about(param: str | None) -> Iterator[None]:
    """Media errors raised inside are about the request field ``param`` unless they name one themselves."""
    try:
        yield
    except MediaError as error:
        error.param = error.param or param
        raise


@dataclass
class _Job:
    """What is asked for: ``url`` in normal form, and what is kept of it."""

    url: str
    entry: CacheEntry | None
    sparse: bool
    budget: _ByteBudget


@dataclass(frozen=True)
class _Answer:
    """What a URL led to, and whether other requests may have it, too."""

    content: Downloaded
    may_be_shared: bool


class _ByteBudget:
    """Counts bytes against ``max_media_bytes``, from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_taken = 0
        self._lock = threading.Lock()

    def check(self, num_bytes: int) -> None:
        """Raise MediaTooLargeError if ``num_bytes`` more would be too many."""
        if self._num_taken + num_bytes > self._max_bytes:
            raise too_large(self._num_taken + num_bytes, self._max_bytes)

    def take(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more; raises MediaTooLargeError if they are too many."""
        with self._lock:
            self.check(num_bytes)
            self._num_taken += num_bytes


class _Packer:
    """Puts many small sources into one file; used by one thread at a time."""

    def __init__(self) -> None:
        self._spool = SpooledBytes(MAX_MEMORY_BYTES)
        self._spans: list[tuple[int, int]] = []

    def add(self, source: MediaSource, _cancel: threading.Event) -> None:
        """Append all of ``source``."""
        start = self._spool.num_bytes
        with storage_errors(), source.open() as file:
            while chunk := file.read(_BATCH_BYTES):
                self._spool.write(chunk)
        self._spans.append((start, self._spool.num_bytes))

    def finish(self) -> list[MediaSource]:
        """What was added, in order; nothing may be added after."""
        whole = self._spool.finish()
        return [SpanSource(whole, start, stop) for start, stop in self._spans]


class _SharedDownload:
    """A download that any number of requests wait for; it is stopped when the last of them is cancelled."""

    def __init__(self, work: Coroutine[Any, Any, _Answer], on_over: Callable[[], object]) -> None:
        """``on_over`` is called as soon as nobody else can join: at its end or when it is stopped."""
        self.is_taken = False
        self._num_waiting = 0
        self._on_over = on_over
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(self._over)

    async def wait(self) -> _Answer:
        """Its result, or its error."""
        self._num_waiting += 1
        try:
            await asyncio.wait([self._task])
        except asyncio.CancelledError:
            if self._num_waiting == 1 and not self._task.done():
                self._on_over()
                self._task.cancel()
                await asyncio.wait([self._task])  # until its connection is closed
            raise
        finally:
            self._num_waiting -= 1
        error = self._task.exception()
        if error is not None:
            raise copy.copy(error)  # each request adds its own field to it
        return self._task.result()

    def _over(self, task: asyncio.Task[_Answer]) -> None:
        self._on_over()
        if not task.cancelled():
            task.exception()  # it has been looked at


def _serves_parts(fields: Fields) -> bool:
    """Whether a whole answer's server says that it can send parts of a file worth asking for parts of."""
    units = [unit.strip().lower() for unit in fields.get("accept-ranges").split(",")]
    is_framed_by_length = not fields.get("transfer-encoding")
    return is_framed_by_length and "bytes" in units and (fields.number("content-length") or 0) >= MIN_SPARSE_BYTES


def _fresh_until(job: _Job, final_url: str, fields: Fields) -> float:
    """When to ask again; at once if it was redirected, since a redirect is never kept."""
    return time.monotonic() + fresh_seconds(fields) if final_url == job.url else 0.0


def _write_batch(spool: SpooledBytes, batch: list[bytes], _cancel: threading.Event) -> None:
    with storage_errors():
        spool.write(b"".join(batch))
