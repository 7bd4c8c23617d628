"""config.json of an InternVL checkpoint in its original layout in, files as Transformers' InternVL has them out.

Source: ``configuration_internvl_chat.py``, ``configuration_intern_vit.py`` and ``modeling_internvl_chat.py`` of
OpenGVLab/InternVL (fields, defaults, what is computed) and Transformers' conversion script (which field becomes which).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from filmstrip.errors import ModelLoadError
from filmstrip.formats.base import Translation, refuse_fields, text_fields
from filmstrip.formats.source import Source

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_TEXT_MODELS = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_VISION_FIELDS = {
    "hidden_size": ("hidden_size", 3200),
    "intermediate_size": ("intermediate_size", 12800),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "num_channels": ("num_channels", 3),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "hidden_act": ("hidden_act", "gelu"),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
}
"""Field of the original -> Transformers' name for it, and what the original has where a file leaves it out."""
_QK_NORM_EPS = 1e-6
"""Of the norms of queries and keys in Transformers, whatever a configuration says."""


def translate(fields: Mapping[str, Any], source: Source) -> Translation:  # noqa: ARG001 - a format's signature
    """``fields`` of config.json translated; ModelLoadError for what Transformers' modules would compute otherwise."""
    is_dynamic = bool(fields.get("dynamic_image_size", False))
    refuse_fields(
        {"ps_version": "v1", "use_thumbnail": False, **fields},
        {
            # Transposed features, features of inner layers, no small tile of the whole, bars around a picture.
            "ps_version": ("v2",),
            "select_layer": (-1,),
            "use_thumbnail": (True,) if is_dynamic else (True, False),
            "pad2square": (False, None),
            "use_backbone_lora": (0, None),
            "use_llm_lora": (0, None),
        },
    )
    text = fields.get("llm_config") or {}
    architecture = (text.get("architectures") or [""])[0]
    vision = _vision(fields.get("vision_config") or {})
    size = fields.get("force_image_size") or vision["image_size"]
    if size != vision["image_size"]:
        raise ModelLoadError(
            f"config.json sets force_image_size to {size}, but vision_config.image_size to {vision['image_size']}; only "
            "equal sizes are supported",
            param="model",
        )
    ratio = fields.get("downsample_ratio", 0.5)
    tile = {"size": {"height": size, "width": size}, "resample": 3, **_IMAGENET}
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text_fields(text, _TEXT_MODELS, architecture),
        "vision_config": vision,
        "downsample_ratio": ratio,
        "image_seq_length": int((size // vision["patch_size"]) ** 2 * ratio**2),
        # The original unties them, whatever the text model's part of the file says.
        "tie_word_embeddings": False,
    }
    config["text_config"]["tie_word_embeddings"] = False
    return Translation(
        files={
            "config.json": config,
            "preprocessor_config.json": tile
            | {
                "image_processor_type": "GotOcr2ImageProcessor",
                "min_patches": fields.get("min_dynamic_patch", 1) if is_dynamic else 1,
                "max_patches": fields.get("max_dynamic_patch", 6) if is_dynamic else 1,
            },
            "video_preprocessor_config.json": tile | {"video_processor_type": "InternVLVideoProcessor"},
            "processor_config.json": {
                "processor_class": "InternVLProcessor",
                "image_seq_length": config["image_seq_length"],
            },
        },
        control_tokens=("<video>",),
        media_marks={"image": "<IMG_CONTEXT>\n", "video": "<video>\n"},
    )


def _vision(fields: Mapping[str, Any]) -> dict[str, Any]:
    vision = {name: fields.get(original, default) for original, (name, default) in _VISION_FIELDS.items()}
    if vision["use_qk_norm"] and vision["layer_norm_eps"] != _QK_NORM_EPS:
        raise ModelLoadError(
            f"config.json sets vision_config.layer_norm_eps to {vision['layer_norm_eps']}; with qk_normalization only "
            f"{_QK_NORM_EPS} is supported",
            param="model",
        )
    return vision | {
        "model_type": "internvl_vision",
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
    }
