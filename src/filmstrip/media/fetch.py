"""A URL or path in, encoded bytes out: the one fetcher of every modality and API; knows nothing of what it fetches.

Rules for downloads. The address that is checked is the address that is dialled: the check sits in the only function that
opens connections, so neither redirects nor a second answer of the name server get around it. Proxy settings of the
environment, cookies and credentials are never used. Limits hold while bytes arrive, and one deadline covers everything.

Two seams, for tests and for unusual networks: a :class:`Resolver` turns names into addresses, and a
``httpcore2.AsyncNetworkBackend`` dials an address that passed the check.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, cast

import httpcore2

from filmstrip.config import MediaConfig
from filmstrip.errors import (
    FilmstripError,
    MediaBlockedError,
    MediaError,
    MediaFetchError,
    MediaTooLargeError,
)
from filmstrip.media.address import (
    HttpTarget,
    is_public_address,
    parse_address,
    parse_http_url,
    parse_redirect,
    url_scheme,
)
from filmstrip.media.data_url import DataUrl, decode_base64, parse_data_url, too_large
from filmstrip.media.local_files import CLOSED_MESSAGE, file_url_path, open_anywhere, open_inside
from filmstrip.media.source import FileSource, MediaSource, SpooledBytes

T = TypeVar("T")

MAX_MEMORY_BYTES = 32 * 1024**2
"""Downloads and data URLs up to this size stay in memory, larger ones go to a nameless temporary file."""

_FRAMES_URL = re.compile(r"data:\s*video/(jpeg|jpg|png|webp)\s*[;,]", re.IGNORECASE)
_DATA_FAMILIES = ("", "image", "video", "audio", "application")
_DATA_TEXT_TYPES = ("text/plain", "text/csv")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_BATCH_BYTES = 1 << 20
_MAX_ADDRESSES = 8
_NUM_THREADS = 8
_HEADERS = [
    (b"User-Agent", b"Filmstrip media fetcher"),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"identity"),
    (b"Connection", b"keep-alive"),
]


class Resolver(Protocol):
    """Turns a host name into addresses."""

    async def resolve(self, host: str) -> Sequence[str]:
        """All IP addresses of ``host`` in the order to try them; raises OSError if it has none."""
        ...


class SystemResolver:
    """The operating system's resolver, in threads of its own: a stuck name server must not hold up other work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="filmstrip-dns")

    async def resolve(self, host: str) -> Sequence[str]:
        """Addresses in the order of the system's policy, each once."""
        answers = await asyncio.get_running_loop().run_in_executor(
            self._threads, functools.partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(answer[4][0]) for answer in answers))

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Fetcher:
    """Fetches for any number of requests at once, from any event loop.

    Nothing is kept between two fetches: no connection, no cookie, no name. ``resolver`` and ``network`` are the seams named
    in the module's docstring, ``ssl_context`` is what servers' certificates are verified with.
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
        self._own_resolver = None
        if resolver is None:
            resolver = self._own_resolver = SystemResolver()
        self._guard = _GuardedNetwork(
            resolver,
            network or cast(httpcore2.AsyncNetworkBackend, httpcore2.AnyIOBackend()),
            allow_private=config.allow_private_media_urls,
        )
        self._given_ssl_context = ssl_context
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="filmstrip-fetch")

    async def fetch(self, url: str | os.PathLike[str], *, param: str | None = None) -> MediaSource:
        """The bytes behind ``url``: http, https, file, data (base64) or a plain path.

        Raises MediaBlockedError where policy forbids the address, scheme or path, MediaTooLargeError over
        ``max_media_bytes``, MediaFetchError for everything that fails; ``param`` is set on each. Cancelling stops at once.
        """
        url = os.fspath(url)
        with about(param):
            if url_scheme(url) in ("http", "https"):
                return await self._download(url)
            return await self._in_thread(self._load, url)

    async def fetch_frames(self, url: str, *, param: str | None = None) -> list[MediaSource]:
        """The frames of a ``data:video/jpeg;base64,a,b,c`` URL (see :func:`is_frames_url`), in order.

        Raises MediaTooLargeError over ``max_video_frames`` or ``max_media_bytes`` before anything is decoded, else as
        :meth:`fetch`.
        """
        with about(param):
            return await self._in_thread(self._load_frames, url)

    def fetch_sync(self, url: str | os.PathLike[str]) -> MediaSource:
        """:meth:`fetch` for code that is not async; works inside a running event loop (a notebook), too, but blocks it."""
        url = os.fspath(url)
        if url_scheme(url) not in ("http", "https"):
            return self._load(url, threading.Event())
        with ThreadPoolExecutor(1, thread_name_prefix="filmstrip-fetch") as thread:
            return thread.submit(lambda: asyncio.run(self.fetch(url))).result()

    def fetch_frames_sync(self, url: str) -> list[MediaSource]:
        """:meth:`fetch_frames` for code that is not async."""
        return self._load_frames(url, threading.Event())

    async def close(self) -> None:
        """Let go of the threads; nothing can be fetched after."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._own_resolver is not None:
            self._own_resolver.close()

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run ``function(*args, cancel)`` in a thread; cancelling sets the event, at which it soon ends."""
        cancel = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args, cancel)
        finally:
            cancel.set()

    # Data URLs and files

    def _load(self, url: str, cancel: threading.Event) -> MediaSource:
        scheme = url_scheme(url)
        if scheme == "data":
            return self._load_data(url, cancel)
        if scheme in ("file", ""):
            if not (self._config.allow_local_files or self._config.allowed_local_media_path):
                raise MediaBlockedError(CLOSED_MESSAGE)
            return self._load_file(file_url_path(url) if scheme else url, cancel)
        message = f"the scheme {scheme[:40]!r} is not supported; media can be http://, https:// or data:...;base64,"
        if self._config.allow_local_files:
            message += ", file:// or a path (./ before a file name with a colon)"
        raise MediaBlockedError(message)

    def _load_file(self, path: str, cancel: threading.Event) -> MediaSource:
        # A directory that was named holds for everyone, even where files are open in general.
        root = self._config.allowed_local_media_path
        fd = open_inside(root, path) if root else open_anywhere(path)
        try:
            num_bytes = os.fstat(fd).st_size
            if num_bytes > self._config.max_media_bytes:
                raise too_large(num_bytes, self._config.max_media_bytes)
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

    def _load_data(self, url: str, cancel: threading.Event) -> MediaSource:
        data = self._parse_data(url)
        return self._decode(data, data.start, len(url), cancel)

    def _load_frames(self, url: str, cancel: threading.Event) -> list[MediaSource]:
        data = self._parse_data(url)
        num_frames, limit = url.count(",", data.start) + 1, self._config.max_video_frames
        if num_frames > limit:
            raise MediaTooLargeError(
                f"the video has {num_frames} frames; the limit is {limit} (max_video_frames, --max-video-frames)"
            )
        num_bytes = (len(url) - data.start) // 4 * 3
        if num_bytes > self._config.max_media_bytes:
            raise too_large(num_bytes, self._config.max_media_bytes)
        frames = []
        for number, (start, end) in enumerate(data.parts()):
            try:
                frames.append(self._decode(data, start, end, cancel))
            except MediaFetchError as error:
                raise MediaFetchError(f"frame {number}: {error.message}") from None
        return frames

    def _parse_data(self, url: str) -> DataUrl:
        data = parse_data_url(url)
        if data.media_type.split("/")[0] not in _DATA_FAMILIES and data.media_type not in _DATA_TEXT_TYPES:
            raise MediaFetchError(f"a data URL of type {data.media_type[:80]!r} is not media")
        return data

    def _decode(self, data: DataUrl, start: int, end: int, cancel: threading.Event) -> MediaSource:
        with _storage_errors():
            return decode_base64(
                data.url,
                start,
                end,
                max_bytes=self._config.max_media_bytes,
                max_memory_bytes=MAX_MEMORY_BYTES,
                cancel=cancel,
            )

    # Downloads

    async def _download(self, url: str) -> MediaSource:
        target = parse_http_url(url)
        timeout = self._config.fetch_timeout_seconds
        try:
            return await asyncio.wait_for(self._follow(target), timeout)
        except asyncio.TimeoutError:  # not the built-in TimeoutError in Python 3.10
            raise MediaFetchError(
                f"the download took longer than {timeout:g} seconds (fetch_timeout_seconds, --fetch-timeout-seconds)",
                code="media_fetch_timeout",
            ) from None

    async def _follow(self, target: HttpTarget) -> MediaSource:
        """Download from ``target`` or from where it redirects to."""
        # A pool for each fetch: a handshake is short beside a video, and nothing of one request is left for the next.
        ssl_context = await self._in_thread(lambda _: self._ssl_context)  # reads the system's certificates from disk
        async with httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context, network_backend=self._guard, max_connections=1
        ) as pool:
            for _ in range(self._config.max_redirects + 1):
                with _network_errors(self._config.connect_timeout_seconds):
                    answer = await self._get(pool, target)
                if not isinstance(answer, HttpTarget):
                    return answer
                target = answer
        raise MediaFetchError(
            f"the media server redirects more than {self._config.max_redirects} times (max_redirects, --max-redirects)"
        )

    async def _get(self, pool: httpcore2.AsyncConnectionPool, target: HttpTarget) -> MediaSource | HttpTarget:
        """One request: the body, or the target of a redirect."""
        url = httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.target)
        headers = [(b"Host", target.authority.encode("ascii")), *_HEADERS]
        timeouts = {"timeout": {"connect": self._config.connect_timeout_seconds}}
        async with pool.stream("GET", url, headers=headers, extensions=timeouts) as response:
            fields = _Fields(response.headers)
            if response.status in _REDIRECT_STATUSES:
                location = fields.get("location")
                if not location:
                    raise MediaFetchError("the media server redirects to nowhere")
                same_port_only = not self._config.allow_private_media_urls
                return parse_redirect(location, target, same_port_only=same_port_only)
            self._check_answer(response.status, fields)
            return await self._receive(response)

    def _check_answer(self, status: int, fields: _Fields) -> None:
        """Raise for what can be refused before the body."""
        if status != 200:
            raise MediaFetchError(f"the media server answered with HTTP status {status}")
        encoding = fields.get("content-encoding").lower()
        if encoding not in ("", "identity"):
            raise MediaFetchError(f"the media server sent the encoding {encoding[:40]!r}, which was not asked for")
        if fields.get("content-type").split(";")[0].strip().lower() in _HTML_TYPES:
            raise MediaFetchError("the URL leads to a web page (HTML), not to a media file")
        length = fields.get("content-length")
        if length.isdecimal() and int(length) > self._config.max_media_bytes:
            raise too_large(int(length), self._config.max_media_bytes)

    async def _receive(self, response: httpcore2.Response) -> MediaSource:
        """The body, cut off at the byte limit."""
        spool = SpooledBytes(MAX_MEMORY_BYTES)
        batch: list[bytes] = []
        num_received = num_in_batch = 0
        async with contextlib.aclosing(response.aiter_stream()) as chunks:
            async for chunk in chunks:
                num_received += len(chunk)
                num_in_batch += len(chunk)
                if num_received > self._config.max_media_bytes:
                    raise too_large(num_received, self._config.max_media_bytes)
                batch.append(chunk)
                if num_in_batch >= _BATCH_BYTES:
                    await self._in_thread(_write_batch, spool, batch)
                    batch, num_in_batch = [], 0
        if num_received == 0:
            raise MediaFetchError("the media server sent an empty file")
        await self._in_thread(_write_batch, spool, batch)
        return spool.finish()

    @functools.cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        return self._given_ssl_context or httpcore2.default_ssl_context()


def is_frames_url(url: str) -> bool:
    """Whether ``url`` is a data URL of frames sampled by the client: ``data:video/jpeg;base64,a,b,c`` (or png, webp)."""
    return _FRAMES_URL.match(url) is not None


@contextlib.contextmanager
def about(param: str | None) -> Iterator[None]:
    """Media errors raised inside are about the request field ``param`` unless they name one themselves."""
    try:
        yield
    except MediaError as error:
        error.param = error.param or param
        raise


class _GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """Dials a host's checked addresses: one resolution, every answer checked, one of exactly these dialled."""

    def __init__(self, resolver: Resolver, network: httpcore2.AsyncNetworkBackend, *, allow_private: bool) -> None:
        self._resolver, self._network, self._allow_private = resolver, network, allow_private

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to ``host``; ``timeout`` seconds cover the resolution and all addresses."""
        try:
            return await asyncio.wait_for(self._connect(host, port, timeout, local_address, socket_options), timeout)
        except asyncio.TimeoutError:  # not the built-in TimeoutError in Python 3.10
            raise httpcore2.ConnectTimeout("no connection in time") from None

    async def _connect(
        self, host: str, port: int, timeout: float | None, local_address: str | None, socket_options: Any
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._checked_addresses(host)
        error: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            # An address that does not answer must leave time for the others.
            share = None if timeout is None else timeout / len(addresses)
            try:
                return await self._network.connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as failure:
                error = failure
        raise error

    async def _checked_addresses(self, host: str) -> Sequence[str]:
        """Addresses of ``host``, all of them allowed; MediaBlockedError if a single one is not."""
        if parse_address(host) is not None:
            addresses: Sequence[str] = [host]
        else:
            try:
                addresses = await self._resolver.resolve(host)
            except OSError:
                addresses = []
            if not addresses:
                raise MediaFetchError("the host name in the URL cannot be resolved")
        if not self._allow_private and not all(is_public_address(address) for address in addresses):
            raise MediaBlockedError(
                "the address is not on the public internet; media are fetched from there only, unless"
                " allow_private_media_urls (--allow-private-media-urls) is set"
            )
        return addresses[:_MAX_ADDRESSES]


class _Fields:
    """Response headers by lower-case name; repeated ones are joined with commas (RFC 9110 section 5.3)."""

    def __init__(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in headers:
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError:
                text = value.decode("latin-1")
            self._values.setdefault(name.decode("latin-1").lower(), []).append(text.strip())

    def get(self, name: str) -> str:
        """The value, "" if there is none."""
        return ", ".join(self._values.get(name, ()))


@contextlib.contextmanager
def _network_errors(connect_timeout_seconds: float) -> Iterator[None]:
    """The HTTP library's errors as ours; no address and no text of the server gets into a message."""
    try:
        yield
    except httpcore2.ConnectTimeout:
        raise MediaFetchError(
            f"the media server did not accept a connection within {connect_timeout_seconds:g} seconds"
            " (connect_timeout_seconds, --connect-timeout-seconds)",
            code="media_fetch_timeout",
        ) from None
    except httpcore2.ConnectError as error:
        if isinstance(next(iter(error.args), None), ssl.SSLError):
            raise MediaFetchError(
                "the secure connection (TLS) to the media server failed: its certificate cannot be verified or it does"
                " not speak TLS"
            ) from None
        raise MediaFetchError("the media server does not accept connections") from None
    except (httpcore2.ProtocolError, httpcore2.NetworkError, httpcore2.TimeoutException):
        raise MediaFetchError("the media server broke off or did not answer in valid HTTP") from None


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """A full disk is the server's fault, not the request's."""
    try:
        yield
    except InterruptedError:
        raise
    except OSError as error:
        raise FilmstripError(f"the media cannot be stored here: {error.strerror}", code="storage_failed") from None


def _write_batch(spool: SpooledBytes, batch: list[bytes], _cancel: threading.Event) -> None:
    with _storage_errors():
        spool.write(b"".join(batch))
