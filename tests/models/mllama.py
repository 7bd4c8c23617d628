"""A seed in, a complete Mllama checkpoint directory with random weights out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from transformers import GenerationConfig

from filmstrip.demo.checkpoint import randomize_weights
from tests.models.tiles import TEXT, tokenizer_with

VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "attention_heads": 3,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 48 * 3,
    "image_size": 56,
    "patch_size": 14,
    "max_num_tiles": 4,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_mllama(path: Path, *, seed: int = 2) -> str:
    """A random Mllama checkpoint: up to 4 tiles of 56 pixels, two of five layers attend to them, gates are open.

    As in published ones the image token's id is the first behind the vocabulary.
    """
    tokenizer = tokenizer_with({"bos_token": "<|begin_of_text|>", "image_token": "<|image|>"}, image="<|image|>")
    ids = tokenizer.get_vocab()
    assert ids["<|image|>"] == max(ids.values())
    first = ids["<|begin_of_text|>"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A $B",
        special_tokens=[("<|begin_of_text|>", first)],
    )
    tokenizer.chat_template = "{{- bos_token -}}" + str(tokenizer.chat_template)
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    text = {
        **TEXT,
        **ends,
        "bos_token_id": first,
        "vocab_size": ids["<|image|>"],
        "num_hidden_layers": 5,
        "cross_attention_layers": [1, 3],
        "rope_parameters": ROPE,
    }
    config = transformers.MllamaConfig(vision_config=VISION, text_config=text, image_token_index=ids["<|image|>"])
    model: Any = transformers.MllamaForConditionalGeneration(config)
    randomize_weights(model, seed)
    vision = model.model.vision_model
    with torch.no_grad():  # tables of embeddings, which are drawn as if they were matrices
        for table in (
            vision.pre_tile_positional_embedding.embedding,
            vision.post_tile_positional_embedding.embedding,
            vision.gated_positional_embedding.tile_embedding,
        ):
            table.weight.mul_(math.sqrt(table.weight.shape[1]))
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    image = {
        "image_processor_type": "MllamaImageProcessor",
        "size": {"height": 56, "width": 56},
        "max_image_tiles": 4,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 2,
    }
    for name, values in (
        ("preprocessor_config.json", image),
        ("processor_config.json", {"processor_class": "MllamaProcessor"}),
    ):
        (path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return str(path)
