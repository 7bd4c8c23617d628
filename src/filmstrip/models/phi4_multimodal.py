"""Crops in, embeddings out; packed tokens in, logits out, for Phi-4-multimodal; knows no pixels and no prompts.

The modules are Transformers' own, without the audio tower. Ours are: attention over paged K and V, rotary embeddings for
requests of any length in one batch, and the vision adapter, which changes the rows of requests that show a picture.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import EncoderInput, ModelInfo
from filmstrip.models.batch import Batch
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.dynamic_hd import CropGrid
from filmstrip.models.longrope import LongRope
from filmstrip.models.lora import Adapter, load_adapter
from filmstrip.models.media_rows import embed_rows, media_rows
from filmstrip.models.paged_attention import PagedAttention
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.models.text import paged_text

logger = logging.getLogger(__name__)

VISION_ADAPTER = "vision-lora"
"""Folder of a checkpoint with what its text layers add for requests that show a picture."""
MAX_CROPS_PER_FORWARD = 8
"""Crops that go through the vision tower at once, which bounds its activations (crops do not see each other)."""


class Phi4MultimodalModel:
    """A Phi-4-multimodal checkpoint in memory with its paged KV cache."""

    def __init__(
        self,
        module: Any,
        attention: PagedAttention,
        info: ModelInfo,
        *,
        rope: LongRope | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """Wrap ``module``, a Transformers ``Phi4MultimodalForCausalLM`` whose text attention is paged."""
        self.info, self.module = info, module
        self._attention, self._rope, self._adapter = attention, rope, adapter
        self._text_model, self._lm_head = module.model, module.lm_head
        self._image_embed = module.model.embed_tokens_extend.image_embed
        vision = module.config.vision_config
        self._crop_size, self._patch_size = vision.crop_size, vision.patch_size
        for layer in self._image_embed.img_processor.encoder.layers:
            # Patches see each other both ways. Transformers marks them causal, which its fused attention obeys wherever no
            # patch of a pass is padding (its plain attention never does).
            layer.self_attn.is_causal = False

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Phi4MultimodalModel:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`, also for what would be computed wrongly."""
        module = checkpoint.load_module(
            getattr(transformers, checkpoint.architecture),
            attn_implementation={"": ATTENTION_NAME, "vision_config": "sdpa", "audio_config": "sdpa"},
        )
        config, text_model = module.config, module.model
        text_model.embed_tokens_extend.audio_embed = None  # half a billion weights that nothing here uses
        if config.sliding_window is not None and config.sliding_window >= config.max_position_embeddings:
            config.sliding_window = None  # a window that nothing is ever behind costs time and changes nothing
        attention, info = paged_text(config, checkpoint, longrope=True)
        rope = None
        if config.rope_parameters["rope_type"] == "longrope":
            rope = text_model.rotary_emb = LongRope(config, checkpoint.device)
            info = dataclasses.replace(info, original_max_position_embeddings=rope.original_max_position_embeddings)
        adapter = load_adapter(checkpoint, VISION_ADAPTER, text_model.layers, "model.layers")
        if adapter is None:
            logger.warning("%s has no folder %s: pictures are answered without", checkpoint.model, VISION_ADAPTER)
        info = dataclasses.replace(info, has_media_adapter=adapter is not None)
        return cls(module, attention, info, rope=rope, adapter=adapter)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate K and V pages of ``num_blocks`` blocks for every layer."""
        self._attention.allocate(num_blocks)

    @torch.inference_mode()
    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """Embeddings of each image, one segment: (num_tokens, 1, hidden_size) in ``info.dtype``."""
        return [[self._image_rows(item).to(self.info.dtype).unsqueeze(1)] for item in items]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Write K and V of the batch's tokens into the cache, attend, return fp32 logits (R, vocab_size)."""
        placements = sorted(batch.placements, key=lambda placement: placement.start)
        rows = media_rows(placements, batch.num_tokens)
        if self._rope is not None:
            limit = self._rope.original_max_position_embeddings
            self._rope.begin(batch.rows_of([length > limit for length in batch.request_lens]))
        if self._adapter is not None:
            self._adapter.begin(batch.rows_of(batch.has_media))
        hidden_states = self._text_model(
            inputs_embeds=embed_rows(self._text_model.embed_tokens, batch.token_ids, placements, rows).unsqueeze(0),
            position_ids=batch.positions[:1],
            use_cache=False,
            paged_step=self._attention.begin(batch),
        ).last_hidden_state[0]
        return self._lm_head(hidden_states[batch.logits_indices]).float()

    def _image_rows(self, item: EncoderInput) -> torch.Tensor:
        """Rows of one image, (num_tokens, hidden_size): its lines of features, a separator, those of the whole."""
        _, num_rows, num_columns = item.grid_thw
        grid = CropGrid(num_rows, num_columns, self._crop_size, self._patch_size)
        patches = normalize_patches(item.patches.to(self.info.device), item.normalization)
        pixels = add_whole(patches.view(num_rows, num_columns, 3, grid.crop_size, grid.crop_size))
        masks = patch_masks(grid, item.source_size).to(pixels.device)
        embed = self._image_embed
        features = torch.cat(
            [
                embed.get_img_features(part.to(self.info.dtype), attention_mask=mask)
                for part, mask in zip(
                    pixels.split(MAX_CROPS_PER_FORWARD), masks.split(MAX_CROPS_PER_FORWARD), strict=True
                )
            ]
        ).unflatten(1, (grid.features_per_side, grid.features_per_side))
        # (rows, columns, line, place in it, channels) to lines over all columns.
        lines = features[1:].unflatten(0, (num_rows, num_columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        shown_rows, shown_columns = grid.shown_features(*item.source_size)
        line_end = embed.sub_img_feature_extensor[0]
        parts = [
            _with_line_ends(lines[:shown_rows, :shown_columns], line_end),
            embed.global_img_feature_extensor[0],
            _with_line_ends(features[0], line_end),
        ]
        return embed.img_projection_down(F.gelu(embed.img_projection_up(torch.cat(parts))))


def add_whole(crops: torch.Tensor) -> torch.Tensor:
    """The whole canvas as one small crop, then the crops: (rows, columns, 3, size, size) -> (1 + num_crops, 3, size, size).

    As the reference processor makes it: from normalised pixels, bicubic, without antialiasing. Crops must be fp32.
    """
    num_rows, num_columns, _, size, _ = crops.shape
    canvas = crops.permute(2, 0, 3, 1, 4).reshape(1, 3, num_rows * size, num_columns * size)
    whole = canvas if num_rows * num_columns == 1 else F.interpolate(canvas, (size, size), mode="bicubic")
    return torch.cat([whole, crops.flatten(0, 1)])


def patch_masks(grid: CropGrid, source_size: tuple[int, int]) -> torch.Tensor:
    """bool (1 + num_crops, side, side): patches of the whole and of each crop that are not padding.

    ``source_size`` is the picture's (height, width) before resizing.
    """
    side = grid.patches_per_side
    masks = torch.zeros(grid.rows * side, grid.columns * side, dtype=torch.bool)
    shown_rows, shown_columns = grid.shown_patches(*source_size)
    masks[:shown_rows, :shown_columns] = True
    crops = masks.unflatten(1, (grid.columns, side)).unflatten(0, (grid.rows, side)).transpose(1, 2).flatten(0, 1)
    return torch.cat([torch.ones(1, side, side, dtype=torch.bool), crops])


def _with_line_ends(lines: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """(rows, columns, channels) with ``end`` (1, 1, channels) behind each row, as one run of rows."""
    return torch.cat([lines, end.expand(len(lines), -1, -1)], dim=1).flatten(0, 1)
