"""Exceptions to OpenAI error bodies; knows every way a request can fail and shows none of the server's insides.

Only the messages of :class:`filmstrip.errors.FilmstripError` reach the client. Anything else is a bug: it is logged with its
traceback, and the client learns no more than that it happened.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from filmstrip.errors import EngineOverloadedError, FilmstripError, InvalidRequestError
from filmstrip.server.protocol import ErrorInfo, ErrorResponse

REQUEST_ID_HEADER = "X-Request-Id"
CLIENT_CLOSED_REQUEST = 499
RETRY_AFTER_SECONDS = 1
_CODES = {404: "not_found", 405: "method_not_allowed"}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class HTTPRequestError(InvalidRequestError):
    """A request that is wrong as HTTP, whatever its body says; ``headers`` go with the answer."""

    def __init__(self, http_status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, code=code)
        self.http_status = http_status
        self.error_type = self.error_type if http_status < 500 else FilmstripError.error_type
        self.headers = dict(headers or {})


def error_body(error: BaseException) -> ErrorResponse:
    """The body that describes ``error`` to a client."""
    if isinstance(error, FilmstripError):
        info = ErrorInfo(message=error.message, type=error.error_type, param=error.param, code=error.code)
    else:
        info = ErrorInfo(
            message="internal error; the server's log says more",
            type=FilmstripError.error_type,
            param=None,
            code=FilmstripError.code,
        )
    return ErrorResponse(error=info)


def error_response(error: BaseException) -> JSONResponse:
    """An answer with the status and body of ``error``; an overloaded server says when to come back."""
    status = error.http_status if isinstance(error, FilmstripError) else FilmstripError.http_status
    headers: dict[str, str] = {}
    if isinstance(error, HTTPRequestError):
        headers = error.headers
    elif isinstance(error, EngineOverloadedError):
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS), "retry-after-ms": str(RETRY_AFTER_SECONDS * 1000)}
    return JSONResponse(error_body(error).model_dump(), status_code=status, headers=headers)


def from_validation_error(error: ValidationError) -> InvalidRequestError:
    """The first complaint of pydantic about a body, with the field's dotted path as ``param``."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequestError(
            f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    param = _dotted(first["loc"])
    name = param or "the body"
    if first["type"] == "missing":
        return InvalidRequestError(f"{name} is required", param=param, code="missing_required_parameter")
    if first["type"] == "too_short":
        return InvalidRequestError(f"{name} must not be empty", param=param)
    message = first["msg"].removeprefix("Input ")
    return InvalidRequestError(f"{name} {message}, not {_short.repr(first['input'])}", param=param, code="invalid_type")


def _dotted(location: tuple[int | str, ...]) -> str | None:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return "".join(steps).removeprefix(".") or None


def install_error_handlers(app: FastAPI) -> None:
    """Make ``app`` answer every failure with an OpenAI error body."""
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)


async def _filmstrip_error(_: Request, error: Exception) -> Response:
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(_from_http_exception(request, error))


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    response = error_response(error)
    # This handler stands outside all middleware.
    response.headers[REQUEST_ID_HEADER] = request.state.request_id
    return response


_HANDLERS = {
    FilmstripError: _filmstrip_error,
    HTTPException: _http_error,
    ClientDisconnect: _client_gone,
    Exception: _unexpected_error,
}


def _from_http_exception(request: Request, error: HTTPException) -> HTTPRequestError:
    message: Any = error.detail
    if error.status_code == 404:
        message = f"there is nothing at {request.method} {request.url.path[:200]}"
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method}"
    code = _CODES.get(error.status_code, "http_error")
    return HTTPRequestError(error.status_code, str(message), code=code, headers=error.headers)
