"""A seed in, complete Qwen3-Omni checkpoint directories with random weights out: all of it, or the thinker alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from filmstrip.demo.checkpoint import randomize_weights
from tests.models.tiles import tokenizer_with

PLACES_PER_SECOND = 13
_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
_VISION = {
    "depth": 4,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_heads": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 1, 2],
    "out_hidden_size": 64,
}
_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 64,
    "downsample_hidden_size": 8,
}
_TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TALKER = {
    "text_config": _TINY
    | {
        "num_key_value_heads": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "vocab_size": 64,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "code_predictor_config": _TINY | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32},
    "thinker_hidden_size": 64,
    "spatial_merge_size": 2,
    "num_code_groups": 2,
}
_CODE2WAV = _TINY | {
    "num_key_value_heads": 2,
    "codebook_size": 8,
    "num_quantizers": 2,
    "decoder_dim": 16,
    "upsample_rates": [2, 2],
    "upsampling_ratios": [2],
}
# As published: pictures' and sounds' settings in one file, nothing about videos.
_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "Qwen3OmniMoeProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "min_pixels": 3136,
    "max_pixels": 60_000,
    "feature_size": 128,
    "sampling_rate": 16000,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
    "return_attention_mask": True,
}


def make_qwen3_omni(path: Path, *, seed: int = 18) -> str:
    """Write a random Qwen3-Omni checkpoint into ``path``: thinker, talker and code2wav, as the published ones are.

    Names of weights, one for each expert, and fields of the configuration are theirs.
    """
    tokenizer = _tokenizer()
    ids = tokenizer.get_vocab()
    config = Qwen3OmniMoeConfig(
        thinker_config=_thinker(tokenizer),
        talker_config=_TALKER,
        code2wav_config=_CODE2WAV,
        im_start_token_id=ids["<|im_start|>"],
        im_end_token_id=ids["<|im_end|>"],
    )
    _save(path, Qwen3OmniMoeForConditionalGeneration(config), tokenizer, seed)
    fields = json.loads((path / "config.json").read_text())
    text = fields["thinker_config"]["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"interleaved": True, "type": "default"}}
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return str(path)


def make_qwen3_omni_thinker(path: Path, *, seed: int = 18) -> str:
    """Write a random checkpoint of the thinker alone into ``path``, in the form in which Transformers saves it."""
    tokenizer = _tokenizer()
    config = Qwen3OmniMoeThinkerConfig(**_thinker(tokenizer))
    _save(path, Qwen3OmniMoeThinkerForConditionalGeneration(config), tokenizer, seed)
    return str(path)


def _tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with(
        _TOKENS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
    )


def _thinker(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = tokenizer.get_vocab()
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64 + 64,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 32768,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    return {
        "text_config": text,
        "vision_config": _VISION,
        "audio_config": _AUDIO,
        "position_id_per_seconds": PLACES_PER_SECOND,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "audio_token_id": ids["<|audio_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "audio_start_token_id": ids["<|audio_start|>"],
    }


def _save(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    thinker = getattr(model, "thinker", model)
    randomize_weights(thinker, seed)
    with torch.no_grad():
        thinker.lm_head.weight[len(tokenizer) :] = 0
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.get_vocab()["<|im_end|>"], pad_token_id=0
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
