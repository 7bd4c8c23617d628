"""The fake model with a recurrent state beside its pages: logits that only the right state, too, can give.

The state of a request is a hash chain over its tokens: one that is not zeroed, not restored, mixed with a neighbour's or
taken from another place of the prompt changes every answer after it. It knows no scheduling and no request.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from filmstrip.engine.engine import Engine, EngineLimits
from filmstrip.models.batch import Batch
from tests.fakes import VOCAB_SIZE, FakeModel, _contents, _mix


class RecurrentFakeModel(FakeModel):
    """Implements :class:`filmstrip.models.base.RecurrentModel`."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.info = dataclasses.replace(self.info, state_bytes_per_request=1000)
        self.num_copies = 0

    def allocate_states(self, num_slots: int) -> None:
        """Slots full of rubbish, as real ones are."""
        self.states = np.random.default_rng(2).integers(0, 2**63, num_slots, np.uint64)
        self.spoiled = np.ones(num_slots, bool)

    def copy_state(self, source: int, target: int) -> None:
        """See the protocol."""
        self.num_copies += 1
        self.states[target], self.spoiled[target] = self.states[source], self.spoiled[source]

    def forward(self, batch: Batch) -> torch.Tensor:
        """The fake's logits plus logits that follow from the states; a failing pass leaves rubbish in both."""
        assert batch.state_slots is not None
        slots = batch.state_slots.tolist()
        assert len(slots) == len(set(slots)) == len(batch.query_lens)
        try:
            logits = super().forward(batch)
        except Exception:
            self.states[slots] = 17
            raise
        states = self._advance(batch, slots)[batch.logits_indices.numpy()]
        own = [np.random.default_rng(int(state)).standard_normal(VOCAB_SIZE) * 2 for state in states]
        spoiled = self._spoiled_rows[batch.logits_indices.numpy()]
        logits = logits + torch.from_numpy(np.array(own, np.float32).reshape(-1, VOCAB_SIZE))
        logits[torch.from_numpy(spoiled)] = float("nan")
        return logits

    def _advance(self, batch: Batch, slots: list[int]) -> np.ndarray:
        """uint64 (N,): the state after each token; the last of each request goes to its slot."""
        contents = _contents(batch)
        bad = np.isin(batch.token_ids.numpy(), list(self.poison))
        after = np.zeros(batch.num_tokens, np.uint64)
        self._spoiled_rows = np.zeros(batch.num_tokens, bool)
        row = 0
        for slot, count, length in zip(slots, batch.query_lens, batch.context_lens_list, strict=True):
            begins = length == count
            # One-element arrays: numpy warns where a lone number overflows, as hashes do.
            state, spoiled = (np.zeros(1, np.uint64), False) if begins else (self.states[[slot]], self.spoiled[slot])
            for index in range(row, row + count):
                state, spoiled = _mix(state ^ contents[index]), bool(spoiled or bad[index])
                after[index], self._spoiled_rows[index] = state[0], spoiled
            self.states[slot], self.spoiled[slot] = state[0], spoiled
            row += count
        return after


def make_recurrent_engine(
    *,
    num_blocks: int = 1024,
    max_model_len: int = 2048,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 512,
    encoder_cache_bytes: int = 1 << 20,
    prefix: bool = True,
    checkpoints: int = 8,
) -> Engine:
    """An engine over a recurrent fake with blocks of 4 tokens."""
    limits = EngineLimits(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        encoder_cache_bytes=encoder_cache_bytes,
        enable_prefix_caching=prefix,
        num_state_checkpoints=checkpoints,
    )
    return Engine(RecurrentFakeModel(), limits)


def recurrent_fake_of(engine: Engine) -> RecurrentFakeModel:
    """The engine's model, as the fake it is."""
    assert isinstance(engine.model, RecurrentFakeModel)
    return engine.model
