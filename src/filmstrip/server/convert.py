"""A chat request's body to what the model is asked, and its outputs to the body's shapes; runs nothing.

Fields that would change the answer but are not supported, or have another place here, are refused, never ignored. Fields of
OpenAI's and OpenRouter's APIs that change nothing here are accepted; so are names nobody knows, unless one looks misspelt.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from filmstrip.errors import InvalidRequestError
from filmstrip.server.protocol import (
    ChatCompletionRequest,
    CompletionTokensDetails,
    MediaInfo,
    PromptTokensDetails,
    UsageInfo,
)
from filmstrip.types import MediaRecord, SamplingParams, Usage

logger = logging.getLogger(__name__)

_MAX_UNKNOWN_FIELDS = 100

_HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_retention", "prediction", "request_id", "session_id", "rid"}
    | {"models", "provider", "route", "transforms", "plugins"}
)

_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("fps", "num_frames", "min_frames", "max_frames", "start", "end"), "media_io_kwargs.video"),
    **dict.fromkeys(("nframes", "video", "video_kwargs"), "media_io_kwargs.video"),
    **dict.fromkeys(("min_pixels", "max_pixels", "mm_kwargs"), "mm_processor_kwargs"),
    **dict.fromkeys(("enable_thinking", "thinking"), "chat_template_kwargs"),
    "stop_sequences": "stop",
    **dict.fromkeys(("max_new_tokens", "n_predict", "num_predict", "max_length"), "max_tokens"),
    **dict.fromkeys(("sampling_seed", "random_seed"), "seed"),
}
"""Where to say what other APIs say in these fields, or what was meant for a part of them."""

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "custom_logit_processor": (),
    "do_sample": (True,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "early_stopping": (False,),
    "ebnf": (),
    "echo": (False,),
    "format": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": (),
    "guidance_scale": (1,),
    "images_config": (),
    "include_reasoning": (True,),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "logprobs": (False,),
    "lora_path": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "regex": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "return_logprob": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "stream_reasoning": (True,),
    "structured_outputs": (),
    "suppress_tokens": ([],),
    "think": (),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_audio_in_video": (False,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "video_config": (),
    "vllm_xargs": (),
    "web_search_options": (),
    "xtc_probability": (0,),
}
"""Fields of this and of other servers' APIs that would change the answer, with the values that ask for nothing."""


def check_request(request: ChatCompletionRequest, *, max_content_parts: int) -> None:
    """Raise InvalidRequestError for what is not supported, contradicts itself or is too much."""
    _check_other_fields(request.model_extra or {})
    if request.n not in (None, 1):
        raise InvalidRequestError(
            f"n must be 1, not {request.n}: several answers to one request are not supported", param="n"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")
    if request.add_generation_prompt and request.continue_final_message:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message cannot both be true", param="continue_final_message"
        )
    num_parts = count_content_parts(request.messages)
    if num_parts > max_content_parts:
        raise InvalidRequestError(
            f"the request has {num_parts} messages and content parts; at most {max_content_parts} are allowed "
            "(--max-content-parts)",
            param="messages",
        )


def count_content_parts(messages: Sequence[Mapping[str, Any]]) -> int:
    """Content parts of a conversation; a message without a list of them counts as one."""
    contents = (message.get("content") for message in messages)
    return sum(max(len(content), 1) if isinstance(content, list) else 1 for content in contents)


def _check_other_fields(fields: Mapping[str, Any]) -> None:
    if len(fields) > _MAX_UNKNOWN_FIELDS:
        raise InvalidRequestError(
            f"the body has {len(fields)} unknown fields; at most {_MAX_UNKNOWN_FIELDS} are allowed"
        )
    for name, value in fields.items():
        if value is None or name in _HARMLESS:
            continue
        if name.startswith("guided_"):
            raise InvalidRequestError(f"{name:.80} is not supported", param=f"{name:.80}", code="unsupported_parameter")
        if name in _UNSUPPORTED:
            if value not in _UNSUPPORTED[name]:
                raise InvalidRequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
            continue
        hint = _hint(name)
        if hint is not None:
            raise InvalidRequestError(
                f"there is no field {name:.80}; {hint}", param=f"{name:.80}", code="unknown_parameter"
            )
        logger.info("ignored the unknown field %.80r", name)


def _hint(name: str) -> str | None:
    """What to do about a field that does not exist; None if nothing here is like it."""
    if name in _ELSEWHERE:
        return f"say it in {_ELSEWHERE[name]}"
    similar = difflib.get_close_matches(name, {*ChatCompletionRequest.model_fields, *_UNSUPPORTED}, 1, 0.8)
    if not similar:
        return None
    if similar[0] in _UNSUPPORTED:
        return f"{similar[0]}, which it looks like, is not supported"
    return f"did you mean {similar[0]}?"


def given_sampling_params(request: ChatCompletionRequest) -> dict[str, Any]:
    """Fields of :class:`SamplingParams` that the request gives, ``max_completion_tokens`` as ``max_tokens``.

    Raises InvalidRequestError if the two differ.
    """
    given = {
        field.name: value
        for field in dataclasses.fields(SamplingParams)
        if (value := getattr(request, field.name)) is not None
    }
    limit = request.max_completion_tokens
    if limit is None:
        return given
    if request.max_tokens not in (None, limit):
        raise InvalidRequestError(
            f"max_tokens {request.max_tokens} contradicts max_completion_tokens {limit}; give one of them",
            param="max_tokens",
        )
    try:
        SamplingParams(max_tokens=limit)
    except InvalidRequestError as error:
        name = "max_completion_tokens"
        raise InvalidRequestError(error.message.replace("max_tokens", name), param=name) from None
    return given | {"max_tokens": limit}


def prompt_ending(request: ChatCompletionRequest) -> tuple[bool, bool]:
    """``add_generation_prompt`` and ``continue_final_message``: without a word, one is the opposite of the other."""
    continued = bool(request.continue_final_message)
    opened = not continued if request.add_generation_prompt is None else request.add_generation_prompt
    return opened, continued


def usage_info(usage: Usage) -> UsageInfo:
    """Token counts as OpenAI names them, with those of videos and time series beside those of images."""
    return UsageInfo(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=usage.cached_tokens,
            text_tokens=usage.prompt_tokens - usage.image_tokens - usage.video_tokens - usage.time_series_tokens,
            image_tokens=usage.image_tokens,
            video_tokens=usage.video_tokens,
            time_series_tokens=usage.time_series_tokens,
        ),
        completion_tokens_details=CompletionTokensDetails(text_tokens=usage.completion_tokens),
    )


def media_info(media: Sequence[MediaRecord]) -> list[MediaInfo]:
    """What was looked at, item by item."""
    return [MediaInfo(**dataclasses.asdict(record)) for record in media]
