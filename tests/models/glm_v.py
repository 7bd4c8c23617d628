"""A family and a seed in, complete GLM-4.1V, 4.5V and 4.6V checkpoint directories with random weights out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.tiles import save, tokenizer_with

_ROPE = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
_TEXT = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": _ROPE}
_EXPERTS = {
    "model_type": "glm4v_moe_text",
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 32,
    "use_qk_norm": True,
    "attention_bias": True,
}
_VISION = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_heads": 3,
    "image_size": 112,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
}
_PIXELS = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}


def make_glm4v(path: Path, *, seed: int = 0) -> str:
    """A random GLM-4.1V checkpoint."""
    return _make(path, "Glm4v", "Glm4vForConditionalGeneration", {"model_type": "glm4v_text"}, seed)


def make_glm4v_moe(path: Path, *, seed: int = 0) -> str:
    """A random GLM-4.5V checkpoint: a dense layer, then experts of which one is shared."""
    return _make(path, "Glm4v", "Glm4vMoeForConditionalGeneration", _EXPERTS, seed)


def make_glm46v(path: Path, *, seed: int = 2) -> str:
    """A random GLM-4.6V checkpoint of the architecture of that name."""
    return _make(path, "Glm46V", "Glm46VForConditionalGeneration", {"model_type": "glm4v_text"}, seed)


def make_glm46v_flash(path: Path, *, seed: int = 2) -> str:
    """A random GLM-4.6V checkpoint as some are published: the earlier architecture, the later processors."""
    return _make(path, "Glm46V", "Glm4vForConditionalGeneration", {"model_type": "glm4v_text"}, seed)


def _make(path: Path, family: str, architecture: str, text: dict[str, Any], seed: int) -> str:
    roles = {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    }
    tokenizer = tokenizer_with(
        roles,
        image="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
    )
    ids = tokenizer.get_vocab()
    fields = {
        "text_config": _TEXT | text,
        "vision_config": _VISION | ({"model_type": "glm4v_vision"} if architecture.startswith("Glm46V") else {}),
        **{f"{role}_id": ids[token] for role, token in roles.items()},
    }
    files = {
        "preprocessor_config.json": {
            **_PIXELS,
            "image_processor_type": f"{family}ImageProcessor",
            "size": {"shortest_edge": 6272, "longest_edge": 80_000},
        },
        "video_preprocessor_config.json": {
            **_PIXELS,
            "video_processor_type": f"{family}VideoProcessor",
            "size": {"shortest_edge": 6272, "longest_edge": 400_000},
        },
        "processor_config.json": {"processor_class": f"{family}Processor"},
    }
    return save(path, tokenizer, architecture, fields, files, seed)
