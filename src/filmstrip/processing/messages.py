"""OpenAI-style messages to template messages and media items; validates their form, fetches nothing.

Accepted content parts: ``text``; ``image_url``, ``video_url`` and ``time_series_url`` as a string or an object with ``url``;
``video_frames``, a video as a list of pictures with their times; and, as Qwen's own tools write them,
``{"type": "image", "image": ...}`` and ``{"type": "video", "video": ...}``, whose value may also be a PIL image or an array
of frames (Python API), and likewise ``time_series``. Settings may stand in the part's object or beside it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from filmstrip.config import VIDEO_DECODERS
from filmstrip.errors import InvalidRequestError
from filmstrip.media.frames import TIMING_FIELDS, is_presampled, parse_frame_timing
from filmstrip.media.sampling import parse_frame_sampling
from filmstrip.media.time_series import check_sampling_rate
from filmstrip.types import FrameSampling, FrameTiming, MediaItem, Modality, PixelLimits

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_MEDIA_PARTS = {
    "image_url": Modality.IMAGE,
    "image": Modality.IMAGE,
    "input_image": Modality.IMAGE,
    "video_url": Modality.VIDEO,
    "video": Modality.VIDEO,
    "input_video": Modality.VIDEO,
    "video_frames": Modality.VIDEO,
    "time_series_url": Modality.TIME_SERIES,
    "time_series": Modality.TIME_SERIES,
}
_FRAMES_PART = "video_frames"
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_PART_TYPES = "text, image_url, video_url, video_frames, time_series_url, image, video, time_series"
_PIXEL_KEYS = frozenset({"min_pixels", "max_pixels"})
_DECODER_KEYS = ("backend", "video_backend")
_OWN_VIDEO_KEYS = frozenset({*TIMING_FIELDS, *_DECODER_KEYS})
_IGNORED_PART_KEYS = frozenset({"type", "url", "detail", "uuid", "cache_control", "format"})


@dataclass(frozen=True)
class MediaOptions:
    """What applies to the media of a request unless an item says otherwise; ``video_decoder`` None is the server's own."""

    sampling: FrameSampling = FrameSampling()
    timing: FrameTiming = FrameTiming()
    video_decoder: str | None = None
    image_pixels: PixelLimits = PixelLimits()
    video_pixels: PixelLimits = PixelLimits()

    def pixels(self, modality: Modality) -> PixelLimits:
        """The limits of one modality; the other's never reach it."""
        return self.image_pixels if modality is Modality.IMAGE else self.video_pixels


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates want them, and their media in prompt order."""

    messages: list[dict[str, Any]]
    items: list[MediaItem]


def parse_media_options(
    media_io_kwargs: Mapping[str, Any] | None, mm_processor_kwargs: Mapping[str, Any] | None, defaults: MediaOptions
) -> MediaOptions:
    """Options of one request: what it says, filled up from the server's ``defaults``.

    ``media_io_kwargs`` is ``{"video": {"num_frames", "fps", ..., "backend"}}``; ``mm_processor_kwargs`` is
    ``{"image" | "video": {"min_pixels", "max_pixels"}}``. Raises InvalidRequestError for anything else.
    """
    io = _section(media_io_kwargs, "media_io_kwargs", ("video", "image", "time_series"))
    for name in ("image", "time_series"):
        if io.get(name):
            raise InvalidRequestError(
                f"media_io_kwargs.{name} has no settings, but {', '.join(map(repr, io[name]))} is given",
                param=f"media_io_kwargs.{name}",
            )
    video = _parse_video(io.get("video", {}), "media_io_kwargs.video")
    pixels = _section(mm_processor_kwargs, "mm_processor_kwargs", ("image", "video"))
    return MediaOptions(
        video.sampling.or_else(defaults.sampling),
        video.timing,
        video.decoder or defaults.video_decoder,
        _or_else(parse_pixel_limits(pixels.get("image", {}), "mm_processor_kwargs.image"), defaults.image_pixels),
        _or_else(parse_pixel_limits(pixels.get("video", {}), "mm_processor_kwargs.video"), defaults.video_pixels),
    )


def parse_pixel_limits(values: Mapping[str, Any], param: str) -> PixelLimits:
    """``{"min_pixels", "max_pixels"}`` as positive integers, min not above max; else InvalidRequestError."""
    for name, value in values.items():
        if name not in _PIXEL_KEYS:
            raise InvalidRequestError(
                f"{param} has no setting {name!r}; it takes min_pixels and max_pixels", param=f"{param}.{name}"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidRequestError(
                f"{param}.{name} must be an integer >= 1, not {value!r:.80}", param=f"{param}.{name}"
            )
    limits = PixelLimits(values.get("min_pixels"), values.get("max_pixels"))
    if limits.min_pixels is not None and limits.max_pixels is not None and limits.min_pixels > limits.max_pixels:
        raise InvalidRequestError(
            f"{param}.min_pixels {limits.min_pixels} is above max_pixels {limits.max_pixels}",
            param=f"{param}.min_pixels",
        )
    return limits


def parse_messages(
    messages: Sequence[Mapping[str, Any]],
    options: MediaOptions,
    *,
    max_items: int,
    limits: Mapping[str, int] | None = None,
) -> Conversation:
    """Check and convert a conversation of at most ``max_items`` media items; ``limits`` has further ones by modality.

    Raises InvalidRequestError whose ``param`` names the offending field, e.g. ``messages[0].content[1].video_url``.
    """
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a non-empty list", param="messages")
    items: list[MediaItem] = []
    converted = [_message(message, f"messages[{i}]", options, items) for i, message in enumerate(messages)]
    if len(items) > max_items:
        raise InvalidRequestError(
            f"the request has {len(items)} media items; at most {max_items} are allowed (max_items_per_request)",
            param="messages",
        )
    for modality, count in Counter(item.type.value for item in items).items():
        limit = (limits or {}).get(modality, count)
        if count > limit:
            raise InvalidRequestError(
                f"the request has {count} items of type {modality}; at most {limit} are allowed (limit_mm_per_prompt, "
                "--limit-mm-per-prompt)",
                param="messages",
            )
    return Conversation(converted, items)


def has_text(message: Mapping[str, Any]) -> bool:
    """Whether a valid message has words, which ``continue_final_message`` can go on from."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else content
    texts = (part if isinstance(part, str) else part.get("text") for part in parts)
    return any(text.strip() for text in texts if isinstance(text, str))


def _message(message: Any, param: str, options: MediaOptions, items: list[MediaItem]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{param} must be an object with role and content", param=param)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequestError(
            f"{param}.role must be one of {', '.join(sorted(_ROLES))}, not {role!r:.80}", param=f"{param}.role"
        )
    converted = {key: value for key, value in message.items() if key not in {"role", "content"} and value is not None}
    converted["role"] = "system" if role == "developer" else role
    if isinstance(message.get("tool_calls"), Sequence):
        converted["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    content = message.get("content")
    if content is None:
        if role != "assistant":
            raise InvalidRequestError(f"{param}.content is missing", param=f"{param}.content")
        converted["content"] = ""
    elif isinstance(content, str):
        converted["content"] = content
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = [_part(part, f"{param}.content[{i}]", options, items) for i, part in enumerate(content)]
        converted["content"] = parts
    else:
        raise InvalidRequestError(f"{param}.content must be a string or a list of parts", param=f"{param}.content")
    return converted


def _with_parsed_arguments(call: Any) -> Any:
    """A tool call whose arguments, a string of JSON in OpenAI's API, are the object that chat templates look for."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call  # the template may show it as it is
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _part(part: Any, param: str, options: MediaOptions, items: list[MediaItem]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InvalidRequestError(f"{param} must be an object with a type", param=param)
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in ("text", *_MEDIA_PARTS) if name in part), None)
    if isinstance(kind, str) and kind in _TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequestError(f"{param}.text must be a string", param=f"{param}.text")
        return {"type": "text", "text": text}
    if not isinstance(kind, str) or kind not in _MEDIA_PARTS:
        raise InvalidRequestError(
            f"{param}.type {kind!r:.80} is not supported; the types are {_PART_TYPES}", param=f"{param}.type"
        )
    modality = _MEDIA_PARTS[kind]
    items.append(_media_item(part, kind, modality, param, options))
    return {"type": modality.value}


def _media_item(part: Mapping[str, Any], kind: str, modality: Modality, param: str, options: MediaOptions) -> MediaItem:
    # OpenAI's Responses form names the field image_url / video_url under the type input_image / input_video.
    field = next((name for name in (kind, f"{modality.value}_url", modality.value) if name in part), None)
    if field is None:
        raise InvalidRequestError(f"{param}.{kind} is missing", param=f"{param}.{kind}")
    value, where = _as_url(part[field]), f"{param}.{field}"
    settings = {key: inner for key, inner in part.items() if key not in _IGNORED_PART_KEYS and key != field}
    content: dict[str, Any] = {}
    if isinstance(value, Mapping):
        settings |= {key: inner for key, inner in value.items() if key not in _IGNORED_PART_KEYS}
        key = "frames" if field == _FRAMES_PART else "url"
        settings.pop(key, None)
        value, where = _as_url(value.get(key)), f"{where}.{key}"
    if field == _FRAMES_PART:
        content["frame_urls"], timestamps = _frames(value, where)
        if timestamps is not None:
            settings["timestamps"] = timestamps
    elif isinstance(value, str):
        if not value.strip():
            raise InvalidRequestError(f"{where} is empty", param=where)
        content["url"] = value
    elif value is None or isinstance(value, bool | int | float | Mapping):
        raise InvalidRequestError(f"{where} must be a URL", param=where)
    else:
        content["data"] = value
    item = MediaItem(
        modality, param=where, **content, **_item_settings(settings, modality, f"{param}.{field}", options)
    )
    unused = next((name for name in TIMING_FIELDS if settings.get(name) is not None), None)
    if unused is not None and not is_presampled(item):
        raise InvalidRequestError(
            f"{param}.{field}.{unused} is about frames that the client sends (data:video/jpeg, video_frames), and this is a "
            "file; num_frames, fps, start and end say which of its frames are shown",
            param=f"{param}.{field}.{unused}",
        )
    return item


def _as_url(value: Any) -> Any:
    """A path object (Python API) as the string it stands for."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _item_settings(settings: dict[str, Any], modality: Modality, param: str, options: MediaOptions) -> dict[str, Any]:
    """Fields of an item that its ``settings`` and the ``options`` of its request say."""
    if modality is Modality.TIME_SERIES:
        _check_known(settings, {"sampling_rate"}, param)
        check_sampling_rate(settings.get("sampling_rate"), f"{param}.sampling_rate")
        return {"sampling_rate": settings.get("sampling_rate")}
    pixels = {key: settings.pop(key) for key in _PIXEL_KEYS & settings.keys()}
    limits = _or_else(parse_pixel_limits(pixels, param), options.pixels(modality))
    if modality is Modality.IMAGE:
        _check_known(settings, set(), param)
        return {"pixels": limits}
    video = _parse_video(settings, param)
    return {
        "pixels": limits,
        "sampling": video.sampling.or_else(options.sampling),
        "timing": _timing_or_else(video.timing, options.timing),
        "video_decoder": video.decoder or options.video_decoder,
    }


def _check_known(settings: Mapping[str, Any], known: set[str], param: str) -> None:
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None:
        raise InvalidRequestError(f"{param} has no setting {unknown!r:.80}", param=f"{param}.{unknown}")


def _frames(frames: Any, param: str) -> tuple[tuple[str, ...], list[Any] | None]:
    """URLs of a video's frames and, if they bring them, their times; a frame is ``{"url", "timestamp"}`` or a URL."""
    if not isinstance(frames, Sequence) or isinstance(frames, str | bytes) or not frames:
        raise InvalidRequestError(f'{param} must be a list of frames, {{"url", "timestamp"}} each', param=param)
    urls: list[str] = []
    timestamps: list[Any] = []
    for index, frame in enumerate(frames):
        where = f"{param}[{index}]"
        frame = frame if isinstance(frame, Mapping) else {"url": frame}
        _check_known(frame, {"url", "timestamp"}, where)
        url, timestamp = frame.get("url"), frame.get("timestamp")
        if not isinstance(url, str) or not url.strip():
            raise InvalidRequestError(f"{where}.url must be a URL", param=f"{where}.url")
        urls.append(url)
        if timestamp is not None:
            timestamps.append(timestamp)
    if timestamps and len(timestamps) < len(urls):
        raise InvalidRequestError(
            f"{len(timestamps)} of {len(urls)} frames have a timestamp; all or none must", param=param
        )
    return tuple(urls), timestamps or None


def _section(values: Any, param: str, allowed: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InvalidRequestError(f"{param} must be an object", param=param)
    for name, inner in values.items():
        if name not in allowed:
            raise InvalidRequestError(
                f"{param} has no section {name!r:.80}; it takes {' and '.join(allowed)}", param=f"{param}.{name}"
            )
        if not isinstance(inner, Mapping):
            raise InvalidRequestError(f"{param}.{name} must be an object", param=f"{param}.{name}")
    return dict(values)


@dataclass(frozen=True)
class _Video:
    sampling: FrameSampling
    timing: FrameTiming
    decoder: str | None


def _parse_video(values: Mapping[str, Any], param: str) -> _Video:
    """Sampling keys, the timing keys that only frames sampled by the client use, and the decoder."""
    sampling = parse_frame_sampling({key: value for key, value in values.items() if key not in _OWN_VIDEO_KEYS}, param)
    fps = sampling.fps if sampling.fps is not None and sampling.fps > 0 else None
    return _Video(sampling, parse_frame_timing(values, param, fps=fps), _parse_decoder(values, param))


def _parse_decoder(values: Mapping[str, Any], param: str) -> str | None:
    given = {key: values[key] for key in _DECODER_KEYS if values.get(key) is not None}
    for key, name in given.items():
        if name not in VIDEO_DECODERS:
            raise InvalidRequestError(
                f"{param}.{key} must be one of {', '.join(VIDEO_DECODERS)}", param=f"{param}.{key}"
            )
    if len(set(given.values())) > 1:
        raise InvalidRequestError(
            f"{param}.backend and video_backend name different decoders", param=f"{param}.backend"
        )
    return next(iter(given.values()), None)


def _timing_or_else(timing: FrameTiming, default: FrameTiming) -> FrameTiming:
    """``timing`` filled up from ``default``, without what of it says otherwise when the frames are."""
    if timing.timestamps is not None:
        default = FrameTiming(duration=default.duration)
    if any(value is not None for value in (timing.fps, timing.frames_indices, timing.total_num_frames)):
        default = dataclasses.replace(default, timestamps=None)
    if timing.fps is not None:
        default = dataclasses.replace(default, duration=None)
    merged = timing.or_else(default)
    # Of frames that are all there is, or whose clip's length in frames is known, a duration says the rate.
    if (
        timing.duration is not None
        and timing.fps is None
        and (merged.frames_indices is None or merged.total_num_frames)
    ):
        merged = dataclasses.replace(merged, fps=None)
    return merged


def _or_else(limits: PixelLimits, default: PixelLimits) -> PixelLimits:
    """``limits`` filled up from ``default``, which gives way where the two contradict each other."""
    low, high = limits.min_pixels, limits.max_pixels
    if low is None and default.min_pixels is not None:
        low = default.min_pixels if high is None else min(default.min_pixels, high)
    if high is None and default.max_pixels is not None:
        high = default.max_pixels if limits.min_pixels is None else max(default.max_pixels, limits.min_pixels)
    return PixelLimits(low, high)
