"""A checked URL in, an open answer out: the only code that connects to media servers; knows nothing of what they send.

The address that is checked is the address that is dialled: the check sits in the only function that opens connections, so
neither redirects nor a second answer of the name server get around it. Proxy settings of the environment, cookies and
credentials are never used.

Two seams, for tests and for unusual networks: a :class:`Resolver` turns names into addresses, and a
``httpcore2.AsyncNetworkBackend`` dials an address that passed the check.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, cast

import httpcore2

from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError, InvalidRequestError, MediaBlockedError, MediaFetchError
from filmstrip.media.address import HttpTarget, is_public_address, normal_domain, parse_address

T = TypeVar("T")

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


class HttpClient:
    """GET requests to hosts that may be asked, from any event loop; keeps nothing but threads.

    ``resolver`` and ``network`` are the seams named in the module's docstring, ``ssl_context`` is what servers' certificates
    are verified with.
    """

    def __init__(
        self,
        config: MediaConfig,
        resolver: Resolver | None,
        network: httpcore2.AsyncNetworkBackend | None,
        ssl_context: ssl.SSLContext | None,
    ) -> None:
        """Raises InvalidRequestError if an allowed domain is not a host name."""
        self._connect_timeout_seconds = config.connect_timeout_seconds
        self._allowed_hosts = frozenset(_allowed_host(domain) for domain in config.allowed_media_domains)
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

    def check(self, target: HttpTarget) -> None:
        """Raise MediaBlockedError if ``target`` is on a host that is not among the allowed domains."""
        if self._allowed_hosts and target.host not in self._allowed_hosts:
            raise MediaBlockedError(
                "the host is not one that media may be downloaded from (allowed_media_domains, --allowed-media-domains)"
            )

    async def pool(self, max_connections: int) -> httpcore2.AsyncConnectionPool:
        """A new set of connections, to be closed with ``aclose()``; each is opened under the guard."""
        ssl_context = await self.in_thread(lambda: self._ssl_context)  # reads the system's certificates from disk
        return httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context, network_backend=self._guard, max_connections=max_connections
        )

    @contextlib.asynccontextmanager
    async def get(
        self, pool: httpcore2.AsyncConnectionPool, target: HttpTarget, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> AsyncIterator[httpcore2.Response]:
        """The answer to a GET request, whose body is still to be read; nothing is followed.

        Raises MediaBlockedError, and the HTTP library's errors (see :meth:`errors`).
        """
        self.check(target)
        url = httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.target)
        every = [(b"Host", target.authority.encode("ascii")), *_HEADERS, *headers]
        timeouts = {"timeout": {"connect": self._connect_timeout_seconds}}
        async with pool.stream("GET", url, headers=every, extensions=timeouts) as response:
            yield response

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """The HTTP library's errors as ours; no address and no text of the server gets into a message."""
        try:
            yield
        except httpcore2.ConnectTimeout:
            raise MediaFetchError(
                f"the media server did not accept a connection within {self._connect_timeout_seconds:g} seconds"
                " (connect_timeout_seconds, --connect-timeout-seconds)",
                code="media_fetch_timeout",
            ) from None
        except httpcore2.ConnectError as error:
            if isinstance(next(iter(error.args), None), ssl.SSLError):
                raise MediaFetchError(
                    "the secure connection (TLS) to the media server failed: its certificate cannot be verified or it"
                    " does not speak TLS"
                ) from None
            raise MediaFetchError("the media server does not accept connections") from None
        except (httpcore2.ProtocolError, httpcore2.NetworkError, httpcore2.TimeoutException):
            raise MediaFetchError("the media server broke off or did not answer in valid HTTP") from None

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run ``function(*args)`` in a thread; when cancelled it goes on by itself."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._own_resolver is not None:
            self._own_resolver.close()

    @functools.cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        return self._given_ssl_context or httpcore2.default_ssl_context()


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
        async with deadline(timeout, httpcore2.ConnectTimeout("no connection in time")):
            return await self._connect(host, port, timeout, local_address, socket_options)

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


@contextlib.asynccontextmanager
async def deadline(seconds: float | None, error: Exception) -> AsyncIterator[None]:
    """Raise ``error`` if what is inside takes longer than ``seconds`` (None: any time).

    Unlike ``asyncio.wait_for``, which before Python 3.12 loses a cancellation that comes in the turn of the loop in which
    the work ends, so that somebody who was told to stop goes on.
    """
    if seconds is None:
        yield
        return
    task = asyncio.current_task()
    assert task is not None
    is_over = False

    def stop() -> None:
        nonlocal is_over
        is_over = True
        task.cancel()

    num_cancels = task.cancelling() if sys.version_info >= (3, 11) else 0
    timer = asyncio.get_running_loop().call_later(seconds, stop)
    try:
        yield
    except asyncio.CancelledError:
        # Somebody else may have cancelled at the same time; Python 3.10 cannot tell.
        if is_over and (sys.version_info < (3, 11) or task.uncancel() <= num_cancels):
            raise error from None
        raise
    finally:
        timer.cancel()


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """A full disk is the server's fault, not the request's."""
    try:
        yield
    except InterruptedError:
        raise
    except OSError as error:
        raise FilmstripError(f"the media cannot be stored here: {error.strerror}", code="storage_failed") from None


def _allowed_host(domain: str) -> str:
    try:
        return normal_domain(domain)
    except MediaBlockedError:
        raise InvalidRequestError(
            f"allowed_media_domains (--allowed-media-domains) must be host names or addresses, without scheme, port, path"
            f" or wildcard, not {domain!r:.300}",
            param="allowed_media_domains",
        ) from None
