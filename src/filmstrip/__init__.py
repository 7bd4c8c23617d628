"""Filmstrip: a multimodal LLM server with video as a native input.

The public names load on first use, so that ``filmstrip --help`` and the light modules need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filmstrip.llm import LLM, AsyncLLM
    from filmstrip.media.encode import (
        encode_image_base64,
        encode_time_series_base64,
        encode_video_base64,
        load_image,
        load_time_series,
        load_video,
    )
    from filmstrip.types import RequestOutput, SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "RequestOutput",
    "SamplingParams",
    "encode_image_base64",
    "encode_time_series_base64",
    "encode_video_base64",
    "load_image",
    "load_time_series",
    "load_video",
]

_MODULES = {
    "LLM": "filmstrip.llm",
    "AsyncLLM": "filmstrip.llm",
    "RequestOutput": "filmstrip.types",
    "SamplingParams": "filmstrip.types",
    "encode_image_base64": "filmstrip.media.encode",
    "encode_time_series_base64": "filmstrip.media.encode",
    "encode_video_base64": "filmstrip.media.encode",
    "load_image": "filmstrip.media.encode",
    "load_time_series": "filmstrip.media.encode",
    "load_video": "filmstrip.media.encode",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'filmstrip' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
