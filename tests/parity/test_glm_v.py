"""GLM-4.1V, 4.5V and 4.6V with pictures and videos: prompts, logits and greedy tokens equal Transformers'.

However a prompt is computed: alone, in a batch, in small chunks, after a prefix hit, after preemption.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from filmstrip.config import EngineConfig, MediaConfig, ProcessorConfig
from filmstrip.models.loader import load_model
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.registry import create_processor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FrameSampling, ImageMetadata, PixelLimits, VideoMetadata
from tests.models.glm_v import make_glm4v, make_glm4v_moe, make_glm46v, make_glm46v_flash
from tests.parity import test_prompt
from tests.parity.conftest import build_prompts, reference_case, run_reference_program
from tests.parity.test_engine import check, make_engine, run

MAKERS = {"glm_4_1v": make_glm4v, "glm_4_5v": make_glm4v_moe, "glm_4_6v": make_glm46v, "mixed_up": make_glm46v_flash}
NAMES = [
    *("text_only", "image", "small_image", "large_image", "video", "ntsc_video", "two_videos", "mixed"),
    *("odd_count", "one_frame", "tall", "tiny", "chosen_frames", "many_turns"),
]
FEW = ["text_only", "image", "video", "two_videos", "mixed", "many_turns"]


@pytest.fixture(scope="module")
def conversations(cases):
    return {name: cases[name] for name in NAMES}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(scope="module", params=MAKERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def path(family, paths):
    return paths[family]


@pytest.fixture(scope="module")
def references(conversations, paths, tmp_path_factory):
    """Transformers' answers, from one process for all families: its start takes longer than the answers of one."""
    folder = tmp_path_factory.mktemp("reference")
    specs = []
    for family, path in paths.items():
        for case in conversations.values():
            spec, arrays = reference_case(replace(case, name=f"{family}_{case.name}"), path)
            np.savez(folder / f"{spec['name']}.npz", **arrays)
            specs.append(spec)
    run_reference_program(folder, specs, "glm_v_reference.py")
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


def test_answers_are_not_trivial(expected):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) >= len(expected) - 2
    assert all(len(set(answer)) > 4 for answer in answers)


def test_prompts(asked, expected):
    for name, prompt in asked.items():
        test_prompt.check(prompt, expected[name])


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_in_a_batch(model, asked, expected):
    results = run(make_engine(model), {name: asked[name] for name in FEW})
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


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    names = ["text_only", "image", "two_videos", "odd_count"]
    num_tokens = sum(len(asked[name].token_ids) for name in names) + 3 * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix, max_num_batched_tokens=256)
    results = run(engine, {name: asked[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name, result in results.items():
        check(result, expected[name])


def test_frames_of_clips_of_any_length(paths, tmp_path):
    rng = np.random.default_rng(0)
    rates = rng.choice([0.7, 1.0, 8.0, 12.5, 15, 23.976, 24, 25, 30000 / 1001, 30, 50, 60, 120], 300)
    totals = (rng.integers(2, 200_000, 300) ** rng.choice([0.3, 0.6, 1.0], 300)).astype(int).clip(2)
    np.save(tmp_path / "lengths.npy", np.stack([totals, rates], axis=1))
    run_reference_program(tmp_path, [], "glm_v_reference.py")
    expected = dict(np.load(tmp_path / "lengths.out.npz"))
    for family, checkpoint in (("glm4v", "glm_4_1v"), ("glm46v", "glm_4_6v")):
        path, media = paths[checkpoint], MediaConfig(max_video_frames=100_000)
        processor = create_processor(Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), media)
        ends = np.cumsum(expected[f"{family}_lens"])
        for total, fps, frames in zip(totals, rates, np.split(expected[family], ends[:-1]), strict=True):
            metadata = VideoMetadata(int(total), fps, total / fps, 64, 64, np.arange(total) / fps, "test")
            plan = processor.plan_video(metadata, FrameSampling(), PixelLimits(), presampled=False)
            # Of clips shorter than a sixth of a second the later rule shows nothing; here their first frame.
            assert list(plan.frame_indices) == (frames.tolist() or [0, 0]), (family, total, fps)


def test_checkpoints_that_name_no_processor_get_their_architectures(paths, tmp_path):
    for source in Path(paths["glm_4_6v"]).iterdir():
        if source.suffix in {".json", ".jinja"} and "processor" not in source.name:
            (tmp_path / source.name).write_text(source.read_text())
    path = str(tmp_path)
    metadata = VideoMetadata(100, 10.0, 10.0, 64, 64, np.arange(100) / 10, "test")
    chosen = []
    for architecture in ("Glm46VForConditionalGeneration", "Glm4vForConditionalGeneration"):
        config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [architecture]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        processor = create_processor(Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), MediaConfig())
        plan = processor.plan_video(metadata, FrameSampling(), PixelLimits(), presampled=False)
        chosen.append(len(plan.frame_indices))
    assert chosen == [60, 20]


def test_wishes_go_before_the_rule(paths):
    path = paths["glm_4_6v"]
    processor = create_processor(Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), MediaConfig())
    metadata = VideoMetadata(100, 10.0, 10.0, 64, 64, np.arange(100) / 10, "test")

    def frames(**wishes):
        return list(
            processor.plan_video(metadata, FrameSampling(**wishes), PixelLimits(), presampled=False).frame_indices
        )

    assert len(frames()) == 60
    assert frames(max_frames=4) == [0, 33, 66, 99]
    assert frames(num_frames=3) == [0, 49, 99]
    assert len(frames(min_frames=80)) == 80
    assert min(frames(start_seconds=5)) == 50
    limits = PixelLimits(max_pixels=20_000)
    plan = processor.plan_image(ImageMetadata(1000, 500), limits)
    assert 10_000 < plan.height * plan.width <= 20_000
