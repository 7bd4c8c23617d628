"""A model without weights whose answers depend on everything the engine must get right.

It keeps, per slot of a paged cache, an identity of what was written there. The logits of a row are drawn from a hash of all
identities the row can see, read back through its block table: a wrong block, slot, position, chunk, shared prefix or media
row changes the tokens that come out.
"""

import hashlib

import numpy as np
import torch

from filmstrip.models.base import ModelInfo
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import MediaFeature, Modality, Normalization, PlaceholderRange, ProcessedPrompt

VOCAB_SIZE = 97
PAD = 96
NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_PRIME = (1 << 61) - 1


class FakeModel:
    """Implements :class:`filmstrip.models.base.Model`; ``block_size`` small, so that every test crosses blocks."""

    def __init__(self, block_size=4):
        self.info = ModelInfo(
            vocab_size=VOCAB_SIZE,
            hidden_size=4,
            max_position_embeddings=1000,
            num_embedding_rows=2,
            block_size=block_size,
            kv_bytes_per_token=8,
            device=torch.device("cpu"),
            dtype=torch.float64,
        )
        self.num_forward_tokens = 0
        self.encoded = []
        self.fail_forward = self.fail_encode = self.nan_rows = False

    def allocate_kv_cache(self, num_blocks):
        self.slots = [None] * (num_blocks * self.info.block_size)

    def encode(self, items):
        if self.fail_encode:
            raise RuntimeError("the encoder broke")
        return [self._encode_item(item) for item in items]

    def _encode_item(self, item):
        assert item.grid_thw[0] * item.grid_thw[1] * item.grid_thw[2] == len(item.patches)
        rows = len(item.patches) // item.num_segments
        segments = []
        for i in range(item.num_segments):
            patches = item.patches[i * rows : (i + 1) * rows].numpy()
            self.encoded.append(hashlib.sha256(patches.tobytes()).hexdigest())
            number = int.from_bytes(
                hashlib.sha256(patches.tobytes() + item.modality.value.encode()).digest()[:6], "big"
            )
            tokens = rows // 4
            segment = torch.zeros(tokens, 2, 4, dtype=torch.float64)
            segment[:, 0, 0] = number
            segment[:, 0, 1] = torch.arange(tokens)
            segment[:, 1, 0] = number + 1
            segments.append(segment)
        return segments

    def forward(self, batch):
        if self.fail_forward:
            raise RuntimeError("the model broke")
        identities = self._identities(batch)
        self.num_forward_tokens += batch.num_tokens
        for slot, identity in zip(batch.slot_mapping.tolist(), identities, strict=True):
            self.slots[slot] = identity
        states = []
        for s, (start, end) in enumerate(
            zip(batch.cu_seqlens_q[:-1].tolist(), batch.cu_seqlens_q[1:].tolist(), strict=True)
        ):
            assert batch.query_lens[s] == end - start
            assert batch.context_lens_list[s] == batch.context_lens[s]
            for row in range(start, end):
                visible = int(batch.context_lens[s]) - (end - 1 - row)
                states.append(self._state(batch.block_tables[s].tolist(), visible))
        logits = torch.stack(
            [_logits(states[row]) for row in batch.logits_indices.tolist()] or [torch.zeros(VOCAB_SIZE)]
        )
        if self.nan_rows and len(logits) > 1:
            logits[0] = float("nan")
        return logits[: len(batch.logits_indices)]

    def _identities(self, batch):
        identities = [
            (int(token), *position) for token, position in zip(batch.token_ids, batch.positions.T.tolist(), strict=True)
        ]
        for placement in batch.placements:
            for i, row in enumerate(placement.embeddings):
                at = placement.start + i
                assert int(batch.token_ids[at]) == PAD
                identities[at] = (int(row[0, 0]), int(row[0, 1]), int(row[1, 0]), *identities[at][1:])
        media = {p.start + i for p in batch.placements for i in range(len(p.embeddings))}
        assert all(int(token) != PAD or i in media for i, token in enumerate(batch.token_ids)), (
            "a placeholder has no media"
        )
        return identities

    def _state(self, table, num_tokens):
        size, state = self.info.block_size, 7
        for i in range(num_tokens):
            identity = self.slots[table[i // size] * size + i % size]
            assert identity is not None, "a slot is read that was never written"
            state = (
                state * 1_000_003 + hash(identity)
            ) % _PRIME  # hashes of integer tuples are the same in every process
        return state


def _logits(state):
    rng = np.random.default_rng(state)
    logits = rng.normal(size=VOCAB_SIZE).astype(np.float32)
    logits[PAD] = -1e9  # never generated: it stands for media
    return torch.from_numpy(logits)


def make_fake_model(config):
    """For ``EngineClient.start(config, model_factory="tests.fakes:make_fake_model")``."""
    if config.model == "broken":
        raise RuntimeError("no such fake")
    return FakeModel()


def feature(seed, segments, height=2, width=4, modality=Modality.VIDEO, media_hash=None):
    """Media of ``len(segments)`` pieces, each of height * width tokens, with pixels that only ``seed`` decides."""
    frames = len(segments)
    patches = SharedTensor.create((frames * height * 2 * width * 2, 12))
    patches.array[:] = np.random.default_rng(seed).integers(0, 256, patches.shape)
    grid = (frames, height * 2, width * 2)
    return MediaFeature(modality, patches, grid, NORMALIZATION, media_hash or f"media-{seed}", tuple(segments))


def prompt(*parts, height=2, width=4):
    """A prompt of text (lists of ids) and media (``(seed, num_segments)``), each segment between two text tokens."""
    token_ids, features = [], []
    for part in parts:
        if isinstance(part, list):
            token_ids += part
            continue
        seed, num_segments = part
        ranges = []
        for _ in range(num_segments):
            token_ids.append(90)
            ranges.append(PlaceholderRange(len(token_ids), height * width))
            token_ids += [PAD] * (height * width)
            token_ids.append(91)
        features.append(feature(seed, ranges, height, width))
    positions = np.tile(np.arange(len(token_ids), dtype=np.int32), (3, 1))
    positions[1] += 3  # unequal axes, so that a mixed-up one shows
    positions[2] += 5
    return ProcessedPrompt(token_ids, tuple(features), positions, -2)
