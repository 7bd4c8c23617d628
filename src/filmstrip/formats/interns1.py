"""config.json of an Intern-S1 checkpoint in, the same as a configuration of Transformers' InternVL out.

Source: ``modeling_interns1.py`` and ``configuration_interns1.py`` of InternLM/Intern-S1, whose modules are InternVL's under
other names; the remaining files are as Transformers' InternVL has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from filmstrip.formats.base import Translation, refuse_fields, text_fields
from filmstrip.formats.source import Source

_TEXT_MODELS = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}
_ARCHITECTURES = {model_type: architecture for architecture, model_type in _TEXT_MODELS.items()}
_KEPT = (
    "dtype",
    "torch_dtype",
    "image_token_id",
    "image_seq_length",
    "downsample_ratio",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)


def translate(fields: Mapping[str, Any], source: Source) -> Translation:  # noqa: ARG001 - a format's signature
    """``fields`` of config.json translated; ModelLoadError for a text model that the format does not have."""
    text, vision = dict(fields.get("text_config") or {}), dict(fields.get("vision_config") or {})
    refuse_fields(vision, {"use_mean_pooling": (True,), "use_mask_token": (False,)})
    # Only training drops paths.
    vision.pop("drop_path_rate", None)
    tied = bool(fields.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    architecture = (text.get("architectures") or [""])[0] or _ARCHITECTURES.get(text.get("model_type", ""), "")
    config = {name: fields[name] for name in _KEPT if name in fields} | {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text_fields(text, _TEXT_MODELS, architecture) | {"tie_word_embeddings": tied},
        "vision_config": vision | {"model_type": "internvl_vision"},
        "tie_word_embeddings": tied,
    }
    return Translation(files={"config.json": config})
