"""Questions about the server itself: is it well, what does it serve, which version is it; runs no model."""

from __future__ import annotations

from fastapi import APIRouter, Request

from filmstrip.errors import EngineDeadError
from filmstrip.server.errors import HTTPRequestError
from filmstrip.server.protocol import ErrorResponse, ModelCard, ModelList
from filmstrip.server.state import VERSION, ServerState, server_state

router = APIRouter(tags=["system"])


@router.head("/health", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
@router.get("/health", responses={503: {"model": ErrorResponse}})
@router.get("/ping", responses={503: {"model": ErrorResponse}})
async def health(request: Request) -> dict[str, str]:
    """200 while requests can be answered, else 503."""
    if not server_state(request).llm.is_alive:
        raise HTTPRequestError(503, "the engine process has ended", code=EngineDeadError.code)
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this software."""
    return {"version": VERSION}


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """The one model that is served, and how long a conversation with it may be."""
    return ModelList(data=[_card(server_state(request))])


@router.get("/v1/models/{name:path}", responses={404: {"model": ErrorResponse}})
async def get_model(request: Request, name: str) -> ModelCard:
    """The same for one name."""
    state = server_state(request)
    state.check_model(name)
    return _card(state)


def _card(state: ServerState) -> ModelCard:
    permission = {
        "id": f"modelperm-{state.model_name}",
        "object": "model_permission",
        "created": state.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": False,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return ModelCard(
        id=state.model_name,
        created=state.created,
        root=state.model_name,
        max_model_len=state.llm.max_model_len,
        permission=[permission],
    )
