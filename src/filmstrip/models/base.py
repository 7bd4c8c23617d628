"""What the engine asks of a model; a unit test's fake implements the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from filmstrip.models.batch import Batch
from filmstrip.types import Modality, Normalization

SeenMedia = Callable[[Sequence[int], int, int], range]
"""Offsets of a request's media, first and last + 1 of some of its tokens -> which media those tokens see, all together."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts the engine plans with."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    num_embedding_rows: int
    """1 + number of DeepStack levels: middle dimension of encoder outputs."""
    block_size: int
    """Tokens per KV block that suits the attention backend."""
    kv_bytes_per_token: int
    """Over all layers, K and V."""
    device: torch.device
    dtype: torch.dtype
    state_bytes_per_request: int = 0
    """Recurrent state of one request over all layers, whatever its length; 0 if the model is no :class:`RecurrentModel`."""
    whole_segments: bool = False
    """Tokens of a media segment see each other both ways, so a step computes all of a segment or none of it."""
    whole_media: bool = False
    """Tokens of all media of a request see each other both ways, so a step computes all from the first to the last of them
    or none, and K and V from the first on are those of just these media."""
    cross_attention_bytes_per_segment: int = 0
    """What the encoder gives for a segment that tokens attend to; 0 if the model is no :class:`CrossAttentionModel`."""
    has_media_adapter: bool = False
    """Requests that show media are computed with other weights, from their first token on."""
    original_max_position_embeddings: int | None = None
    """Requests of more tokens than this are computed with other rotary embeddings, from their first token on (LongRoPE);
    None: their length changes nothing."""


@dataclass(frozen=True)
class EncoderInput:
    """Consecutive segments of one media item, to be encoded in one go.

    ``patches`` is uint8 (num_segments * rows_per_segment, 3*tps*ps*ps) on the host; ``grid_thw`` is the grid of just these
    patches. ``source_size`` is the item's (height, width) before resizing. Where segments differ in size ``segment_grids``
    is the patch grid (height, width) of each of these segments, and ``grid_thw`` says no more than the number of rows.

    A time series is one segment: ``patches`` is its samples, float32 (num_samples, num_channels) and normalised already, and
    ``hop`` how many of them lie between the beginnings of its windows.

    ``pooling`` is int32 (tokens of a segment, patches) on the host where tokens are pooled from patches: for each token
    which rows of its segment, -1 for none; a token with none at all shows nothing of the picture.
    """

    modality: Modality
    patches: torch.Tensor
    grid_thw: tuple[int, int, int]
    normalization: Normalization | None
    num_segments: int
    source_size: tuple[int, int] = (0, 0)
    hop: int = 0
    segment_grids: tuple[tuple[int, int], ...] = ()
    pooling: torch.Tensor | None = None


class Model(Protocol):
    """A checkpoint in memory with its paged KV cache."""

    info: ModelInfo

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate K and V pages of ``num_blocks`` blocks of ``info.block_size`` tokens for every layer."""
        ...

    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """Embeddings of each item's segments: (tokens_per_segment, num_embedding_rows, hidden_size) in ``info.dtype``."""
        ...

    def forward(self, batch: Batch) -> torch.Tensor:
        """Write K and V of the batch's tokens into the cache, attend, return fp32 logits (R, vocab_size)."""
        ...


class RecurrentModel(Model, Protocol):
    """A model some of whose layers keep a state of fixed size for each request (linear attention).

    A forward pass reads the state in ``batch.state_slots``, unless the request begins in it, and leaves the state after the
    last of its tokens there.
    """

    def allocate_states(self, num_slots: int) -> None:
        """Allocate ``num_slots`` states of ``info.state_bytes_per_request`` bytes, of unknown content."""
        ...

    def copy_state(self, source: int, target: int) -> None:
        """Copy the state in slot ``source`` to slot ``target``, for every layer."""
        ...


class CrossAttentionModel(Model, Protocol):
    """A model whose media stand beside the prompt: tokens attend to them in layers made for that, to the answer's end.

    :meth:`encode` gives one tensor for each segment, of any shape and ``info.cross_attention_bytes_per_segment`` bytes. In
    the prompt an ordinary token stands for a segment, and a forward pass finds in ``batch.attended_media`` what its tokens
    see.
    """

    def seen_media(self, offsets: Sequence[int], start: int, end: int) -> range:
        """Which of a request's media its tokens ``start`` to ``end`` see, all of these tokens together.

        ``offsets`` are where in the request the media's tokens stand, ascending. Tokens that see a medium behind themselves
        are right only for this very set of media, which the prefix cache takes into account.
        """
        ...
