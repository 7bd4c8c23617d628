"""Settings as frozen dataclasses, one for each layer; knows their defaults and nothing of how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from filmstrip.types import FrameSampling, PixelLimits


@dataclass(frozen=True)
class MediaConfig:
    """Fetching and decoding.

    ``allow_local_files`` is True for the Python API; the server sets it False and gives ``allowed_local_media_path``, the
    one directory files may come from. ``video`` is the server-wide sampling default (``--media-io-kwargs``).
    """

    allow_local_files: bool = True
    allowed_local_media_path: str | None = None
    allow_private_media_urls: bool = False
    max_media_bytes: int = 2 * 1024**3
    fetch_timeout_seconds: float = 60.0
    connect_timeout_seconds: float = 10.0
    max_redirects: int = 5
    max_image_pixels: int = 178_956_970
    max_video_frames: int = 2048
    max_items_per_request: int = 64
    num_decode_threads: int | None = None
    """Threads that decode, over all requests; None means the number of cores this process may use."""
    video: FrameSampling = FrameSampling()
    media_cache_gb: float = 1.0
    """Bytes of processed media kept for the next question about the same clip."""


@dataclass(frozen=True)
class ProcessorConfig:
    """Prompt processing: server-wide ``--mm-processor-kwargs`` and the form of the video prompt.

    ``video_prompt_form``: "nested" keeps the chat template's outer vision_start/vision_end around the per-frame blocks
    (Transformers >= 5.10), "flat" replaces them (the original release), "auto" follows the installed Transformers.
    """

    image: PixelLimits = PixelLimits()
    video: PixelLimits = PixelLimits()
    video_prompt_form: str = "auto"


@dataclass(frozen=True)
class EngineConfig:
    """The engine process.

    ``max_num_batched_tokens`` bounds the tokens of one step; a longer prompt is prefilled in chunks of it.
    ``kv_cache_gb`` None means 40 % of the memory free after loading (on CUDA ``gpu_memory_utilization`` of the device, less
    what is in use); ``encoder_cache_gb`` None means 5 %.
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    block_size: int | None = None
    kv_cache_gb: float | None = None
    encoder_cache_gb: float | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    """Threads of the model's forward pass on CPU; None means the number of cores this process may use."""
    seed: int = 0


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
    port: int = 8000
    served_model_name: str | None = None
    max_body_bytes: int = 512 * 1024**2
    keep_alive_seconds: float = 15.0
    """An SSE comment line is sent when a stream has been silent for this long."""
