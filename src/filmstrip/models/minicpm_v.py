"""Patches of tiles of any size in, embeddings out; packed tokens in, logits out, for MiniCPM-V; knows no prompts.

The modules are Transformers' own. A picture, or a frame of a video, is seen as a whole and in slices; each of these is a
tile that the vision tower sees for itself, and tiles differ in size. The text model is Qwen3.5's, with plain positions: some
layers attend over paged K and V, the others keep a recurrent state for each request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.base import EncoderInput
from filmstrip.models.batch import Batch, EmbeddingPlacement
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.gated_delta_net import PackedGatedDeltaNet
from filmstrip.models.qwen3_5 import HybridCache
from filmstrip.models.qwen_vl import MAX_PATCHES_PER_FORWARD, LinearPatchEmbed, normalize_patches
from filmstrip.models.vision_text import VisionTextModel


class MiniCPMVModel(VisionTextModel):
    """A MiniCPM-V 4.6 checkpoint in memory with its pages and states."""

    def __init__(self, module: Any, cache: HybridCache) -> None:
        """Wrap ``module``, a Transformers ``MiniCPMV4_6ForConditionalGeneration`` made ready by ``cache``."""
        super().__init__(module, cache.attention, cache.info)
        self._states = cache.states
        tower = module.model.vision_tower
        tower.embeddings.patch_embedding = _RowPatchEmbed(tower.embeddings.patch_embedding)
        tower.vit_merger.self_attn = _EqualWindowAttention(tower.vit_merger.self_attn)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> MiniCPMVModel:
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

    @torch.inference_mode()
    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """Embeddings of each item's tiles: (tokens of the tile, 1, hidden_size) in ``info.dtype``.

        Every tensor owns its memory, so a cache that drops one tile frees it.
        """
        return [[rows for part in _passes(item) for rows in self._encode_pass(*part, item)] for item in items]

    def _encode_pass(
        self, patches: torch.Tensor, grids: Sequence[tuple[int, int]], item: EncoderInput
    ) -> list[torch.Tensor]:
        """One pass of some of the item's tiles through the vision tower and the merger."""
        pixels = normalize_patches(patches.to(self.info.device), item.normalization)
        # Sizes stay on the host: indices are worked out from them there, whatever device the model is on.
        features = self.module.model.get_image_features(
            pixel_values=pixels, target_sizes=torch.tensor(grids, dtype=torch.int32), return_dict=True
        )
        return [rows.to(self.info.dtype).unsqueeze(1) for rows in features.pooler_output]

    def _begin(self, batch: Batch, placements: Sequence[EmbeddingPlacement]) -> dict[str, Any]:
        return super()._begin(batch, placements) | {"delta_step": self._states.begin(batch)}


class _RowPatchEmbed(LinearPatchEmbed):
    """The patch embedding on patch rows, where Transformers' lays patches side by side in one low picture."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(num_patches, C * H * W) -> (1, embed_dim, num_patches)."""
        return super().forward(patches).T.unsqueeze(0)


class _EqualWindowAttention(torch.nn.Module):
    """Attention within windows that all have the same number of patches: they are a batch, not a call for each."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> tuple[torch.Tensor, None]:
        """(1, num_windows * max_seqlen, embed_dim) in and out; ``cu_seqlens`` are the multiples of ``max_seqlen``.

        Raises ValueError for a number of patches that is not so many windows.
        """
        num_windows = len(cu_seqlens) - 1
        if hidden_states.shape[1] != num_windows * max_seqlen:
            raise ValueError(f"{hidden_states.shape[1]} patches are not {num_windows} windows of {max_seqlen}")
        windows = hidden_states.view(num_windows, max_seqlen, -1)
        output, _ = self.attention(windows, cu_seqlens=cu_seqlens[:2], max_seqlen=max_seqlen)
        return output.view_as(hidden_states), None


def _passes(item: EncoderInput) -> Iterator[tuple[torch.Tensor, list[tuple[int, int]]]]:
    """Patches and grids of consecutive tiles, at most ``MAX_PATCHES_PER_FORWARD`` patches (a single tile may be more)."""
    start = end = 0
    grids: list[tuple[int, int]] = []
    for height, width in item.segment_grids:
        if grids and end - start + height * width > MAX_PATCHES_PER_FORWARD:
            yield item.patches[start:end], grids
            start, grids = end, []
        grids.append((height, width))
        end += height * width
    yield item.patches[start:end], grids
