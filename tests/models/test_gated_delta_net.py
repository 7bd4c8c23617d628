"""The packed delta rule and convolution against the recurrence written out token by token in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from filmstrip.models.gated_delta_net import MAX_CHUNK_TOKENS, DeltaShape, DeltaStates
from tests.models.batches import pack, text_request

SHAPE = DeltaShape(num_layers=2, num_key_heads=2, num_value_heads=3, key_dim=8, value_dim=5, kernel_size=4)
LAYER = 1


class Sequence:
    """Inputs of one request of both operations, and what they should give."""

    def __init__(self, length: int, rng: np.random.Generator, decay: float) -> None:
        heads = SHAPE.num_value_heads
        keys = rng.standard_normal((2, length, heads, SHAPE.key_dim))
        query, key = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
        value = rng.standard_normal((length, heads, SHAPE.value_dim))
        log_decay, rate = -decay * rng.random((length, heads)), rng.random((length, heads))
        self.length = length
        self.inputs = (query, key, value, log_decay, rate)
        self.channels = rng.standard_normal((length, SHAPE.num_channels))

    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """(length, heads, value_dim), and the state after the last token."""
        state = np.zeros((SHAPE.num_value_heads, SHAPE.key_dim, SHAPE.value_dim))
        rows = []
        for query, key, value, log_decay, rate in zip(*self.inputs, strict=True):
            state = state * np.exp(log_decay)[:, None, None]
            answer = np.einsum("hk,hkv->hv", key, state)
            state = state + np.einsum("hk,hv->hkv", key, rate[:, None] * (value - answer))
            rows.append(np.einsum("hk,hkv->hv", query, state))
        return np.stack(rows), state

    def convolved(self, weight: np.ndarray) -> np.ndarray:
        padded = np.concatenate([np.zeros((SHAPE.kernel_size - 1, SHAPE.num_channels)), self.channels])
        taps = [padded[place : place + self.length] * weight[:, place] for place in range(SHAPE.kernel_size)]
        return np.sum(taps, axis=0)


def run(sequences, cuts, weight):
    """Both operations over all sequences at once, cut at random; pages of rubbish in every slot before."""
    states = DeltaStates(SHAPE, torch.float32, torch.device("cpu"))
    states.allocate(len(sequences))
    states.windows.fill_(float("nan"))
    states.matrices.fill_(float("nan"))
    slots = np.random.default_rng(1).permutation(len(sequences))
    requests = [text_request([0] * sequence.length, range(1000)) for sequence in sequences]
    done = [0] * len(sequences)
    outputs: list[list[np.ndarray]] = [[] for _ in sequences]
    convolved: list[list[np.ndarray]] = [[] for _ in sequences]
    while any(count < sequence.length for count, sequence in zip(done, sequences, strict=True)):
        who = [index for index, sequence in enumerate(sequences) if done[index] < sequence.length]
        chunks = [(index, done[index], min(done[index] + cuts(), sequences[index].length)) for index in who]
        batch = pack([(requests[index], start, end) for index, start, end in chunks], 8)
        batch.state_slots = torch.from_numpy(slots[who])
        step = states.begin(batch)
        inputs = [
            torch.from_numpy(np.concatenate([sequences[index].inputs[part][start:end] for index, start, end in chunks]))
            for part in range(5)
        ]
        channels = np.concatenate([sequences[index].channels[start:end] for index, start, end in chunks])
        sizes = [end - start for _, start, end in chunks]
        output = step.update(LAYER, *(each.float() for each in inputs)).split(sizes)
        mixed = step.convolve(
            LAYER, torch.from_numpy(channels).float(), torch.from_numpy(weight).float().unsqueeze(1)
        ).split(sizes)
        for (index, _, end), rows, columns in zip(chunks, output, mixed, strict=True):
            outputs[index].append(rows.numpy())
            convolved[index].append(columns.numpy())
            done[index] = end
    finals = [states.matrices[LAYER, slot].numpy() for slot in slots]
    assert states.matrices[0].isnan().all(), "another layer's states were touched"
    return [np.concatenate(each) for each in outputs], [np.concatenate(each) for each in convolved], finals


@pytest.mark.parametrize("decay", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("seed", range(5))
def test_any_packing_gives_the_recurrence(seed, decay):
    """Decays up to e^-60 for each token: over a chunk they would overflow if they were not masked first.

    Sums of so many large log decays lose digits of their small differences, hence the tolerance.
    """
    tolerance = 2e-5 + 2e-6 * decay
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 3, MAX_CHUNK_TOKENS, MAX_CHUNK_TOKENS + 1, *rng.integers(1, 200, 4)]
    sequences = [Sequence(int(length), rng, decay) for length in lengths]
    weight = rng.standard_normal((SHAPE.num_channels, SHAPE.kernel_size))
    largest = [1, 2, 5, 100, 1000][seed]
    outputs, convolved, finals = run(sequences, lambda: int(rng.integers(1, largest + 1)), weight)
    for sequence, output, mixed, final in zip(sequences, outputs, convolved, finals, strict=True):
        expected, state = sequence.outputs()
        np.testing.assert_allclose(output, expected, atol=tolerance, rtol=0)
        np.testing.assert_allclose(final, state, atol=tolerance, rtol=0)
        np.testing.assert_allclose(mixed, sequence.convolved(weight), atol=1e-5, rtol=0)


def test_bytes_of_a_state():
    """The sizes of the released 9B model: about 50 MiB for each request."""
    shape = DeltaShape(num_layers=24, num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, kernel_size=4)
    assert shape.bytes_per_request(torch.bfloat16) == 24 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
