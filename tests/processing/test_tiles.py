"""What families of tiles show and refuse, beyond what parity with the references says: wishes, limits, broken settings."""

import json
from pathlib import Path

import numpy as np
import pytest

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig, ProcessorConfig
from filmstrip.errors import InvalidRequestError, ModelLoadError
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Placeholder
from filmstrip.processing.prompt_builder import PromptBuilder
from filmstrip.processing.registry import create_processor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FrameSampling, ImageMetadata, Modality, PatchLayout, PixelLimits, VideoMetadata, View
from tests.models import tiles
from tests.models.llama4 import make_llama4


def make_processor(path, **media):
    return create_processor(Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), MediaConfig(**media))


def clip(total, fps=10.0):
    return VideoMetadata(total, fps, total / fps, 90, 160, np.arange(total) / fps, "test")


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    return tiles.make_internvl(tmp_path_factory.mktemp("internvl"))


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
    assert plan.num_tokens == processor.num_video_tokens(len(plan.frame_indices))
    assert plan.grid_thw == (len(plan.frame_indices), 1, 1)
    return list(plan.frame_indices)


def test_frames_by_the_checkpoint_or_as_asked(internvl):
    processor = make_processor(internvl)
    assert frames(processor, 100) == [10, 30, 50, 70, 90]
    assert frames(processor, 3) == [0, 1, 2]
    assert frames(processor, 1) == [0]
    assert frames(processor, 100, start_seconds=4, end_seconds=4.95) == [41, 43, 45, 47, 49]
    assert frames(processor, 100, num_frames=3) == [0, 49, 99]
    assert frames(processor, 100, fps=0.4) == [0, 33, 66, 99]
    assert frames(processor, 100, max_frames=3) == [0, 49, 99]
    assert frames(processor, 100, min_frames=6) == [0, 19, 39, 59, 79, 99]
    assert frames(processor, 7, presampled=True) == list(range(7))
    assert frames(processor, 7, presampled=True, num_frames=3) == [0, 3, 6]
    assert frames(processor, 7, presampled=True, start_seconds=0.2, end_seconds=0.5) == [2, 3, 4, 5]
    assert frames(make_processor(internvl, max_video_frames=2), 100) == [0, 99]


def test_a_checkpoint_without_a_rule_shows_32_frames(internvl, tmp_path):
    processor = make_processor(with_changed(internvl, tmp_path, "video_preprocessor_config.json", num_frames=None))
    assert len(frames(processor, 900)) == 32
    assert frames(processor, 20) == list(range(20))


def test_a_checkpoint_with_a_rate(internvl, tmp_path):
    rate = {"num_frames": None, "fps": 2, "initial_shift": 0}
    processor = make_processor(with_changed(internvl, tmp_path, "video_preprocessor_config.json", **rate))
    assert frames(processor, 40) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert frames(processor, 3) == [0]


def test_videos_without_settings_of_their_own_are_shown_by_those_for_images(internvl, tmp_path):
    path = with_changed(internvl, tmp_path, "preprocessor_config.json", size={"height": 28, "width": 28})
    (tmp_path / "video_preprocessor_config.json").unlink()
    plan = make_processor(path).plan_video(clip(40), FrameSampling(), PixelLimits(), presampled=False)
    assert (plan.height, plan.width, plan.num_tokens) == (28, 28, 32)


@pytest.mark.parametrize(
    ("max_pixels", "size", "num_tiles"),
    [(None, (112, 168), 7), (6 * 56**2, (112, 168), 7), (3 * 56**2 - 1, (56, 112), 3), (1, (56, 56), 1)],
)
def test_max_pixels_lowers_the_number_of_tiles(internvl, max_pixels, size, num_tiles):
    plan = make_processor(internvl).plan_image(ImageMetadata(400, 600), PixelLimits(max_pixels=max_pixels))
    assert (plan.height, plan.width) == size
    assert plan.patches_shape == (num_tiles, 3 * 56 * 56)
    assert plan.num_tokens == 4 * num_tiles


@pytest.fixture(scope="module")
def llama4(tmp_path_factory):
    return make_llama4(tmp_path_factory.mktemp("llama4"))


@pytest.mark.parametrize(
    ("max_pixels", "size", "num_tiles"),
    [(None, (112, 168), 7), (6 * 56**2 - 1, (112, 112), 5), (3 * 56**2, (56, 112), 3), (1, (56, 56), 1)],
)
def test_max_pixels_lowers_the_number_of_tiles_of_llama4(llama4, max_pixels, size, num_tiles):
    plan = make_processor(llama4).plan_image(ImageMetadata(400, 600), PixelLimits(max_pixels=max_pixels))
    assert (plan.height, plan.width) == size
    assert plan.patches_shape == (num_tiles, 3 * 56 * 56)
    assert plan.num_tokens == 4 * num_tiles


def test_words_between_tiles_of_llama4(llama4):
    processor, ids = make_processor(llama4), Tokenizer(llama4).special_tokens
    named = {token_id: token for token, token_id in ids.items()}
    for shape, words in (
        ((100, 150), "start P x P x P y P x P x P y image P end"),
        ((150, 50), "start P y P y P y image P end"),
        ((30, 56), "start image P end"),
    ):
        plan = processor.plan_image(ImageMetadata(*shape), PixelLimits())
        pieces = processor.expand([ids["<|image|>"]], [PlannedMedia(Modality.IMAGE, plan)])
        found = ["P" if isinstance(piece, Placeholder) else named[piece].strip("<|>") for piece in pieces[1:]]
        full = {"start": "image_start", "end": "image_end", "x": "tile_x_separator", "y": "tile_y_separator"}
        assert found == [full.get(word, word) for word in words.split()]


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        (
            "preprocessor_config.json",
            {"size": {"height": 28, "width": 28}},
            "tiles of 56 pixels and 4 tokens .* 28 and 1",
        ),
        ("processor_config.json", {"pixel_shuffle_ratio": 0.25}, "tiles of 56 pixels and 4 tokens .* 56 and 1"),
        ("preprocessor_config.json", {"max_patches": 0}, "sets max_patches to 0; it must be at least 1"),
    ],
)
def test_tiles_of_llama4_that_the_model_does_not_take_are_not_loaded(llama4, tmp_path, file, values, named):
    with pytest.raises(ModelLoadError, match=named):
        make_processor(with_changed(llama4, tmp_path, file, **values))


def test_the_number_that_the_first_files_of_llama4_have_for_true(llama4, tmp_path):
    """Tokenizer and processor read a config.json that Transformers refuses by now, too."""
    text = json.loads((Path(llama4) / "config.json").read_text())["text_config"] | {"attn_temperature_tuning": 4}
    path = with_changed(llama4, tmp_path, "config.json", text_config=text)
    assert make_processor(path).modalities == {Modality.IMAGE}
    tokenizers = [Tokenizer(each) for each in (llama4, path)]
    facts = [(each.special_tokens, each.first_ids, each.encode_text(" A <|patch|> b")) for each in tokenizers]
    assert facts[0] == facts[1]
    assert type(tokenizers[0].hf) is type(tokenizers[1].hf)


def test_items_and_marks_of_the_template_must_match(internvl):
    processor = make_processor(internvl)
    mark = Tokenizer(internvl).special_tokens["<IMG_CONTEXT>"]
    plan = processor.plan_image(ImageMetadata(10, 10), PixelLimits())
    planned = PlannedMedia(Modality.IMAGE, plan, ())
    assert len(processor.expand(["a", mark], [planned])) == 4
    with pytest.raises(InvalidRequestError, match="shows an image that the messages do not have"):
        processor.expand([mark, mark], [planned])
    with pytest.raises(InvalidRequestError, match="does not show all media"):
        processor.expand(["a"], [planned])


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        (
            "preprocessor_config.json",
            {"size": {"height": 56, "width": 28}},
            "size in preprocessor_config.json must be a",
        ),
        ("preprocessor_config.json", {"resample": 1}, "sets resample to 1"),
        ("preprocessor_config.json", {"do_normalize": False}, "sets do_normalize to False"),
        ("video_preprocessor_config.json", {"rescale_factor": 0.5}, "sets rescale_factor to 0.5"),
    ],
)
def test_what_would_be_shown_wrongly_is_not_loaded(internvl, tmp_path, file, values, named):
    path = with_changed(internvl, tmp_path, file, **values)
    with pytest.raises(ModelLoadError, match=named):
        make_processor(path)


def test_a_tokenizer_without_the_control_tokens_is_not_loaded(internvl):
    tokenizer = Tokenizer(internvl)
    del tokenizer.special_tokens["</img>"]
    with pytest.raises(ModelLoadError, match="no control token </img>"):
        create_processor(tokenizer, CheckpointFiles(internvl), ProcessorConfig(), MediaConfig())


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiles.make_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize(
    ("settings", "shape", "view"),
    [
        ({}, (100, 200), View(56, 56, 56, 112, 0, -28)),
        ({}, (201, 100), View(56, 56, 112, 56, -28, 0)),
        ({"size": 40}, (100, 200), View(56, 56, 40, 80, 8, -12)),
        ({"size": {"height": 56, "width": 56}}, (100, 200), View(56, 56, 56, 56)),
        ({"do_center_crop": False, "size": {"height": 28, "width": 28}}, (9, 7), View(28, 28, 28, 28)),
    ],
)
def test_llava_cuts_out_the_middle(llava, tmp_path, settings, shape, view):
    processor = make_processor(with_changed(llava, tmp_path, "preprocessor_config.json", **settings))
    plan = processor.plan_image(ImageMetadata(*shape), PixelLimits())
    assert plan.views == (view,)
    assert plan.num_tokens == (view.height // 14) ** 2


@pytest.mark.parametrize(
    ("own", "num_tokens"),
    [
        ({"num_additional_image_tokens": None}, 16),
        ({"vision_feature_select_strategy": "full"}, 17),
        ({"vision_feature_select_strategy": "full", "num_additional_image_tokens": None}, 16),
        ({"num_additional_image_tokens": 0}, 15),
    ],
)
def test_llava_counts_the_class_token(llava, tmp_path, own, num_tokens):
    processor = make_processor(with_changed(llava, tmp_path, "processor_config.json", **own))
    assert processor.plan_image(ImageMetadata(10, 20), PixelLimits()).num_tokens == num_tokens


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "names the image processor 'PixtralImageProcessor'"),
        ({"do_pad": True}, "sets do_pad to True"),
    ],
)
def test_llava_with_other_towers_is_not_loaded(llava, tmp_path, values, named):
    with pytest.raises(ModelLoadError, match=named):
        make_processor(with_changed(llava, tmp_path, "preprocessor_config.json", **values))


def test_llava_next_needs_tiles_of_the_size_it_resizes_to(tmp_path_factory, tmp_path):
    path = tiles.make_llava_next(tmp_path_factory.mktemp("llava_next"))
    size = {"shortest_edge": 28}
    with pytest.raises(ModelLoadError, match="tiles of 56 pixels but resizes to 28"):
        make_processor(with_changed(path, tmp_path, "preprocessor_config.json", size=size))


def test_llava_onevision_needs_a_number_of_tiles(tmp_path_factory, tmp_path):
    path = tiles.make_llava_onevision(tmp_path_factory.mktemp("llava_onevision"))
    with pytest.raises(ModelLoadError, match="vision_aspect_ratio to 'square'"):
        make_processor(with_changed(path, tmp_path, "config.json", vision_aspect_ratio="square"))


def test_a_prompt_begins_as_the_tokenizer_says_once(llava):
    processor, tokenizer = make_processor(llava), Tokenizer(llava)
    first = tokenizer.special_tokens["<s>"]
    assert tokenizer.first_ids == [first]
    assert processor.expand(["Hi"], []) == processor.expand([first, "Hi"], []) == [first, "Hi"]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return tiles.make_deepseek_vl_hybrid(tmp_path_factory.mktemp("deepseek_vl_hybrid"))


@pytest.mark.parametrize(
    ("shape", "resized", "place"),
    [
        ((80, 80), (80, 80), (0, 0)),
        ((60, 160), (30, 80), (25, 0)),
        ((160, 61), (80, 30), (0, 25)),  # 30.5, to the even number
        ((160, 63), (80, 32), (0, 24)),  # 31.5
        ((3, 4000), (14, 80), (33, 0)),  # never less than min_size
    ],
)
def test_deepseek_vl_pads_to_a_square_and_makes_that_small(hybrid, shape, resized, place):
    plan = make_processor(hybrid).plan_image(ImageMetadata(*shape), PixelLimits())
    large, small = plan.views
    assert large == View(80, 80, *resized, *place, fill=(122, 116, 104))
    assert small == View(56, 56, 56, 56, of_previous=True)
    assert plan.layout == PatchLayout(8, 1, 1)
    assert (plan.height, plan.width, plan.num_tokens) == (80, 80, 16)
    assert plan.grid_thw == (1, 10 * 10 + 7 * 7, 1)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        (
            "preprocessor_config.json",
            {"size": {"height": 70, "width": 70}},
            "70 pixels to a vision tower that takes 56",
        ),
        ("preprocessor_config.json", {"high_res_size": 72}, r"takes 80 \(image_size of high_res_vision_config"),
        ("preprocessor_config.json", {"high_res_size": {"height": 80}}, "size in the high_res_ part of preprocessor"),
        ("preprocessor_config.json", {"high_res_resample": 2}, "high_res_resample to 2 and resample to 3"),
        ("preprocessor_config.json", {"do_pad": False}, "do_pad to False"),
        ("preprocessor_config.json", {"min_size": 57}, "min_size to 57, which is more than its size, 56"),
        ("processor_config.json", {"num_image_tokens": None}, "num_image_tokens to 576, but the vision tower makes 16"),
    ],
)
def test_deepseek_vl_whose_files_do_not_fit_each_other_is_not_loaded(hybrid, tmp_path, file, values, named):
    with pytest.raises(ModelLoadError, match=named):
        make_processor(with_changed(hybrid, tmp_path, file, **values))


def test_deepseek_vl_in_the_format_of_its_first_release_is_not_loaded(hybrid, tmp_path):
    """Said before anything else that such files lack, such as a chat template."""
    path = with_changed(hybrid, tmp_path, "config.json", architectures=["MultiModalityCausalLM"])
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelLoadError, match="MultiModalityCausalLM, the format of a first release"):
        PromptBuilder(LLMConfig(EngineConfig(path)))
