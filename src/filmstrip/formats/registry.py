"""config.json in, the checkpoint's translation out, or why its format cannot be served; imports a format when it is met."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from filmstrip.errors import ModelLoadError
from filmstrip.formats.base import Translation
from filmstrip.formats.source import Source

_FORMATS = {
    "InternS1ForConditionalGeneration": ("filmstrip.formats.interns1", "InternVLForConditionalGeneration"),
    "InternVLChatModel": ("filmstrip.formats.internvl_chat", "InternVLForConditionalGeneration"),
    "LlavaLlamaForCausalLM": ("filmstrip.formats.llava_original", "LlavaForConditionalGeneration"),
    "LlavaMistralForCausalLM": ("filmstrip.formats.llava_original", "LlavaForConditionalGeneration"),
    "LlavaQwenForCausalLM": ("filmstrip.formats.llava_original", "LlavaForConditionalGeneration"),
}
"""Checkpoint architecture -> the module whose ``translate`` reads its files, and one whose media are the same."""

_REMOTE_CODE = "Transformers has no modules for it, and code that comes with a checkpoint is never run"
_REFUSED = {
    "ChatGLMForConditionalGeneration": ("ChatGLM, GLM-4V-9B", "Glm4vForConditionalGeneration (GLM-4.1V)"),
    "ChatGLMModel": ("ChatGLM, GLM-4V-9B", "Glm4vForConditionalGeneration (GLM-4.1V)"),
    "CogVLMForCausalLM": ("CogVLM2", "Glm4vForConditionalGeneration (GLM-4.1V)"),
    "CogVLMVideoForCausalLM": ("CogVLM2-Video", "Glm4vForConditionalGeneration (GLM-4.1V)"),
    "DeepseekVLV2ForCausalLM": ("DeepSeek-VL2", "Qwen3VLMoeForConditionalGeneration (Qwen3-VL-MoE)"),
    "InternLMXComposer2ForCausalLM": ("InternLM-XComposer2", "InternVLChatModel (InternVL2.5, InternVL3)"),
    "Phi3VForCausalLM": ("Phi-3-vision", "Phi4MultimodalForCausalLM (Phi-4-multimodal)"),
    "QWenLMHeadModel": ("Qwen, Qwen-VL", "Qwen2VLForConditionalGeneration (Qwen2-VL)"),
}
"""Architectures known by name that cannot be served -> what they are, and the nearest that can."""
_FIRST_RELEASES = {
    "MultiModalityCausalLM": "deepseek-community/deepseek-vl-1.3b-chat and deepseek-community/deepseek-vl-7b-chat",
    "Phi4MMForCausalLM": "revisions of microsoft/Phi-4-multimodal-instruct that name Phi4MultimodalForCausalLM",
}
"""Architectures of first releases -> checkpoints of the same model in Transformers' format, which is served."""
_REFUSED_MODEL_TYPES = {"deepseek_vl_v2": "DeepseekVLV2ForCausalLM"}
"""For files of these formats that name no architecture."""


def translated_architectures() -> dict[str, str]:
    """Architectures that are translated, sorted, each with one of Transformers' that takes the same media."""
    return {name: alike for name, (_, alike) in sorted(_FORMATS.items())}


def refused_architectures() -> list[str]:
    """Architectures that are refused with a reason of their own, sorted."""
    return sorted(_REFUSED)


def check_format(fields: Mapping[str, Any], model: str) -> None:
    """Raise ModelLoadError, saying why and what is near, if ``fields`` of config.json are a format that cannot be served."""
    named = list(fields.get("architectures") or [])
    by_type = _REFUSED_MODEL_TYPES.get(str(fields.get("model_type")))
    for architecture in named or ([by_type] if by_type else []):
        if architecture in _FIRST_RELEASES:
            raise ModelLoadError(
                f"{model!r} has the architecture {architecture}, the format of a first release, which is not supported; "
                f"Transformers' format is, as in {_FIRST_RELEASES[architecture]}",
                param="model",
            )
        if architecture in _REFUSED:
            what, nearest = _REFUSED[architecture]
            raise ModelLoadError(
                f"{model!r} has the architecture {architecture} ({what}), which is not supported: {_REMOTE_CODE}. The "
                f"nearest supported one is {nearest}",
                param="model",
            )


def translate(fields: Mapping[str, Any], source: Source) -> Translation:
    """The translation of the checkpoint at ``source`` with ``fields`` in its config.json; an empty one if it needs none.

    Raises ModelLoadError for a format known to be unsupported, or for what its translation cannot express.
    """
    check_format(fields, source.model)
    for architecture in fields.get("architectures") or []:
        if architecture in _FORMATS:
            return importlib.import_module(_FORMATS[architecture][0]).translate(fields, source)
    return Translation()
