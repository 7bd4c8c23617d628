"""MiniCPM-V 4.6 with pictures and videos: prompts, pixels, logits and greedy tokens equal Transformers'.

However a prompt is computed: alone, in a batch, in chunks shorter than the convolution, from a kept state, after an encoder
hit, after preemption. With both ways of merging patches.
"""

from dataclasses import replace

import numpy as np
import pytest

from filmstrip import LLM, SamplingParams
from filmstrip.config import EngineConfig
from filmstrip.engine import kv_cache
from filmstrip.models.loader import load_model
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.types import Modality
from tests.models.minicpm_v import PATCH_SIZE, make_minicpm_v
from tests.parity.conftest import Case, build_prompts, image, reference_case, run_reference_program, user, video
from tests.parity.test_engine import check, run
from tests.parity.test_qwen3_5 import make_engine

NAMES = [
    "text_only",
    "image",
    "small_image",
    "large_image",
    "video",
    "ntsc_video",
    "two_videos",
    "mixed",
    "odd_count",
    "tall",
    "wide",
    "tiny",
    "large",
    "chosen_frames",
    "many_turns",
]
CHECKPOINTS = {
    "minicpm_v_16x": {"downsample_mode": "16x"},
    "minicpm_v_4x": {"downsample_mode": "4x", "use_image_id": False},
}


@pytest.fixture(autouse=True)
def close_checkpoints(monkeypatch):
    """States are kept close enough to each other for prompts as short as these."""
    monkeypatch.setattr(kv_cache, "MIN_TOKENS_PER_CHECKPOINT", 16)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {name: make_minicpm_v(tmp_path_factory.mktemp("model"), **how) for name, how in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def conversations(cases, media_files):
    """Some of the conversations, and other questions about pictures and clips of theirs."""
    m = media_files
    again = [
        user(image(m["photo"]), "First?"),
        {"role": "assistant", "content": "A bar."},
        user("And <this> ", image(m["strip"]), " or", image(m["photo"]), "?"),
    ]
    made = [
        Case("image_turns", again),
        Case("other_question", [user(video(m["clip"]), "What is in the picture? Say it in two words.")]),
        Case("after_picture", [user(image(m["photo"]), video(m["clip"]), "What happens?")]),
    ]
    return {name: cases[name] for name in NAMES} | {case.name: case for case in made}


@pytest.fixture(scope="module")
def references(conversations, paths, tmp_path_factory):
    """Transformers' answers, from one process for all checkpoints."""
    folder = tmp_path_factory.mktemp("reference")
    specs = []
    for checkpoint, path in paths.items():
        for case in conversations.values():
            spec, arrays = reference_case(replace(case, name=f"{checkpoint}_{case.name}"), path)
            np.savez(folder / f"{spec['name']}.npz", **arrays)
            specs.append(spec)
    run_reference_program(folder, specs, "tile_reference.py")
    return {spec["name"]: dict(np.load(folder / f"{spec['name']}.out.npz")) for spec in specs}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def expected(conversations, checkpoint, references):
    return {name: references[f"{checkpoint}_{name}"] for name in conversations}


@pytest.fixture(scope="module")
def asked(conversations, checkpoint, paths):
    return build_prompts(conversations, paths[checkpoint])


@pytest.fixture(scope="module")
def model(checkpoint, paths):
    return load_model(EngineConfig(paths[checkpoint], device="cpu", dtype="float32", num_threads=2, block_size=8))


def test_answers_are_not_trivial(expected):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) >= len(expected) - 1
    assert all(len(set(answer)) > 4 for answer in answers)


def test_prompts(asked, expected):
    for name, prompt in asked.items():
        assert prompt.token_ids == expected[name]["input_ids"][0].tolist(), name
        assert prompt.positions is None
        for modality, suffix in ((Modality.IMAGE, ""), (Modality.VIDEO, "_videos")):
            check_pixels(
                prompt,
                modality,
                expected[name].get(f"pixel_values{suffix}"),
                expected[name].get(f"target_sizes{suffix}"),
            )


def check_pixels(prompt, modality, pixels, sizes):
    """The reference lays patches side by side: (1, 3, size, num_patches * size)."""
    features = [feature for feature in prompt.features if feature.modality is modality]
    assert bool(features) == (pixels is not None)
    if not features:
        return
    assert [grid for feature in features for grid in feature.segment_grids] == [tuple(size) for size in sizes.tolist()]
    rows = np.concatenate([normalize_patches(f.patches.torch(), f.normalization).numpy() for f in features])
    theirs = pixels.reshape(3, PATCH_SIZE, -1, PATCH_SIZE).transpose(2, 0, 1, 3).reshape(len(rows), -1)
    np.testing.assert_array_equal(rows, theirs)


def test_slices_are_of_many_shapes(asked):
    """Wholes and slices, square and not, of all kinds of pictures: else the tests would prove little."""
    grids = {
        name: [grid for feature in prompt.features for grid in feature.segment_grids] for name, prompt in asked.items()
    }
    assert len({grid for each in grids.values() for grid in each}) > 5
    assert any(len(set(each)) > 1 for name, each in grids.items() if len(asked[name].features) == 1)
    assert (len(grids["large_image"]), len(grids["video"]), len(grids["tiny"])) == (7, 3 * 3, 4)


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_in_a_batch(model, asked, expected):
    results = run(make_engine(model), asked)
    for name, result in results.items():
        check(result, expected[name])


@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_chunked(model, asked, expected, chunk):
    names = ["mixed", "two_videos", "image_turns", "text_only"] if chunk > 3 else ["image", "text_only"]
    results = run(make_engine(model, max_num_batched_tokens=chunk, prefix=False), {name: asked[name] for name in names})
    for name in names:
        check(results[name], expected[name])


def test_from_kept_states(model, asked, expected):
    """The same prompts again, another question about a clip that the cache knows, and that clip behind a picture."""
    engine = make_engine(model)
    names = ["image", "video", "mixed", "many_turns"]
    for name in names:
        run(engine, {name: asked[name]})
    for name in [*names, "other_question", "after_picture"]:
        before = engine.stats()["prefix_cache_hit_tokens"]
        check(run(engine, {name: asked[name]})[name], expected[name])
        hit = engine.stats()["prefix_cache_hit_tokens"] - before
        assert hit > kv_cache.MIN_TOKENS_PER_CHECKPOINT or name == "after_picture", name


def test_after_an_encoder_hit(model, asked, expected):
    engine = make_engine(model, prefix=False)
    names = ["image", "large_image", "video", "mixed", "image_turns"]
    for name in names:
        run(engine, {name: asked[name]})
    encoded = engine.stats()["encoded_segments"]
    for name in [*names, "other_question"]:
        check(run(engine, {name: asked[name]})[name], expected[name])
    assert engine.stats()["encoded_segments"] == encoded


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    names = ["video", "image", "text_only", "mixed", "odd_count"]
    num_tokens = sum(len(asked[name].token_ids) for name in names) + 4 * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix, max_num_batched_tokens=256)
    results = run(engine, {name: asked[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name in names:
        check(results[name], expected[name])


def test_from_messages_to_words(paths, conversations, references):
    """Through the engine's process, with a step smaller than a tile."""
    name = "minicpm_v_16x"
    sizes = {"kv_cache_gb": 0.02, "encoder_cache_gb": 0.01, "max_num_batched_tokens": 3}
    with LLM(paths[name], device="cpu", dtype="float32", num_threads=2, num_decode_threads=2, **sizes) as llm:
        for case in ("mixed", "image_turns"):
            out = llm.chat(conversations[case].messages, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
            assert out.token_ids == references[f"{name}_{case}"]["new_token_ids"][:8].tolist()
