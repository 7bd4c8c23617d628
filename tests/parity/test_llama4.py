"""Canvases, sizes and colours of Llama 4's pictures equal those of Transformers' image processor for shapes of all kinds."""

import numpy as np
import pytest
import torch

from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.processing.llama4 import best_canvas, fitted_size
from filmstrip.processing.tiles import CLIP_MEAN, CLIP_STD
from filmstrip.types import Normalization
from tests.parity.conftest import run_reference_program

NUM_SIZES, TILE = 3000, 56


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(2500), (NUM_SIZES, 2))).astype(int).clip(1)
    # Sides of whole tiles and their neighbours: there the arithmetic decides.
    sizes[::3] = TILE * rng.integers(1, 12, sizes[::3].shape) + rng.integers(-1, 2, sizes[::3].shape)
    return {
        "sizes": sizes,
        "max_patches": rng.integers(1, 20, NUM_SIZES),
        "enlarge": rng.integers(0, 4, NUM_SIZES) == 0,
        "mean": np.array(CLIP_MEAN),
        "std": np.array(CLIP_STD),
    }


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama4")
    np.savez(folder / "sizes.npz", **inputs)
    run_reference_program(folder, [], "llama4_reference.py")
    return dict(np.load(folder / "sizes.out.npz"))


def test_canvases_and_sizes(inputs, reference):
    shapes = [tuple(shape) for shape in inputs["sizes"].tolist()]
    canvases, fitted = [], []
    for shape, most, enlarge in zip(shapes, inputs["max_patches"].tolist(), inputs["enlarge"].tolist(), strict=True):
        canvas = best_canvas(shape, TILE, most, enlarge=enlarge)
        canvases.append(canvas.tolist())
        fitted.append(fitted_size(shape, canvas, TILE, enlarge=enlarge))
    np.testing.assert_array_equal(canvases, reference["canvases"])
    np.testing.assert_array_equal(fitted, reference["fitted"])
    assert len({tuple(canvas) for canvas in canvases}) > 30


def test_colours(reference):
    """All of a channel's 256 values, each rounded to bfloat16 in the same three steps."""
    rows = torch.arange(256, dtype=torch.uint8).expand(3, 256).reshape(1, -1)
    ours = normalize_patches(rows, Normalization(CLIP_MEAN, CLIP_STD, "bfloat16"))
    np.testing.assert_array_equal(ours.numpy().reshape(reference["normalised"].shape), reference["normalised"])
