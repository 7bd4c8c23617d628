"""A downsampling mode and a seed in, a complete MiniCPM-V 4.6 checkpoint directory with random weights out."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

from tests.models.qwen3_5 import save, text_fields
from tests.models.tiles import VISION, tokenizer_with

PATCH_SIZE = 8
TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def make_minicpm_v(path: Path, *, downsample_mode: str = "16x", use_image_id: bool = True, seed: int = 0) -> str:
    """Write a random MiniCPM-V 4.6 checkpoint: pictures of about 80 x 80 pixels, at most 6 slices, 2 of a frame.

    A video has at most 4 frames. The vision tower has 5 x 5 learned positions.
    """
    tokenizer = tokenizer_with(TOKENS, image="<|image_pad|>\\n", video="<|video_pad|>\\n")
    ids = tokenizer.get_vocab()
    config = MiniCPMV4_6Config(
        text_config={"model_type": "qwen3_5_text", **text_fields(tokenizer, moe=False)},
        vision_config={**VISION, "image_size": 40, "patch_size": PATCH_SIZE},
        insert_layer_id=1,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        downsample_mode=downsample_mode,
    )
    save(path, MiniCPMV4_6ForConditionalGeneration(config), tokenizer, seed)
    common = {
        "patch_size": PATCH_SIZE,
        "scale_resolution": 80,
        "downsample_mode": downsample_mode,
        "use_image_id": use_image_id,
    }
    image = {"image_processor_type": "MiniCPMV4_6ImageProcessor", "max_slice_nums": 6}
    video = {"video_processor_type": "MiniCPMV4_6VideoProcessor", "max_slice_nums": 2, "max_num_frames": 4}
    files = {
        "preprocessor_config.json": image | common,
        "video_preprocessor_config.json": video | common,
        "processor_config.json": {"processor_class": "MiniCPMV4_6Processor"},
    }
    for name, values in files.items():
        (path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return str(path)
