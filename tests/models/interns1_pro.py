"""Sizes and a seed in, complete Intern-S1-Pro checkpoint directories with random weights out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AddedToken, PreTrainedTokenizerFast

from filmstrip.demo.checkpoint import CHAT_TEMPLATE, build_tokenizer, randomize_weights, write_processor_configs
from filmstrip.models.interns1_pro_config import InternS1ProConfig
from filmstrip.models.interns1_pro_modules import InternS1ProForConditionalGeneration
from tests.models.qwen3_5 import VISION

TS_TOKENS = {"ts_token": "<TS_CONTEXT>", "ts_start_token": "<|ts|>", "ts_end_token": "<|/ts|>"}
TIME_SERIES_TEMPLATE = CHAT_TEMPLATE.replace(
    "{%- elif 'text' in part -%}",
    "{%- elif part.type == 'time_series' -%}\n{{- '<|ts|><TS_CONTEXT><|/ts|>' -}}\n{%- elif 'text' in part -%}",
)
IMAGE_SIZE = {"shortest_edge": 4096, "longest_edge": 32 * 1024}
VIDEO_SIZE = {"shortest_edge": 4096, "longest_edge": 128 * 1024}
TIME_SERIES = {
    "d_model": 32,
    "num_mel_bins": 20,
    "max_source_positions": 9,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "activation_function": "gelu",
    "ts_adapt_in_dim": 256,
    "ts_adapt_out_dim": 40,
    "ts_hidden_dim": 40,
    "out_hidden_size": 64,
}
"""Sizes of the time-series encoder; its table of positions is shorter than some series in the tests."""


def make_interns1_pro(
    path: Path,
    *,
    architecture: str = "InternS1ProForConditionalGeneration",
    seed: int = 0,
    expert_layout: str = "fused",
    with_optional_weights: bool = True,
    with_time_series: bool = True,
    text: dict[str, Any] | None = None,
    **fields: Any,
) -> str:
    """Write a random checkpoint into ``path``.

    ``expert_layout``: all experts in one tensor ("fused"), or each for itself ("split"; a published name of the layers,
    too). ``with_optional_weights``: biases that Whisper does not have, and the table of positions in a window. ``text``
    replaces fields of the text configuration, ``fields`` are more of the whole.
    """
    tokenizer = build_time_series_tokenizer() if with_time_series else build_tokenizer()
    config = _config_fields(tokenizer, architecture, text or {}, with_time_series=with_time_series) | fields
    model = InternS1ProForConditionalGeneration(InternS1ProConfig(**config))
    randomize_weights(model, seed)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 0
        for name, parameter in model.named_parameters():
            if name.endswith("_coef"):  # around what they are without learning, so that both parts count
                parameter.mul_(0.5).add_(torch.eye(parameter.shape[-1]))
    path.mkdir(parents=True, exist_ok=True)
    weights = _as_published(dict(model.state_dict()), expert_layout)
    if config.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    if not with_optional_weights:
        optional = ("k_proj.bias", ".pe")
        weights = {
            name: weight for name, weight in weights.items() if "time_series" not in name or not name.endswith(optional)
        }
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"do_sample": False, "eos_token_id": config["text_config"]["eos_token_id"], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer.save_pretrained(path)
    if with_time_series:
        _name_roles(path / "tokenizer_config.json")
    write_processor_configs(
        path,
        model.config.vision_config,
        IMAGE_SIZE,
        VIDEO_SIZE,
    )
    return str(path)


def build_time_series_tokenizer() -> PreTrainedTokenizerFast:
    """The tests' tokenizer with control tokens for time series."""
    tokenizer = build_tokenizer(chat_template=TIME_SERIES_TEMPLATE)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in TS_TOKENS.values()], special_tokens=True)
    return tokenizer


def _name_roles(file: Path) -> None:
    """Let a tokenizer's file say which control tokens are for what, as published ones do."""
    settings = json.loads(file.read_text())
    roles = {token.strip("<|>"): token for token in settings["extra_special_tokens"]}
    file.write_text(json.dumps(settings | {"extra_special_tokens": roles | TS_TOKENS}))


def _config_fields(
    tokenizer: PreTrainedTokenizerFast, architecture: str, text: dict[str, Any], *, with_time_series: bool
) -> dict[str, Any]:
    """What config.json holds; as published ones do, in the words of older Transformers."""
    ids = tokenizer.get_vocab()
    text_config = {
        "model_type": "interns1_pro_text",
        "vocab_size": -(-len(tokenizer) // 64) * 64 + 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "fope", "fope_init_factor": 0.1, "fope_sep_head": True, "num_inv_freq": 11},
        "rms_norm_eps": 1e-5,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "router_n_groups": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    fields = {
        "architectures": [architecture],
        "model_type": "interns1_pro" if "Pro" in architecture else "interns1_1",
        "torch_dtype": "float32",
        "text_config": text_config | text,
        "vision_config": VISION,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    return fields | ({"ts_config": TIME_SERIES} if with_time_series else {})


def _as_published(weights: dict[str, torch.Tensor], expert_layout: str) -> dict[str, torch.Tensor]:
    published = {}
    for name, weight in weights.items():
        if ".experts." not in name:
            published[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if expert_layout == "split" else name] = (
                weight
            )
        elif expert_layout == "fused":
            published[name] = weight.transpose(1, 2)
        else:
            published |= _split_experts(name.replace(".mlp.", ".block_sparse_moe."), weight)
    return published


def _split_experts(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each expert's own matrices, of a tensor (experts, out, in)."""
    parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
    stem = name.rpartition(".")[0]
    return {
        f"{stem}.{index}.{part}.weight": matrix
        for index, expert in enumerate(weight)
        for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True)
    }
