"""Patches in, embeddings out; packed tokens in, logits out, for Qwen-VL models; knows no pixels and no prompts.

The modules are Transformers' own. Three things are ours: attention over paged K and V, the patch embedding as a matrix
product, and media rows put into the packed batch by range, so that an id in a prompt never decides what is a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import EncoderInput, ModelInfo
from filmstrip.models.batch import Batch, EmbeddingPlacement
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.media_rows import embed_rows, media_rows
from filmstrip.models.paged_attention import PagedAttention
from filmstrip.models.text import paged_text
from filmstrip.types import Normalization

MAX_PATCHES_PER_FORWARD = 8192
"""Patches that go through the vision tower at once; more are taken in turns, which bounds its activations (segments do not
see each other, so the result is the same)."""


class QwenVLModel:
    """A checkpoint of Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE in memory with its paged KV cache.

    All of their vision towers see a temporal group of a video, or a window in it, alone: a group is encoded by itself.
    """

    def __init__(self, module: Any, attention: PagedAttention, info: ModelInfo) -> None:
        """Wrap ``module``, a Transformers ``Qwen3VLForConditionalGeneration`` or its like, whose text attention is paged."""
        self.info = info
        self._attention = attention
        self._language_model = module.model.language_model
        self._visual = module.model.visual
        self._lm_head = module.lm_head
        self._visual.patch_embed = LinearPatchEmbed(self._visual.patch_embed.proj)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> QwenVLModel:
        """Load the weights of ``checkpoint``; raises :class:`ModelLoadError`."""
        module = checkpoint.load_module(
            getattr(transformers, checkpoint.architecture),
            attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"},
        )
        levels = getattr(module.config.vision_config, "deepstack_visual_indexes", ())
        attention, info = paged_text(module.config.text_config, checkpoint, num_embedding_rows=1 + len(levels))
        return cls(module, attention, info)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate K and V pages of ``num_blocks`` blocks for every layer."""
        self._attention.allocate(num_blocks)

    @torch.inference_mode()
    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """Embeddings of each item's segments: (tokens_per_segment, 1 + num_deepstack, hidden_size) in ``info.dtype``.

        Every tensor owns its memory, so a cache that drops one segment frees it.
        """
        pieces = [(index, piece) for index, item in enumerate(items) for piece in _split_item(item)]
        embeddings: list[list[torch.Tensor]] = [[] for _ in items]
        for group in _forward_groups(pieces):
            for (index, _), segments in zip(group, self._encode_pieces([piece for _, piece in group]), strict=True):
                embeddings[index] += segments
        return embeddings

    def _encode_pieces(self, pieces: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """One pass through the vision tower; the segments of each piece."""
        pixels = torch.cat(
            [normalize_patches(piece.patches.to(self.info.device), piece.normalization) for piece in pieces]
        )
        grid_thw = torch.tensor([grid for piece in pieces for grid in self._grids(piece)], device=self.info.device)
        output = self._visual(pixels.to(self.info.dtype), grid_thw=grid_thw)
        # A tower without DeepStack has no such field.
        levels = [output.pooler_output, *getattr(output, "deepstack_features", ())]
        result, start = [], 0
        for piece in pieces:
            grid_t, grid_h, grid_w = piece.grid_thw
            num_rows = grid_t * grid_h * grid_w // self._visual.spatial_merge_size**2 // piece.num_segments
            starts = range(start, start + num_rows * piece.num_segments, num_rows)
            result.append([torch.stack([level[row : row + num_rows] for level in levels], dim=1) for row in starts])
            start += num_rows * piece.num_segments
        return result

    def _grids(self, piece: EncoderInput) -> list[tuple[int, int, int]]:
        """What the vision tower is told of the patches of ``piece``: patch grids (time, height, width), in order."""
        return [piece.grid_thw]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Write K and V of the batch's tokens into the cache, attend, return fp32 logits (R, vocab_size)."""
        placements = sorted(batch.placements, key=lambda placement: placement.start)
        rows = media_rows(placements, batch.num_tokens)
        hidden_states = self._language_model(
            inputs_embeds=embed_rows(self._language_model.embed_tokens, batch.token_ids, placements, rows).unsqueeze(0),
            position_ids=torch.cat([batch.positions[:1], batch.positions]).unsqueeze(1),
            use_cache=False,
            **self._begin(batch),
            **self._deepstack(placements, rows),
        ).last_hidden_state[0]
        return self._lm_head(hidden_states[batch.logits_indices]).float()

    def _begin(self, batch: Batch) -> dict[str, Any]:
        """The step in progress, as keyword arguments that Transformers hands down to every layer."""
        return {"paged_step": self._attention.begin(batch)}

    def _deepstack(self, placements: Sequence[EmbeddingPlacement], rows: torch.Tensor | None) -> dict[str, Any]:
        """Keyword arguments that say what DeepStack adds to which rows: for each level (num_media_rows, hidden_size)."""
        levels = range(1, self.info.num_embedding_rows)
        if rows is None or not levels:
            return {}
        added = [torch.cat([placement.embeddings[:, level] for placement in placements]) for level in levels]
        return {"visual_pos_masks": rows.unsqueeze(0), "deepstack_visual_embeds": added}


class GlmVModel(QwenVLModel):
    """A checkpoint of GLM-4.1V, GLM-4.5V or GLM-4.6V, whose vision tower takes each temporal group for a picture."""

    def _grids(self, piece: EncoderInput) -> list[tuple[int, int, int]]:
        grid_t, grid_h, grid_w = piece.grid_thw
        return [(1, grid_h, grid_w)] * grid_t


class LinearPatchEmbed(torch.nn.Module):
    """The patch embedding as one matrix product.

    A convolution whose stride is its kernel sees each patch once, and a patch row already lies in kernel order (channel,
    time, height, width), so it equals a linear layer on rows, which runs several times faster on CPU.
    """

    def __init__(self, convolution: torch.nn.Conv3d) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(convolution.weight.detach().flatten(1), requires_grad=False)
        self.bias = None if convolution.bias is None else torch.nn.Parameter(convolution.bias.detach(), False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(num_patches, C * T * H * W) -> (num_patches, embed_dim)."""
        return F.linear(patches.to(self.weight.dtype), self.weight, self.bias)


def normalize_patches(patches: torch.Tensor, normalization: Normalization | None) -> torch.Tensor:
    """uint8 patch rows (num_patches, 3 * tps * ps * ps) to fp32, bit-equal to the reference processors.

    They fuse rescaling into normalising: mean and std times 255 as fp32 tensors, then a subtraction and a division
    (``BaseImageProcessor.rescale_and_normalize`` in Transformers). Where the ``normalization`` is of bfloat16 each of three
    steps is rounded to that. Without one values stay what they are.
    """
    if normalization is None:
        return patches.to(torch.float32)
    dtype = torch.bfloat16 if normalization.dtype == "bfloat16" else torch.float32
    mean, std = (
        torch.tensor(values, dtype=dtype, device=patches.device) for values in (normalization.mean, normalization.std)
    )
    channels = patches.to(dtype).unflatten(1, (len(normalization.mean), -1))
    if dtype == torch.bfloat16:
        channels = channels * (1 / 255)
    else:
        mean, std = mean * 255.0, std * 255.0
    return channels.sub_(mean[:, None]).div_(std[:, None]).flatten(1).to(torch.float32)


def _split_item(item: EncoderInput) -> Iterable[EncoderInput]:
    """``item`` in runs of whole segments of at most ``MAX_PATCHES_PER_FORWARD`` patches (a single segment may be more)."""
    rows_per_segment = len(item.patches) // item.num_segments
    grid_t, grid_h, grid_w = item.grid_thw
    frames_per_segment = grid_t // item.num_segments
    step = max(1, MAX_PATCHES_PER_FORWARD // rows_per_segment)
    for first in range(0, item.num_segments, step):
        count = min(step, item.num_segments - first)
        yield EncoderInput(
            modality=item.modality,
            patches=item.patches[first * rows_per_segment : (first + count) * rows_per_segment],
            grid_thw=(count * frames_per_segment, grid_h, grid_w),
            normalization=item.normalization,
            num_segments=count,
        )


def _forward_groups(pieces: list[tuple[int, EncoderInput]]) -> Iterable[list[tuple[int, EncoderInput]]]:
    """Consecutive pieces that fit into one pass of the vision tower together."""
    group: list[tuple[int, EncoderInput]] = []
    num_patches = 0
    for piece in pieces:
        size = len(piece[1].patches)
        if group and num_patches + size > MAX_PATCHES_PER_FORWARD:
            yield group
            group, num_patches = [], 0
        group.append(piece)
        num_patches += size
    if group:
        yield group
