"""A seed in, a complete Llama 4 checkpoint directory with random weights out."""

from __future__ import annotations

from pathlib import Path

from tokenizers import processors
from transformers.models.llama4.processing_llama4 import chat_template

from tests.models.tiles import VISION, save, tokenizer_with

LLAMA4_TEXT = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 20,
    "floor_scale": 12,
    "attn_scale": 0.5,
}
"""Every prompt is longer than a chunk and than a step of the temperature; dense and sparse, chunked and full layers."""

_TOKENS = {
    "bos_token": "<|begin_of_text|>",
    "header_start_token": "<|header_start|>",
    "header_end_token": "<|header_end|>",
    "turn_end_token": "<|eot|>",
    "boi_token": "<|image_start|>",
    "eoi_token": "<|image_end|>",
    "image_token": "<|image|>",
    "patch_token": "<|patch|>",
    "column_end_token": "<|tile_x_separator|>",
    "row_end_token": "<|tile_y_separator|>",
}


def make_llama4(path: Path, *, seed: int = 0) -> str:
    """A random Llama 4 checkpoint: tiles of 56 pixels, 4 tokens each, at most 9 and the whole; the published template."""
    tokenizer = tokenizer_with(_TOKENS, image="")
    tokenizer.chat_template = chat_template
    ids = tokenizer.get_vocab()
    first = _TOKENS["bos_token"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, ids[first])]
    )
    fields = {
        "vision_config": {
            **VISION,
            "image_size": 56,
            "patch_size": 14,
            "intermediate_size": 4 * VISION["hidden_size"],  # what the pixel shuffle leaves to the projector
            "projector_input_dim": 40,
            "projector_output_dim": 40,
            "vision_output_dim": 40,
        },
        "text_config": LLAMA4_TEXT,
        "boi_token_index": ids["<|image_start|>"],
        "eoi_token_index": ids["<|image_end|>"],
        "image_token_index": ids["<|patch|>"],
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Llama4ImageProcessorFast",
            "size": {"height": 56, "width": 56},
            "max_patches": 9,
        },
        "processor_config.json": {
            "processor_class": "Llama4Processor",
            "fake_image_token": "<|image|>",
            "image_token": "<|image|>",
            "patch_size": 14,
        },
    }
    return save(path, tokenizer, "Llama4ForConditionalGeneration", fields, files, seed)
