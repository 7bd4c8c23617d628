"""Tiles in, K and V of pictures out; packed tokens in, logits out, for Mllama (Llama 3.2 Vision); knows no prompts.

The modules are Transformers' own. Self-attention layers read paged K and V. The other layers read K and V of pictures, which
are made when a picture is encoded and not in every step; rows of requests without pictures do not go through them.

Which rows see which pictures is the reference's: a row sees the last picture before it, and those that stand directly before
that one. A row before the first picture sees all pictures of the prompt, padding tiles included, and skips the layer's MLP:
the reference lets go of the mask there, so such rows depend on what comes behind them.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from filmstrip.errors import ModelLoadError
from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import EncoderInput, ModelInfo
from filmstrip.models.batch import AttendedMedia, Batch
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.dense_attention import attend_all
from filmstrip.models.paged_attention import PagedAttention
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.models.text import TextModel, paged_text


def seen_media(offsets: Sequence[int], start: int, end: int) -> range:
    """Which pictures at ``offsets`` (ascending) the tokens ``start`` to ``end`` of a prompt see, all of them together.

    Transformers' ``get_cross_attention_token_mask``, read from the tokens' side; generated tokens go on as the last of the
    prompt.
    """
    if not offsets or start < offsets[0]:
        return range(len(offsets))
    first = bisect.bisect_right(offsets, start) - 1
    while first > 0 and offsets[first - 1] == offsets[first] - 1:
        first -= 1
    return range(first, bisect.bisect_left(offsets, end))


class CrossAttentionStep:
    """One forward pass: which of its rows attend to which pictures, worked out once for all layers."""

    def __init__(self, batch: Batch, patches_per_tile: int, dtype: torch.dtype) -> None:
        rows, sees_own = [], []
        self._runs: list[tuple[slice, list[tuple[torch.Tensor, int]]]] = []
        first_row = num_rows = 0
        for media, length, end in zip(batch.attended_media, batch.query_lens, batch.context_lens_list, strict=True):
            if media:
                rows.append(torch.arange(first_row, first_row + length))
                for first, last, seen, is_own in _runs(media, end - length, end, patches_per_tile):
                    self._runs.append((slice(num_rows, num_rows + last - first), seen))
                    num_rows += last - first
                    sees_own.append(torch.full((last - first,), float(is_own)))
            first_row += length
        device = batch.token_ids.device
        self.rows = None if num_rows == batch.num_tokens else torch.cat(rows).to(device)
        """int64 (n,): rows of requests with pictures; None if these are all."""
        self.mlp_mask = torch.cat(sees_own).view(1, 1, -1, 1).to(device, dtype)
        """(1, 1, n, 1): 0 for rows before the first picture, else 1; what the reference multiplies the MLP's output with."""

    def attend(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """softmax(scaling * Q K^T) V over the pictures that each row sees; (n, num_query_heads, head_dim) in and out.

        K and V are read where they lie, except that those of several pictures that a row sees are put together first.
        """
        output = torch.empty_like(query)
        for rows, seen in self._runs:
            parts = [encoded[layer, :, :, :length] for encoded, length in seen]
            keys, values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
            output[rows] = attend_all(query[rows], keys, values, scaling)
        return output


def _runs(
    media: Sequence[AttendedMedia], start: int, end: int, patches_per_tile: int
) -> list[tuple[int, int, list[tuple[torch.Tensor, int]], bool]]:
    """Tokens ``start`` to ``end`` of a request in runs that see the same: (first, last + 1, what, whether it is before).

    What is seen are K and V of pictures, and how many of the rows in them.
    """
    offsets = [each.offset for each in media]
    bounds = [start, *(offset for offset in offsets if start < offset < end), end]
    runs = []
    for first, last in itertools.pairwise(bounds):
        is_own = first >= offsets[0]
        seen = []
        for index in seen_media(offsets, first, first + 1):
            encoded, (_, num_rows, num_columns) = media[index].encoded, media[index].grid_thw
            seen.append((encoded, num_rows * num_columns * patches_per_tile if is_own else encoded.shape[3]))
        runs.append((first, last, seen, is_own))
    return runs


class PictureAttention(torch.nn.Module):
    """Transformers' ``MllamaTextCrossAttention`` with K and V that were made before; its weights under the same names."""

    def __init__(self, attention: Any, number: int) -> None:
        """``number`` counts the layers of this kind."""
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
        )
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self._number, self._head_dim, self._scaling = number, attention.head_dim, attention.scaling

    def keys_and_values(self, states: torch.Tensor) -> torch.Tensor:
        """(2, num_kv_heads, num_rows, head_dim) from what the projector gave for a picture, (num_rows, hidden_size)."""
        keys, values = (
            projection(states).unflatten(-1, (-1, self._head_dim)).transpose(0, 1)
            for projection in (self.k_proj, self.v_proj)
        )
        return torch.stack([self.k_norm(keys), values])

    def forward(
        self,
        hidden_states: torch.Tensor,
        cross_attention_states: CrossAttentionStep,
        **options: Any,  # noqa: ARG002 - the reference's
    ) -> tuple[torch.Tensor, None]:
        """(1, n, hidden_size) in and out: attention of the rows to the pictures that the step says they see."""
        query = self.q_norm(self.q_proj(hidden_states[0]).unflatten(-1, (-1, self._head_dim)))
        output = cross_attention_states.attend(self._number, query, self._scaling)
        return self.o_proj(output.flatten(1)).unsqueeze(0), None


class PictureLayer(torch.nn.Module):
    """Transformers' ``MllamaCrossAttentionDecoderLayer`` on packed batches: only rows of requests with pictures enter it."""

    def __init__(self, layer: Any, number: int) -> None:
        """``number`` counts the layers of this kind."""
        super().__init__()
        self.attention = layer.cross_attn = PictureAttention(layer.cross_attn, number)
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        cross_attention_states: CrossAttentionStep,
        **options: Any,  # noqa: ARG002 - the reference's, for layers that attend to text
    ) -> torch.Tensor:
        """(1, N, hidden_size) in and out."""
        step = cross_attention_states
        output = self.layer(
            hidden_states if step.rows is None else hidden_states[:, step.rows],
            cross_attention_states=step,
            cross_attention_mask=None,
            attention_mask=None,
            full_text_row_masked_out_mask=step.mlp_mask,
        )
        return output if step.rows is None else hidden_states.index_copy(1, step.rows, output)


class MllamaModel(TextModel):
    """A Mllama checkpoint in memory with its paged KV cache: a text model with layers that attend to pictures."""

    def __init__(self, module: Any, layers: Sequence[PictureLayer], attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, a Transformers ``MllamaForConditionalGeneration`` whose text layers :meth:`load` made ready."""
        vision, text = module.config.vision_config, module.config.text_config
        self._max_tiles, self._patches_per_tile = vision.max_num_tiles, module.model.vision_model.num_patches
        self._aspect_ratios = get_all_supported_aspect_ratios(self._max_tiles)
        head_dim = text.hidden_size // text.num_attention_heads
        num_values = 2 * len(layers) * text.num_key_value_heads * head_dim * self._max_tiles * self._patches_per_tile
        num_bytes = num_values * info.dtype.itemsize
        super().__init__(module, attention, dataclasses.replace(info, cross_attention_bytes_per_segment=num_bytes))
        self.module, self._picture_layers = module, layers
        self._text_model = module.model.language_model

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> MllamaModel:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`, also for what would be computed wrongly."""
        module = checkpoint.load_module(
            transformers.MllamaForConditionalGeneration,
            attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"},
        )
        vision = module.config.vision_config
        known = get_all_supported_aspect_ratios(vision.max_num_tiles)
        if [tuple(each) for each in vision.supported_aspect_ratios] != known:
            raise ModelLoadError(
                f"config.json names supported_aspect_ratios {vision.supported_aspect_ratios}; only all of up to "
                f"max_num_tiles ({vision.max_num_tiles}) tiles are supported",
                param="model",
            )
        text_model = module.model.language_model
        picture_layers: list[PictureLayer] = []
        num_paged = 0
        for index, layer in enumerate(text_model.layers):
            if index in text_model.cross_attention_layers:
                text_model.layers[index] = PictureLayer(layer, len(picture_layers))
                picture_layers.append(text_model.layers[index])
            else:
                layer.self_attn.layer_idx = num_paged  # a layer without K and V of tokens has no pages
                num_paged += 1
        attention, info = paged_text(module.config.text_config, checkpoint, num_layers=num_paged)
        return cls(module, picture_layers, attention, info)

    @torch.inference_mode()
    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """K and V of pictures, each one segment: (num_cross_layers, 2, num_kv_heads, num_rows, head_dim) in ``info.dtype``.

        Rows are those of all tiles that a picture may have; the last ones are padding's if it has fewer.
        """
        return [[self._encode(item)] for item in items]

    def seen_media(self, offsets: Sequence[int], start: int, end: int) -> range:
        """See :class:`filmstrip.models.base.CrossAttentionModel`."""
        return seen_media(offsets, start, end)

    def _encode(self, item: EncoderInput) -> torch.Tensor:
        device, (_, num_rows, num_columns) = self.info.device, item.grid_thw
        size = math.isqrt(item.patches.shape[1] // 3)
        tiles = normalize_patches(item.patches.to(device), item.normalization).view(-1, 3, size, size)
        # The tower lets tiles see padding tiles, so that these have to be there as the reference has them.
        pixels = tiles.new_zeros(1, 1, self._max_tiles, 3, size, size)
        pixels[0, 0, : len(tiles)] = tiles
        is_tile = torch.arange(self._max_tiles, device=device) < len(tiles)
        aspect_ratio = self._aspect_ratios.index((num_rows, num_columns)) + 1  # 0 is no picture
        features = self.module.model.vision_model(
            pixel_values=pixels.to(self.info.dtype),
            aspect_ratio_ids=torch.tensor([[aspect_ratio]], device=device),
            aspect_ratio_mask=is_tile.to(torch.int64).view(1, 1, -1),
        ).last_hidden_state
        states = self.module.model.multi_modal_projector(features).flatten(0, -2)
        return torch.stack([layer.attention.keys_and_values(states) for layer in self._picture_layers])

    def _begin(self, batch: Batch) -> dict[str, Any]:
        step = None
        if any(batch.attended_media):
            step = CrossAttentionStep(batch, self._patches_per_tile, self.info.dtype)
        return super()._begin(batch) | {"cross_attention_states": step}
