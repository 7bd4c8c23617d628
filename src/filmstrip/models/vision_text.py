"""Tiles in, embeddings out; packed tokens in, logits out, for a vision tower, a projector and a text model side by side.

The modules are Transformers' own, tower and projector called through its ``get_image_features``. A picture or a frame is one
or more square tiles of one size; each tile is encoded for itself. Attention of the text model reads paged K and V. Knows no
pixels and no prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import EncoderInput, ModelInfo
from filmstrip.models.batch import Batch, EmbeddingPlacement
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.media_rows import embed_rows, media_rows
from filmstrip.models.paged_attention import PagedAttention, Span
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.models.text import paged_text
from filmstrip.types import Modality, Normalization

MAX_TILES_PER_FORWARD = 16
"""Tiles that go through the vision tower at once, which bounds its activations (tiles do not see each other)."""


class VisionTextModel:
    """A checkpoint whose tiles become rows of the text model's input, each for itself: InternVL, LLaVA.

    Other families differ in :meth:`_item_rows`: what the rows of a whole item are.
    """

    def __init__(self, module: Any, attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, a Transformers ``...ForConditionalGeneration`` whose text attention is paged."""
        self.info = info
        self._attention = attention
        self.module = module
        self._language_model, self._lm_head = self._text_parts(module)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> VisionTextModel:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`, also for what would be computed wrongly."""
        module = checkpoint.load_module(
            getattr(transformers, checkpoint.architecture),
            attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"},
        )
        attention, info = paged_text(module.config.text_config, checkpoint)
        return cls(module, attention, info)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate K and V pages of ``num_blocks`` blocks for every layer."""
        self._attention.allocate(num_blocks)

    @torch.inference_mode()
    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """Embeddings of each item's segments: (tokens_per_segment, 1, hidden_size) in ``info.dtype``.

        Every tensor owns its memory, so a cache that drops one segment frees it.
        """
        encoded = []
        for item in items:
            rows = self._encode_item(item).to(self.info.dtype)
            segments = rows.unflatten(0, (item.num_segments, -1)).unsqueeze(2)
            encoded.append([segment.clone() for segment in segments])
        return encoded

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Write K and V of the batch's tokens into the cache, attend, return fp32 logits (R, vocab_size)."""
        placements = sorted(batch.placements, key=lambda placement: placement.start)
        rows = media_rows(placements, batch.num_tokens)
        hidden_states = self._language_model(
            inputs_embeds=self._embed(batch.token_ids, placements, rows).unsqueeze(0),
            position_ids=batch.positions[:1],
            use_cache=False,
            **self._begin(batch, placements),
        ).last_hidden_state[0]
        return self._lm_head(hidden_states[batch.logits_indices]).float()

    @staticmethod
    def _text_parts(module: Any) -> tuple[Any, Any]:
        """The text model without its head, and the head."""
        return module.model.language_model, module.lm_head

    def _embed(
        self, token_ids: torch.Tensor, placements: Sequence[EmbeddingPlacement], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Rows of the text model's input, (N, hidden_size); ``rows`` is what :func:`media_rows` says of ``placements``."""
        return embed_rows(self._language_model.embed_tokens, token_ids, placements, rows)

    def _begin(self, batch: Batch, placements: Sequence[EmbeddingPlacement]) -> dict[str, Any]:
        """What the layers need to know of the step, as keyword arguments."""
        return {"paged_step": self._attention.begin(batch, self._spans(batch, placements))}

    def _spans(
        self,
        batch: Batch,  # noqa: ARG002 - for other families
        placements: Sequence[EmbeddingPlacement],  # noqa: ARG002
    ) -> list[Span]:
        """Media whose tokens see each other both ways; none here."""
        return []

    def _encode_item(self, item: EncoderInput) -> torch.Tensor:
        """Rows of the whole item, (num_tokens, hidden_size)."""
        size = math.isqrt(item.patches.shape[1] // 3)
        pixels = normalize_patches(item.patches.to(self.info.device), item.normalization).view(-1, 3, size, size)
        return self._item_rows(pixels.to(self.info.dtype), item)

    def _item_rows(self, pixels: torch.Tensor, item: EncoderInput) -> torch.Tensor:  # noqa: ARG002 - for other families
        """Rows of the whole item, (num_tokens, hidden_size), from its normalised tiles (num_tiles, 3, size, size)."""
        return torch.cat([self._tile_rows(tiles) for tiles in pixels.split(MAX_TILES_PER_FORWARD)])

    def _tile_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rows of tiles that follow each other, each for itself."""
        output = self.module.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        return torch.cat(tuple(output))


class LlavaNextModel(VisionTextModel):
    """A LLaVA-NeXT checkpoint: features of an image's tiles are put together and freed of the padding's."""

    def _item_rows(self, pixels: torch.Tensor, item: EncoderInput) -> torch.Tensor:
        """All tiles at once: Transformers packs what it encodes."""
        image_sizes = torch.tensor([item.source_size], device=pixels.device)
        features = self.module.model.get_image_features(
            pixel_values=pixels.unsqueeze(0), image_sizes=image_sizes, return_dict=True
        )
        return features.pooler_output[0]


class LlavaOnevisionModel(LlavaNextModel):
    """A LLaVA-OneVision checkpoint: images as LLaVA-NeXT's, frames of a video pooled, a line's end after the last."""

    def _item_rows(self, pixels: torch.Tensor, item: EncoderInput) -> torch.Tensor:
        if item.modality is not Modality.VIDEO:
            return super()._item_rows(pixels, item)
        frames = pixels.split(MAX_TILES_PER_FORWARD)
        parts = [
            self.module.model.get_video_features(part.unsqueeze(0), return_dict=True).pooler_output[0]
            for part in frames
        ]
        # Each part ends in the end of the line, which stands behind the last only.
        return torch.cat([*(part[:-1] for part in parts), parts[-1][-1:]])


class Gemma3Model(VisionTextModel):
    """A Gemma 3 checkpoint: the tokens of a picture see each other both ways, in layers with a sliding window, too."""

    def __init__(self, module: Any, attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, a Transformers ``Gemma3ForConditionalGeneration`` whose text attention is paged."""
        super().__init__(module, attention, dataclasses.replace(info, whole_segments=True))

    def _spans(self, batch: Batch, placements: Sequence[EmbeddingPlacement]) -> list[Span]:  # noqa: ARG002
        spans = []
        for placement in placements:
            if placement.segment_end is None:
                raise ValueError(f"nothing says where the segment in row {placement.start} ends")
            spans.append(Span(placement.start, len(placement.embeddings), placement.segment_end))
        return spans


class DeepseekVLHybridModel(VisionTextModel):
    """A DeepSeek-VL checkpoint with two vision towers, each of which sees the whole picture at a resolution of its own."""

    def _encode_item(self, item: EncoderInput) -> torch.Tensor:
        """Patch rows hold the picture twice: for the tower of high resolution, then for the other."""
        if item.normalization is None or item.normalization.later_views is None:
            raise ValueError("nothing says how the picture of low resolution is normalised")
        patch_size = math.isqrt(item.patches.shape[1] // 3)
        num_high = (self.module.config.high_res_vision_config.image_size // patch_size) ** 2
        high, low = item.patches[:num_high], item.patches[num_high:]
        features = self.module.model.get_image_features(
            pixel_values=self._picture(low, item.normalization.later_views),
            high_res_pixel_values=self._picture(high, item.normalization),
            return_dict=True,
        )
        return features.pooler_output[0]

    def _picture(self, patches: torch.Tensor, normalization: Normalization) -> torch.Tensor:
        """A square picture, normalised (1, 3, size, size), from its uint8 patch rows (num_patches, 3 * ps * ps)."""
        side, patch_size = math.isqrt(len(patches)), math.isqrt(patches.shape[1] // 3)
        pixels = normalize_patches(patches.to(self.info.device), normalization)
        rows = pixels.view(side, side, 3, patch_size, patch_size).permute(2, 0, 3, 1, 4)
        return rows.reshape(1, 3, side * patch_size, side * patch_size).to(self.info.dtype)
