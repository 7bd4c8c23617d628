"""One media item to what a model would be shown of it, without the model: from a checkpoint's small files, or from none.

Loads tokenizer and processor settings at most; decodes only if pictures are wanted. Knows no engine and no output format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from filmstrip.config import LLMConfig, MediaConfig, ProcessorConfig
from filmstrip.errors import ModelLoadError
from filmstrip.media.loader import FetchedMedia, MediaLoader
from filmstrip.media.sniff import sniff
from filmstrip.media.sparse import SparseFile
from filmstrip.processing.base import Processor
from filmstrip.processing.chat_template import ChatTemplate
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.media_pipeline import MediaPipeline
from filmstrip.processing.placeholders import count_prompt_tokens
from filmstrip.processing.preview import (
    ItemPreview,
    Thumbnails,
    preview_item,
    read_thumbnails,
)
from filmstrip.processing.qwen3_vl import Qwen3VLProcessor
from filmstrip.processing.registry import create_processor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import MediaItem, Modality

_VISION_START, _VISION_END, _IMAGE_PAD, _VIDEO_PAD = 151652, 151653, 151655, 151656
_PUBLISHED_CONTEXT_TOKENS = 262_144
_SHARED_SETTINGS = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Source: the repositories Qwen/Qwen3-VL-2B-Instruct to -235B-A22B-Instruct, whose files of these names are the same.
_PUBLISHED_FILES = {
    "config.json": {
        "vision_start_token_id": _VISION_START,
        "vision_end_token_id": _VISION_END,
        "image_token_id": _IMAGE_PAD,
        "video_token_id": _VIDEO_PAD,
    },
    "preprocessor_config.json": _SHARED_SETTINGS | {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},
    "video_preprocessor_config.json": _SHARED_SETTINGS | {"size": {"shortest_edge": 4_096, "longest_edge": 25_165_824}},
}
# What Qwen's pre-tokenizer makes of "<12.5 seconds>": words with their space, single digits, marks.
_QWEN_WORDS = re.compile(r" ?[^\W\d_]+|\d|[^\w\s]+|\s+")


@dataclass(frozen=True)
class ModelView:
    """What is known of a model without its weights.

    ``pieces`` are the prompts of a message that has only a medium of the kind, by modality; ``counts_exactly``:
    ``num_text_tokens`` asks the model's own tokenizer.
    """

    name: str
    processor: Processor
    pieces: Callable[[Modality], Sequence[str | int]]
    num_text_tokens: Callable[[str], int]
    counts_exactly: bool
    max_model_len: int


@dataclass(frozen=True)
class Inspection:
    """An item, what it would cost in a prompt of its own, and pictures of its frames if they were wanted.

    ``container`` is the file's format, None where it is not known: frames sampled by the client, parts of remote files.
    """

    item: ItemPreview
    model: ModelView
    num_prompt_tokens: int
    container: str | None
    thumbnails: Thumbnails | None

    @property
    def context_share(self) -> float:
        """Part of the context that the prompt takes; above 1 it does not fit."""
        return self.num_prompt_tokens / self.model.max_model_len


def view_of_checkpoint(config: LLMConfig) -> ModelView:
    """The view of a checkpoint's own files; raises ModelLoadError. No weights are read."""
    engine = config.engine
    files = CheckpointFiles(engine.model, engine.revision)
    tokenizer = Tokenizer(engine.model, engine.revision, files.translation.control_tokens)
    template = ChatTemplate(tokenizer, files, config.processor.chat_template)
    return ModelView(
        engine.model,
        create_processor(tokenizer, files, config.processor, config.media),
        lambda modality: template.render([{"role": "user", "content": [{"type": modality.value}]}]),
        lambda text: len(tokenizer.encode_text(text)),
        True,
        engine.max_model_len or _context_tokens(files),
    )


def published_view(media: MediaConfig, processor: ProcessorConfig, max_model_len: int | None = None) -> ModelView:
    """Qwen3-VL as it was published, without any file of it. Words are counted by the rules of its tokenizer."""
    control_tokens = cast("Tokenizer", _QwenControlTokens())
    pads = {Modality.IMAGE: _IMAGE_PAD, Modality.VIDEO: _VIDEO_PAD}
    return ModelView(
        "Qwen3-VL as published",
        Qwen3VLProcessor(control_tokens, _PublishedFiles(), processor, media),
        lambda modality: (_VISION_START, pads[modality], _VISION_END),
        lambda text: len(_QWEN_WORDS.findall(text)),
        False,
        max_model_len or _PUBLISHED_CONTEXT_TOKENS,
    )


async def inspect_item(
    item: MediaItem, model: ModelView, media: MediaConfig, *, choose_edge: Callable[[int], int] | None = None
) -> Inspection:
    """Plan ``item`` as a server with these settings would.

    With ``choose_edge`` also decode all its frames, small: it is told their number and says how long, in pixels, their
    longer side may be. Raises the InvalidRequestError family.
    """
    pipeline = MediaPipeline(MediaLoader(media), model.processor, 0, media.max_video_duration_seconds)
    try:
        planned = await pipeline.plan(item)
        try:
            thumbnails = None
            if choose_edge is not None:
                num_frames = len(planned.media.plan.frame_indices)
                thumbnails = await read_thumbnails(
                    pipeline, planned, max_edge=choose_edge(num_frames), max_frames=num_frames
                )
        finally:
            planned.close()
    finally:
        await pipeline.close()
    pieces = model.processor.expand(model.pieces(planned.media.modality), [planned.media])
    num_prompt_tokens = count_prompt_tokens(pieces, model.num_text_tokens)
    return Inspection(preview_item(planned), model, num_prompt_tokens, _container(planned.fetched), thumbnails)


class _PublishedFiles(CheckpointFiles):
    """The files that say what Qwen3-VL is shown, from memory."""

    def __init__(self) -> None:
        super().__init__("Qwen3-VL")

    def text(self, name: str) -> str | None:
        found = _PUBLISHED_FILES.get(name)
        return None if found is None else json.dumps(found)


class _QwenControlTokens:
    """All that a processor asks a tokenizer for."""

    special_tokens = {  # noqa: RUF012 - never changed
        "<|vision_start|>": _VISION_START,
        "<|vision_end|>": _VISION_END,
        "<|image_pad|>": _IMAGE_PAD,
        "<|video_pad|>": _VIDEO_PAD,
    }


def _context_tokens(files: CheckpointFiles) -> int:
    config = files.model_config()
    tokens = config.get("text_config", config).get("max_position_embeddings")
    if not isinstance(tokens, int):
        raise ModelLoadError(f"config.json of {files.model!r} has no max_position_embeddings", param="model")
    return tokens


def _container(fetched: FetchedMedia) -> str | None:
    if isinstance(fetched.content, tuple | np.ndarray | SparseFile):
        return None
    return sniff(fetched.content).format or None
