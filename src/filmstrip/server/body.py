"""A request's body to a checked pydantic model, within limits of size and patience; knows no field of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from filmstrip.server.errors import HTTPRequestError, from_validation_error

Model = TypeVar("Model", bound=BaseModel)

_LINGER_SECONDS = 2.0
_CLOSE = {"Connection": "close"}


async def read_json(request: Request, model: type[Model], *, max_bytes: int, idle_timeout_seconds: float) -> Model:
    """Read and validate the body.

    Raises HTTPRequestError 415 (not JSON, or compressed), 413 (over ``max_bytes``), 408 (silent for
    ``idle_timeout_seconds``), and InvalidRequestError (malformed JSON or a field of the wrong type).
    """
    # Web pages may post other types, or none, to any site without asking it first.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HTTPRequestError(415, "Content-Type must be application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPRequestError(
            415, "compressed bodies (Content-Encoding) are not accepted", code="unsupported_encoding"
        )
    body = await _read(request, max_bytes, idle_timeout_seconds)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation_error(error) from None


async def _read(request: Request, max_bytes: int, idle_timeout_seconds: float) -> bytearray:
    declared = request.headers.get("content-length", "")
    chunks = request.stream()
    if declared.isdecimal() and int(declared) > max_bytes:
        await _too_large(request, chunks, f"the body has {declared} bytes", max_bytes)
    body = bytearray()
    with contextlib.suppress(StopAsyncIteration):
        while True:
            try:
                body += await asyncio.wait_for(anext(chunks), idle_timeout_seconds)
            except asyncio.TimeoutError:
                raise HTTPRequestError(
                    408,
                    f"no more of the body arrived for {idle_timeout_seconds:g} s (--body-idle-timeout-seconds)",
                    code="body_timeout",
                    headers=_CLOSE,
                ) from None
            if len(body) > max_bytes:
                body.clear()
                await _too_large(request, chunks, "the body is longer", max_bytes)
    return body


async def _too_large(request: Request, chunks: AsyncIterator[bytes], what: str, max_bytes: int) -> None:
    """Refuse the rest of a body.

    Many clients read no answer before they have sent everything, and lose it if the connection closes under them; so what
    arrives in the next moments is read and dropped. A client that asked first (``Expect``) is answered at once.
    """
    if "expect" not in request.headers:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drop(chunks), _LINGER_SECONDS)
    raise HTTPRequestError(
        413,
        f"{what}; at most {max_bytes} bytes are accepted (--max-body-bytes)",
        code="body_too_large",
        headers=_CLOSE,
    )


async def _drop(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass
