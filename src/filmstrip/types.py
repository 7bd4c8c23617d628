"""The contracts between stages, as plain values; knows no torch, no FFmpeg and no HTTP.

A request's way: ``MediaItem`` (what was sent) -> ``VideoMetadata`` (what the file says) -> ``FramePlan`` (what will be
looked at) -> ``MediaFeature`` (pixels and where they go) -> ``ProcessedPrompt`` (what the engine gets) ->
``RequestOutput`` (what the caller gets).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from filmstrip.errors import InvalidRequestError

if TYPE_CHECKING:
    from filmstrip.shared_tensor import SharedTensor


class Modality(str, Enum):
    """A kind of media."""

    IMAGE = "image"
    VIDEO = "video"
    TIME_SERIES = "time_series"

    def __str__(self) -> str:
        return self.value


FinishReason = Literal["stop", "length", "abort"]
ProgressStage = Literal["fetch", "decode", "queue", "prefill", "generate"]
Resample = Literal["bicubic", "bilinear", "bilinear_plain"]
"""How frames are resized: with antialiasing, or between the four nearest pixels alone (``bilinear_plain``)."""


@dataclass(frozen=True)
class Progress:
    """How far a request is, for people who wait: ``done`` of ``total`` items, frames or tokens of ``stage``.

    ``fetch`` counts media items, ``decode`` frames, ``prefill`` and ``generate`` tokens; ``total`` 0 means "not known".
    """

    stage: ProgressStage
    done: int
    total: int


_Wishes = TypeVar("_Wishes")


def _filled_up(mine: _Wishes, default: _Wishes) -> _Wishes:
    return type(mine)(**{name: vars(default)[name] if value is None else value for name, value in vars(mine).items()})


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are wanted; None means "not said here", -1 in num_frames or fps means "no limit"."""

    num_frames: int | None = None
    """At most this many frames of a video; -1 for no limit."""
    fps: float | None = None
    """At most this many frames for each second of a video; -1 for no limit."""
    min_frames: int | None = None
    """At least this many frames, where the video has them."""
    max_frames: int | None = None
    """Never more frames than this, whatever else is asked."""
    start_seconds: float | None = None
    """Look at the video from this time on."""
    end_seconds: float | None = None
    """Look at the video up to this time."""

    def or_else(self, default: FrameSampling) -> FrameSampling:
        """Fill what is not said here from ``default``, field by field."""
        return _filled_up(self, default)


@dataclass(frozen=True)
class PixelLimits:
    """``mm_processor_kwargs`` of one modality: total pixels of the resized item (for a video, over all its frames)."""

    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class FrameTiming:
    """Timing of frames sampled by the client (``data:video/jpeg``); all None means 2 fps is assumed.

    ``timestamps`` are the frames' own times in seconds and exclude the other ways to say them.
    """

    fps: float | None = None
    frames_indices: tuple[int, ...] | None = None
    total_num_frames: int | None = None
    duration: float | None = None
    timestamps: tuple[float, ...] | None = None

    def or_else(self, default: FrameTiming) -> FrameTiming:
        """Fill what is not said here from ``default``, field by field, whether or not the two go together."""
        return _filled_up(self, default)


@dataclass(frozen=True)
class MediaItem:
    """One image, video or time series of a request, in prompt order.

    Exactly one of ``url`` (http, https, file, data or a plain path), ``frame_urls`` (a video's frames, picked by the client,
    each a URL of its own) and ``data`` (a PIL image, an array of frames (T, H, W, 3) uint8, or an array of samples (T, C);
    Python API only) is set. ``sampling_rate`` is a time series' samples per second, if said, and ``video_decoder`` the
    decoder that the request asks for. ``param`` is the request field it came from, for error messages.
    """

    type: Modality
    url: str | None = None
    data: Any = None
    frame_urls: tuple[str, ...] = ()
    sampling_rate: float | None = None
    video_decoder: str | None = None
    sampling: FrameSampling = FrameSampling()
    timing: FrameTiming = FrameTiming()
    pixels: PixelLimits = PixelLimits()
    param: str | None = None


@dataclass(frozen=True)
class VideoMetadata:
    """What a video file says about itself, after an index scan; nothing is decoded yet.

    ``timestamps`` are the presentation times in seconds of all frames in display order, relative to the first frame,
    shape (total_num_frames,), float64. Where the file has a constant frame rate they are exactly ``index / fps``.
    """

    total_num_frames: int
    fps: float
    duration: float
    height: int
    width: int
    timestamps: np.ndarray
    video_backend: str
    codec: str = ""
    rotation_degrees: int = 0
    timing_assumed: bool = False
    has_audio: bool = False
    is_mirrored: bool = False
    """Left and right are exchanged before the picture is turned, as the file says; both are done where it is read."""


@dataclass(frozen=True)
class ImageMetadata:
    """Size of an image as displayed (EXIF orientation applied)."""

    height: int
    width: int
    format: str = ""


@dataclass(frozen=True)
class TimeSeriesMetadata:
    """What a time series file says about itself: samples, values in each, and samples per second (None: not known)."""

    num_samples: int
    num_channels: int
    sampling_rate: float | None = None
    format: str = ""

    @property
    def duration(self) -> float | None:
        """Length in seconds, if the rate is known."""
        return None if self.sampling_rate is None else self.num_samples / self.sampling_rate


@dataclass(frozen=True)
class PatchLayout:
    """How resized frames become rows: merge-block-major patches of (channels, temporal, height, width)."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int


@dataclass(frozen=True)
class View:
    """A canvas of ``height`` x ``width`` pixels that a frame is laid on before it is cut into patches.

    The frame is resized to ``resized_height`` x ``resized_width`` and its upper left corner laid at (``top``, ``left``),
    which may be negative: what sticks out is cut off. The rest of the canvas has the colour ``fill``, 0 to 255 in all
    channels or in each. With ``square_color`` bars of that color (RGB) make the frame a square before it is resized; with
    ``of_previous`` the canvas of the view before this one stands in for the frame.

    ``tiles`` are the rows and columns of equal tiles that the canvas is divided into where the model sees each tile for
    itself: each is a segment, and its patches lie together. None where it sees all views of a frame together.
    """

    height: int
    width: int
    resized_height: int
    resized_width: int
    top: int = 0
    left: int = 0
    fill: int | tuple[int, int, int] = 0
    square_color: tuple[int, int, int] | None = None
    of_previous: bool = False
    tiles: tuple[int, int] | None = None


@dataclass(frozen=True)
class FramePlan:
    """What a decoder has to deliver, as plain data: these frames, this size, this layout.

    Frame indices are ascending and may repeat (a one-frame clip shown twice). The number of frames is padded to a multiple
    of ``layout.temporal_patch_size`` by repeating the last. Models that see a picture as tiles of one size have patches as
    large as those, and ``views``: what each frame becomes before it is cut, one after the other; ``height`` and ``width``
    are then those of the largest. Views of several sizes have patches that divide all of them. Without views a frame is
    resized to ``height`` x ``width``.
    """

    frame_indices: tuple[int, ...]
    height: int
    width: int
    layout: PatchLayout
    views: tuple[View, ...] = ()
    resample: Resample = "bicubic"
    num_embeddings: int | None = None
    """Placeholder tokens of the item; None where each merge x merge patches are one."""

    @property
    def frame_views(self) -> tuple[View, ...]:
        """What each frame becomes, at least one view."""
        return self.views or (View(self.height, self.width, self.height, self.width),)

    @property
    def patches_per_frame(self) -> int:
        """Rows of the patch matrix for one frame, or one temporal group of them."""
        size = self.layout.patch_size
        return sum((view.height // size) * (view.width // size) for view in self.frame_views)

    @property
    def segment_grids(self) -> tuple[tuple[int, int], ...]:
        """Patch grid (height, width) of each segment, frame by frame, where views have tiles; else empty."""
        size = self.layout.patch_size
        frame = [
            (view.height // rows // size, view.width // columns // size)
            for view in self.views
            if view.tiles
            for rows, columns in [view.tiles]
            for _ in range(rows * columns)
        ]
        return tuple(frame * self.grid_thw[0])

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Patch grid (temporal, height, width); with several views of a frame (temporal, patches of a frame, 1)."""
        tps, ps = self.layout.temporal_patch_size, self.layout.patch_size
        num_groups = -(-len(self.frame_indices) // tps)
        if len(self.views) > 1:
            return (num_groups, self.patches_per_frame, 1)
        view = self.frame_views[0]
        return (num_groups, view.height // ps, view.width // ps)

    @property
    def patches_shape(self) -> tuple[int, int]:
        """Shape of the uint8 patch matrix: (t*h*w, channels * temporal_patch_size * patch_size**2)."""
        t, h, w = self.grid_thw
        return (t * h * w, 3 * self.layout.temporal_patch_size * self.layout.patch_size**2)

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens of the item."""
        if self.num_embeddings is not None:
            return self.num_embeddings
        return self.patches_shape[0] // self.layout.merge_size**2


@dataclass(frozen=True)
class SeriesPlan:
    """What of a time series is shown, as plain data: its first ``num_samples`` samples of ``num_channels`` values each.

    The model looks at them in windows of twice ``hop`` samples that begin ``hop`` apart.
    """

    num_samples: int
    num_channels: int
    hop: int
    num_tokens: int
    """Placeholder tokens of the item."""


@dataclass(frozen=True)
class Normalization:
    """``(x - 255*mean) / (255*std)`` per channel, as the reference processors fuse rescaling and normalising.

    With the ``dtype`` bfloat16 it is ``(x/255 - mean) / std``, each step rounded to that.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: Literal["float32", "bfloat16"] = "float32"
    later_views: Normalization | None = None
    """For views of a frame behind the first, where the model wants those otherwise."""


@dataclass(frozen=True)
class PlaceholderRange:
    """Where the embeddings of one media segment stand in the prompt, in tokens."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """First token after the range."""
        return self.offset + self.length


@dataclass(frozen=True)
class MediaFeature:
    """One media item as the engine sees it.

    ``patches`` holds uint8 pixels in patch layout, (t*h*w, 3*tps*ps*ps); the model normalises them. ``segments`` has one
    range per independently encodable piece, in order: for a Qwen3-VL video one per temporal group (``grid_thw[0]`` of
    them), for an image one. All segments of an item have the same number of patch rows, unless ``segment_grids`` says the
    patch grid (height, width) of each. ``source_size`` is (height, width) before resizing, which families with padded tiles
    need.

    Of a time series ``patches`` are float32 samples (num_samples, num_channels), normalised already (``normalization`` is
    None) and in one segment; ``hop`` is how many samples lie between the beginnings of its windows.

    ``pooling`` is int32 (tokens of a segment, patches) where tokens are pooled from patches: for each token which patch rows
    of its segment, -1 for none; a token with none at all (the end of a row) shows nothing of the picture. It follows from
    the plan, so ``media_hash`` covers it.
    """

    modality: Modality
    patches: SharedTensor
    grid_thw: tuple[int, int, int]
    normalization: Normalization | None
    media_hash: str
    segments: tuple[PlaceholderRange, ...]
    source_size: tuple[int, int] = (0, 0)
    hop: int = 0
    segment_grids: tuple[tuple[int, int], ...] = ()
    pooling: np.ndarray | None = None


@dataclass(frozen=True)
class MediaRecord:
    """What was really seen of one media item; ``out.media`` has one for each, in prompt order."""

    type: str
    num_frames: int
    frame_indices: list[int]
    timestamps: list[float]
    height: int
    width: int
    num_tokens: int
    cached: bool
    """True if nothing of it was decoded for this request."""
    notes: list[str] = field(default_factory=list)
    num_samples: int | None = None
    """Samples of a time series that were looked at; it has no frames and no size in pixels."""
    num_channels: int | None = None


@dataclass(frozen=True)
class ProcessedPrompt:
    """A prompt ready for the engine.

    ``positions`` is int32 (3, num_tokens) where the model uses M-RoPE, float32 where some lie between whole numbers, else
    None; generated token i (counted from the start of the prompt) then has position ``i + position_delta`` on all axes.
    """

    token_ids: list[int]
    features: tuple[MediaFeature, ...] = ()
    positions: np.ndarray | None = None
    position_delta: float = 0
    media: tuple[MediaRecord, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    ``max_tokens`` None means "to the end of the context". ``temperature`` 0 is greedy. ``top_k`` 0 or -1 means all.
    Raises :class:`InvalidRequestError` naming the field, the value and the allowed range.
    """

    max_tokens: int | None = None
    """Longest answer, in tokens; to the end of the context if not given."""
    temperature: float = 1.0
    """0 always takes the likeliest token; higher values choose more freely."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Choose among this many of the likeliest tokens; 0 or -1 for all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the answer less likely, below 1 more likely."""
    presence_penalty: float = 0.0
    """Positive values make tokens that the answer has already less likely."""
    frequency_penalty: float = 0.0
    """The same, for each time the answer has the token."""
    seed: int | None = None
    """The same seed gives the same choices."""
    stop: tuple[str, ...] = ()
    """End the answer before this text."""
    stop_token_ids: tuple[int, ...] = ()
    """End the answer at this token."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    include_stop_str_in_output: bool = False
    """Leave the stop text in the answer."""
    skip_special_tokens: bool = True
    """Leave control tokens out of the text."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, int, 1, 2**31 - 1)
        _check("temperature", self.temperature, float, 0.0, 100.0)
        _check("top_p", self.top_p, float, 0.0, 1.0, low_open=True)
        _check("top_k", self.top_k, int, -1, 2**31 - 1)
        _check("min_p", self.min_p, float, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, float, 0.0, 100.0, low_open=True)
        _check("presence_penalty", self.presence_penalty, float, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, float, -2.0, 2.0)
        if self.seed is not None:
            _check("seed", self.seed, int, -(2**63), 2**63 - 1)
        self._check_stops()

    def _check_stops(self) -> None:
        if len(self.stop) > 64:
            raise InvalidRequestError(f"stop has {len(self.stop)} strings; at most 64 are allowed", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError("stop must be non-empty strings", param="stop")
        for token_id in self.stop_token_ids:
            _check("stop_token_ids", token_id, int, 0, 2**31 - 1)


def _check(name: str, value: object, kind: type, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise unless ``value`` is a number of ``kind`` in [low, high] (or (low, high])."""
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed):
        what = "a number" if kind is float else "an integer"
        raise InvalidRequestError(f"{name} must be {what}, not {value!r:.80}", param=name)
    if not (low <= value <= high) or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise InvalidRequestError(f"{name} must be in {bracket}{low}, {high}], not {value}", param=name)


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer; ``cached_tokens`` of the prompt came from the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0
    time_series_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class RequestOutput:
    """The answer so far; streaming yields one for each step, the last has ``finish_reason``.

    ``text`` and ``token_ids`` are cumulative; ``delta`` is the text added by this step. ``stop_reason`` is the stop string
    or token id that ended the answer, None for end-of-sequence.
    """

    request_id: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason | None
    usage: Usage
    media: list[MediaRecord]
    delta: str = ""
    stop_reason: str | int | None = None
