"""What Phi-4-multimodal's processor shows and refuses, beyond what parity with the reference says."""

import json

import pytest

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.errors import MediaError, ModelLoadError
from filmstrip.models.dynamic_hd import CropGrid
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.registry import create_processor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import ImageMetadata, PixelLimits, View
from tests.models.phi4_multimodal import make_phi4_multimodal


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_phi4_multimodal(tmp_path_factory.mktemp("model"))


def make_processor(path):
    return create_processor(Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), MediaConfig())


def plan(path, height, width, max_pixels=None):
    return make_processor(path).plan_image(ImageMetadata(height, width), PixelLimits(max_pixels=max_pixels))


def test_phi_3_vision_is_refused_with_the_nearest_models(path, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Phi3VForCausalLM"]}))
    message = r"Phi3VForCausalLM \(Phi-3-vision\), which is not supported: .* one is Phi4Multimodal"
    with pytest.raises(ModelLoadError, match=message):
        create_processor(Tokenizer(path), CheckpointFiles(str(tmp_path)), ProcessorConfig(), MediaConfig())


def test_a_picture_lies_on_white_crops(path):
    shown = plan(path, 300, 500)
    assert shown.views == (View(448, 672, 403, 672, fill=255),)
    assert (shown.grid_thw, shown.patches_shape) == ((1, 2, 3), (6, 3 * 224**2))
    # 403 rows of pixels are 58 of 64 patches, and those 29 features; the whole has 16 x 16.
    assert shown.num_tokens == 29 * (48 + 1) + 1 + 16 * 17


def test_fewer_pixels_are_fewer_crops(path):
    assert plan(path, 300, 500, 4 * 224**2).grid_thw == (1, 1, 2)
    assert plan(path, 300, 500, 1).grid_thw == (1, 1, 1)
    assert plan(path, 10_000, 10_000).grid_thw == (1, 2, 2)


@pytest.mark.parametrize(("height", "width"), [(6, 5000), (5000, 6)])
def test_extreme_shapes_are_refused(path, height, width):
    with pytest.raises(MediaError, match=rf"{width} x {height} pixels is shown as .*at least 10"):
        plan(path, height, width)


def test_features_of_an_odd_number_of_patches():
    grid = CropGrid(2, 1, 35, 7)  # 5 patches a side, 3 features
    assert (grid.patches_per_side, grid.features_per_side) == (5, 3)
    assert grid.resized_size(50, 30) == (58, 35)
    assert grid.shown_patches(50, 30) == (9, 5)  # 12 of 70 rows of pixels are padding: one patch and a part of one
    assert grid.shown_features(50, 30) == (3 + 2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 2}, r"sets resample to 2; only 3 \(bicubic\)"),
        ({"patch_size": 14}, "config.json has a patch_size of 7 pixels, but preprocessor_config.json makes it 14"),
        ({"size": {"height": 448, "width": 448}}, "crop_size of 224 pixels, but preprocessor_config.json makes it 448"),
        ({"do_normalize": False}, "do_normalize"),
    ],
)
def test_settings_that_cannot_be_reproduced(path, tmp_path, settings, message):
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
    ):
        (tmp_path / name).write_bytes((CheckpointFiles(path).text(name) or "").encode())
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | settings))
    with pytest.raises(ModelLoadError, match=message):
        make_processor(str(tmp_path))
