"""Architecture names to processors, loaded on demand; knows no model weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import ModelLoadError
from filmstrip.processing.base import Processor
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.tokenizer import Tokenizer

_PROCESSORS = {
    "Qwen3VLForConditionalGeneration": ("filmstrip.processing.qwen3_vl", "Qwen3VLProcessor"),
    "Qwen3VLMoeForConditionalGeneration": ("filmstrip.processing.qwen3_vl", "Qwen3VLProcessor"),
    "Qwen3_5ForConditionalGeneration": ("filmstrip.processing.qwen3_vl", "Qwen3VLProcessor"),
    "Qwen3_5MoeForConditionalGeneration": ("filmstrip.processing.qwen3_vl", "Qwen3VLProcessor"),
}


def create_processor(
    tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
) -> Processor:
    """The processor for a checkpoint's architecture; raises ModelLoadError for one that is not supported."""
    architectures = files.json("config.json").get("architectures") or []
    name = next((name for name in architectures if name in _PROCESSORS), None)
    if name is None:
        known = ", ".join(sorted(_PROCESSORS))
        raise ModelLoadError(
            f"{files.model!r} has the architecture {', '.join(architectures) or 'none'}; supported are {known}",
            param="model",
        )
    module, attribute = _PROCESSORS[name]
    factory: Callable[..., Processor] = getattr(importlib.import_module(module), attribute)
    return factory(tokenizer, files, config, media)
