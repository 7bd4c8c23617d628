"""Crops of pictures and frames in, embeddings out; packed tokens in, logits out, for Molmo 2.

The modules are Transformers' own, tower and adapter called through its ``get_image_features``. Each crop goes through the
tower for itself; the adapter pools patches of all crops of a picture into tokens by a table that comes with the picture.
Features are added to the embeddings of the tokens that show them. Knows no pixels and no prompts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import EncoderInput, ModelInfo
from filmstrip.models.batch import Batch, EmbeddingPlacement
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.paged_attention import PagedAttention, Span
from filmstrip.models.text import paged_text
from filmstrip.models.vision_text import MAX_TILES_PER_FORWARD, VisionTextModel


class Molmo2Model(VisionTextModel):
    """A Molmo 2 checkpoint: tokens of all media of a request see each other both ways, text between them does not."""

    def __init__(self, module: Any, attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, a Transformers ``Molmo2ForConditionalGeneration`` whose text attention is paged."""
        super().__init__(module, attention, dataclasses.replace(info, whole_media=True))
        self._patches_per_crop: int = module.config.vision_config.num_position_embeddings

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Molmo2Model:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`, also for what would be computed wrongly."""
        module = checkpoint.load_module(
            getattr(transformers, checkpoint.architecture),
            attn_implementation={
                "text_config": ATTENTION_NAME,
                "vision_config": "sdpa",
                "adapter_config": "sdpa",
            },
        )
        attention, info = paged_text(module.config.text_config, checkpoint)
        return cls(module, attention, info)

    def _item_rows(self, pixels: torch.Tensor, item: EncoderInput) -> torch.Tensor:
        """Rows of the whole item, (num_tokens, hidden_size), from its patches (num_patches, 3, size, size).

        A token that shows nothing of the picture gets a row of zeros.
        """
        if item.pooling is None:
            raise ValueError("nothing says which patches the tokens of a picture are pooled from")
        # The tower takes a patch's values by row, column, channel.
        crops = pixels.permute(0, 2, 3, 1).reshape(-1, self._patches_per_crop, pixels[0].numel())
        segments = crops.unflatten(0, (item.num_segments, -1))
        num_at_once = max(1, MAX_TILES_PER_FORWARD // segments.shape[1])
        pooling = item.pooling.to(pixels.device, torch.int64)
        return torch.cat([self._segment_rows(part, pooling) for part in segments.split(num_at_once)])

    def _segment_rows(self, segments: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
        """Rows of segments (num_segments, num_crops, patches_per_crop, values), one behind the other."""
        num_segments, num_crops = segments.shape[:2]
        firsts = torch.arange(num_segments, device=pooling.device) * (num_crops * self._patches_per_crop)
        table = torch.where(pooling >= 0, pooling + firsts[:, None, None], pooling).flatten(0, 1)
        shows = (table >= 0).any(dim=1)
        # Only the number of tokens counts here: they are those of pictures of one row each.
        grids = torch.tensor([[int(shows.sum()), 1, 0, 0]], device=pooling.device)
        output = self.module.model.get_image_features(segments.flatten(0, 1), table[shows], grids, return_dict=True)
        features = torch.cat(tuple(output.pooler_output))
        rows = features.new_zeros(len(table), features.shape[1])
        rows[shows] = features
        return rows

    def _embed(
        self, token_ids: torch.Tensor, placements: Sequence[EmbeddingPlacement], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Embeddings of all tokens, those of media with what they show added."""
        embeds = self._language_model.embed_tokens(token_ids)
        if rows is not None:
            embeds[rows] += torch.cat([placement.embeddings[:, 0] for placement in placements])
        return embeds

    def _spans(self, batch: Batch, placements: Sequence[EmbeddingPlacement]) -> list[Span]:
        """Segments of a request, each to the end of its last one; text between them is seen from behind only."""
        spans = []
        first_rows = [0, *itertools.accumulate(batch.query_lens)][:-1]
        for row, num_rows, length in zip(first_rows, batch.query_lens, batch.context_lens_list, strict=True):
            shown = [each for each in placements if row <= each.start < row + num_rows]
            first_token = length - num_rows - row  # of a request that began with the batch
            ranges = [(each.start + first_token, each.start + len(each.embeddings) + first_token) for each in shown]
            if shown and ranges[-1][1] != shown[-1].segment_end:
                raise ValueError(f"media end at {shown[-1].segment_end}, but the step ends at {ranges[-1][1]}")
            gaps = tuple((end, start) for (_, end), (start, _) in itertools.pairwise(ranges) if end < start)
            spans += [Span(each.start, len(each.embeddings), ranges[-1][1], gaps) for each in shown]
        return spans
