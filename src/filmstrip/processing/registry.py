"""Architecture names to processors, loaded on demand; knows no model weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import ModelLoadError
from filmstrip.formats.registry import translated_architectures
from filmstrip.processing.base import Processor
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import Modality

_TEXT = ("filmstrip.processing.text", "TextProcessor")
_PROCESSORS = {
    "DeepseekVLForConditionalGeneration": ("filmstrip.processing.deepseek_vl", "DeepseekVLProcessor"),
    "DeepseekVLHybridForConditionalGeneration": ("filmstrip.processing.deepseek_vl", "DeepseekVLHybridProcessor"),
    "Glm46VForConditionalGeneration": ("filmstrip.processing.glm_v", "GlmVProcessor"),
    "Glm4vForConditionalGeneration": ("filmstrip.processing.glm_v", "GlmVProcessor"),
    "Glm4vMoeForConditionalGeneration": ("filmstrip.processing.glm_v", "GlmVProcessor"),
    "InternS1ProForConditionalGeneration": ("filmstrip.processing.interns1_pro", "InternS1ProProcessor"),
    "InternS1_1_ForConditionalGeneration": ("filmstrip.processing.interns1_pro", "InternS1ProProcessor"),
    "Gemma3ForCausalLM": _TEXT,
    "Gemma3ForConditionalGeneration": ("filmstrip.processing.gemma3", "Gemma3Processor"),
    "InternVLForConditionalGeneration": ("filmstrip.processing.internvl", "InternVLProcessor"),
    "Llama4ForCausalLM": _TEXT,
    "Llama4ForConditionalGeneration": ("filmstrip.processing.llama4", "Llama4Processor"),
    "LlamaForCausalLM": _TEXT,
    "LlavaForConditionalGeneration": ("filmstrip.processing.llava", "LlavaProcessor"),
    "LlavaNextForConditionalGeneration": ("filmstrip.processing.llava", "LlavaNextProcessor"),
    "LlavaOnevisionForConditionalGeneration": ("filmstrip.processing.llava", "LlavaOnevisionProcessor"),
    "MiniCPMV4_6ForConditionalGeneration": ("filmstrip.processing.minicpm_v", "MiniCPMVProcessor"),
    "MistralForCausalLM": _TEXT,
    "MllamaForConditionalGeneration": ("filmstrip.processing.mllama", "MllamaProcessor"),
    "Molmo2ForConditionalGeneration": ("filmstrip.processing.molmo2", "Molmo2Processor"),
    "Phi4MultimodalForCausalLM": ("filmstrip.processing.phi4_multimodal", "Phi4MultimodalProcessor"),
    "Qwen2ForCausalLM": _TEXT,
    "Qwen2VLForConditionalGeneration": ("filmstrip.processing.qwen2_vl", "Qwen2VLProcessor"),
    "Qwen2_5_VLForConditionalGeneration": ("filmstrip.processing.qwen2_vl", "Qwen25VLProcessor"),
    "Qwen3ForCausalLM": _TEXT,
    "Qwen3MoeForCausalLM": _TEXT,
    "Qwen3NextForCausalLM": _TEXT,
    "Qwen3OmniMoeForConditionalGeneration": ("filmstrip.processing.qwen3_omni", "Qwen3OmniProcessor"),
    "Qwen3OmniMoeThinkerForConditionalGeneration": ("filmstrip.processing.qwen3_omni", "Qwen3OmniProcessor"),
    "Qwen3_5ForCausalLM": _TEXT,
    "Qwen3_5MoeForCausalLM": _TEXT,
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
        known = ", ".join(supported_models())
        raise ModelLoadError(
            f"{files.model!r} has the architecture {', '.join(architectures) or 'none'}; supported are {known}",
            param="model",
        )
    factory: Callable[..., Processor] = _processor_class(name)
    return factory(tokenizer, files, config, media)


def supported_models() -> dict[str, frozenset[Modality]]:
    """Every architecture that can be served, sorted, and the media that it takes beside text."""
    alike = {name: name for name in _PROCESSORS} | translated_architectures()
    return {name: _processor_class(alike[name]).modalities for name in sorted(alike)}


def _processor_class(architecture: str) -> Any:
    module, attribute = _PROCESSORS[architecture]
    return getattr(importlib.import_module(module), attribute)
