"""Patches in, embeddings out; packed tokens in, logits out, for Qwen3.5 (dense and MoE) and Qwen3-Next; knows no prompts.

Three of four layers are gated DeltaNet and keep a state for each request (``gated_delta_net.py``); the others attend over
paged K and V. The attention's output gate, partial rotary positions and experts are Transformers' own modules.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import ModelInfo
from filmstrip.models.batch import Batch
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.devices import make_attention
from filmstrip.models.gated_delta_net import (
    DeltaShape,
    DeltaStates,
    PackedGatedDeltaNet,
    PackedQwen3NextGatedDeltaNet,
)
from filmstrip.models.paged_attention import AttentionShape, PagedAttention
from filmstrip.models.qwen_vl import QwenVLModel
from filmstrip.models.text import TextModel


class HybridCache:
    """Pages for the full-attention layers of a text model and states for its gated DeltaNet layers.

    Both kinds are counted for themselves: a layer without K and V has no pages.
    """

    def __init__(self, text_model: Any, checkpoint: Checkpoint, delta_class: type[PackedGatedDeltaNet]) -> None:
        """Let the layers of the Transformers ``text_model`` work on packed batches."""
        config = text_model.config
        num_full = num_delta = 0
        for layer in text_model.layers:
            if hasattr(layer, "self_attn"):
                layer.self_attn.layer_idx = num_full
                num_full += 1
            else:
                layer.linear_attn = delta_class(layer.linear_attn, num_delta)
                num_delta += 1
        shape = AttentionShape(
            num_layers=num_full,
            num_query_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        delta_shape = DeltaShape(
            num_layers=num_delta,
            num_key_heads=config.linear_num_key_heads,
            num_value_heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
            kernel_size=config.linear_conv_kernel_dim,
        )
        self.attention: PagedAttention = make_attention(
            shape, checkpoint.device, checkpoint.dtype, checkpoint.block_size
        )
        self.states = DeltaStates(delta_shape, checkpoint.dtype, checkpoint.device)
        self.info = ModelInfo(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            max_position_embeddings=config.max_position_embeddings,
            num_embedding_rows=1,
            block_size=self.attention.block_size,
            kv_bytes_per_token=self.attention.kv_bytes_per_token,
            device=checkpoint.device,
            dtype=checkpoint.dtype,
            state_bytes_per_request=delta_shape.bytes_per_request(checkpoint.dtype),
        )


class Qwen35Model(QwenVLModel):
    """A Qwen3.5 or Qwen3.5-MoE checkpoint in memory with its pages and states. It has no DeepStack."""

    def __init__(self, module: Any, cache: HybridCache) -> None:
        """Wrap ``module``, a Transformers ``Qwen3_5[Moe]ForConditionalGeneration`` made ready by ``cache``."""
        super().__init__(module, cache.attention, cache.info)
        self._states = cache.states

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Qwen35Model:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`."""
        module = checkpoint.load_module(
            getattr(transformers, checkpoint.architecture),
            attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"},
        )
        return cls(module, HybridCache(module.model.language_model, checkpoint, PackedGatedDeltaNet))

    def allocate_states(self, num_slots: int) -> None:
        """Allocate ``num_slots`` recurrent states, of unknown content."""
        self._states.allocate(num_slots)

    @torch.inference_mode()
    def copy_state(self, source: int, target: int) -> None:
        """Copy the state in slot ``source`` to slot ``target``, for every layer."""
        self._states.copy(source, target)

    def _begin(self, batch: Batch) -> dict[str, Any]:
        return super()._begin(batch) | {"delta_step": self._states.begin(batch)}


class HybridTextModel(TextModel):
    """A text-only checkpoint of the same layers in memory with its pages and states: Qwen3-Next, Qwen3.5 without vision."""

    delta_class: type[PackedGatedDeltaNet] = PackedGatedDeltaNet

    def __init__(self, module: Any, cache: HybridCache) -> None:
        """Wrap ``module``, a Transformers ``...ForCausalLM`` made ready by ``cache``."""
        super().__init__(module, cache.attention, cache.info)
        self._states = cache.states

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> HybridTextModel:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`."""
        module_class = getattr(transformers, checkpoint.architecture)
        module = checkpoint.load_module(module_class, attn_implementation=ATTENTION_NAME)
        return cls(module, HybridCache(module.model, checkpoint, cls.delta_class))

    def allocate_states(self, num_slots: int) -> None:
        """Allocate ``num_slots`` recurrent states, of unknown content."""
        self._states.allocate(num_slots)

    @torch.inference_mode()
    def copy_state(self, source: int, target: int) -> None:
        """Copy the state in slot ``source`` to slot ``target``, for every layer."""
        self._states.copy(source, target)

    def _begin(self, batch: Batch) -> dict[str, Any]:
        return super()._begin(batch) | {"delta_step": self._states.begin(batch)}


class Qwen3NextModel(HybridTextModel):
    """Qwen3-Next, whose projections are grouped by key head."""

    delta_class = PackedQwen3NextGatedDeltaNet
