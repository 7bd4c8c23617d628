"""Molmo 2 with pictures and videos: prompts, pixels, logits and greedy tokens equal Transformers'.

However a prompt is computed: alone, in a batch, in small chunks, after a prefix hit, after preemption. All media of a prompt
see each other both ways, so what stands in the prefix cache for a picture is of use only beside the same other pictures.
"""

from dataclasses import replace

import numpy as np
import pytest

from filmstrip import LLM, SamplingParams
from filmstrip.config import EngineConfig, MediaConfig, ProcessorConfig
from filmstrip.models.loader import load_model
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.molmo2 import select_tiling
from filmstrip.processing.registry import create_processor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FrameSampling, ImageMetadata, Modality, PixelLimits, VideoMetadata
from tests.models.molmo2 import make_molmo2
from tests.parity.conftest import Case, build_prompts, image, reference_case, run_reference_program, user
from tests.parity.test_engine import check, make_engine, run

NAMES = [
    *("text_only", "image", "small_image", "large_image", "video", "ntsc_video", "webm_video", "two_videos", "mixed"),
    *("odd_count", "tall", "wide", "tiny", "chosen_frames", "many_turns"),
]
FEW = ["text_only", "image", "small_image", "video", "two_videos", "mixed", "image_turns"]
OTHER_WORDS = {
    "image_use_col_tokens": False,
    "use_single_crop_col_tokens": True,
    "use_single_crop_start_token": False,
    "video_use_col_tokens": True,
    "use_frame_special_tokens": False,
}
OTHER_TEXT = {
    "qk_norm_type": "olmo",
    "norm_after": True,
    "attention_bias": True,
    "rope_scaling_layers": [1],
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """One as most are, and one whose every switch stands the other way."""
    return {
        "molmo2": make_molmo2(tmp_path_factory.mktemp("molmo2"), seed=7),
        "switched": make_molmo2(
            tmp_path_factory.mktemp("switched"), seed=2, text=OTHER_TEXT, raw_videos=True, **OTHER_WORDS
        ),
    }


@pytest.fixture(scope="module", params=["molmo2", "switched"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def path(family, paths):
    return paths[family]


@pytest.fixture(scope="module")
def conversations(cases, media_files):
    turns = [
        user("Of this: ", image(media_files["photo"]), "First?"),
        {"role": "assistant", "content": "A bar."},
        user("And <this> ", image(media_files["strip"]), " or", image(media_files["photo"]), "?"),
    ]
    made = [
        Case("image_turns", turns),
        Case("first_turn", turns[:1]),
        Case("other_question", [user("Of this: ", image(media_files["photo"]), "Where is it, and when?")]),
    ]
    return {name: cases[name] for name in NAMES} | {case.name: case for case in made}


@pytest.fixture(scope="module")
def references(conversations, paths, tmp_path_factory):
    """Transformers' answers, from one process for both: its start takes longer than the answers of one."""
    folder = tmp_path_factory.mktemp("reference")
    specs = []
    for family, path in paths.items():
        for case in conversations.values():
            spec, arrays = reference_case(replace(case, name=f"{family}_{case.name}"), path)
            np.savez(folder / f"{spec['name']}.npz", **arrays)
            specs.append(spec)
    run_reference_program(folder, specs, "molmo2_reference.py")
    return {spec["name"]: dict(np.load(folder / f"{spec['name']}.out.npz")) for spec in specs}


@pytest.fixture(scope="module")
def expected(conversations, family, references):
    return {name: references[f"{family}_{name}"] for name in conversations}


@pytest.fixture(scope="module")
def asked(conversations, path):
    return build_prompts(conversations, path)


@pytest.fixture(scope="module")
def model(path):
    return load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2, block_size=8))


def test_answers_are_not_trivial(expected, family):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) >= len(expected) - 2
    if family == "molmo2":  # values of 0 to 255 make random models repeat themselves
        assert all(len(set(answer)) > 4 for answer in answers)


def test_prompts(asked, expected):
    for name, prompt in asked.items():
        reference = expected[name]
        assert prompt.token_ids == reference["input_ids"][0].tolist(), name
        assert prompt.positions is None
        in_media = np.zeros(len(prompt.token_ids), bool)
        for feature in prompt.features:
            for segment in feature.segments:
                in_media[segment.offset : segment.end] = True
        np.testing.assert_array_equal(in_media, reference["mm_token_type_ids"][0] == 1)
        for modality, pixels, pooling in (
            (Modality.IMAGE, "pixel_values", "image_token_pooling"),
            (Modality.VIDEO, "pixel_values_videos", "video_token_pooling"),
        ):
            features = [feature for feature in prompt.features if feature.modality is modality]
            assert bool(features) == (pixels in reference)
            if features:
                np.testing.assert_array_equal(np.concatenate(list(map(crops_of, features))), reference[pixels])
                np.testing.assert_array_equal(pooling_of(features), reference[pooling])


def crops_of(feature):
    """float32 (num_crops, patches, values) as the model gets them, values by row, column and channel."""
    rows = normalize_patches(feature.patches.torch(), feature.normalization)
    return rows.view(-1, 3, 14, 14).permute(0, 2, 3, 1).reshape(-1, 25, 588).numpy()


def pooling_of(features):
    """The tables of all tokens that show something, numbers counted from the first patch of the first item."""
    tables, first = [], 0
    for feature in features:
        num_segments = len(feature.segments)
        shown = feature.pooling[(feature.pooling >= 0).any(axis=1)]
        for _ in range(num_segments):
            tables.append(np.where(shown >= 0, shown + first, -1))
            first += feature.patches.shape[0] // num_segments
    return np.concatenate(tables)


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_in_a_batch(model, asked, expected):
    results = run(make_engine(model), asked)
    for name, result in results.items():
        check(result, expected[name])


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked(model, asked, expected, chunk):
    engine = make_engine(model, max_num_batched_tokens=chunk, prefix=False)
    results = run(engine, {name: asked[name] for name in FEW})
    for name, result in results.items():
        check(result, expected[name])


def test_after_a_prefix_hit(model, asked, expected):
    engine = make_engine(model)
    for name in FEW:
        run(engine, {name: asked[name]})
    before = engine.stats()["prefix_cache_hit_tokens"]
    for name in FEW:
        check(run(engine, {name: asked[name]})[name], expected[name])
    hit = engine.stats()["prefix_cache_hit_tokens"] - before
    assert hit == sum((len(asked[name].token_ids) - 1) // 8 * 8 for name in FEW)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_a_new_picture_changes_the_pictures_before_it(model, asked, expected, chunk):
    """The next turn shows more: of what is cached only the words before the first picture are of use, and the encoder's."""
    engine = make_engine(model, max_num_batched_tokens=chunk)
    check(run(engine, {"first_turn": asked["first_turn"]})["first_turn"], expected["first_turn"])
    encoded = engine.stats()["encoded_segments"]
    check(run(engine, {"image_turns": asked["image_turns"]})["image_turns"], expected["image_turns"])
    first = asked["image_turns"].features[0].segments[0].offset
    assert engine.stats()["prefix_cache_hit_tokens"] == first // 8 * 8 > 0
    assert engine.stats()["encoded_segments"] == encoded + 1  # the first picture is shown twice


@pytest.mark.parametrize("chunk", [7, 4096])
def test_another_question_about_the_same_pictures(model, asked, expected, chunk):
    """What is cached ends inside the picture or behind it; the rest of its tokens see all of it."""
    engine = make_engine(model, max_num_batched_tokens=chunk)
    run(engine, {"first_turn": asked["first_turn"]})
    check(run(engine, {"other_question": asked["other_question"]})["other_question"], expected["other_question"])
    end = asked["first_turn"].features[-1].segments[-1].end
    assert engine.stats()["prefix_cache_hit_tokens"] == end // 8 * 8


def test_a_prefix_that_ends_between_frames(model, asked, expected):
    """Blocks at the end of the cached prompt were given out for others: the rest of the video is computed in one step."""
    prompt = asked["video"]
    media = prompt.features[0].segments
    for cut in range(media[0].offset // 8 * 8, media[-1].end, 8):
        engine = make_engine(model, max_num_batched_tokens=16)
        run(engine, {"video": prompt})
        pool = engine.cache.pool
        engine.add_request("probe", prompt, SamplingParams(max_tokens=1))
        blocks = engine.cache.find_prefix(engine.scheduler.waiting[0])
        engine.abort("probe")
        pool.disown(blocks[cut // 8 :])
        before = engine.stats()["prefix_cache_hit_tokens"]
        check(run(engine, {"video": prompt})["video"], expected["video"])
        assert engine.stats()["prefix_cache_hit_tokens"] - before == cut


def test_after_an_encoder_hit(model, asked, expected):
    engine = make_engine(model, prefix=False)
    for name in FEW:
        run(engine, {name: asked[name]})
    encoded = engine.stats()["encoded_segments"]
    for name in FEW:
        check(run(engine, {name: asked[name]})[name], expected[name])
    assert engine.stats()["encoded_segments"] == encoded


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    """Room for all prompts in whole blocks and little more: all begin in the first step, and then all grow."""
    num_tokens = sum(len(asked[name].token_ids) for name in FEW) + (len(FEW) + 1) * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix)
    results = run(engine, {name: asked[name] for name in FEW})
    assert engine.stats()["num_preemptions"] > 0
    for name, result in results.items():
        check(result, expected[name])


def test_from_messages_to_words(paths, conversations, references):
    """Through the engine's process, with a step smaller than a picture."""
    sizes = {"kv_cache_gb": 0.02, "encoder_cache_gb": 0.01, "max_num_batched_tokens": 5}
    with LLM(paths["molmo2"], device="cpu", dtype="float32", num_threads=2, num_decode_threads=2, **sizes) as llm:
        for name in ("mixed", "image_turns"):
            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            out = llm.chat(conversations[name].messages, params)
            assert out.token_ids == references[f"molmo2_{name}"]["new_token_ids"][:8].tolist()


def test_crops_and_frames_of_any_size_and_length(paths, tmp_path):
    rng = np.random.default_rng(0)
    sides = (rng.integers(1, 4000, (300, 2)) ** rng.choice([0.5, 0.8, 1.0], (300, 1))).astype(int).clip(1)
    margins = rng.integers(0, 5, (300, 2))
    sizes = np.concatenate([sides, rng.integers(1, 13, (300, 1)), margins, rng.integers(10, 28, (300, 1))], axis=1)
    sizes[:20, 0] = 14 * margins[:20].sum(axis=1).clip(1)  # as high as the crops overlap
    rates = rng.choice([0.7, 1.0, 1.9, 2.0, 8.0, 12.5, 15, 23.976, 24, 25, 30000 / 1001, 30, 50, 60, 120], 300)
    totals = (rng.integers(1, 200_000, 300) ** rng.choice([0.3, 0.6, 1.0], 300)).astype(int).clip(1)
    np.save(tmp_path / "sizes.npy", sizes)
    np.save(tmp_path / "lengths.npy", np.stack([totals, rates, np.full(300, 5)], axis=1))
    run_reference_program(tmp_path, [], "molmo2_reference.py")
    expected = dict(np.load(tmp_path / "arithmetic.out.npz"))
    for (height, width, most, left, right, side), geometry in zip(sizes.tolist(), expected["geometry"], strict=True):
        step, overlap = 14 * (side - left - right), 14 * (left + right)
        tiling = select_tiling(height - overlap, width - overlap, step, most)
        canvas = [count * step + overlap for count in tiling]
        assert [*tiling, *canvas] == geometry.tolist(), (height, width, most, left, right, side)
    processor = processor_of(paths["molmo2"])
    ends = np.cumsum(expected["lens"])
    for total, fps, frames in zip(totals, rates, np.split(expected["frames"], ends[:-1]), strict=True):
        metadata = VideoMetadata(int(total), fps, total / fps, 64, 64, np.arange(total) / fps, "test")
        plan = processor.plan_video(metadata, FrameSampling(), PixelLimits(), presampled=False)
        assert list(plan.frame_indices) == frames[frames < total].tolist(), (total, fps)


def processor_of(path):
    return create_processor(Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), MediaConfig())


def test_wishes_go_before_the_rule(paths):
    processor = processor_of(paths["molmo2"])
    metadata = VideoMetadata(100, 10.0, 10.0, 64, 64, np.arange(100) / 10, "test")

    def frames(**wishes):
        plan = processor.plan_video(metadata, FrameSampling(**wishes), PixelLimits(), presampled=False)
        return list(plan.frame_indices)

    assert frames() == [0, 20, 40, 60, 80]
    assert frames(max_frames=4) == [0, 33, 66, 99]
    assert frames(num_frames=3) == [0, 49, 99]
    assert len(frames(min_frames=80)) == 80
    assert min(frames(start_seconds=5)) == 50
    plans = [processor.plan_image(ImageMetadata(1000, 500), PixelLimits(max_pixels=most)) for most in (None, 20_000, 1)]
    assert [(plan.height, plan.width, len(plan.views)) for plan in plans] == [(154, 112, 7), (154, 70, 4), (70, 70, 2)]
