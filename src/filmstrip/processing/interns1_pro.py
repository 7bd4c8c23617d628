"""Intern-S1-Pro: which frames, what size, which windows of a time series, which words; knows no weights.

Pictures and videos are shown as Qwen3-VL shows them, but a prompt's positions have one axis: the token's index. Any number
of time series stand in the prompt, each in the place of one token of the chat template.

Source of the numbers for time series: LMDeploy's implementation of the family. Where it leaves a choice, this happens here:

- A window's length is computed in float32, as its model does it. Its processor, which counts the tokens, does it in float64;
  where the two differ (2200 samples per second: 160 and 159), it places other embeddings than it has tokens.
- The sampling rate that a sound file states is used if the request gives none; there it is thrown away.
- Mean and deviation are computed in double precision.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import InvalidRequestError, MediaError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Assembled, Piece, Placeholder
from filmstrip.processing.qwen3_vl import Qwen3VLProcessor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import Modality, SeriesPlan, TimeSeriesMetadata

logger = logging.getLogger(__name__)

MAX_SAMPLES = 240_000
"""Of a longer series only the beginning is looked at."""
_BLOCK_VALUES = 1 << 18
_TS_TOKEN = "<TS_CONTEXT>"
"""What the token that stands for a time series is called where a checkpoint's files do not say."""


class InternS1ProProcessor(Qwen3VLProcessor):
    """Implements :class:`filmstrip.processing.base.TimeSeriesProcessor`."""

    modalities = frozenset({Modality.IMAGE, Modality.VIDEO, Modality.TIME_SERIES})

    def __init__(
        self, tokenizer: Tokenizer, files: CheckpointFiles, config: ProcessorConfig, media: MediaConfig
    ) -> None:
        """Read the checkpoint's files; ModelLoadError if they or the control tokens of pictures do not fit.

        A checkpoint without a time-series encoder, or without a control token for time series, takes none.
        """
        super().__init__(tokenizer, files, config, media)
        self._ts_pad = _ts_token_id(tokenizer, files)
        if self._ts_pad is None:
            self.modalities = frozenset({Modality.IMAGE, Modality.VIDEO})

    def plan_time_series(self, metadata: TimeSeriesMetadata) -> SeriesPlan:
        """The beginning of the series, in windows whose length follows from the sampling rate.

        Without a rate, a quarter of the number of samples stands in for it. Raises MediaError for a series that is not
        longer than one window.
        """
        num_samples = min(metadata.num_samples, MAX_SAMPLES)
        rate = metadata.sampling_rate or max(num_samples / 4, 1.0)
        hop = window_hop(rate)
        num_windows = -(-(num_samples - 2 * hop) // hop) + 1
        if num_windows < 2:
            raise MediaError(
                f"the time series has {num_samples} samples; at {rate:g} samples per second (sampling_rate) the model needs "
                f"at least {2 * hop + 1}"
            )
        return SeriesPlan(num_samples, metadata.num_channels, hop, (num_windows // 2 + 1) // 2)

    def normalize_time_series(self, samples: np.ndarray, out: np.ndarray) -> None:
        """``(samples - mean) / (deviation + 1e-8)`` for each channel, both taken over all samples; raises nothing.

        ``samples`` and ``out`` are float32 (num_samples, num_channels); ``out`` may have fewer samples.
        """
        step = max(1, _BLOCK_VALUES // samples.shape[1])
        starts = range(0, len(samples), step)
        total = sum(samples[start : start + step].sum(axis=0, dtype=np.float64) for start in starts)
        mean = total / len(samples)
        squares = sum(np.square(samples[start : start + step] - mean).sum(axis=0) for start in starts)
        scale = np.sqrt(squares / len(samples)) + 1e-8
        for start in range(0, len(out), step):
            out[start : start + step] = (samples[start : start + min(step, len(out) - start)] - mean) / scale

    def expand(self, pieces: Sequence[str | int], media: Sequence[PlannedMedia]) -> list[Piece]:
        """Replace each pad token of the template by its item's placeholders; a time series becomes one block."""
        expanded = super().expand(pieces, media)
        series = [item for item, planned in enumerate(media) if planned.modality is Modality.TIME_SERIES]
        marks = [place for place, piece in enumerate(expanded) if self._ts_pad is not None and piece == self._ts_pad]
        if len(marks) != len(series):
            raise InvalidRequestError(
                f"the chat template shows {len(marks)} time series, the messages have {len(series)}; attach them to user "
                "messages",
                param="messages",
            )
        for item, place in zip(series, marks, strict=True):
            expanded[place] = Placeholder(item, self._ts_pad or 0, 1, media[item].num_tokens)
        return expanded

    def positions(self, assembled: Assembled) -> tuple[None, int]:  # noqa: ARG002 - the protocol's
        """One position a token, which the engine counts itself."""
        return None, 0


def window_hop(sampling_rate: float) -> int:
    """Samples between the beginnings of neighbouring windows: 2 for the slowest series, 24 at 100 Hz, 160 for sounds.

    ``floor(160 / (1 + exp(-rate / 100)) ** 6)``, in float32.
    """
    rate = np.float32(sampling_rate)
    return int(np.floor(np.float32(160) / (np.float32(1) + np.exp(-rate / np.float32(100))) ** np.float32(6)))


def _ts_token_id(tokenizer: Tokenizer, files: CheckpointFiles) -> int | None:
    """The control token that stands for a time series, as the checkpoint's files say; None if it takes none."""
    config = files.json("config.json")
    if config.get("ts_config") is None:
        return None
    named = tokenizer.named_tokens.get("ts_token") or files.json("processor_config.json").get("ts_token") or _TS_TOKEN
    token_id = config.get("ts_token_id", tokenizer.special_tokens.get(named))
    if token_id not in tokenizer.special_tokens.values():
        logger.warning(
            "the tokenizer of %r has no control token for time series (ts_token_id, ts_token or %s); none can be sent",
            files.model,
            _TS_TOKEN,
        )
        return None
    return token_id
