"""Tiles in, embeddings out; packed tokens in, logits out, for Llama 4 with pictures or text only.

The modules are Transformers' own, with three differences: attention reads paged K and V, in chunks where a layer has them;
queries of layers without rotary embeddings are scaled by where their tokens really stand, not by their row in the packed
batch; experts compute the tokens that chose them, not all. Knows no pixels and no prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, PreTrainedConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from filmstrip.errors import ModelLoadError
from filmstrip.models.attention_interface import paged_attention_forward
from filmstrip.models.base import ModelInfo
from filmstrip.models.batch import Batch, EmbeddingPlacement
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.paged_attention import PagedAttention
from filmstrip.models.text import TextModel, paged_text
from filmstrip.models.vision_text import VisionTextModel

LLAMA4_ATTENTION_NAME = "filmstrip_paged_llama4"
_CHUNKED = "chunked_attention"


def llama4_attention_forward(
    module: Any, query: torch.Tensor, *arguments: Any, query_scales: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, None]:
    """:func:`filmstrip.models.attention_interface.paged_attention_forward` with what Llama 4's layers differ in.

    ``query`` is (1, num_query_heads, N, head_dim). ``query_scales``, float32 (1, 1, N, 1), is for layers without rotary
    embeddings; layers of chunked attention see their token's chunk only.
    """
    config = module.config
    if query_scales is not None and not module.use_rope:
        query = (query * query_scales).to(query.dtype)
    is_chunked = config.layer_types[module.layer_idx] == _CHUNKED
    chunk_size = config.attention_chunk_size if is_chunked else None
    return paged_attention_forward(module, query, *arguments, attention_chunk_size=chunk_size, **options)


AttentionInterface.register(LLAMA4_ATTENTION_NAME, llama4_attention_forward)


class Llama4Text(TextModel):
    """A text-only Llama 4 checkpoint in memory with its paged KV cache."""

    def __init__(self, module: Any, attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, a Transformers ``Llama4ForCausalLM``, and change its layers as this file says."""
        super().__init__(module, attention, info)
        _prepare(self._text_model)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Llama4Text:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`, also for what would be computed wrongly."""
        module = _load_module(checkpoint, LLAMA4_ATTENTION_NAME)
        return cls(module, *_paged_text(module.config, checkpoint))

    def _begin(self, batch: Batch) -> dict[str, Any]:
        return super()._begin(batch) | _query_scales(self._text_model.config, batch)


class Llama4Model(VisionTextModel):
    """A Llama 4 checkpoint with its vision tower: a picture's tiles are encoded, cached and computed each for itself."""

    def __init__(self, module: Any, attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, a Transformers ``Llama4ForConditionalGeneration``, and change its layers as this file says."""
        super().__init__(module, attention, info)
        _prepare(self._language_model)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Llama4Model:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`, also for what would be computed wrongly."""
        module = _load_module(checkpoint, {"text_config": LLAMA4_ATTENTION_NAME, "vision_config": "sdpa"})
        return cls(module, *_paged_text(module.config.text_config, checkpoint))

    @staticmethod
    def _text_parts(module: Any) -> tuple[Any, Any]:
        return module.language_model.model, module.language_model.lm_head

    def _begin(self, batch: Batch, placements: Sequence[EmbeddingPlacement]) -> dict[str, Any]:
        return super()._begin(batch, placements) | _query_scales(self._language_model.config, batch)

    def _tile_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """``get_image_features`` of this family leaves the projection to its caller."""
        features = self.module.get_image_features(pixel_values=pixels, return_dict=True).last_hidden_state
        return self.module.multi_modal_projector(features).flatten(0, 1)


class SparseMoe(torch.nn.Module):
    """A shared expert for every token, and for each of the others only the tokens that chose it.

    Transformers' forward sends every token through every expert, scaled by 0 where it was not chosen, which gives 0: as many
    times the work, and the memory, as there are experts.
    """

    def __init__(self, moe: Llama4TextMoe) -> None:
        super().__init__()
        self.router, self.experts, self.shared_expert = moe.router, moe.experts, moe.shared_expert

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, N, hidden_size) to (N, hidden_size), and the router's logits (N, num_experts)."""
        rows = hidden_states.flatten(0, -2)
        scores, logits = self.router(rows)  # 0 where an expert was not chosen
        output = self.shared_expert(rows)
        chosen, tokens = scores.T.nonzero(as_tuple=True)  # sorted by expert
        routed = rows[tokens] * scores[tokens, chosen].unsqueeze(1)
        counts = torch.bincount(chosen, minlength=scores.shape[1]).tolist()
        parts = [self._expert(expert, part) for expert, part in enumerate(routed.split(counts)) if len(part)]
        return output.index_add_(0, tokens, torch.cat(parts)) if parts else output, logits

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """One expert's answer to its rows, (n, hidden_size)."""
        gate, up = (rows @ self.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return (up * self.experts.act_fn(gate)) @ self.experts.down_proj[expert]


def _load_module(checkpoint: Checkpoint, attn_implementation: str | dict[str, str]) -> Any:
    """Transformers' module with the checkpoint's weights; raises :class:`ModelLoadError`."""
    module_class = getattr(transformers, checkpoint.architecture)
    fields, _ = PreTrainedConfig.get_config_dict(checkpoint.model, revision=checkpoint.revision or "main")
    text = fields.get("text_config") or fields
    # The first published files have the number 4 here, which meant "on"; Transformers 5 takes only true or false.
    if type(text.get("attn_temperature_tuning")) is int:
        text["attn_temperature_tuning"] = bool(text["attn_temperature_tuning"])
    try:
        config = module_class.config_class.from_dict(fields)
    except Exception as error:
        message = " ".join(str(error).split())
        raise ModelLoadError(f"cannot read config.json of {checkpoint.model!r}: {message}", param="model") from error
    return checkpoint.load_module(module_class, config=config, attn_implementation=attn_implementation)


def _paged_text(config: Any, checkpoint: Checkpoint) -> tuple[PagedAttention, ModelInfo]:
    """As :func:`filmstrip.models.text.paged_text`; chunks must have a size."""
    if _CHUNKED in config.layer_types and not config.attention_chunk_size:
        raise ModelLoadError(
            f"this {checkpoint.architecture} checkpoint has layers of {_CHUNKED!r} but sets attention_chunk_size to "
            f"{config.attention_chunk_size!r} (config.json)",
            param="model",
        )
    return paged_text(config, checkpoint)


def _prepare(text_model: Any) -> None:
    """Change the layers of a ``Llama4TextModel`` in place."""
    for layer in text_model.layers:
        layer.self_attn.attn_temperature_tuning = False  # it would count rows; llama4_attention_forward does it
        if layer.is_moe_layer:
            layer.feed_forward = SparseMoe(layer.feed_forward)


def _query_scales(config: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """The scales of :func:`llama4_attention_forward` as a keyword argument; nothing where the checkpoint has none.

    "Temperature tuning" (Nakanishi, 2025, "Scalable-Softmax Is Superior for Attention", arXiv:2501.19399): queries grow with
    the logarithm of the number of tokens that they see, in steps of ``floor_scale``.
    """
    if not config.attn_temperature_tuning:
        return {}
    steps = torch.floor((batch.positions[0].float() + 1.0) / config.floor_scale)
    return {"query_scales": (torch.log1p(steps) * config.attn_scale + 1.0).view(1, 1, -1, 1)}
