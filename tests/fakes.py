"""A fake model on real paged bookkeeping: packed batches in, logits out that only the right context can give.

It has two layers of "K and V". Layer 0 keeps what stands in a slot (token id or media row, and its position); layer 1 keeps
a hash over everything visible to that token, read back through the block table. Logits are a function of layer 1 over the
whole context. So a wrong slot, block table, chunk border, position, shared block or media row changes the answer, at once
or when the wrong content is read later. It knows no scheduling, no sampling and no request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np
import torch

from filmstrip.config import EngineConfig
from filmstrip.errors import ModelLoadError
from filmstrip.models.base import EncoderInput, ModelInfo
from filmstrip.models.batch import Batch
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import MediaFeature, Modality, Normalization, PlaceholderRange, ProcessedPrompt

VOCAB_SIZE = 97
PLACEHOLDER_ID = 96
PATCH_BYTES = 6
NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class FakeModel:
    """Implements :class:`filmstrip.models.base.Model` with integers.

    One patch row is one embedding row. Faults are injected by the attributes below.
    """

    def __init__(
        self,
        *,
        block_size: int = 4,
        kv_bytes_per_token: int = 64,
        max_position_embeddings: int = 4096,
        step_seconds: float = 0.0,
    ) -> None:
        self.info = ModelInfo(
            vocab_size=VOCAB_SIZE,
            hidden_size=4,
            max_position_embeddings=max_position_embeddings,
            num_embedding_rows=1,
            block_size=block_size,
            kv_bytes_per_token=kv_bytes_per_token,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        self.step_seconds = step_seconds
        self.fail_next_forward: Exception | None = None
        """Raised by the next forward pass, after half of its slots were overwritten with rubbish."""
        self.poison: set[int] = set()
        """Token ids whose K and V are not numbers: whoever sees one gets NaN logits."""
        self.fail_on_patches: bytes | None = None
        """Encoding a row that begins with these bytes raises."""
        self.num_rows_too_few = 0
        """Embedding rows the encoder leaves out of each segment."""
        self.num_encoded_segments = 0
        self.forwards: list[list[int]] = []
        """Row counts of every forward pass."""

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Pages full of rubbish, as real ones are."""
        self.pages = np.random.default_rng(1).integers(0, 2**63, (2, num_blocks, self.info.block_size), np.uint64)
        self.poisoned = np.zeros((num_blocks, self.info.block_size), bool)

    def encode(self, items: Sequence[EncoderInput]) -> list[list[torch.Tensor]]:
        """Rows that say what bytes they were made of, and where in its segment each stands."""
        return [self._encode(item) for item in items]

    def forward(self, batch: Batch) -> torch.Tensor:
        """See the module's text."""
        self.forwards.append(list(batch.query_lens))
        slots = batch.slot_mapping.numpy()
        check_batch(batch, self.info.block_size)
        layer0, layer1 = self.pages.reshape(2, -1)
        if self.fail_next_forward is not None:
            error, self.fail_next_forward = self.fail_next_forward, None
            self.pages.reshape(2, -1)[:, slots[::2]] = 13
            raise error
        if self.step_seconds:
            time.sleep(self.step_seconds)
        layer0[slots] = _contents(batch)
        self.poisoned.reshape(-1)[slots] = np.isin(batch.token_ids.numpy(), list(self.poison))
        rows = np.zeros(batch.num_tokens, np.uint64)
        spoiled = np.zeros(batch.num_tokens, bool)
        row = 0
        for table, count, length in zip(
            batch.block_tables.numpy(), batch.query_lens, batch.context_lens_list, strict=True
        ):
            blocks = table[: -(-length // self.info.block_size)]
            mine = slice(row, row + count)
            seen = _visible(self.pages[0, blocks].reshape(-1)[:length])
            layer1[slots[mine]] = seen[length - count :]
            rows[mine] = _visible(self.pages[1, blocks].reshape(-1)[:length])[length - count :]
            spoiled[mine] = np.logical_or.accumulate(self.poisoned[blocks].reshape(-1)[:length])[length - count :]
            row += count
        wanted = batch.logits_indices.numpy()
        logits = np.array([_logits(seed) for seed in rows[wanted]], np.float32).reshape(-1, VOCAB_SIZE)
        logits[spoiled[wanted]] = np.nan
        return torch.from_numpy(logits)

    def _encode(self, item: EncoderInput) -> list[torch.Tensor]:
        patches = item.patches.numpy()
        assert len(patches) == item.grid_thw[0] * item.grid_thw[1] * item.grid_thw[2]
        ends = np.cumsum([height * width for height, width in item.segment_grids])
        segments = np.split(patches, ends[:-1] if len(ends) else item.num_segments)
        assert len(segments) == item.num_segments
        if self.fail_on_patches is not None and any(bytes(s[0]).startswith(self.fail_on_patches) for s in segments):
            raise RuntimeError("these pixels cannot be encoded")
        self.num_encoded_segments += item.num_segments
        return [torch.from_numpy(_embeddings(segment))[self.num_rows_too_few :] for segment in segments]


def _embeddings(segment: np.ndarray) -> np.ndarray:
    """float32 (num_rows, 1, 4): four 16-bit pieces of a hash of each row's bytes and place."""
    digests = [hashlib.sha256(bytes(patch) + bytes([index])).digest()[:8] for index, patch in enumerate(segment)]
    return np.stack([np.frombuffer(digest, np.uint16) for digest in digests]).astype(np.float32)[:, None, :]


def check_batch(batch: Batch, block_size: int) -> None:
    """Raise AssertionError unless the parts of a batch agree with each other."""
    counts, lengths = batch.query_lens, batch.context_lens_list
    assert batch.context_lens.tolist() == lengths
    assert batch.cu_seqlens_q.tolist() == [0, *np.cumsum(counts).tolist()]
    assert batch.positions.shape == (3, batch.num_tokens)
    assert sum(counts) == batch.num_tokens
    slots = batch.slot_mapping.tolist()
    assert len(set(slots)) == len(slots), "two tokens of a step share a slot"
    tables = [
        table[: -(-length // block_size)] for table, length in zip(batch.block_tables.tolist(), lengths, strict=True)
    ]
    row = 0
    for index, (table, count, length) in enumerate(zip(tables, counts, lengths, strict=True)):
        places = range(length - count, length)
        assert slots[row : row + count] == [table[i // block_size] * block_size + i % block_size for i in places]
        written = {slot // block_size for slot in slots[row : row + count]}
        for other, blocks in enumerate(tables):
            assert other == index or not written & set(blocks), "a block is written that another request reads"
        row += count


def _contents(batch: Batch) -> np.ndarray:
    """uint64 (N,): what each token is (text or media row) and where it stands."""
    what = batch.token_ids.numpy().astype(np.uint64)
    for placed in batch.placements:
        words = placed.embeddings[:, 0].numpy().astype(np.uint64)
        identity = np.zeros(len(words), np.uint64)
        for column in range(words.shape[1]):
            identity = (identity << np.uint64(16)) | words[:, column]
        what[placed.start : placed.start + len(words)] = _mix(identity)
    for axis in batch.positions.numpy().astype(np.uint64):
        what = _mix(what ^ _mix(axis))
    return what


def _visible(values: np.ndarray) -> np.ndarray:
    """uint64 (n,): for each place a hash of all values up to it, order included."""
    places = np.arange(len(values), dtype=np.uint64)
    return _mix(np.cumsum(_mix(values ^ _mix(places)), dtype=np.uint64))


def _mix(values: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit numbers that scatters (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _logits(seed: np.uint64) -> np.ndarray:
    logits = np.random.default_rng(int(seed)).standard_normal(VOCAB_SIZE) * 2
    logits[PLACEHOLDER_ID] = -np.inf
    return logits


def make_fake_model(config: EngineConfig) -> FakeModel:
    """For ``EngineClient.start(..., model_factory="tests.fakes:make_fake_model")``; the model's name says what it does.

    ``fake`` or ``fake:SECONDS`` (of each step), ``broken`` (cannot be loaded), ``crash`` (any exception),
    ``slow:SECONDS`` (to load) or ``lost`` (its device breaks in the first pass).
    """
    name, _, seconds = config.model.partition(":")
    if name == "broken":
        raise ModelLoadError("this checkpoint is broken", param="model")
    if name == "crash":
        raise RuntimeError("loading went wrong")
    if name == "slow":
        time.sleep(float(seconds))
    model = FakeModel(step_seconds=float(seconds) if name == "fake" and seconds else 0.0)
    if name == "lost":
        model.fail_next_forward = torch.AcceleratorError("CUDA error: device-side assert triggered")
    return model


def feature(
    offset: int, *, num_segments: int = 3, length: int = 3, gap: int = 1, content: int = 0, modality: str = "video"
) -> MediaFeature:
    """A media item with ``num_segments`` segments of ``length`` tokens, ``gap`` text tokens apart, from ``offset`` on."""
    patches = SharedTensor.create((num_segments * length, PATCH_BYTES))
    patches.array[:] = np.random.default_rng(content).integers(0, 256, patches.shape, np.uint8)
    patches.array[:, 0] = content
    segments = tuple(PlaceholderRange(offset + i * (length + gap), length) for i in range(num_segments))
    media_hash = f"content-{content}-{num_segments}-{length}"
    return MediaFeature(Modality(modality), patches, (num_segments, 1, length), NORMALIZATION, media_hash, segments)


def prompt(num_tokens: int, *features: MediaFeature, seed: int = 0, mrope: bool = True) -> ProcessedPrompt:
    """``num_tokens`` random text tokens (the same beginning for the same seed) with media put over them."""
    token_ids = np.random.default_rng(seed).integers(0, PLACEHOLDER_ID, max(num_tokens, 4096))[:num_tokens].tolist()
    positions = np.tile(np.arange(num_tokens, dtype=np.int32), (3, 1))
    num_segments = 0
    for item in features:
        for segment in item.segments:
            token_ids[segment.offset : segment.end] = [PLACEHOLDER_ID] * segment.length
            positions[1, segment.offset : segment.end] += np.arange(segment.length, dtype=np.int32) // 2
            positions[2, segment.offset : segment.end] += np.arange(segment.length, dtype=np.int32) % 2
            positions[:, segment.end :] -= 1  # like M-RoPE, media take less room than they have tokens
            num_segments += 1
    if not mrope:
        return ProcessedPrompt(token_ids, features)
    return ProcessedPrompt(token_ids, features, positions, position_delta=-num_segments)
