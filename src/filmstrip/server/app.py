"""A model in memory to an ASGI application: middleware, routes and error handlers put together; answers nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from filmstrip.config import ServerConfig
from filmstrip.server import chat, media, page, system
from filmstrip.server.errors import REQUEST_ID_HEADER, install_error_handlers
from filmstrip.server.media_protocol import MediaFramesRequest
from filmstrip.server.middleware import ApiKeyCheck, HostCheck, RequestIds
from filmstrip.server.protocol import ChatCompletionRequest
from filmstrip.server.state import VERSION, ServerState

if TYPE_CHECKING:
    from filmstrip.llm import AsyncLLM

_SCHEMA_REFERENCE = "#/components/schemas/{model}"
_HAND_READ_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/media/plan": ChatCompletionRequest,
    "/v1/media/frames": MediaFramesRequest,
}


def create_app(llm: AsyncLLM, config: ServerConfig) -> FastAPI:
    """The OpenAI-compatible API of ``llm``, which the caller starts before and closes after."""
    app = FastAPI(
        title="Filmstrip", version=VERSION, middleware=_middleware(config), redirect_slashes=False, redoc_url=None
    )
    app.state.server = ServerState(llm, config)
    app.include_router(chat.router)
    app.include_router(media.router)
    app.include_router(system.router)
    if config.page:
        app.include_router(page.create_router())
    install_error_handlers(app)
    app.openapi = lambda: _openapi(app)
    return app


def _middleware(config: ServerConfig) -> list[Middleware]:
    """From the outside in. A browser's preflight carries no key, so it is answered before the key is asked for."""
    middleware = [
        Middleware(RequestIds),
        Middleware(HostCheck, listens_on=config.host, allowed_hosts=config.allowed_hosts),
    ]
    if config.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's client sends many of its own
                expose_headers=[REQUEST_ID_HEADER, "Retry-After", "Retry-After-Ms"],
            )
        )
    if config.api_key is not None:
        middleware.append(Middleware(ApiKeyCheck, api_key=config.api_key, open_paths=page.PATHS))
    return middleware


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the bodies that are read by hand."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path, body in _HAND_READ_BODIES.items():
            _add_body(schema, path, body)
        app.openapi_schema = schema
    return app.openapi_schema


def _add_body(schema: dict[str, Any], path: str, model: type[BaseModel]) -> None:
    body = model.model_json_schema(ref_template=_SCHEMA_REFERENCE)
    schema["components"]["schemas"] |= body.pop("$defs", {}) | {model.__name__: body}
    schema["paths"][path]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _SCHEMA_REFERENCE.format(model=model.__name__)}}},
    }
