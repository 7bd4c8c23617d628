"""Packed tokens in, logits out, for text-only checkpoints that Transformers has; knows no media and no prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from filmstrip.errors import ModelLoadError
from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import EncoderInput, ModelInfo
from filmstrip.models.batch import Batch
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.devices import make_attention
from filmstrip.models.paged_attention import AttentionShape, PagedAttention

_ROPE_TYPES_OF_LENGTH = frozenset({"longrope"})
"""Rotary embeddings that change with the longest position at hand, which in a packed batch is another request's.

Those of the type "dynamic" change only beyond ``max_position_embeddings``, which no request may exceed."""


class TextModel:
    """A checkpoint of causal attention layers over text in memory with its paged KV cache."""

    def __init__(self, module: Any, attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, a Transformers ``...ForCausalLM`` whose attention is paged."""
        self.info = info
        self._attention = attention
        self._text_model, self._lm_head = module.model, module.lm_head

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> TextModel:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`, also for what would be computed wrongly."""
        module_class = getattr(transformers, checkpoint.architecture)
        module = checkpoint.load_module(module_class, attn_implementation=ATTENTION_NAME)
        config = module.config
        attention, info = paged_text(config, checkpoint)
        return cls(module, attention, info)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate K and V pages of ``num_blocks`` blocks for every layer that attends."""
        self._attention.allocate(num_blocks)

    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """Raises ValueError for any item: the model reads text only."""
        if items:
            raise ValueError("this model reads text only")
        return []

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Write K and V (and states) of the batch's tokens, return fp32 logits (R, vocab_size)."""
        if batch.placements:
            raise ValueError("this model reads text only")
        hidden_states = self._text_model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions[:1],
            use_cache=False,
            **self._begin(batch),
        ).last_hidden_state[0]
        return self._lm_head(hidden_states[batch.logits_indices]).float()

    def _begin(self, batch: Batch) -> dict[str, Any]:
        """What the layers need to know of the step, as keyword arguments."""
        return {"paged_step": self._attention.begin(batch)}


def paged_text(
    config: Any,
    checkpoint: Checkpoint,
    *,
    num_embedding_rows: int = 1,
    num_layers: int | None = None,
    longrope: bool = False,
) -> tuple[PagedAttention, ModelInfo]:
    """Attention for a text model with this Transformers ``config``, and what the engine plans with.

    ``num_layers`` have K and V of their tokens; all if not given. ``longrope``: the caller sees to rotary embeddings of this
    type. Raises :class:`ModelLoadError` for a model that would be computed wrongly.
    """
    check_supported(config, checkpoint.architecture, longrope=longrope)
    shape = AttentionShape(
        num_layers=config.num_hidden_layers if num_layers is None else num_layers,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    attention = make_attention(shape, checkpoint.device, checkpoint.dtype, checkpoint.block_size)
    info = ModelInfo(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        num_embedding_rows=num_embedding_rows,
        block_size=attention.block_size,
        kv_bytes_per_token=attention.kv_bytes_per_token,
        device=checkpoint.device,
        dtype=checkpoint.dtype,
    )
    return attention, info


def check_supported(config: Any, architecture: str, *, longrope: bool = False) -> None:
    """Raise :class:`ModelLoadError` if a text model with this Transformers ``config`` would be computed wrongly.

    ``longrope``: the caller sees to rotary embeddings of this type.
    """
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise ModelLoadError(
                f"this {architecture} checkpoint sets {name} (config.json), which is not supported", param="model"
            )
    parameters = getattr(config, "rope_parameters", None) or {}
    # Where layers differ, each kind of layer has parameters of its own.
    for each in (parameters, *(values for values in parameters.values() if isinstance(values, Mapping))):
        rope_type = each.get("rope_type", "default")
        if rope_type in _ROPE_TYPES_OF_LENGTH and not (longrope and rope_type == "longrope"):
            raise ModelLoadError(
                f"this {architecture} checkpoint has rotary embeddings of the type {rope_type!r} (config.json), which is "
                "not supported",
                param="model",
            )
