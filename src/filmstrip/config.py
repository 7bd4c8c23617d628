"""Settings as frozen dataclasses, one for each layer; knows their defaults and nothing of how they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from filmstrip.types import FrameSampling, PixelLimits

VIDEO_DECODERS = ("pyav", "torchcodec", "decord", "opencv", "torchvision")
"""Libraries that videos can be decoded with, the default first."""
VIDEO_DECODER_VARIABLE = "FILMSTRIP_VIDEO_DECODER"
API_KEY_VARIABLE = "FILMSTRIP_API_KEY"


@dataclass(frozen=True)
class MediaConfig:
    """Fetching and decoding.

    ``allow_local_files`` is True for the Python API; the server sets it False and gives ``allowed_local_media_path``, the
    one directory files may come from. ``video`` is the server-wide sampling default (``--media-io-kwargs``).
    ``limit_mm_per_prompt`` is by modality: image, video, time_series.
    """

    allow_local_files: bool = True
    """Whether ``file://`` and plain paths may be read from anywhere."""
    allowed_local_media_path: str | None = None
    """Directory that media may be read from with file:// or a path; without it, from nowhere."""
    allow_private_media_urls: bool = False
    """Download media from addresses that are not public, too."""
    allowed_media_domains: tuple[str, ...] = ()
    """Host name that media may be downloaded from, redirects included; any public one if none is given."""
    max_media_bytes: int = 2 * 1024**3
    """Largest media file, in bytes."""
    fetch_timeout_seconds: float = 60.0
    """Longest time a download may take altogether."""
    connect_timeout_seconds: float = 10.0
    """Longest time until a media server accepts a connection."""
    max_redirects: int = 5
    """Most redirects followed for one download."""
    max_image_pixels: int = 178_956_970
    """Largest picture or video frame, in pixels before resizing."""
    max_video_frames: int = 2048
    """Most frames taken from one video, whatever a request asks."""
    max_video_duration_seconds: float | None = None
    """Longest part of a video that may be looked at, in seconds; any length if not given."""
    max_time_series_values: int = 50_000_000
    """Largest time series, in values: samples times channels."""
    max_time_series_channels: int = 4096
    """Most channels of a time series."""
    max_items_per_request: int = 64
    """Most media items in one request."""
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=dict)
    """Most items of a modality in one request; only the limit on all of them if a modality is not named."""
    video_decoder: str = field(default_factory=lambda: os.environ.get(VIDEO_DECODER_VARIABLE) or "pyav")
    """Library that decodes videos; FILMSTRIP_VIDEO_DECODER in the environment does the same, and pyav is used without."""
    allowed_video_decoders: tuple[str, ...] = ()
    """Library that a request may choose with media_io_kwargs.video.backend; only the server's own if none is given."""
    num_decode_threads: int | None = None
    """Threads that decode, over all requests; as many as this process may use cores if not given."""
    decode_timeout_seconds: float = 300.0
    """Longest time that opening and decoding one item may take."""
    max_decode_memory_gb: float = 4.0
    """Memory that decoding one item may take, in GiB, its result not counted."""
    video: FrameSampling = FrameSampling()
    media_cache_gb: float = 1.0
    """Memory for processed media kept for the next question about the same clip, in GiB."""
    download_cache_gb: float = 2.0
    """Room for downloads kept for the next question about the same URL, in GiB, in memory or temporary files."""


@dataclass(frozen=True)
class ProcessorConfig:
    """Prompt processing: server-wide ``--mm-processor-kwargs`` and the form of the video prompt.

    ``video_prompt_form``: "nested" keeps the chat template's outer vision_start/vision_end around the per-frame blocks
    (Transformers >= 5.10), "flat" replaces them (the original release), "auto" follows the installed Transformers. For
    Qwen2-VL and Qwen2.5-VL, whose videos are one block, "flat" is the original release's place of the text behind it.
    """

    image: PixelLimits = PixelLimits()
    video: PixelLimits = PixelLimits()
    video_prompt_form: str = "auto"
    """Video prompt as written by newer Transformers (nested), by the first release (flat) or as installed (auto)."""
    chat_template: str | None = None
    """Jinja file to use in place of the checkpoint's chat template, or the template itself."""


@dataclass(frozen=True)
class EngineConfig:
    """The engine process.

    ``max_num_batched_tokens`` bounds the tokens of one step, and so the time that answers under way wait for a new prompt.
    ``kv_cache_gb`` None means 40 % of the memory free after loading (on CUDA ``gpu_memory_utilization`` of the device, less
    what is in use); ``encoder_cache_gb`` and ``state_cache_gb`` None mean 5 % each, ``encoder_cache_gb`` 15 % for models
    that attend to pictures beside the prompt.
    """

    model: str
    revision: str | None = None
    """Branch, tag or commit of a checkpoint on the hub."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """Type of weights and cache: auto, float32, bfloat16 or float16."""
    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens; the model's own limit if not given."""
    max_num_seqs: int = 16
    """Most requests computed in one step."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; longer prompts are cut into chunks of it. 512 on a CPU, 2048 on a GPU if not given."""
    block_size: int | None = None
    """Tokens in a block of the KV cache; what suits the device if not given."""
    kv_cache_gb: float | None = None
    """Memory for keys and values, in GiB; 40 % of what is free on a CPU if not given."""
    encoder_cache_gb: float | None = None
    """Memory for encoded images and videos, in GiB; if not given 5 % of what is free, 15 % if answers attend to them."""
    state_cache_gb: float | None = None
    """Memory for states of linear attention kept for prompts that begin alike, in GiB; 5 % of what is free if not given.
    Models without linear attention have none."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that may be used."""
    enable_prefix_caching: bool = True
    """Reuse keys and values of prompts that begin alike."""
    num_threads: int | None = None
    """Threads of the model's forward pass on CPU; as many as this process may use cores if not given."""
    seed: int = 0
    """Seed for requests that bring none."""


@dataclass(frozen=True)
class LLMConfig:
    """All a model in memory needs; what :class:`filmstrip.LLM` and the server are built from."""

    engine: EngineConfig
    media: MediaConfig = field(default_factory=MediaConfig)
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP face."""

    llm: LLMConfig
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    served_model_name: str | None = None
    """Name of the model in requests and answers; MODEL if not given."""
    max_body_bytes: int = 512 * 1024**2
    """Largest request body, in bytes."""
    keep_alive_seconds: float = 15.0
    """An SSE comment line is sent when a stream has been silent for this long."""
    body_idle_timeout_seconds: float = 30.0
    """Longest silence while a request body arrives."""
    drain_timeout_seconds: float = 30.0
    """Time that running requests have to finish after SIGTERM."""
    max_content_parts: int = 4096
    """Most messages and content parts in one request."""
    api_key: str | None = field(default=None, repr=False)
    """Key that requests must bring as "Authorization: Bearer KEY"; FILMSTRIP_API_KEY in the environment does the same."""
    allowed_hosts: tuple[str, ...] = ()
    """Host name that requests may be addressed to; any if none is given, only this machine's own if --host is local."""
    allowed_origins: tuple[str, ...] = ()
    """Web origin whose pages may call the server from a browser; none if not given."""
    page: bool = True
    """Serve the page at /, where people can try the model in a browser."""
    log_level: str = "info"
    """debug, info, warning or error."""
