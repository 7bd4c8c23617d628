"""What goes between the client and the engine process, and how: typed MessagePack frames, pixels as file descriptors.

Nothing is pickled: a peer can send wrong values but no code. How frames are made is :mod:`filmstrip.channel`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from filmstrip import channel
from filmstrip.channel import close_all
from filmstrip.config import EngineConfig
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import (
    FinishReason,
    MediaFeature,
    Modality,
    Normalization,
    PlaceholderRange,
    ProcessedPrompt,
    SamplingParams,
)


class Feature(msgspec.Struct):
    """A media feature without its pixels, whose descriptor travels beside the message.

    ``pooling`` is int32 (tokens of a segment, patches) in C order, or empty.
    """

    modality: str
    shape: tuple[int, int]
    grid_thw: tuple[int, int, int]
    normalization: Normalization | None
    media_hash: str
    segments: list[tuple[int, int]]
    source_size: tuple[int, int]
    hop: int
    dtype: Literal["uint8", "float32"]
    segment_grids: tuple[tuple[int, int], ...]
    pooling: bytes = b""


class Start(msgspec.Struct, tag="start"):
    """First message: load this."""

    config: EngineConfig


class AddRequest(msgspec.Struct, tag="add"):
    """Answer this prompt; ``positions`` is (3, num_tokens) of ``positions_dtype`` in C order, or empty."""

    request_id: str
    token_ids: list[int]
    positions: bytes
    position_delta: int | float
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    features: list[Feature]
    positions_dtype: Literal["int32", "float32"] = "int32"


class Abort(msgspec.Struct, tag="abort"):
    """Forget a request."""

    request_id: str


class GetStats(msgspec.Struct, tag="get_stats"):
    """Ask for counters; the answer carries the same number."""

    number: int


class Ready(msgspec.Struct, tag="ready"):
    """The model is loaded."""

    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    device: str
    dtype: str


class LoadFailed(msgspec.Struct, tag="load_failed"):
    """The model could not be loaded."""

    message: str
    param: str | None


class TokenOutput(msgspec.Struct, array_like=True):
    """What one step added to a request; ``error`` is (code, message, param) if it failed."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | None
    num_cached_tokens: int
    error: tuple[str, str, str | None] | None = None


class Outputs(msgspec.Struct, tag="outputs"):
    """All outputs of one step."""

    outputs: list[TokenOutput]


class Stats(msgspec.Struct, tag="stats"):
    """Counters of the engine."""

    number: int
    values: dict[str, Any]


ToEngine = Start | AddRequest | Abort | GetStats
ToClient = Ready | LoadFailed | Outputs | Stats

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_client = msgspec.msgpack.Decoder(ToClient).decode


def add_request(
    request_id: str, prompt: ProcessedPrompt, params: SamplingParams, stop_token_ids: tuple[int, ...]
) -> tuple[AddRequest, list[int]]:
    """The message for a prompt, and the descriptors of its pixels in the order of its features."""
    features = [
        Feature(
            feature.modality.value,
            (feature.patches.shape[0], feature.patches.shape[1]),
            feature.grid_thw,
            feature.normalization,
            feature.media_hash,
            [(segment.offset, segment.length) for segment in feature.segments],
            feature.source_size,
            feature.hop,
            "float32" if feature.modality is Modality.TIME_SERIES else "uint8",
            feature.segment_grids,
            b"" if feature.pooling is None else np.ascontiguousarray(feature.pooling, np.int32).tobytes(),
        )
        for feature in prompt.features
    ]
    has_fractions = prompt.positions is not None and np.issubdtype(prompt.positions.dtype, np.floating)
    dtype = "float32" if has_fractions else "int32"
    positions = b"" if prompt.positions is None else np.ascontiguousarray(prompt.positions, dtype).tobytes()
    message = AddRequest(
        request_id, prompt.token_ids, positions, prompt.position_delta, params, stop_token_ids, features, dtype
    )
    return message, [feature.patches.fd for feature in prompt.features]


def processed_prompt(message: AddRequest, descriptors: list[int]) -> ProcessedPrompt:
    """The prompt of a message. Takes over the descriptors, which are closed if it raises ValueError or OSError."""
    owned = deque(descriptors)
    features = []
    try:
        if len(owned) != len(message.features):
            raise ValueError(f"{len(message.features)} media items came with {len(owned)} descriptors")
        for feature in message.features:
            patches = SharedTensor(owned.popleft(), feature.shape, feature.dtype)
            segments = tuple(PlaceholderRange(offset, length) for offset, length in feature.segments)
            features.append(
                MediaFeature(
                    Modality(feature.modality),
                    patches,
                    feature.grid_thw,
                    feature.normalization,
                    feature.media_hash,
                    segments,
                    feature.source_size,
                    feature.hop,
                    feature.segment_grids,
                    _pooling(feature),
                )
            )
    finally:
        close_all(owned)
    positions = np.frombuffer(message.positions, message.positions_dtype).reshape(3, -1) if message.positions else None
    return ProcessedPrompt(message.token_ids, tuple(features), positions, message.position_delta)


def _pooling(feature: Feature) -> np.ndarray | None:
    """The table of a feature's message; ValueError if it does not fit the first segment."""
    if not feature.pooling:
        return None
    num_tokens = feature.segments[0][1] if feature.segments else 0
    return np.frombuffer(bytearray(feature.pooling), np.int32).reshape(num_tokens, -1)


def frame_parts(message: ToEngine | ToClient, descriptors: list[int]) -> list[tuple[bytes, Sequence[int]]]:
    """A frame as pieces to send in order, each with the descriptors attached to it."""
    return channel.frame_parts(encode(message), descriptors)
