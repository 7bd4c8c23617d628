"""Bodies of ``/v1/media/plan`` and ``/v1/media/frames`` as pydantic models; no behaviour."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from filmstrip.server.protocol import ChatCompletionRequest


class MediaFramesRequest(ChatCompletionRequest):
    """A chat request, and how many pictures of what size to make of its media."""

    max_edge: int = 192
    """Longer side of a picture, in pixels: 16 to 512. Pictures are never larger than what the model sees."""
    max_thumbnails: int = 64
    """Most pictures for all media together: 1 to 256; of longer plans an evenly spread part is shown."""


class MediaFacts(BaseModel):
    """What a file says about itself; what it does not say is null."""

    width: int | None = None
    height: int | None = None
    """As displayed, in pixels: rotation and EXIF orientation applied."""
    num_bytes: int
    codec: str | None = None
    format: str | None = None
    duration: float | None = None
    """Seconds."""
    fps: float | None = None
    total_num_frames: int | None = None
    rotation_degrees: int | None = None
    is_mirrored: bool | None = None
    variable_frame_rate: bool | None = None
    has_audio: bool | None = None
    timing_assumed: bool | None = None
    video_backend: str | None = None
    num_samples: int | None = None
    num_channels: int | None = None
    sampling_rate: float | None = None
    """Of a time series, in samples per second."""


class MediaPlanItem(BaseModel):
    """One image, video or time series of the request: its facts, and what of it would be shown."""

    type: str
    param: str | None
    """Field of the request it stands in."""
    facts: MediaFacts
    num_frames: int
    frame_indices: list[int]
    timestamps: list[float]
    """Seconds, one for each frame of a video; else empty, like ``frame_indices``."""
    width: int
    height: int
    """Size at which the model sees it, in pixels; 0 for a time series, like ``num_frames``."""
    num_tokens: int
    cached: bool
    """True if its pixels are ready and nothing would be decoded."""
    notes: list[str]


class FittedMedia(BaseModel):
    """What would be shown of one item with ``media_overflow`` "fit"."""

    num_frames: int
    width: int
    height: int
    num_tokens: int


class MediaPlan(BaseModel):
    """Answer of ``POST /v1/media/plan``."""

    object: Literal["media.plan"] = "media.plan"
    model: str
    media: list[MediaPlanItem]
    prompt_tokens: int
    """Of the whole prompt: words, media and the template's own."""
    media_tokens: int
    max_model_len: int
    fits: bool
    """Whether at least one token is left for an answer."""
    advice: str | None
    """What to change if it does not fit."""
    fitted: list[FittedMedia] | None
    """If it does not fit: what the server would show if it may choose; null if nothing would help."""


class Thumbnail(BaseModel):
    """One frame as a picture; ``frame_index`` and ``timestamp`` (seconds) are null for an image."""

    frame_index: int | None
    timestamp: float | None
    url: str
    """A ``data:`` URL with a JPEG."""


class ItemThumbnails(BaseModel):
    """Pictures of one item: of all its ``num_frames`` frames, or evenly spread ones; none of a time series."""

    type: str
    num_frames: int
    width: int
    height: int
    frames: list[Thumbnail]


class MediaFrames(BaseModel):
    """Answer of ``POST /v1/media/frames``."""

    object: Literal["media.frames"] = "media.frames"
    model: str
    media: list[ItemThumbnails]
