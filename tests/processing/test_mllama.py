"""What Mllama's processor shows and refuses, beyond what parity with the reference says."""

import pytest

from filmstrip.errors import ModelLoadError
from filmstrip.types import ImageMetadata, PixelLimits, View
from tests.models.mllama import make_mllama
from tests.processing.test_tiles import make_processor, with_changed


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_mllama(tmp_path_factory.mktemp("mllama"))


@pytest.mark.parametrize(
    ("max_pixels", "grid", "resized"),
    [
        (None, (1, 2, 2), (84, 112)),
        (4 * 56**2 - 1, (1, 1, 2), (56, 74)),
        (1, (1, 1, 1), (42, 56)),
    ],
)
def test_max_pixels_lowers_the_number_of_tiles(path, max_pixels, grid, resized):
    plan = make_processor(path).plan_image(ImageMetadata(300, 400), PixelLimits(max_pixels=max_pixels))
    assert plan.grid_thw == grid
    assert plan.views == (View(56 * grid[1], 56 * grid[2], *resized),)
    assert plan.patches_shape == (grid[1] * grid[2], 3 * 56 * 56)
    assert plan.num_tokens == 1


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        (
            "preprocessor_config.json",
            {"max_image_tiles": 3},
            "makes up to 3 tiles of 56 pixels .* made for up to 4 of 56",
        ),
        ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "makes up to 4 tiles of 28 pixels"),
        ("preprocessor_config.json", {"do_pad": False}, "sets do_pad to False"),
        ("config.json", {"text_config": {"vocab_size": 100}}, "image token has the id 525, but the model has 108"),
    ],
)
def test_what_would_be_shown_wrongly_is_not_loaded(path, tmp_path, file, values, named):
    with pytest.raises(ModelLoadError, match=named):
        make_processor(with_changed(path, tmp_path, file, **values))
