"""``POST /v1/media/plan`` and ``/v1/media/frames``: what an answer would look at, before one is asked for; runs no model.

Both take the body of a chat request and hold it to the same limits and rights; a client that goes away stops the work.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request

from filmstrip.errors import InvalidRequestError
from filmstrip.media.contact_sheet import jpeg_url
from filmstrip.server.body import read_json
from filmstrip.server.convert import check_request, prompt_ending
from filmstrip.server.media_protocol import (
    FittedMedia,
    ItemThumbnails,
    MediaFrames,
    MediaFramesRequest,
    MediaPlan,
    MediaPlanItem,
    Thumbnail,
)
from filmstrip.server.protocol import ChatCompletionRequest, ErrorResponse
from filmstrip.server.state import ServerState, server_state
from filmstrip.server.streaming import unless_disconnected

if TYPE_CHECKING:
    from filmstrip.processing.preview import ItemPreview, PromptPreview, Thumbnails

router = APIRouter(tags=["media"])

Body = TypeVar("Body", bound=ChatCompletionRequest)

MAX_EDGE_RANGE = (16, 512)
MAX_THUMBNAILS_RANGE = (1, 256)


async def _read_plan_body(request: Request) -> ChatCompletionRequest:
    return await _read(request, ChatCompletionRequest)


async def _read_frames_body(request: Request) -> MediaFramesRequest:
    return await _read(request, MediaFramesRequest)


async def _read(request: Request, model: type[Body]) -> Body:
    config = server_state(request).config
    return await read_json(
        request, model, max_bytes=config.max_body_bytes, idle_timeout_seconds=config.body_idle_timeout_seconds
    )


@router.post(
    "/v1/media/plan",
    summary="Say which frames an answer would look at and what they cost, without decoding",
    responses={400: {"model": ErrorResponse}, 404: {"model": ErrorResponse}},
)
async def plan_media(request: Request, body: Annotated[ChatCompletionRequest, Depends(_read_plan_body)]) -> MediaPlan:
    """The body is that of ``/v1/chat/completions``; a prompt that is too long is no error here but ``"fits": false``."""
    state = server_state(request)
    model = _check(state, body)
    preview = await unless_disconnected(request.receive, state.llm.preview(body.messages, **_options(body)))
    return _plan(model, preview)


@router.post(
    "/v1/media/frames",
    summary="Show the frames an answer would look at as small pictures",
    responses={400: {"model": ErrorResponse}, 404: {"model": ErrorResponse}},
)
async def show_media_frames(
    request: Request, body: Annotated[MediaFramesRequest, Depends(_read_frames_body)]
) -> MediaFrames:
    """The body is that of ``/v1/chat/completions``, with ``max_edge`` and ``max_thumbnails`` if other than usual."""
    state = server_state(request)
    model = _check(state, body)
    _check_range("max_edge", body.max_edge, MAX_EDGE_RANGE)
    _check_range("max_thumbnails", body.max_thumbnails, MAX_THUMBNAILS_RANGE)
    thumbnails = await unless_disconnected(
        request.receive,
        state.llm.thumbnails(
            body.messages, max_edge=body.max_edge, max_thumbnails=body.max_thumbnails, **_options(body)
        ),
    )
    media = await asyncio.to_thread(lambda: [_thumbnails(item) for item in thumbnails])
    return MediaFrames(model=model, media=media)


def _check(state: ServerState, body: ChatCompletionRequest) -> str:
    """The model's name; raises as a chat request would."""
    model = state.check_model(body.model)
    check_request(body, max_content_parts=state.config.max_content_parts)
    return model


def _check_range(name: str, value: int, allowed: tuple[int, int]) -> None:
    low, high = allowed
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} must be from {low} to {high}, not {value}", param=name)


def _options(body: ChatCompletionRequest) -> dict[str, Any]:
    add_generation_prompt, continue_final_message = prompt_ending(body)
    return {
        "media_io_kwargs": body.media_io_kwargs,
        "mm_processor_kwargs": body.mm_processor_kwargs,
        "chat_template_kwargs": body.chat_template_kwargs,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "media_overflow": body.media_overflow,
    }


def _plan(model: str, preview: PromptPreview) -> MediaPlan:
    fitted = preview.fitted
    return MediaPlan(
        model=model,
        media=[_item(item) for item in preview.items],
        prompt_tokens=preview.num_prompt_tokens,
        media_tokens=preview.num_media_tokens,
        max_model_len=preview.max_model_len,
        fits=preview.fits,
        advice=preview.advice,
        fitted=None if fitted is None else [FittedMedia(**vars(item)) for item in fitted],
    )


def _item(item: ItemPreview) -> MediaPlanItem:
    return MediaPlanItem.model_validate(item.description() | {"param": item.item.param})


def _thumbnails(item: Thumbnails) -> ItemThumbnails:
    indices = item.frame_indices or (None,) * len(item.frames)
    timestamps = item.timestamps or (None,) * len(item.frames)
    height, width = item.frames.shape[1:3]
    frames = [
        Thumbnail(frame_index=index, timestamp=timestamp, url=jpeg_url(frame))
        for index, timestamp, frame in zip(indices, timestamps, item.frames, strict=True)
    ]
    return ItemThumbnails(
        type=item.modality.value, num_frames=item.num_planned, width=width, height=height, frames=frames
    )
