"""Server-sent events: models to framed bytes, keep-alives, and work that ends when its client is gone; knows no chat."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from filmstrip.errors import EngineOverloadedError, FilmstripError
from filmstrip.server.errors import error_body

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def encode_event(data: BaseModel) -> bytes:
    """One event. JSON has no raw line break, so the data is always one line."""
    return b"data: " + data.model_dump_json().encode() + b"\n\n"


async def encode_events(chunks: AsyncGenerator[BaseModel, None]) -> AsyncGenerator[bytes, None]:
    """Frame ``chunks`` and end with ``[DONE]``; an error on the way becomes the last event before it."""
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield encode_event(chunk)
        except FilmstripError as error:
            yield encode_event(error_body(error))
        except Exception as error:
            logger.exception("a stream failed")
            yield encode_event(error_body(error))
        yield DONE


async def with_keep_alives(events: AsyncGenerator[bytes, None], seconds: float) -> AsyncGenerator[bytes, None]:
    """Pass ``events`` on, with a comment line whenever nothing came for ``seconds``: proxies cut silent connections."""
    async with aclosing(events):
        while True:
            pending = asyncio.ensure_future(_next_or_none(events))
            try:
                while not (await asyncio.wait({pending}, timeout=seconds))[0]:
                    yield KEEP_ALIVE
            finally:
                await _cancel(pending)
            event = pending.result()
            if event is None:
                return
            yield event


class EventStream(Response):
    """Sends events until they end or the client is gone, and closes them and their ``source`` in every case.

    ``source`` is named beside ``events`` because closing a generator that never ran does not reach what it would read.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: AsyncGenerator[Any, None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | dict(headers or {}))
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Answer one request."""
        async with aclosing(self._source), aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await unless_disconnected(receive, self._send_events(send))
            except ClientDisconnect:
                return
            except EngineOverloadedError as error:
                last = encode_event(error_body(error)) + DONE
                await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_events(self, send: Send) -> None:
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``; if the client goes away first, ``work`` is cancelled and ClientDisconnect raised.

    The request's body must have been read. Only a server that ends cancels a request from outside; that its client can
    be told, it becomes an EngineOverloadedError.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(receive))
    try:
        try:
            await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            raise EngineOverloadedError("the server is shutting down", code="shutting_down") from None
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        await _cancel(worker, watcher)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*futures: asyncio.Future[Any]) -> None:
    """Cancel what is not done and wait until it is; how it then ended does not matter."""
    for future in futures:
        future.cancel()
    await asyncio.wait(futures)
    for future in futures:
        if not future.cancelled():
            future.exception()


async def _next_or_none(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)
