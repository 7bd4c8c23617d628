"""A seed in, the demo model before training out: sizes, tokenizer, chat template, processor settings; knows no pixels.

The architecture is Qwen3-VL's, every mechanism of the big ones in use: patches of two frames, merged two by two, DeepStack,
interleaved M-RoPE, a time before each group of frames.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLForConditionalGeneration,
)

from filmstrip.demo.checkpoint import build_config, build_tokenizer, write_processor_configs
from filmstrip.demo.questions import WEIGHTS, View, ask_of_picture, ask_of_two, ask_some, list_looks, transcribe
from filmstrip.demo.scenes import make_picture_scene, make_scene

NUM_TRAINED_TOKENS = 900
_NUM_CORPUS_SCENES = 600
_TIME_PATTERN = r"\d{1,2}\.\d(?!\d)"
_TIME_REPEATS = 100
TIMES = tuple(f"{tenths / 10:.1f}" for tenths in range(250))
"""Times of one token each, in seconds: what is copied from a prompt into an answer is one thing then."""

FRAMES_PER_SECOND = 4
"""Default rate: a group of two frames is half a second, the accuracy at which the model tells times."""
MIN_FRAMES, MAX_FRAMES = 4, 96
MAX_TOKENS_PER_FRAME = 16
"""Merged tokens of a frame, 32 x 32 pixels each: 128 x 128 for a square clip, 160 x 96 for 16:9."""

_FACTOR = 32
_MIN_PIXELS = 4096

CHAT_TEMPLATE = """\
{%- set seen = namespace(pictures=0, videos=0) -%}
{%- macro parts(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or part.type == 'image_url' or 'image' in part or 'image_url' in part -%}
{%- set seen.pictures = seen.pictures + 1 -%}
{{- 'Picture ' + seen.pictures|string + ': <|vision_start|><|image_pad|><|vision_end|>\\n' -}}
{%- elif part.type == 'video' or part.type == 'video_url' or 'video' in part or 'video_url' in part -%}
{%- set seen.videos = seen.videos + 1 -%}
{{- 'Video ' + seen.videos|string + ': <|vision_start|><|video_pad|><|vision_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- for part in content -%}
{%- if 'text' in part -%}
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
"""Qwen's conversation markup. Media are numbered and stand before the text of their message, wherever the user put them."""

TEXT = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 5,
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_heads": 5,
    "patch_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 3],
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, trained on questions and answers about the first scenes."""
    return build_tokenizer(
        _corpus(), num_trained_tokens=NUM_TRAINED_TOKENS, chat_template=CHAT_TEMPLATE, whole_words=_TIME_PATTERN
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    """The untrained model, float32, drawn as Transformers draws it."""
    torch.manual_seed(seed)
    model_class: Any = Qwen3VLForConditionalGeneration  # build_config is typed for both families
    return model_class(build_config(tokenizer, text=TEXT, vision=VISION))


def write_checkpoint(path: Path, tokenizer: PreTrainedTokenizerFast, model: Qwen3VLForConditionalGeneration) -> None:
    """Write what a published checkpoint holds into ``path``; weights in the type that ``model`` has."""
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = tokenizer.get_vocab()
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    max_pixels = MAX_TOKENS_PER_FRAME * _FACTOR**2
    write_processor_configs(
        path,
        model.config.vision_config,
        {"shortest_edge": _MIN_PIXELS, "longest_edge": max_pixels},
        {"shortest_edge": _MIN_PIXELS, "longest_edge": max_pixels * MAX_FRAMES},
        fps=FRAMES_PER_SECOND,
        min_frames=MIN_FRAMES,
        max_frames=MAX_FRAMES,
        cap_pixels_per_frame=True,
        max_video_tokens=MAX_TOKENS_PER_FRAME,
    )


def _corpus() -> Iterator[str]:
    """Questions, answers and prompts as the model will see them."""
    for seed in range(_NUM_CORPUS_SCENES):
        rng = random.Random(f"corpus {seed}")
        views = tuple(_view(number) for number in (seed, seed + 1))
        questions = ask_some(views[0], rng, 6, WEIGHTS)
        questions.extend(question for _ in range(2) if (question := ask_of_two((views[0], views[1]), rng)))
        about_picture = ask_of_picture(make_picture_scene(seed), views[0], rng)
        others = (about_picture, transcribe(views[0]), list_looks(views[0]))
        for question in (*questions, *(other for other in others if other is not None)):
            yield question.text
            yield question.answer
    yield from itertools.chain.from_iterable(itertools.repeat(TIMES, _TIME_REPEATS))
    yield from itertools.repeat("system\nuser\nassistant\nPicture 1: Video 1: <1.5 seconds>", 50)


def _view(seed: int) -> View:
    scene = make_scene(seed)
    step = max(scene.frames_per_second // FRAMES_PER_SECOND, 1)
    return View(scene, [index / scene.frames_per_second for index in range(0, scene.num_frames, step)])
