"""Packed tokens in, hidden states out, for Intern-S1-Pro's language model: Qwen3-MoE with FoPE and a grouped router.

Written like Transformers' modules, of which all but three classes are used as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeModel,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
    rotate_half,
)

from filmstrip.models.interns1_pro_config import InternS1ProTextConfig


class FourierPositionEmbedding(nn.Module):
    """FoPE (https://arxiv.org/abs/2412.17739): each rotary channel turns by a learned mixture of frequencies.

    With the ``D`` frequencies that are kept, position ``t`` and K and V head ``h`` have
    ``cos[t, h] = cos(t * inv_freq) @ cos_coef[h]`` and ``sin`` likewise. Channels of frequencies that are not kept have 1 as
    cosine **and as sine**, as the reference has it. All in float32.
    """

    def __init__(self, config: InternS1ProTextConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim(config)
        num_kept = len(kept_frequencies(config))
        shape = (config.num_key_value_heads, num_kept, num_kept)
        self.cos_coef = nn.Parameter(torch.eye(num_kept).expand(shape).contiguous())
        self.sin_coef = nn.Parameter(torch.eye(num_kept).expand(shape).contiguous())
        self.inv_freq = nn.Buffer(kept_frequencies(config), persistent=False)

    def reset(self) -> None:
        """Set what is not learned, after the module was made without memory."""
        self.inv_freq.copy_(kept_frequencies(self.config))

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (B, num_key_value_heads, N, head_dim) in the dtype of ``x`` for positions (B, N)."""
        angles = (position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)).unsqueeze(1)
        cos = self._widened(angles.cos() @ self.cos_coef.float())
        sin = self._widened(angles.sin() @ self.sin_coef.float())
        return cos.to(x.dtype), sin.to(x.dtype)

    def _widened(self, mixed: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., head_dim): ones for what is not kept, then both halves alike."""
        half = F.pad(mixed, (0, self.head_dim // 2 - mixed.shape[-1]), value=1.0)
        return torch.cat((half, half), dim=-1)


class InternS1ProAttention(Qwen3MoeAttention):
    """Qwen3-MoE's attention, whose positions differ from one K and V head to the next."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, N, hidden_size) to the same; cosine and sine are (B, num_key_value_heads, N, head_dim).

        K and V are kept by the registered attention function alone: ``past_key_values`` must be None.
        """
        if past_key_values is not None:
            raise ValueError("this model keeps K and V in pages, not in a cache of Transformers")
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = position_embeddings
        query = query.unflatten(1, (-1, self.num_key_value_groups))
        query = _rotated(query, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(1, 2)
        key = _rotated(key, cos, sin)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None


class GroupedTopKRouter(Qwen3MoeTopKRouter):
    """Chooses as many experts in each of ``router_n_groups`` equal groups of neighbours; probabilities are over all."""

    def __init__(self, config: InternS1ProTextConfig) -> None:
        super().__init__(config)
        self.num_groups = config.num_expert_groups

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, hidden_size) to logits (N, num_experts), weights and indices (N, num_experts_per_tok) of the chosen."""
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32).unflatten(-1, (self.num_groups, -1))
        weights, indices = probabilities.topk(self.top_k // self.num_groups, dim=-1)
        first = torch.arange(0, self.num_experts, self.num_experts // self.num_groups, device=logits.device)
        weights, indices = weights.flatten(-2), (indices + first[:, None]).flatten(-2)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(logits.dtype), indices


class InternS1ProTextModel(Qwen3MoeModel):
    """Embeddings and decoder layers; logits are made from what they return.

    Without FoPE and with one group of experts it is Transformers' ``Qwen3MoeModel``.
    """

    config: InternS1ProTextConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: InternS1ProTextConfig) -> None:
        super().__init__(config)
        if config.has_fope:
            self.rotary_emb: nn.Module = FourierPositionEmbedding(config)
        for index, layer in enumerate(self.layers):
            if config.has_fope:
                layer.self_attn = InternS1ProAttention(config, index)
            if config.num_expert_groups > 1 and isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                layer.mlp.gate = GroupedTopKRouter(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FourierPositionEmbedding):
            module.reset()


def head_dim(config: InternS1ProTextConfig) -> int:
    """Numbers of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kept_frequencies(config: InternS1ProTextConfig) -> torch.Tensor:
    """The angular frequencies that FoPE keeps, float32, falling: ``theta ** (-2i / head_dim)``.

    So many as the configuration says, else those that come round at least once in the context.
    """
    rope: Any = config.rope_parameters
    size = head_dim(config)
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size))
    if config.fope_num_inv_freq is not None:
        return frequencies[: config.fope_num_inv_freq]
    return frequencies[frequencies > 2.0 * math.pi / config.max_position_embeddings]


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return states * cos + rotate_half(states) * sin
