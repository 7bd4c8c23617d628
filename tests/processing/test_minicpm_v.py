"""What MiniCPM-V shows and refuses, beyond what parity on real files says: sizes and frames in numbers, wishes, settings."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
from transformers.video_utils import VideoMetadata as ReferenceMetadata

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import ModelLoadError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.registry import create_processor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FrameSampling, ImageMetadata, Modality, PixelLimits, VideoMetadata
from tests.models.minicpm_v import make_minicpm_v


def make_processor(path, **media):
    return create_processor(Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), MediaConfig(**media))


def clip(total, fps=10.0, height=90, width=160):
    return VideoMetadata(total, fps, total / fps, height, width, np.arange(total) / fps, "test")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_minicpm_v(tmp_path_factory.mktemp("minicpm_v"))


def with_changed(path, tmp_path, file, **values):
    """The checkpoint's small files again, one of them changed; None takes a value out."""
    for source in Path(path).iterdir():
        if source.suffix in {".json", ".jinja"}:
            (tmp_path / source.name).write_text(source.read_text())
    changed = json.loads((tmp_path / file).read_text()) | values
    (tmp_path / file).write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    return str(tmp_path)


def frames(processor, total, *, presampled=False, **sampling):
    plan = processor.plan_video(clip(total), FrameSampling(**sampling), PixelLimits(), presampled=presampled)
    return list(plan.frame_indices)


def test_default_frames_are_the_references(path):
    """At any length and rate, but for frames behind the last one, which the reference sometimes names."""
    processor = make_processor(path)
    rule = SimpleNamespace(max_num_frames=4, stack_frames=1)
    rng = np.random.default_rng(0)
    rates = [1.0, 8.0, 12.5, 15, 24000 / 1001, 24, 25, 30000 / 1001, 30, 59.94, 60, 120]
    for fps in rates:
        for total in rng.integers(1, 20_000, 100) ** rng.choice([0.4, 0.7, 1.0], 100):
            count = max(int(total), 1)
            metadata = ReferenceMetadata(total_num_frames=count, fps=fps, duration=count / fps)
            theirs = MiniCPMV4_6VideoProcessor.sample_frames(rule, metadata)
            assert processor.default_frames(count, fps).tolist() == [min(index, count - 1) for index in theirs]


def test_frames_as_asked(path):
    processor = make_processor(path)
    assert frames(processor, 35) == [0, 10, 20, 30]
    assert frames(processor, 3) == [0]
    assert frames(processor, 100, start_seconds=4, end_seconds=5.95) == [40, 50]
    assert frames(processor, 100, num_frames=3) == [0, 49, 99]
    assert frames(processor, 100, fps=0.5) == [0, 24, 49, 74, 99]
    assert frames(processor, 35, max_frames=2) == [0, 34]
    assert frames(processor, 7, presampled=True) == list(range(7))
    assert frames(processor, 7, presampled=True, start_seconds=0.2, num_frames=2) == [2, 6]
    assert frames(make_processor(path, max_video_frames=2), 35) == [0, 34]


@pytest.mark.parametrize("mode", ["4x", "16x"])
def test_sizes_are_those_of_the_references_videos(tmp_path, mode):
    """Transformers works out those of images and those of videos in two places; here they are worked out in one."""
    processor = make_processor(make_minicpm_v(tmp_path, downsample_mode=mode))
    rng = np.random.default_rng(1)
    their = SimpleNamespace()
    their.find_best_resize = lambda **given: MiniCPMV4_6VideoProcessor.find_best_resize(their, **given)
    rule = {"scale_resolution": 80, "patch_size": 8, "downsample_mode": mode}
    for height, width in np.exp(rng.uniform(0, math.log(3000), (500, 2))).astype(int).tolist():
        grid = MiniCPMV4_6VideoProcessor.get_sliced_grid(their, (height, width), 2, 80)
        sizes = [their.find_best_resize(video_size=(height, width), allow_upscale=grid is None, **rule)]
        if grid is not None:
            sizes.append(
                MiniCPMV4_6VideoProcessor.get_refine_size(their, (height, width), grid, allow_upscale=True, **rule)
            )
        plan = processor.plan_video(clip(3, 1.0, height, width), FrameSampling(), PixelLimits(), presampled=False)
        assert [(view.height, view.width) for view in plan.views] == sizes
        assert [view.tiles for view in plan.views] == [(1, 1), *([tuple(grid)] if grid else [])]
        per_token = 8 * (2 if mode == "4x" else 4)
        per_frame = sum(height // per_token * (width // per_token) for height, width in sizes)
        assert (plan.num_tokens, plan.height, plan.width) == (3 * per_frame, *sizes[-1])


@pytest.mark.parametrize(("max_pixels", "num_slices"), [(None, 6), (6 * 96 * 64, 6), (6 * 96 * 64 - 1, 4), (1, 0)])
def test_max_pixels_lowers_the_number_of_slices(path, max_pixels, num_slices):
    plan = make_processor(path).plan_image(ImageMetadata(600, 600), PixelLimits(max_pixels=max_pixels))
    assert len(plan.segment_grids) == 1 + num_slices
    assert max_pixels in (None, 1) or plan.height * plan.width <= max_pixels


def test_max_pixels_of_a_video_are_those_of_all_frames(path):
    processor = make_processor(path)
    plans = [
        processor.plan_video(clip(35), FrameSampling(), PixelLimits(max_pixels=most), presampled=False)
        for most in (None, 4 * 64 * 192, 4 * 64 * 192 - 1)
    ]
    assert [len(plan.segment_grids) for plan in plans] == [12, 12, 4]


def test_no_slices(path, tmp_path):
    processor = make_processor(with_changed(path, tmp_path, "preprocessor_config.json", slice_mode=False))
    assert len(processor.plan_image(ImageMetadata(600, 600), PixelLimits()).segment_grids) == 1


def test_numbers_count_each_kind_of_media(path):
    processor, tokenizer = make_processor(path), Tokenizer(path)
    pads = [tokenizer.special_tokens[f"<|{kind}_pad|>"] for kind in ("image", "video", "image")]
    picture = PlannedMedia(Modality.IMAGE, processor.plan_image(ImageMetadata(20, 20), PixelLimits()))
    video = PlannedMedia(
        Modality.VIDEO, processor.plan_video(clip(9), FrameSampling(), PixelLimits(), presampled=False), (0.0,)
    )
    expanded = processor.expand(pads, [picture, video, picture])
    assert [piece for piece in expanded if isinstance(piece, str)] == ["0", "0", "1"]


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("config.json", {"downsample_mode": "4x"}, "sets downsample_mode to '16x', but config.json to '4x'"),
        ("preprocessor_config.json", {"downsample_mode": "4x"}, "to '4x', but config.json to '16x'"),
        ("preprocessor_config.json", {"patch_size": 14}, "sets patch_size to 14, but config.json to 8"),
        ("video_preprocessor_config.json", {"stack_frames": 3}, "sets stack_frames to 3; only 1"),
        ("video_preprocessor_config.json", {"do_resize": False}, "sets do_resize to False"),
        ("config.json", {"merger_times": 2}, "sets merger_times to 2; only 1"),
    ],
)
def test_what_would_be_shown_wrongly_is_not_loaded(path, tmp_path, file, values, named):
    with pytest.raises(ModelLoadError, match=named):
        make_processor(with_changed(path, tmp_path, file, **values))


def test_an_unknown_way_of_merging_is_not_loaded(path, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    changed = path
    for folder, file in ((one, "config.json"), (other, "preprocessor_config.json")):
        changed = with_changed(changed, folder, file, downsample_mode="8x")
    with pytest.raises(ModelLoadError, match="sets downsample_mode to '8x'; only 4x and 16x"):
        make_processor(changed)


def test_a_tokenizer_without_the_control_tokens_is_not_loaded(path):
    tokenizer = Tokenizer(path)
    del tokenizer.special_tokens["</slice>"]
    with pytest.raises(ModelLoadError, match="no control token </slice>"):
        create_processor(tokenizer, CheckpointFiles(path), ProcessorConfig(), MediaConfig())
