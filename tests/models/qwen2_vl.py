"""A seed in, complete Qwen2-VL and Qwen2.5-VL checkpoint directories with random weights out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from filmstrip.demo.checkpoint import build_tokenizer, randomize_weights

TOKENS_PER_SECOND = 7
"""So many that a video of a few seconds reaches further on the temporal axis than its picture is wide."""
PREPROCESSOR = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 3136,
    "max_pixels": 40_000,
}
_VISION = {
    "num_heads": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
_VISION_2 = _VISION | {"depth": 3, "embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}
_VISION_25 = _VISION | {
    "depth": 4,
    "hidden_size": 48,
    "intermediate_size": 96,
    "out_hidden_size": 64,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": TOKENS_PER_SECOND,
}


def make_qwen2_vl(path: Path, *, seed: int = 1) -> str:
    """Write a random Qwen2-VL checkpoint into ``path``, in the form in which Transformers 5 saves it."""
    tokenizer = build_tokenizer()
    fields: dict[str, Any] = {"text_config": _text(tokenizer), "vision_config": _VISION_2} | _token_ids(tokenizer)
    config = Qwen2VLConfig(**fields)
    _save(path, Qwen2VLForConditionalGeneration(config), tokenizer, seed)
    limits = {"shortest_edge": PREPROCESSOR["min_pixels"], "longest_edge": PREPROCESSOR["max_pixels"]}
    common = {key: value for key, value in PREPROCESSOR.items() if not key.endswith("_pixels")} | {"size": limits}
    common["processor_class"] = "Qwen2VLProcessor"
    _write(path / "preprocessor_config.json", common | {"image_processor_type": "Qwen2VLImageProcessor"})
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2, "do_sample_frames": False}
    _write(path / "video_preprocessor_config.json", common | video)
    return str(path)


def make_qwen2_5_vl(path: Path, *, seed: int = 0, tie_word_embeddings: bool = False) -> str:
    """Write a random Qwen2.5-VL checkpoint into ``path``, in the form of the published ones.

    Its config is flat and nothing is said of how videos are shown.
    """
    tokenizer = build_tokenizer()
    ids = _token_ids(tokenizer)
    fields: dict[str, Any] = {"text_config": _text(tokenizer), "vision_config": _VISION_25} | ids
    config = Qwen2_5_VLConfig(**fields, tie_word_embeddings=tie_word_embeddings)
    _save(path, Qwen2_5_VLForConditionalGeneration(config), tokenizer, seed)
    text = _text(tokenizer)
    rope = text.pop("rope_parameters")
    flat = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "float32",
        "tie_word_embeddings": tie_word_embeddings,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 4,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": _VISION_25,
    }
    _write(path / "config.json", text | ids | flat)
    published = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    _write(path / "preprocessor_config.json", PREPROCESSOR | published)
    return str(path)


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = tokenizer.get_vocab()
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Small sizes; grouped-query attention and three unequal M-RoPE sections, as one table after the other."""
    ids = tokenizer.get_vocab()
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64 + 64,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [4, 5, 7]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }


def _save(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    randomize_weights(model, seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] = 0
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.get_vocab()["<|im_end|>"], pad_token_id=0
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
