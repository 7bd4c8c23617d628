"""The fake model with media beside the prompt: logits that only the right media in every step can give.

What stands in a token's slot follows from the token and from the media that it sees: the last one before it and its direct
neighbours, or all of the request's for tokens before the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from filmstrip.engine.engine import Engine
from filmstrip.models.base import EncoderInput
from filmstrip.models.batch import Batch
from filmstrip.models.mllama import seen_media
from filmstrip.types import MediaFeature, PlaceholderRange
from tests.engine.helpers import make_engine
from tests.fakes import FakeModel, _mix, feature

SEGMENT_BYTES = 3 * 4 * 4
"""What the fake's encoder gives for three patch rows."""


class AttendingFakeModel(FakeModel):
    """Implements :class:`filmstrip.models.base.CrossAttentionModel`."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.info = dataclasses.replace(self.info, cross_attention_bytes_per_segment=SEGMENT_BYTES)

    def seen_media(self, offsets: Sequence[int], start: int, end: int) -> range:
        """The rule of Mllama."""
        return seen_media(offsets, start, end)

    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """As the fake's; every medium has one size."""
        encoded = super().encode(items)
        assert all(each.nbytes == SEGMENT_BYTES for segments in encoded for each in segments)
        return encoded

    def forward(self, batch: Batch) -> torch.Tensor:
        """The fake's, of tokens mixed with what they see."""
        assert not batch.placements
        token_ids, row = batch.token_ids.clone(), 0
        for media, count, length in zip(batch.attended_media, batch.query_lens, batch.context_lens_list, strict=True):
            offsets = [each.offset for each in media]
            assert offsets == sorted(offsets)
            assert all(each.grid_thw == (1, 1, 3) for each in media)
            for index, place in enumerate(range(length - count, length), row):
                for number in seen_media(offsets, place, place + 1):
                    words = media[number].encoded.numpy().astype(np.uint64).tobytes()
                    mixed = _mix(np.frombuffer(words, np.uint64)).sum(keepdims=True) ^ token_ids[index].numpy().astype(
                        np.uint64
                    )
                    token_ids[index] = int(_mix(mixed)[0] >> np.uint64(2))
            row += count
        return super().forward(dataclasses.replace(batch, token_ids=token_ids))


def picture(offset: int, content: int) -> MediaFeature:
    """A picture of three patch rows that one token at ``offset`` stands for."""
    item = feature(offset, num_segments=1, length=3, content=content, modality="image")
    return dataclasses.replace(item, segments=(PlaceholderRange(offset, 1),))


def make_attending_engine(*, room: int = 100, **options) -> Engine:
    """An engine over an attending fake, with room for so many media."""
    return make_engine(model=AttendingFakeModel(), encoder_cache_bytes=room * SEGMENT_BYTES, **options)
