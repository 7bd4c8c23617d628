"""Patches and time series in, embeddings out; packed tokens in, logits out, for Intern-S1-Pro; knows no prompts.

The vision tower is Qwen3-VL's without DeepStack. Media of all kinds may stand in one prompt and in one batch: each becomes
rows of its own, which are put into the packed batch by range. Positions have one axis, whatever stands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from filmstrip.errors import ModelLoadError
from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import EncoderInput, ModelInfo
from filmstrip.models.batch import Batch
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.interns1_pro_config import InternS1ProConfig, InternS1ProTextConfig
from filmstrip.models.interns1_pro_modules import InternS1ProForConditionalGeneration
from filmstrip.models.media_rows import embed_rows, media_rows
from filmstrip.models.paged_attention import PagedAttention
from filmstrip.models.qwen_vl import QwenVLModel
from filmstrip.models.text import paged_text
from filmstrip.types import Modality


class InternS1ProModel(QwenVLModel):
    """An Intern-S1-Pro checkpoint in memory with its paged KV cache."""

    def __init__(self, module: Any, attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, an :class:`InternS1ProForConditionalGeneration` whose text attention is paged."""
        super().__init__(module, attention, info)
        self._time_series = module.model.time_series

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> InternS1ProModel:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`, also for what would be computed wrongly."""
        config = _read_config(checkpoint)
        _check_text(config.text_config, checkpoint.architecture)
        module = checkpoint.load_module(
            InternS1ProForConditionalGeneration,
            config=config,
            attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa", "ts_config": "sdpa"},
        )
        attention, info = paged_text(config.text_config, checkpoint)
        return cls(module, attention, info)

    @torch.inference_mode()
    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """Embeddings of each item's segments: (tokens_per_segment, 1, hidden_size); pictures together, series one by one."""
        pictures = iter(super().encode([item for item in items if item.modality is not Modality.TIME_SERIES]))
        return [
            [self._encode_series(item)] if item.modality is Modality.TIME_SERIES else next(pictures) for item in items
        ]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Write K and V of the batch's tokens into the cache, attend, return fp32 logits (R, vocab_size)."""
        placements = sorted(batch.placements, key=lambda placement: placement.start)
        rows = media_rows(placements, batch.num_tokens)
        hidden_states = self._language_model(
            inputs_embeds=embed_rows(self._language_model.embed_tokens, batch.token_ids, placements, rows).unsqueeze(0),
            position_ids=batch.positions[:1],
            use_cache=False,
            **self._begin(batch),
        ).last_hidden_state[0]
        return self._lm_head(hidden_states[batch.logits_indices]).float()

    def _encode_series(self, item: EncoderInput) -> torch.Tensor:
        """(num_tokens, 1, hidden_size) of a whole series."""
        if self._time_series is None:
            raise ValueError("this checkpoint has no time-series encoder")
        samples = item.patches.to(self.info.device, self.info.dtype)
        return self._time_series(samples, item.hop).unsqueeze(1)


def _read_config(checkpoint: Checkpoint) -> InternS1ProConfig:
    fields, _ = InternS1ProConfig.get_config_dict(checkpoint.model, revision=checkpoint.revision or "main")
    try:
        return InternS1ProConfig.from_dict(fields)
    except Exception as error:  # of each field's type, Transformers' validators say what they like
        reason = " ".join(str(error).split())[:400]
        raise ModelLoadError(
            f"config.json of {checkpoint.model!r} is not understood: {reason}", param="model"
        ) from error


def _check_text(config: InternS1ProTextConfig, architecture: str) -> None:
    """Raise :class:`ModelLoadError` for positions or experts that would be computed wrongly."""
    rope: Any = config.rope_parameters
    if config.has_fope and (rope["rope_type"] != "default" or not rope.get("fope_sep_head", True)):
        raise ModelLoadError(
            f"this {architecture} checkpoint has FoPE positions of the type {rope['rope_type']!r} with fope_sep_head "
            f"{rope.get('fope_sep_head')} (config.json); only 'default' and 'fope' with a mixture for each head can be "
            "computed",
            param="model",
        )
    groups = config.num_expert_groups
    if groups > 1 and (config.num_experts % groups or config.num_experts_per_tok % groups):
        raise ModelLoadError(
            f"this {architecture} checkpoint has {config.num_experts} experts, of which {config.num_experts_per_tok} are "
            f"chosen; neither may leave a rest over its {groups} groups (router_n_groups in config.json)",
            param="model",
        )
