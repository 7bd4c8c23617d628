"""Sizes and a seed in, a complete Qwen3-VL checkpoint directory with random weights out; knows nothing of serving it.

The directory holds what a published checkpoint holds (config, safetensors weights, tokenizer, chat template, processor
settings), so every loader reads it like the real thing. Answers are gibberish, but they depend on every token and pixel:
weights are drawn at a scale where activations neither vanish nor saturate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Tokens that structure a prompt and are skipped when an answer is shown."""

MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Single tokens that are part of an answer's text."""

NUM_TRAINED_TOKENS = 512
"""Byte-level BPE vocabulary: 256 bytes and what the corpus below yields."""

_PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen models cut text before merging bytes: contractions, words with one leading mark, single digits, the rest."""

_CORPUS = (
    "A person walks slowly along the river while the sun sets behind the old bridge.",
    "What happens in this video? Describe the scene, the people and what they do, step by step.",
    "The first frame shows a red car; two seconds later it turns left and stops near the house.",
    "How many people are in the picture, and which of them is wearing a blue jacket?",
    "At 12.5 seconds the camera moves closer and the text on the screen becomes readable.",
    "You are a helpful assistant. Answer the user's question about the images and the videos.",
    "system user assistant seconds frame frames video videos image images scene camera person",
    "Ein Kind spielt im Garten. Un chien court sur la plage. 一只猫坐在窗边看雨。",
)

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or part.type == 'image_url' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or part.type == 'video_url' or 'video' in part or 'video_url' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + parts(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""Qwen's conversation markup; written so that whitespace around the tags never reaches the prompt."""


def make_qwen3_vl(
    path: str | Path,
    *,
    moe: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tie_word_embeddings: bool = False,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    image_size: Mapping[str, int] | None = None,
    video_size: Mapping[str, int] | None = None,
) -> Path:
    """Write a random-weight Qwen3-VL (``moe``: Qwen3-VL-MoE) checkpoint into ``path`` and return it.

    ``text`` and ``vision`` override fields of the text and the vision config. ``image_size`` and ``video_size`` are the
    processors' ``{"shortest_edge": min_pixels, "longest_edge": max_pixels}``, for a video over all its frames. The same
    arguments always give the same weights.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer, moe=moe, tie_word_embeddings=tie_word_embeddings, text=text, vision=vision)
    model_class: Any = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    model = model_class(config)
    randomize_weights(model, seed)
    with torch.no_grad():  # the spare rows of the vocabulary have no text: their logits are 0, never the largest
        model.get_output_embeddings().weight[len(tokenizer) :] = 0
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[_token_id(tokenizer, "<|im_end|>"), _token_id(tokenizer, "<|endoftext|>")],
        pad_token_id=_token_id(tokenizer, "<|endoftext|>"),
    )
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    write_processor_configs(
        path,
        config.vision_config,
        dict(image_size or {"shortest_edge": 4096, "longest_edge": 64 * 1024}),
        dict(video_size or {"shortest_edge": 4096, "longest_edge": 512 * 1024}),
    )
    return path


def build_tokenizer(
    corpus: Iterable[str] = _CORPUS,
    *,
    num_trained_tokens: int = NUM_TRAINED_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
    whole_words: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's control tokens and pre-tokenizer, trained on a few sentences or ``corpus``.

    What the regular expression ``whole_words`` matches is split off first.
    """
    pattern = _PRE_TOKENIZER_PATTERN if whole_words is None else f"{whole_words}|{_PRE_TOKENIZER_PATTERN}"
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_trained_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in MARKUP_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(CONTROL_TOKENS),
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    moe: bool = False,
    tie_word_embeddings: bool = False,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> Qwen3VLConfig | Qwen3VLMoeConfig:
    """A config of the real class with small sizes, every mechanism of the big ones in use.

    Grouped-query attention, interleaved M-RoPE with three unequal sections, three DeepStack levels and, for MoE, one dense
    layer among the sparse ones. The vocabulary has a few rows more than the tokenizer, as published checkpoints have.
    """
    text_fields: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64 + 64,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "eos_token_id": _token_id(tokenizer, "<|im_end|>"),
        "pad_token_id": _token_id(tokenizer, "<|endoftext|>"),
    }
    if moe:
        text_fields |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        }
    text_fields |= dict(text or {})
    vision_fields: dict[str, Any] = {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
        "out_hidden_size": text_fields["hidden_size"],
    }
    vision_fields |= dict(vision or {})
    return (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(
        text_config=text_fields,
        vision_config=vision_fields,
        tie_word_embeddings=tie_word_embeddings,
        image_token_id=_token_id(tokenizer, "<|image_pad|>"),
        video_token_id=_token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_token_id(tokenizer, "<|vision_end|>"),
    )


def randomize_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew, in name order, so that logits spread and depend on all inputs.

    Matrices are normal with variance 1 / fan_in (activations keep their size from layer to layer), embedding tables have
    variance 1, norms lie around 1, biases around 0; the output head is three times as wide so that one token stands out.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise))


def _token_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Id of the one token spelled ``name``."""
    return tokenizer.get_vocab()[name]


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Unit normal ``noise`` at the mean and spread that the parameter called ``name`` should have."""
    if name.endswith("bias"):
        return 0.1 * noise
    if noise.ndim == 1:
        return 1 + 0.1 * noise
    if "embed_tokens" in name:
        return noise
    if "pos_embed" in name:
        return 0.5 * noise
    # Experts are (experts, out, in) and convolution kernels (out, in, t, h, w): all behind the output counts as fan-in.
    fan_in = noise.shape[-1] if noise.ndim <= 3 else noise[0].numel()
    gain = 3.0 if name.startswith("lm_head") else 1.0
    return gain / math.sqrt(fan_in) * noise


def write_processor_configs(
    path: Path, vision_config: Any, image_size: dict[str, int], video_size: dict[str, int], **video_fields: Any
) -> None:
    """Write both preprocessor files into ``path``; ``video_fields`` are added to the video's or replace its own."""
    common = {
        "patch_size": vision_config.patch_size,
        "temporal_patch_size": vision_config.temporal_patch_size,
        "merge_size": vision_config.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "resample": 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "processor_class": "Qwen3VLProcessor",
    }
    image = common | {"image_processor_type": "Qwen2VLImageProcessor", "size": image_size}
    video = (
        common
        | {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": video_size,
            "fps": 2,
            "min_frames": 4,
            "max_frames": 768,
            "do_sample_frames": True,
        }
        | video_fields
    )
    for name, settings in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (path / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
