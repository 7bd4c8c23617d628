"""Architecture names in, model classes out; loads a family's file only when one of its checkpoints is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from filmstrip.errors import ModelLoadError

_MODEL_CLASSES = {
    "DeepseekVLForConditionalGeneration": "filmstrip.models.vision_text:VisionTextModel",
    "DeepseekVLHybridForConditionalGeneration": "filmstrip.models.vision_text:DeepseekVLHybridModel",
    "Gemma3ForCausalLM": "filmstrip.models.text:TextModel",
    "Gemma3ForConditionalGeneration": "filmstrip.models.vision_text:Gemma3Model",
    "Glm46VForConditionalGeneration": "filmstrip.models.qwen_vl:GlmVModel",
    "Glm4vForConditionalGeneration": "filmstrip.models.qwen_vl:GlmVModel",
    "Glm4vMoeForConditionalGeneration": "filmstrip.models.qwen_vl:GlmVModel",
    "InternS1ProForConditionalGeneration": "filmstrip.models.interns1_pro:InternS1ProModel",
    "InternS1_1_ForConditionalGeneration": "filmstrip.models.interns1_pro:InternS1ProModel",
    "InternS1ForConditionalGeneration": "filmstrip.models.internvl_formats:InternS1Model",
    "InternVLChatModel": "filmstrip.models.internvl_formats:InternVLChatModel",
    "InternVLForConditionalGeneration": "filmstrip.models.vision_text:VisionTextModel",
    "Llama4ForCausalLM": "filmstrip.models.llama4:Llama4Text",
    "Llama4ForConditionalGeneration": "filmstrip.models.llama4:Llama4Model",
    "LlamaForCausalLM": "filmstrip.models.text:TextModel",
    "LlavaForConditionalGeneration": "filmstrip.models.vision_text:VisionTextModel",
    "LlavaLlamaForCausalLM": "filmstrip.models.llava_format:LlavaOriginalModel",
    "LlavaMistralForCausalLM": "filmstrip.models.llava_format:LlavaOriginalModel",
    "LlavaNextForConditionalGeneration": "filmstrip.models.vision_text:LlavaNextModel",
    "LlavaOnevisionForConditionalGeneration": "filmstrip.models.vision_text:LlavaOnevisionModel",
    "MiniCPMV4_6ForConditionalGeneration": "filmstrip.models.minicpm_v:MiniCPMVModel",
    "LlavaQwenForCausalLM": "filmstrip.models.llava_format:LlavaOriginalModel",
    "MistralForCausalLM": "filmstrip.models.text:TextModel",
    "MllamaForConditionalGeneration": "filmstrip.models.mllama:MllamaModel",
    "Molmo2ForConditionalGeneration": "filmstrip.models.molmo2:Molmo2Model",
    "Phi4MultimodalForCausalLM": "filmstrip.models.phi4_multimodal:Phi4MultimodalModel",
    "Qwen2ForCausalLM": "filmstrip.models.text:TextModel",
    "Qwen2VLForConditionalGeneration": "filmstrip.models.qwen_vl:QwenVLModel",
    "Qwen2_5_VLForConditionalGeneration": "filmstrip.models.qwen_vl:QwenVLModel",
    "Qwen3ForCausalLM": "filmstrip.models.text:TextModel",
    "Qwen3MoeForCausalLM": "filmstrip.models.text:TextModel",
    "Qwen3NextForCausalLM": "filmstrip.models.qwen3_5:Qwen3NextModel",
    "Qwen3OmniMoeForConditionalGeneration": "filmstrip.models.qwen3_omni:Qwen3OmniModel",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "filmstrip.models.qwen3_omni:Qwen3OmniModel",
    "Qwen3VLForConditionalGeneration": "filmstrip.models.qwen_vl:QwenVLModel",
    "Qwen3VLMoeForConditionalGeneration": "filmstrip.models.qwen_vl:QwenVLModel",
    "Qwen3_5ForCausalLM": "filmstrip.models.qwen3_5:HybridTextModel",
    "Qwen3_5ForConditionalGeneration": "filmstrip.models.qwen3_5:Qwen35Model",
    "Qwen3_5MoeForCausalLM": "filmstrip.models.qwen3_5:HybridTextModel",
    "Qwen3_5MoeForConditionalGeneration": "filmstrip.models.qwen3_5:Qwen35Model",
}
"""Checkpoint architecture (``architectures`` of its config.json) -> module and class that serve it."""

_SERVED_PARTS = {"Qwen3OmniMoeForConditionalGeneration": "thinker_config"}
"""Architectures made of several models -> the field of config.json that describes the one that is served."""


def supported_architectures() -> list[str]:
    """Every architecture that can be served, sorted."""
    return sorted(_MODEL_CLASSES)


def find_architecture(architectures: Sequence[str], model: str) -> str:
    """The first of a checkpoint's ``architectures`` that is supported.

    Raises :class:`ModelLoadError` naming ``model``, what it has, the nearest supported names and the whole list.
    """
    for architecture in architectures:
        if architecture in _MODEL_CLASSES:
            return architecture
    supported = supported_architectures()
    if not architectures:
        raise ModelLoadError(
            f"config.json of {model!r} names no architecture (field 'architectures'); supported are: "
            + ", ".join(supported),
            param="model",
        )
    nearest = difflib.get_close_matches(architectures[0], supported, n=2, cutoff=0.5)
    hint = f"; did you mean a checkpoint of {' or '.join(nearest)}?" if nearest else ""
    raise ModelLoadError(
        f"{model!r} has the architecture {', '.join(architectures)}, which is not supported{hint} "
        f"Supported architectures: {', '.join(supported)}",
        param="model",
    )


def served_fields(architecture: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a config.json with these ``fields``, those that describe the served model; what they leave out is the whole's."""
    return {**fields, **fields.get(_SERVED_PARTS.get(architecture, ""), {})}


def model_class(architecture: str) -> Any:
    """The class that serves ``architecture``; its module is imported now. KeyError if it is not a supported name."""
    module_name, _, class_name = _MODEL_CLASSES[architecture].partition(":")
    return getattr(importlib.import_module(module_name), class_name)
