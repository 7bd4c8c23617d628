"""Bodies of the HTTP API as pydantic models: names, types and shapes of OpenAI's API; no behaviour."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Role = Literal["assistant"]


class _Omitting(BaseModel):
    """Leaves the fields named in ``omitted`` out of the JSON unless they were given, be it as null."""

    omitted: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _leave_out(self, serialize: SerializerFunctionWrapHandler):
        missing = self.omitted - self.model_fields_set
        return {name: value for name, value in serialize(self).items() if name not in missing}


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    """Send token counts in one more chunk at the end."""
    continuous_usage_stats: bool | None = None
    """With ``include_usage``: send token counts in every chunk."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatCompletionRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``; fields not listed here are judged in :mod:`filmstrip.server.convert`."""

    model_config = ConfigDict(strict=True, extra="allow")

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    media_io_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_overflow: str | None = None
    """What to do with media that do not fit the context: "error" refuses them, "fit" shows less of them and says so."""
    return_media_info: bool | None = None
    """Say in ``media`` what was looked at: frames, their times, sizes and token counts."""
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class PromptTokensDetails(BaseModel):
    """Where the tokens of the prompt come from; those of text, images, videos and time series add up to all of them."""

    cached_tokens: int
    text_tokens: int
    image_tokens: int
    video_tokens: int
    time_series_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """What the tokens of the answer are."""

    text_tokens: int
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageInfo(BaseModel):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class MediaInfo(BaseModel):
    """What was looked at of one image, video or time series; see :class:`filmstrip.types.MediaRecord`."""

    type: str
    num_frames: int
    frame_indices: list[int]
    timestamps: list[float]
    height: int
    width: int
    num_tokens: int
    cached: bool
    notes: list[str]
    num_samples: int | None = None
    num_channels: int | None = None


class AssistantMessage(BaseModel):
    """The answer."""

    role: Role = "assistant"
    content: str | None
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer and why it ended; ``stop_reason`` is the stop string or token id, if one was met."""

    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str
    stop_reason: str | int | None = None


class ChatCompletion(_Omitting):
    """Answer of ``POST /v1/chat/completions`` without ``stream``."""

    omitted = frozenset({"media"})

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    system_fingerprint: str
    media: list[MediaInfo] | None = None
    """Only with ``return_media_info``."""


class ChoiceDelta(_Omitting):
    """What a chunk adds to the answer; fields it says nothing of are left out."""

    omitted = frozenset({"role", "content"})

    role: Role | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The part of a chunk that belongs to the answer."""

    index: int = 0
    delta: ChoiceDelta
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatCompletionChunk(_Omitting):
    """One event of a stream."""

    omitted = frozenset({"usage", "media"})

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: UsageInfo | None = None
    """Only with ``include_usage``: null in all chunks but the last."""
    media: list[MediaInfo] | None = None
    """Only in the first chunk, with ``return_media_info``."""


class ModelCard(BaseModel):
    """One model of ``GET /v1/models``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "filmstrip"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[dict[str, Any]] = Field(default_factory=list)


class ModelList(BaseModel):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorInfo(BaseModel):
    """What went wrong: for people, by kind, at which field of the request, for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success, and of an error inside a stream."""

    error: ErrorInfo
