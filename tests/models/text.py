"""An architecture and a seed in, a complete text-only checkpoint directory with random weights out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from filmstrip.demo.checkpoint import build_tokenizer, randomize_weights
from tests.models.llama4 import LLAMA4_TEXT
from tests.models.tiles import GEMMA3_TEXT

ARCHITECTURES = (
    "Gemma3ForCausalLM",
    "Llama4ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
_FIELDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        "attention_bias": True,
    },
    "Llama4ForCausalLM": {
        **LLAMA4_TEXT,
        "attention_chunk_size": 50,
        "floor_scale": 32,
        "num_experts_per_tok": 2,
        "use_qk_norm": False,
        "attention_bias": True,
    },
    "MistralForCausalLM": {"sliding_window": None, "head_dim": 32},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 48},
    "Gemma3ForCausalLM": {**GEMMA3_TEXT, "sliding_window": 30},
    "Qwen3MoeForCausalLM": {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
"""What of each family is unlike the others'."""


def make_text(path: Path, architecture: str, *, seed: int = 0, **fields: Any) -> str:
    """Write a random checkpoint of ``architecture`` into ``path``; ``fields`` replace its configuration's."""
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    model_class: Any = getattr(transformers, architecture)
    config = model_class.config_class(
        **{
            "vocab_size": -(-len(tokenizer) // 64) * 64 + 64,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            **_FIELDS[architecture],
            **fields,
        }
    )
    model = model_class(config)
    randomize_weights(model, seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] = 0
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
