"""Patches in, embeddings out; packed tokens in, logits out, for the thinker of Qwen3-Omni; knows no pixels and no prompts.

Of a checkpoint that also speaks (talker, code2wav), and of the thinker itself the part that hears, nothing is loaded.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.qwen_vl import QwenVLModel
from filmstrip.models.text import paged_text


class Qwen3OmniModel(QwenVLModel):
    """A Qwen3-Omni checkpoint's thinker in memory with its paged KV cache."""

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Qwen3OmniModel:
        """Load the thinker's weights of ``checkpoint``; raises :class:`ModelLoadError`."""
        module = checkpoint.load_module(
            DeafThinker, attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"}
        )
        config = module.config
        levels = config.vision_config.deepstack_visual_indexes
        attention, info = paged_text(config.text_config, checkpoint, num_embedding_rows=1 + len(levels))
        return cls(module, attention, info)


class DeafThinker(Qwen3OmniMoeThinkerForConditionalGeneration):
    """The thinker without its audio encoder, which is as large as the vision tower and would never run."""

    # What Transformers need not warn of.
    _keys_to_ignore_on_load_unexpected = [r"audio_tower\.", r"^talker\.", r"^code2wav\."]  # noqa: RUF012 - never changed

    def __init__(self, config: Qwen3OmniMoeThinkerConfig, *inputs: Any, **options: Any) -> None:
        super().__init__(config, *inputs, **options)
        del self.model.audio_tower


# Transformers knows by a class's name how published weights are called; a name that stays unknown is a missing weight.
register_checkpoint_conversion_mapping(
    DeafThinker.__name__,
    get_checkpoint_conversion_mapping(Qwen3OmniMoeThinkerForConditionalGeneration.__name__) or [],
    overwrite=True,
)
