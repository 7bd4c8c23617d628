"""OpenAI-style messages to template messages and media items; validates their form, fetches nothing.

Accepted content parts: ``text``; ``image_url`` and ``video_url`` as a string or an object with ``url``; and, as Qwen's own
tools write them, ``{"type": "image", "image": ...}`` and ``{"type": "video", "video": ...}``, whose value may also be a PIL
image or an array of frames (Python API). Sampling keys may stand in the part's object or beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from filmstrip.errors import InvalidRequestError
from filmstrip.media.sampling import parse_frame_sampling
from filmstrip.types import FrameSampling, FrameTiming, MediaItem, Modality, PixelLimits

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_MEDIA_PARTS = {
    "image_url": Modality.IMAGE,
    "image": Modality.IMAGE,
    "input_image": Modality.IMAGE,
    "video_url": Modality.VIDEO,
    "video": Modality.VIDEO,
    "input_video": Modality.VIDEO,
}
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_PART_TYPES = "text, image_url, video_url, image, video"
_PIXEL_KEYS = frozenset({"min_pixels", "max_pixels"})
_TIMING_KEYS = frozenset({"frames_indices", "total_num_frames", "duration"})
_IGNORED_PART_KEYS = frozenset({"type", "url", "detail", "uuid", "cache_control", "format"})


@dataclass(frozen=True)
class MediaOptions:
    """Sampling, timing and pixel limits that apply to the media of a request unless an item says otherwise."""

    sampling: FrameSampling = FrameSampling()
    timing: FrameTiming = FrameTiming()
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

    ``media_io_kwargs`` is ``{"video": {"num_frames", "fps", ...}}``; ``mm_processor_kwargs`` is
    ``{"image" | "video": {"min_pixels", "max_pixels"}}``. Raises InvalidRequestError for anything else.
    """
    video = _section(media_io_kwargs, "media_io_kwargs", ("video", "image")).get("video", {})
    image_io = _section(media_io_kwargs, "media_io_kwargs", ("video", "image")).get("image", {})
    if image_io:
        raise InvalidRequestError(
            f"media_io_kwargs.image has no settings, but {', '.join(map(repr, image_io))} is given",
            param="media_io_kwargs.image",
        )
    sampling, timing = _parse_video(video, "media_io_kwargs.video")
    pixels = _section(mm_processor_kwargs, "mm_processor_kwargs", ("image", "video"))
    return MediaOptions(
        sampling.or_else(defaults.sampling),
        timing,
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


def parse_messages(messages: Sequence[Mapping[str, Any]], options: MediaOptions, *, max_items: int) -> Conversation:
    """Check and convert a conversation.

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
    return Conversation(converted, items)


def _message(message: Any, param: str, options: MediaOptions, items: list[MediaItem]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{param} must be an object with role and content", param=param)
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequestError(
            f"{param}.role must be one of {', '.join(sorted(_ROLES))}, not {role!r:.80}", param=f"{param}.role"
        )
    converted = {key: value for key, value in message.items() if key not in {"role", "content"} and value is not None}
    converted["role"] = "system" if role == "developer" else role
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
    value, where = part[field], f"{param}.{field}"
    settings = {key: inner for key, inner in part.items() if key not in _IGNORED_PART_KEYS and key != field}
    if isinstance(value, Mapping):
        settings |= {key: inner for key, inner in value.items() if key not in _IGNORED_PART_KEYS}
        value, where = value.get("url"), f"{where}.url"
    pixels = {key: settings.pop(key) for key in _PIXEL_KEYS & settings.keys()}
    limits = _or_else(parse_pixel_limits(pixels, f"{param}.{field}"), options.pixels(modality))
    sampling, timing = FrameSampling(), FrameTiming()
    if modality is Modality.VIDEO:
        sampling, timing = _parse_video(settings, f"{param}.{field}")
        sampling, timing = sampling.or_else(options.sampling), _timing_or_else(timing, options.timing)
    elif settings:
        name = next(iter(settings))
        raise InvalidRequestError(f"{param}.{field} has no setting {name!r}", param=f"{param}.{field}.{name}")
    if isinstance(value, str):
        if not value.strip():
            raise InvalidRequestError(f"{where} is empty", param=where)
        return MediaItem(modality, url=value, sampling=sampling, timing=timing, pixels=limits, param=where)
    if value is None or isinstance(value, bool | int | float | Mapping):
        raise InvalidRequestError(f"{where} must be a URL", param=where)
    return MediaItem(modality, data=value, sampling=sampling, timing=timing, pixels=limits, param=where)


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


def _parse_video(values: Mapping[str, Any], param: str) -> tuple[FrameSampling, FrameTiming]:
    """Sampling keys, and the timing keys that only frames sampled by the client use."""
    sampling = parse_frame_sampling({key: value for key, value in values.items() if key not in _TIMING_KEYS}, param)
    indices = values.get("frames_indices")
    if indices is not None:
        whole = isinstance(indices, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
        if not whole:
            raise InvalidRequestError(
                f"{param}.frames_indices must be a list of integers", param=f"{param}.frames_indices"
            )
        indices = tuple(indices)
    total = values.get("total_num_frames")
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 1):
        raise InvalidRequestError(
            f"{param}.total_num_frames must be an integer >= 1, not {total!r:.80}", param=f"{param}.total_num_frames"
        )
    duration = values.get("duration")
    if duration is not None and (
        isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration < math.inf
    ):
        raise InvalidRequestError(
            f"{param}.duration must be a number of seconds > 0, not {duration!r:.80}", param=f"{param}.duration"
        )
    fps = sampling.fps if sampling.fps is not None and sampling.fps > 0 else None
    return sampling, FrameTiming(fps, indices, total, duration)


def _timing_or_else(timing: FrameTiming, default: FrameTiming) -> FrameTiming:
    mine, theirs = vars(timing), vars(default)
    return FrameTiming(**{name: theirs[name] if value is None else value for name, value in mine.items()})


def _or_else(limits: PixelLimits, default: PixelLimits) -> PixelLimits:
    return PixelLimits(
        default.min_pixels if limits.min_pixels is None else limits.min_pixels,
        default.max_pixels if limits.max_pixels is None else limits.max_pixels,
    )
