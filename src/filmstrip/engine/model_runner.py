"""Scheduled requests to logits: encodes the media that the step shows, builds the batch, runs the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch

from filmstrip.engine.batch_builder import build_batch
from filmstrip.engine.encoder_cache import EncoderCache
from filmstrip.engine.request import Request, Segment
from filmstrip.errors import FilmstripError
from filmstrip.models.base import EncoderInput, Model, RecurrentModel

MAX_PATCHES_PER_ENCODE = 32768
"""Patch rows in one call of the encoder; a long video is encoded in several."""


class ModelRunner:
    """One model and its encoder cache."""

    def __init__(self, model: Model, encoder_cache: EncoderCache) -> None:
        self.model, self.encoder_cache = model, encoder_cache
        self.num_encoded_segments = 0

    def encode(self, request: Request, num_tokens: int) -> None:
        """Make sure that the segments that the request's next ``num_tokens`` tokens see are encoded, and pin them.

        Raises FilmstripError if the encoder's rows do not match a segment's tokens: found here it fails one request,
        found while the batch is built it would fail all.
        """
        start = request.num_computed_tokens
        shown = request.segments_seen(start, start + num_tokens)
        segments = {segment.key: segment for segment in shown}
        missing = [segments[key] for key in self.encoder_cache.pin(segments)]
        for run in _runs(missing):
            encoded = self.model.encode([_encoder_input(run)])[0]
            self.num_encoded_segments += len(run)
            for segment, embeddings in zip(run, encoded, strict=True):
                self.encoder_cache.put(segment.key, embeddings)
        if request.seen_media is not None:
            return  # what tokens attend to has no place among them that it must fit
        for segment in shown:
            num_rows = len(self.encoder_cache.get(segment.key))
            if num_rows != segment.range.length:
                raise FilmstripError(
                    f"the encoder gave {num_rows} rows for a media segment of {segment.range.length} tokens"
                )

    def drop_media(self, request: Request) -> None:
        """Encode this request's media anew the next time they are shown: some of its content is not numbers."""
        for segment in request.segments:
            self.encoder_cache.drop(segment.key)

    def forward(self, scheduled: Mapping[Request, int]) -> tuple[torch.Tensor, list[Request]]:
        """Logits (R, vocab_size) and the R requests they belong to."""
        batch, sampled = build_batch(scheduled, self.model.info.block_size, self.encoder_cache, self.model.info.device)
        return self.model.forward(batch), sampled

    def copy_states(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy recurrent states from slot to slot, in order."""
        for source, target in copies:
            cast(RecurrentModel, self.model).copy_state(source, target)

    def recover(self) -> None:
        """After a failed pass: give memory that PyTorch holds back to the device, so that the next has all of it."""
        if self.model.info.device.type == "cuda":
            torch.cuda.empty_cache()


def _runs(segments: list[Segment]) -> list[list[Segment]]:
    """Neighbouring segments of one item together, up to the bound on patch rows."""
    runs: list[list[Segment]] = []
    for segment in segments:
        last = runs[-1] if runs else None
        if (
            last is not None
            and last[-1].feature is segment.feature
            and last[-1].index + 1 == segment.index
            and segment.first_row + segment.num_rows - last[0].first_row <= MAX_PATCHES_PER_ENCODE
        ):
            last.append(segment)
        else:
            runs.append([segment])
    return runs


def _encoder_input(run: list[Segment]) -> EncoderInput:
    feature = run[0].feature
    patches = feature.patches.torch()[run[0].first_row : run[-1].first_row + run[-1].num_rows]
    segment_grids = feature.segment_grids[run[0].index : run[-1].index + 1]
    frames, height, width = feature.grid_thw
    if segment_grids:
        grid_thw = (1, len(patches), 1)
    elif frames % len(feature.segments) == 0:
        grid_thw = (frames // len(feature.segments) * len(run), height, width)
    else:  # segments are equal parts of a picture
        grid_thw = (frames, height * len(run) // len(feature.segments), width)
    return EncoderInput(
        modality=feature.modality,
        patches=patches,
        grid_thw=grid_thw,
        normalization=feature.normalization,
        num_segments=len(run),
        source_size=feature.source_size,
        hop=feature.hop,
        segment_grids=segment_grids,
        pooling=None if feature.pooling is None else torch.from_numpy(feature.pooling),
    )
