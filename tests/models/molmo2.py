"""A seed in, a complete Molmo 2 checkpoint directory with random weights out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filmstrip.demo.checkpoint import build_tokenizer
from tests.models.tiles import VISION, save, tokenizer_with

_CONTROL_TOKENS = {
    "image": "<|image|>",
    "video": "<|video|>",
    "patch": "<im_patch>",
    "row_end": "<im_col>",
    "image_start": "<im_start>",
    "image_end": "<im_end>",
    "whole_start": "<low_res_im_start>",
    "low": "<im_low>",
    "frame_start": "<frame_start>",
    "frame_end": "<frame_end>",
}
_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}


def make_molmo2(
    path: Path, *, seed: int = 0, text: dict[str, Any] | None = None, raw_videos: bool = False, **processor: Any
) -> str:
    """A random Molmo 2 checkpoint: crops of 5 x 5 patches that share two, at most 6 and the whole; 5 frames of a video.

    Its control tokens lie behind the vocabulary, as the published ones do: they have embeddings and no logits. ``text`` are
    fields of the text model, ``processor`` of ``processor_config.json``; ``raw_videos`` are not normalised.
    """
    roles = {f"{role}_control": token for role, token in _CONTROL_TOKENS.items()}
    tokenizer = tokenizer_with(roles, image="<|image|>", video="<|video|>")
    ids = tokenizer.get_vocab()
    size = {"height": 70, "width": 70}
    shown = {"size": size, "patch_size": 14, "resample": 2}
    fields = {
        "vision_config": {**VISION, **_HEADS, "image_size": [70, 70], "patch_size": 14},
        "adapter_config": {
            **_HEADS,
            "vision_feature_layer": [2, -3],
            "hidden_size": 48,
            "intermediate_size": 96,
            "text_hidden_size": 64,
        },
        "text_config": {"head_dim": 16, "additional_vocab_size": 16, **(text or {})},
        "image_patch_id": ids["<im_patch>"],
        "image_start_token_id": ids["<im_start>"],
        "image_end_token_id": ids["<im_end>"],
        "low_res_image_start_token_id": ids["<low_res_im_start>"],
        "frame_start_token_id": ids["<frame_start>"],
        "frame_end_token_id": ids["<frame_end>"],
        "tie_word_embeddings": False,
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Molmo2ImageProcessor",
            "max_crops": 6,
            "overlap_margins": [1, 1],
            "pooling_size": [2, 2],
            **shown,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Molmo2VideoProcessor",
            "num_frames": 5,
            "max_fps": 2,
            "pooling_size": [3, 3],
            **({} if raw_videos else {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}),
            **shown,
        },
        "processor_config.json": {"processor_class": "Molmo2Processor", **processor},
    }
    vocab_size = len(build_tokenizer())
    return save(path, tokenizer, "Molmo2ForConditionalGeneration", fields, files, seed, vocab_size=vocab_size)
