"""``POST /v1/chat/completions``: one request through the model, answered at once or as a stream; knows no media."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from filmstrip.errors import EngineDeadError, FilmstripError
from filmstrip.server.body import read_json
from filmstrip.server.convert import check_request, given_sampling_params, media_info, prompt_ending, usage_info
from filmstrip.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChoiceDelta,
    ChunkChoice,
    ErrorResponse,
    StreamOptions,
)
from filmstrip.server.state import SYSTEM_FINGERPRINT, ServerState, server_state
from filmstrip.server.streaming import EventStream, encode_events, unless_disconnected, with_keep_alives
from filmstrip.types import RequestOutput, Usage

logger = logging.getLogger(__name__)

router = APIRouter(tags=["chat"])

Outputs = AsyncGenerator[RequestOutput, None]


async def _read_body(request: Request) -> ChatCompletionRequest:
    config = server_state(request).config
    return await read_json(
        request,
        ChatCompletionRequest,
        max_bytes=config.max_body_bytes,
        idle_timeout_seconds=config.body_idle_timeout_seconds,
    )


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation about text, images and videos",
    response_model=None,
    responses={200: {"model": ChatCompletion}, 400: {"model": ErrorResponse}, 404: {"model": ErrorResponse}},
)
async def create_chat_completion(
    request: Request, body: Annotated[ChatCompletionRequest, Depends(_read_body)]
) -> Response:
    """Errors found before the first token, those of media included, are plain HTTP errors even if ``stream`` is true."""
    state = server_state(request)
    answer = _Answer(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), state.check_model(body.model))
    check_request(body, max_content_parts=state.config.max_content_parts)
    outputs = _outputs(state, body, answer.id, request.state.request_id)
    if not body.stream:
        async with aclosing(outputs):
            last = await unless_disconnected(request.receive, _last(outputs))
        return Response(_completion(last, answer, body).model_dump_json(), media_type="application/json")
    try:
        first = await unless_disconnected(request.receive, _next(outputs))
    except BaseException:
        await outputs.aclose()
        raise
    events = encode_events(_chunks(first, outputs, answer, body))
    return EventStream(with_keep_alives(events, state.config.keep_alive_seconds), outputs)


@dataclass(frozen=True)
class _Answer:
    """What all objects that answer one request have in common."""

    id: str
    created: int
    model: str

    def head(self) -> dict[str, Any]:
        return vars(self) | {"system_fingerprint": SYSTEM_FINGERPRINT}


async def _outputs(state: ServerState, body: ChatCompletionRequest, answer_id: str, request_id: str) -> Outputs:
    """The model's outputs, and one line in the log when they end: counts and times, nothing of what was said."""
    params = state.llm.default_sampling_params(**given_sampling_params(body))
    if not state.llm.is_alive:
        raise EngineDeadError("the engine process has ended; the server must be started again")
    started, output = time.monotonic(), None
    add_generation_prompt, continue_final_message = prompt_ending(body)
    outputs = state.llm.generate(
        body.messages,
        params,
        request_id=answer_id,
        media_io_kwargs=body.media_io_kwargs,
        media_overflow=body.media_overflow,
        mm_processor_kwargs=body.mm_processor_kwargs,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    outcome = "not finished"
    try:
        async with aclosing(outputs):
            async for output in outputs:
                if output.finish_reason == "abort":
                    raise FilmstripError("the server aborted the request", code="aborted")
                outcome = output.finish_reason or outcome
                yield output
    except FilmstripError as error:
        outcome = error.code
        raise
    finally:
        usage = output.usage if output else Usage()
        logger.info(
            "%s %s: %s, prompt %d tokens (%d cached), answer %d tokens, %.3f s",
            request_id,
            answer_id,
            outcome,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            time.monotonic() - started,
        )


async def _next(outputs: Outputs) -> RequestOutput:
    return await anext(outputs)


async def _last(outputs: Outputs) -> RequestOutput:
    last = await anext(outputs)
    async for output in outputs:
        last = output
    return last


def _completion(output: RequestOutput, answer: _Answer, body: ChatCompletionRequest) -> ChatCompletion:
    choice = ChatChoice(
        message=AssistantMessage(content=output.text),
        finish_reason=str(output.finish_reason),
        stop_reason=output.stop_reason,
    )
    shape = answer.head()
    if body.return_media_info:
        shape["media"] = media_info(output.media)
    return ChatCompletion(choices=[choice], usage=usage_info(output.usage), **shape)


async def _chunks(
    output: RequestOutput, outputs: Outputs, answer: _Answer, body: ChatCompletionRequest
) -> AsyncGenerator[ChatCompletionChunk, None]:
    """Role, text, finish reason and (if asked for) token counts, in the order OpenAI sends them."""
    options = body.stream_options or StreamOptions()

    def chunk(delta: ChoiceDelta, **finish: Any) -> ChatCompletionChunk:
        shape = answer.head()
        if options.include_usage:
            shape["usage"] = usage_info(output.usage) if options.continuous_usage_stats else None
        return ChatCompletionChunk(choices=[ChunkChoice(delta=delta, **finish)], **shape)

    first = chunk(ChoiceDelta(role="assistant", content=""))
    if body.return_media_info:
        first.media = media_info(output.media)
    yield first
    while output.finish_reason is None:
        output = await anext(outputs)
        if output.delta:
            yield chunk(ChoiceDelta(content=output.delta))
    yield chunk(ChoiceDelta(), finish_reason=output.finish_reason, stop_reason=output.stop_reason)
    if options.include_usage:
        yield ChatCompletionChunk(choices=[], usage=usage_info(output.usage), **answer.head())
