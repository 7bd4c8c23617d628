"""Sizes and frame choices equal the reference's over thousands of random shapes, limits and lengths."""

import numpy as np
import pytest

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import MediaError
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.qwen2_vl import Qwen2VLProcessor
from filmstrip.processing.qwen3_vl import Qwen3VLProcessor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.processing.vision import VisionSettings, resize_image, resize_video, resize_video_frame
from filmstrip.types import FrameSampling, Normalization, PatchLayout, PixelLimits, VideoMetadata
from tests.models.qwen2_vl import make_qwen2_vl
from tests.parity.conftest import run_reference_program

NUM_SIZES, NUM_LENGTHS = 4000, 400


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    low = rng.integers(1, 300_000, NUM_SIZES)
    sizes = np.stack(
        [
            rng.integers(2, 800, NUM_SIZES),
            np.exp(rng.uniform(0, np.log(5000), NUM_SIZES)).astype(int).clip(1),
            np.exp(rng.uniform(0, np.log(5000), NUM_SIZES)).astype(int).clip(1),
            low,
            low + rng.integers(0, 30_000_000, NUM_SIZES),
        ],
        axis=1,
    )
    rates = rng.choice([1.0, 8.0, 12.5, 15, 23.976, 24, 25, 30000 / 1001, 30, 50, 59.94, 60, 120], NUM_LENGTHS)
    lengths = np.stack(
        [rng.integers(2, 200_000, NUM_LENGTHS) ** rng.choice([0.4, 0.7, 1.0], NUM_LENGTHS), rates], axis=1
    )
    lengths[:, 0] = lengths[:, 0].astype(int).clip(2)
    return {"sizes": sizes, "lengths": lengths}


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    np.savez(folder / "arithmetic.npz", **inputs)
    run_reference_program(folder, [])
    return dict(np.load(folder / "arithmetic.out.npz"))


def sized(resize, low, high, *shape, patch_size=16, max_video_tokens=None):
    layout, normalization = PatchLayout(patch_size, 2, 2), Normalization((0.5,) * 3, (0.5,) * 3)
    settings = VisionSettings(layout, normalization, low, high, max_video_tokens=max_video_tokens)
    try:
        return resize(*shape, settings, PixelLimits())
    except MediaError:
        return 0, 0


def test_image_sizes(inputs, reference):
    ours = [sized(resize_image, low, high, h, w) for _, h, w, low, high in inputs["sizes"].tolist()]
    np.testing.assert_array_equal(ours, reference["images"])
    assert 0 < (reference["images"] == 0).sum() < NUM_SIZES  # some shapes are refused, most are not


def test_video_sizes(inputs, reference):
    ours = [sized(resize_video, low, high, n, h, w) for n, h, w, low, high in inputs["sizes"].tolist()]
    np.testing.assert_array_equal(ours, reference["videos"])


@pytest.mark.parametrize(("name", "max_video_tokens"), [("frames", None), ("capped_frames", 128_000)])
def test_sizes_of_frames(inputs, reference, name, max_video_tokens):
    """Qwen2-VL's limits are those of one frame."""
    ours = [
        sized(resize_video_frame, low, high, n, h, w, patch_size=14, max_video_tokens=max_video_tokens)
        for n, h, w, low, high in inputs["sizes"].tolist()
    ]
    np.testing.assert_array_equal(ours, reference[name])
    assert (reference["frames"] != reference["capped_frames"]).any()


def test_default_frames(inputs, reference, qwen3_vl_dir):
    processor = Qwen3VLProcessor(
        Tokenizer(qwen3_vl_dir), CheckpointFiles(qwen3_vl_dir), ProcessorConfig(), MediaConfig(max_video_frames=10_000)
    )
    check_frames(processor, inputs["lengths"], reference["indices"])


def test_default_frames_of_qwen2_vl(inputs, reference, tmp_path):
    path = make_qwen2_vl(tmp_path)
    processor = Qwen2VLProcessor(
        Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), MediaConfig(max_video_frames=10_000)
    )
    check_frames(processor, inputs["lengths"], reference["other_indices"])


def check_frames(processor, lengths, indices):
    for (total, fps), expected in zip(lengths.tolist(), indices, strict=True):
        total = int(total)
        metadata = VideoMetadata(total, fps, total / fps, 64, 64, np.arange(total) / fps, "test")
        plan = processor.plan_video(metadata, FrameSampling(), PixelLimits(), presampled=False)
        assert list(plan.frame_indices) == expected[expected >= 0].tolist()
