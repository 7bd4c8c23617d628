"""Sizes and a seed in, complete Qwen3.5 and Qwen3-Next checkpoint directories with random weights out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from filmstrip.demo.checkpoint import build_tokenizer, randomize_weights, write_processor_configs

DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
}
VISION = {
    "depth": 2,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_heads": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 256,
    "out_hidden_size": 64,
}
_TEXT_CLASSES: dict[str, tuple[Any, Any]] = {
    "Qwen3_5ForCausalLM": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "Qwen3_5MoeForCausalLM": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
    "Qwen3NextForCausalLM": (Qwen3NextConfig, Qwen3NextForCausalLM),
}


def make_qwen3_5(path: Path, *, moe: bool = False, seed: int = 0) -> str:
    """Write a random Qwen3.5 (``moe``: Qwen3.5-MoE) checkpoint with vision into ``path``.

    Like published ones it has weights of a multi-token prediction head, which nothing here reads.
    """
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    config_class: Any = Qwen3_5MoeConfig if moe else Qwen3_5Config
    config = config_class(
        text_config=text_fields(tokenizer, moe=moe),
        vision_config=VISION,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model_class: Any = Qwen3_5MoeForConditionalGeneration if moe else Qwen3_5ForConditionalGeneration
    model = model_class(config)
    save(path, model, tokenizer, seed)
    write_processor_configs(
        path,
        config.vision_config,
        {"shortest_edge": 4096, "longest_edge": 64 * 1024},
        {"shortest_edge": 4096, "longest_edge": 512 * 1024},
    )
    _add_mtp_weights(path)
    return str(path)


def make_text_only(path: Path, architecture: str, *, seed: int = 0) -> str:
    """Write a random text-only checkpoint of ``architecture`` (Qwen3-Next, Qwen3.5 without vision) into ``path``."""
    tokenizer = build_tokenizer()
    config_class, model_class = _TEXT_CLASSES[architecture]
    fields = text_fields(tokenizer, moe=architecture != "Qwen3_5ForCausalLM")
    if architecture == "Qwen3NextForCausalLM":
        fields |= {"intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [1], "norm_topk_prob": True}
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.25}
    save(path, model_class(config_class(**fields)), tokenizer, seed)
    _add_mtp_weights(path)
    return str(path)


def text_fields(tokenizer: PreTrainedTokenizerFast, *, moe: bool) -> dict[str, Any]:
    """Small sizes, every mechanism in use: three DeltaNet layers of four, three unequal M-RoPE sections, partial rotary."""
    ids = tokenizer.get_vocab()
    fields: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64 + 64,
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        # Random small heads often give outputs near 0, which a norm blows up: with an epsilon of 1e-6 the reference itself
        # is off by 1e-4 from its result in double precision.
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    return fields | DELTA | (EXPERTS if moe else {"intermediate_size": 160})


def save(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Write ``model``, whose text model has such fields, with random weights."""
    path.mkdir(parents=True, exist_ok=True)
    randomize_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] = 0
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):  # from hardly any forgetting to much
                parameter.copy_(noise - 1)
            elif (
                name.endswith(("norm.weight", "layernorm.weight"))
                and "linear_attn" not in name
                and not name.startswith(("model.visual", "model.vision_tower", "model.merger"))
            ):
                parameter.copy_(0.1 * noise)  # these are counted from 1
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.get_vocab()["<|im_end|>"], pad_token_id=0
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _add_mtp_weights(path: Path) -> None:
    """Weights that a checkpoint has and a model has no place for."""
    file = path / "model.safetensors"
    weights = load_file(file)
    weights |= {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.mlp.gate.weight": torch.ones(8, 64)}
    save_file(weights, file, metadata={"format": "pt"})
    assert "architectures" in json.loads((path / "config.json").read_text())
