"""The compiled vector functions against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from filmstrip.models.cpu_attention_kernels import multiply, softmax_row
from filmstrip.models.cpu_simd import LOWEST, VECTOR, exp2_in_place, fetch_add, largest_of


@njit
def _exp2_in_place(address, num_vectors, shift):
    return exp2_in_place(address, num_vectors, shift)


@njit
def _largest_of(address, num_vectors):
    return largest_of(address, num_vectors)


@njit
def _fetch_add(address):
    return fetch_add(address)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize(("columns", "depth"), [(16, 1), (32, 7), (48, 33), (128, 128)])
@pytest.mark.parametrize("accumulate", [0, 1])
def test_product(half, rows, columns, depth, accumulate):
    generator = torch.Generator().manual_seed(rows)
    a = torch.randn(rows, depth + 3, generator=generator).numpy()
    b = torch.randn(depth, columns + 16, generator=generator).to(torch.bfloat16 if half else torch.float32)
    # Without accumulating, what C held before does not matter.
    c = np.full((rows, columns + 8), 0.5 if accumulate else np.nan, dtype=np.float32)
    multiply(
        rows, columns, int(half), accumulate, c.ctypes.data, c.shape[1], a.ctypes.data, a.shape[1], b.data_ptr(), b.shape[1],
        depth, 0,
    )  # fmt: skip
    expected = a[:, :depth].astype(float) @ b[:, :columns].double().numpy() + (0.5 if accumulate else 0)
    np.testing.assert_allclose(c[:, :columns], expected, atol=1e-4)
    assert np.all(np.isnan(c[:, columns:]) | (c[:, columns:] == 0.5))


def test_exp2_is_accurate_and_underflows_to_zero():
    x = np.linspace(-140, 0, 16 * VECTOR * 50, dtype=np.float32)
    y = x + np.float32(3.0)
    total = _exp2_in_place(y.ctypes.data, len(y) // VECTOR, np.float32(3.0))
    exact = np.exp2(x.astype(float))
    normal = x > -125.9
    np.testing.assert_allclose(y[normal], exact[normal], rtol=2e-5)
    assert np.all(y[x < -126.1] == 0)
    np.testing.assert_allclose(total, exact.sum(), rtol=1e-5)

    whole = np.arange(-VECTOR * 7, 0, dtype=np.float32)
    powers = whole.copy()
    _exp2_in_place(powers.ctypes.data, 7, np.float32(0.0))
    np.testing.assert_allclose(powers, np.exp2(whole.astype(float)), rtol=2e-7)


def test_largest():
    x = np.array([-3.0] * 20 + [-1.5] + [-2.0] * 11, dtype=np.float32)
    assert _largest_of(x.ctypes.data, 2) == np.float32(-1.5)
    assert _largest_of(x.ctypes.data, 1) == np.float32(-3.0)
    assert _largest_of(x.ctypes.data, 0) == np.float32(LOWEST)


def test_fetch_add():
    counter = np.array([5], dtype=np.int64)
    assert [_fetch_add(counter.ctypes.data) for _ in range(3)] == [5, 6, 7]
    assert counter[0] == 8


@pytest.mark.parametrize(
    "ranges", [((0, 32), (0, 32)), ((0, 5), (0, 0)), ((0, 0), (2, 9)), ((3, 17), (1, 1)), ((9, 32), (31, 32))]
)
def test_softmax_in_two_steps(ranges):
    """Weights relative to the running maximum; columns outside the range, whatever they hold, get weight 0."""
    generator = np.random.default_rng(0)
    scores = generator.normal(0, 20, (2, 32)).astype(np.float32)
    output, state = np.ones(8, dtype=np.float32), np.array([LOWEST, 0.0], dtype=np.float32)
    seen = []
    for row, (first, limit) in zip(scores, ranges, strict=True):
        weights = np.full_like(row, np.nan)
        weights[first:limit] = row[first:limit]
        softmax_row(weights, first, limit, output, state)
        seen += list(row[first:limit].astype(float))
        np.testing.assert_allclose(
            weights[first:limit], np.exp2(row[first:limit] - state[0].astype(float)), rtol=1e-5, atol=1e-30
        )
        assert np.all(weights[:first] == 0)
        assert np.all(weights[limit:] == 0)
    assert state[0] == np.float32(max(seen))
    np.testing.assert_allclose(state[1], np.exp2(np.array(seen) - max(seen)).sum(), rtol=1e-5)
