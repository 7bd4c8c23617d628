"""A family and a seed in, a complete checkpoint directory with random weights out, for families that see tiles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from filmstrip.demo.checkpoint import CHAT_TEMPLATE, build_tokenizer, randomize_weights

_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
GEMMA3_TEXT = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": False,
}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}


def tokenizer_with(tokens: Mapping[str, str], *, image: str, video: str = "") -> PreTrainedTokenizerFast:
    """The small tokenizer with control tokens by their roles; ``image`` and ``video`` are what its template writes."""
    small = build_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=small.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(tokens),
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace(_QWEN_IMAGE, image).replace(_QWEN_VIDEO, video)
    return tokenizer


def save(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    architecture: str,
    fields: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    seed: int,
    *,
    vocab_size: int | None = None,
) -> str:
    """Write a random checkpoint of ``architecture`` with the configuration ``fields`` and the JSON ``files``.

    The vocabulary has room to spare unless ``vocab_size`` says where it ends.
    """
    ids = tokenizer.get_vocab()
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    size = {"vocab_size": vocab_size or -(-len(tokenizer) // 64) * 64 + 64}
    model_class: Any = getattr(transformers, architecture)
    text = {**TEXT, **fields.get("text_config", {}), **size, **ends}
    model = model_class(model_class.config_class(**{**fields, "text_config": text}))
    randomize_weights(model, seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] = 0
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    for name, values in files.items():
        (path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return str(path)


def make_internvl(path: Path, *, seed: int = 0) -> str:
    """A random InternVL3 checkpoint: tiles of 56 pixels, 4 tokens each, at most 6 and the whole; 5 frames of a video."""
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_with(tokens, image="<IMG_CONTEXT>\\n", video="<video>\\n")
    size = {"height": 56, "width": 56}
    image = {"image_processor_type": "GotOcr2ImageProcessor", "size": size, "max_patches": 6, "min_patches": 1}
    video = {
        "video_processor_type": "InternVLVideoProcessor",
        "size": size,
        "do_sample_frames": True,
        "num_frames": 5,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    fields = {
        "vision_config": {**VISION, "image_size": [56, 56], "patch_size": [14, 14], "use_qk_norm": True},
        "text_config": {"model_type": "qwen2"},
        "image_token_id": tokenizer.get_vocab()["<IMG_CONTEXT>"],
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }
    files = {
        "preprocessor_config.json": image,
        "video_preprocessor_config.json": video,
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
    }
    return save(path, tokenizer, "InternVLForConditionalGeneration", fields, files, seed)


_CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "projection_dim": 32}
_SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False}
_GRID = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
_CROPPED = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True}


def llama_tokenizer(tokens: Mapping[str, str], *, image: str, video: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token of its own and a space before every text, which its template leaves out."""
    tokenizer = tokenizer_with({**tokens, "bos_token": "<s>"}, image=image, video=video)
    first = tokenizer.get_vocab()["<s>"]
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\u2581", " ")])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>' + message.role", "' + message.role")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", first)]
    )
    return tokenizer


def make_llava(path: Path, *, seed: int = 0) -> str:
    """A random LLaVA-1.5 checkpoint: CLIP whose class token is dropped, features of two layers, a Llama text model."""
    tokenizer = llama_tokenizer({"image_token": "<image>"}, image="<image>\\n")
    fields = {
        "vision_config": _CLIP,
        "text_config": {"model_type": "llama"},
        "image_token_index": tokenizer.get_vocab()["<image>"],
        "vision_feature_layer": [-2, -1],
    }
    files = {
        "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", **_CROPPED},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    }
    return save(path, tokenizer, "LlavaForConditionalGeneration", fields, files, seed)


_DEEPSEEK_TEMPLATE = """\
{%- for message in messages -%}
{{- message.role | capitalize + ': ' -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<image_placeholder>{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>' if message.role == 'assistant' else '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""
"""Looks for parts in every message, as DeepSeek-VL's does: a content that is a string is not shown."""


def make_deepseek_vl(path: Path, *, hybrid: bool = False, seed: int = 0) -> str:
    """A random DeepSeek-VL checkpoint: 16 tokens for an image, seen at 56 pixels and, if ``hybrid``, at 80 as well."""
    tokenizer = llama_tokenizer({"image_token": "<image_placeholder>"}, image="")
    tokenizer.chat_template = _DEEPSEEK_TEMPLATE
    fields = {
        "vision_config": _SIGLIP,
        "text_config": {"model_type": "llama"},
        "image_token_id": tokenizer.get_vocab()["<image_placeholder>"],
        "tie_word_embeddings": False,
    }
    image = {"image_processor_type": "DeepseekVLImageProcessor", "size": {"height": 56, "width": 56}}
    name = "DeepseekVL"
    if hybrid:
        name = "DeepseekVLHybrid"
        # Windows that do not divide the grid, and not every layer with windows.
        fields["high_res_vision_config"] = {
            "model_type": "sam_vision_model",
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "output_channels": 24,
            "image_size": 80,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
        }
        image |= {
            "image_processor_type": "DeepseekVLHybridImageProcessor",
            "high_res_size": {"height": 80, "width": 80},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    files = {
        "preprocessor_config.json": image,
        "processor_config.json": {"processor_class": f"{name}Processor", "num_image_tokens": 16},
    }
    return save(path, tokenizer, f"{name}ForConditionalGeneration", fields, files, seed)


def make_deepseek_vl_hybrid(path: Path, *, seed: int = 0) -> str:
    """A random checkpoint of DeepSeek-VL's hybrid: SigLIP, and SAM at a higher resolution."""
    return make_deepseek_vl(path, hybrid=True, seed=seed)


def make_llava_siglip(path: Path, *, seed: int = 0) -> str:
    """A random LLaVA checkpoint with SigLIP, whose pictures are squeezed into a square, and a Qwen2 text model."""
    tokenizer = tokenizer_with({"image_token": "<image>"}, image="<image>\\n")
    fields = {
        "vision_config": _SIGLIP,
        "text_config": {"model_type": "qwen2"},
        "image_token_index": tokenizer.get_vocab()["<image>"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 56, "width": 56},
            "resample": 2,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "full",
        },
    }
    return save(path, tokenizer, "LlavaForConditionalGeneration", fields, files, seed)


def make_llava_next(path: Path, *, seed: int = 0) -> str:
    """A random LLaVA-NeXT checkpoint: sizes of two and three tiles, a Mistral text model."""
    tokenizer = llama_tokenizer({"image_token": "<image>"}, image="<image>\\n")
    fields = {
        "vision_config": _CLIP,
        "text_config": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
        "image_token_index": tokenizer.get_vocab()["<image>"],
        "image_grid_pinpoints": _GRID,
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": _GRID,
            **_CROPPED,
        },
        "processor_config.json": {
            "processor_class": "LlavaNextProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    }
    return save(path, tokenizer, "LlavaNextForConditionalGeneration", fields, files, seed)


def make_llava_onevision(path: Path, *, seed: int = 1) -> str:
    """A random LLaVA-OneVision checkpoint: sizes of up to nine tiles, packed to at most two; 5 frames of a video."""
    tokenizer = tokenizer_with(
        {"image_token": "<image>", "video_token": "<video>"}, image="<image>\\n", video="<video>\\n"
    )
    ids = tokenizer.get_vocab()
    grid = [[70 * rows, 70 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    fields = {
        "vision_config": {**_SIGLIP, "image_size": 70},
        "text_config": {"model_type": "qwen2"},
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        "image_grid_pinpoints": grid,
        "vision_aspect_ratio": "anyres_max_2",
    }
    size = {"height": 70, "width": 70}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": grid,
            "size": size,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": size,
            "num_frames": 5,
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 25,
            "vision_aspect_ratio": "anyres_max_2",
            "vision_feature_select_strategy": "full",
        },
    }
    return save(path, tokenizer, "LlavaOnevisionForConditionalGeneration", fields, files, seed)


def make_gemma3(path: Path, *, seed: int = 0) -> str:
    """A random Gemma 3 checkpoint: 9 tokens for an image, more than two of three layers see at once."""
    roles = {
        "bos_token": "<bos>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = tokenizer_with(roles, image="<start_of_image>")
    ids = tokenizer.get_vocab()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    tokenizer.chat_template = "{{- bos_token -}}" + str(tokenizer.chat_template)
    fields = {
        "vision_config": {**_SIGLIP, "image_size": 84},
        "text_config": GEMMA3_TEXT,
        "mm_tokens_per_image": 9,
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
        "tie_word_embeddings": False,
    }
    size = {"height": 84, "width": 84}
    files = {
        "preprocessor_config.json": {"image_processor_type": "Gemma3ImageProcessor", "size": size, "resample": 2},
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 9},
    }
    return save(path, tokenizer, "Gemma3ForConditionalGeneration", fields, files, seed)
