"""A seed in, a complete random Phi-4-multimodal checkpoint directory out, with or without a vision adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from filmstrip.demo.checkpoint import randomize_weights
from tests.models.tiles import VISION, tokenizer_with

ORIGINAL_LEN = 1024
"""``original_max_position_embeddings``: longer requests have the long factors."""
CROP_SIZE, PATCH_SIZE, MAX_CROPS = 224, 7, 6
RANK, ALPHA = 4, 8

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "original_max_position_embeddings": ORIGINAL_LEN,
    "sliding_window": 262144,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.05 * i for i in range(12)],
        "long_factor": [1.5 + 2.0 * i for i in range(12)],
    },
}
_AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 16,
    "depthwise_separable_out_channel": 16,
    "nemo_conv_channels": 16,
}


def make_phi4_multimodal(
    path: Path, *, seed: int = 0, crop_size: int = CROP_SIZE, image: dict[str, Any] | None = None, **fields: Any
) -> str:
    """A random checkpoint: crops of ``crop_size`` pixels with 256 features each, at most six of them and the whole.

    ``fields`` replace the configuration's, ``image`` those of the image processor.
    """
    tokenizer = tokenizer_with({"image_token": "<|image|>", "audio_token": "<|audio|>"}, image="<|image|>")
    ids = tokenizer.get_vocab()
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    vision = {
        **VISION,
        "image_size": crop_size,
        "crop_size": crop_size,
        "patch_size": PATCH_SIZE,
        "image_token_id": ids["<|image|>"],
    }
    config = Phi4MultimodalConfig(
        **{
            "vocab_size": -(-len(tokenizer) // 64) * 64 + 64,
            "bos_token_id": ids["<|endoftext|>"],
            "vision_config": vision,
            "audio_config": {**_AUDIO, "audio_token_id": ids["<|audio|>"]},
            **_TEXT,
            **ends,
            **fields,
        }
    )
    model = Phi4MultimodalForCausalLM(config)
    randomize_weights(model, seed)
    with torch.no_grad():
        head = model.lm_head.weight
        head[len(tokenizer) :] = 0
        # Transformers takes a token of a picture that was generated for one that stands for features.
        head[[ids["<|image|>"], ids["<|audio|>"]]] = 0
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    settings = {
        "image_processor_type": "Phi4MultimodalImageProcessor",
        "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
        "processor_class": "Phi4MultimodalProcessor",
        "size": {"height": crop_size, "width": crop_size},
        "patch_size": PATCH_SIZE,
        "dynamic_hd": MAX_CROPS,
        **(image or {}),
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return str(path)


def add_adapter(path: Path, *, seed: int = 5, folder: str = "vision-lora", **settings: Any) -> None:
    """Write a random LoRA adapter of all linear layers of the text model into ``folder``, named as PEFT names it.

    ``settings`` replace those of its ``adapter_config.json``.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in _adapted(path).items():
        out_features, in_features = weight.shape
        factors = {"A": (RANK, in_features), "B": (out_features, RANK)}
        for factor, shape in factors.items():
            noise = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            weights[f"base_model.model.{name.removesuffix('.weight')}.lora_{factor}.weight"] = 0.5 * noise
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "lora_dropout": 0.0,
        "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        **settings,
    }
    (path / folder).mkdir()
    save_file(weights, path / folder / "adapter_model.safetensors")
    (path / folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def merge_adapter(source: Path, target: Path, folder: str = "vision-lora") -> str:
    """Copy the checkpoint ``source`` with its adapter added to its weights: what rows with the adapter compute."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    factors = load_file(source / folder / "adapter_model.safetensors")
    for name in _adapted(source):
        lora = {
            factor: factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{factor}.weight"] for factor in "AB"
        }
        weights[name] = weights[name] + ALPHA / RANK * lora["B"] @ lora["A"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def _adapted(path: Path) -> dict[str, torch.Tensor]:
    """Weights of the text model's linear layers, by name."""
    weights = load_file(path / "model.safetensors")
    return {name: weight for name, weight in weights.items() if name.startswith("model.layers.") and weight.ndim == 2}
