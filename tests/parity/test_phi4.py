"""Phi-4-multimodal: prompts, pixels, masks, logits and greedy tokens equal Transformers'.

However a prompt is computed, with and without a vision adapter, shorter and longer than where LongRoPE changes, and across.
The reference of requests that show a picture, where there is an adapter, is the checkpoint with the adapter in its weights.
"""

from pathlib import Path

import numpy as np
import pytest

from filmstrip import LLM, SamplingParams
from filmstrip.config import EngineConfig
from filmstrip.models.dynamic_hd import CropGrid, choose_grid
from filmstrip.models.loader import load_model
from filmstrip.models.phi4_multimodal import add_whole, patch_masks
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.types import ProcessedPrompt
from tests.models.phi4_multimodal import (
    CROP_SIZE,
    MAX_CROPS,
    ORIGINAL_LEN,
    PATCH_SIZE,
    add_adapter,
    make_phi4_multimodal,
    merge_adapter,
)
from tests.parity.conftest import (
    MAX_NEW_TOKENS,
    Case,
    build_prompts,
    image,
    reference_case,
    run_reference_program,
    user,
)
from tests.parity.test_engine import check, make_engine, run

KINDS = ["plain", "adapted", "odd"]
"""Without an adapter; with one; with an odd number of patches along a crop's side."""
CASES = ["text_only", "image", "small_image", "large_image", "image_turns", "late_image"]
STEPWISE = ["crossing_image", "crossing_text", "long_text", "early_text"]
SOME = ["text_only", "image", "small_image", "image_turns", "crossing_image", "long_text"]
PREEMPTED = ["text_only", "small_image", "large_image", "long_text"]
"""Prompts that do not begin alike and do not restart: either would leave room for all."""
ODD_CROP = 217
SIZES = [
    (1, 1),
    (30, 41),
    (448, 448),
    (449, 448),
    (2000, 20),
    (20, 2000),
    (60, 5000),
    (1000, 40),
    (900, 1350),
    (672, 672),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A checkpoint of each kind, and ``merged``: the adapted one's reference where its adapter is on."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("plain", "adapted"):
        make_phi4_multimodal(folder / kind)
    make_phi4_multimodal(folder / "odd", crop_size=ODD_CROP, seed=3)
    add_adapter(folder / "adapted")
    merge_adapter(folder / "adapted", folder / "merged")
    return {kind: str(folder / kind) for kind in [*KINDS, "merged"]}


@pytest.fixture(scope="module")
def conversations(cases, media_files, paths):
    """Short ones and long ones; the answer of ``crossing_image`` begins short and ends long."""
    again = [
        user(image(media_files["photo"]), "First?"),
        {"role": "assistant", "content": "A bar."},
        user("And <this> ", image(media_files["strip"]), " or", image(media_files["photo"]), "?"),
    ]
    made = {name: cases[name] for name in CASES if name in cases}
    made["image_turns"] = Case("image_turns", again)
    made["late_image"] = Case(
        "late_image", [user("A film strip and more. " * 10, image(media_files["small"]), "What?")]
    )

    def filled(num_words):
        return Case("crossing_image", [user(image(media_files["photo"]), "One by one: " + "film " * num_words)])

    lengths = [len(build_prompts({"filled": filled(count)}, paths["plain"])["filled"].token_ids) for count in (50, 100)]
    rate = (lengths[1] - lengths[0]) / 50
    made["crossing_image"] = filled(50 + int((ORIGINAL_LEN - 12 - lengths[0]) / rate))
    return made


@pytest.fixture(scope="module")
def prompts(conversations, paths):
    """For each kind prompts of all conversations and of token ids alone."""
    built = {"plain": build_prompts(conversations, paths["plain"])}
    built["adapted"] = build_prompts(conversations, paths["adapted"])
    built["odd"] = build_prompts({name: conversations[name] for name in CASES}, paths["odd"])
    token_ids = np.random.default_rng(0).integers(0, 500, ORIGINAL_LEN + 300).tolist()
    for kind in ("plain", "adapted"):
        late = built[kind]["late_image"]
        built[kind]["crossing_text"] = ProcessedPrompt(token_ids[: ORIGINAL_LEN - 12])
        built[kind]["long_text"] = ProcessedPrompt(token_ids)
        built[kind]["early_text"] = ProcessedPrompt(late.token_ids[: late.features[0].segments[0].offset])
    for name in ("crossing_image", "crossing_text"):
        assert ORIGINAL_LEN - MAX_NEW_TOKENS + 2 < len(built["plain"][name].token_ids) < ORIGINAL_LEN
    return built


@pytest.fixture(scope="module")
def references(conversations, prompts, paths, tmp_path_factory):
    """Transformers' answers, from one process; of the crops of some sizes, too."""
    folder = tmp_path_factory.mktemp("reference")
    specs = []
    for checkpoint in ("plain", "merged", "odd"):
        for name, prompt in prompts[checkpoint if checkpoint in KINDS else "adapted"].items():
            if checkpoint == "merged" and not prompt.features:
                continue
            case = conversations.get(name, Case(name, []))
            spec, arrays = reference_case(case, paths[checkpoint])
            spec |= {"name": f"{checkpoint}_{name}", "stepwise": name in STEPWISE}
            if not case.messages:
                spec["token_ids"] = prompt.token_ids
            np.savez(folder / f"{spec['name']}.npz", **arrays)
            specs.append(spec)
    sizes = np.concatenate([SIZES, np.random.default_rng(0).integers(1, 2500, (60, 2))])
    np.savez(folder / "sizes.npz", sizes=sizes)
    run_reference_program(folder, specs, "phi4_reference.py")
    answers = {spec["name"]: dict(np.load(folder / f"{spec['name']}.out.npz")) for spec in specs}
    return answers | {"sizes": {"sizes": sizes} | dict(np.load(folder / "sizes.out.npz"))}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def asked(prompts, kind):
    return prompts[kind]


@pytest.fixture(scope="module")
def expected(asked, kind, references):
    def checkpoint(prompt):
        return ("merged" if prompt.features else "plain") if kind == "adapted" else kind

    return {name: references[f"{checkpoint(prompt)}_{name}"] for name, prompt in asked.items()}


@pytest.fixture(scope="module")
def model(paths, kind):
    return load_model(EngineConfig(paths[kind], device="cpu", dtype="float32", num_threads=2, block_size=8))


def some_of(asked, names=SOME):
    return [name for name in names if name in asked]


def test_answers_are_not_trivial(expected, references):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) >= len(expected) - 1
    assert all(len(set(answer)) > 4 for answer in answers)
    for name in ("image", "image_turns", "crossing_image"):  # the adapter says something else
        assert (references[f"plain_{name}"]["new_token_ids"] != references[f"merged_{name}"]["new_token_ids"]).any()


def test_prompts(asked, expected, kind):
    crop_size = ODD_CROP if kind == "odd" else CROP_SIZE
    for name, prompt in asked.items():
        assert prompt.token_ids == expected[name]["input_ids"][0].tolist(), name
        if not prompt.features or name in STEPWISE:
            continue
        theirs = expected[name]
        for item, pixels, masks in zip(
            prompt.features, theirs["image_pixel_values"], theirs["image_attention_mask"], strict=True
        ):
            _, rows, columns = item.grid_thw
            crops = normalize_patches(item.patches.torch(), item.normalization)
            ours = add_whole(crops.view(rows, columns, 3, crop_size, crop_size)).numpy()
            np.testing.assert_array_equal(ours, pixels[: len(ours)])
            grid = CropGrid(rows, columns, crop_size, PATCH_SIZE)
            np.testing.assert_array_equal(patch_masks(grid, item.source_size).numpy(), masks[: len(ours)])
            assert not pixels[len(ours) :].any()


def test_crops_of_all_sizes(references):
    """Canvas, patches that show something and tokens; what is refused there is too small a side here."""
    for (height, width), answer in zip(
        references["sizes"]["sizes"].tolist(), references["sizes"]["answers"], strict=True
    ):
        for max_crops, (canvas_height, canvas_width, num_shown, num_tokens) in zip(
            (MAX_CROPS, 36), answer, strict=True
        ):
            grid = choose_grid(height, width, CROP_SIZE, PATCH_SIZE, max_crops)
            if num_tokens == 0:
                assert min(grid.resized_size(height, width)) < 10
                continue
            assert grid.canvas_size == (canvas_height, canvas_width), (height, width)
            rows, columns = grid.shown_patches(height, width)
            assert (rows * columns, grid.num_tokens(height, width)) == (num_shown, num_tokens), (height, width)


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_in_a_batch(model, asked, expected):
    """Short and long ones, with the adapter and without, and some that change on the way."""
    results = run(make_engine(model), asked)
    for name, result in results.items():
        check(result, expected[name])


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked(model, asked, expected, chunk):
    names = some_of(asked)
    engine = make_engine(model, max_num_batched_tokens=chunk, prefix=False)
    results = run(engine, {name: asked[name] for name in names})
    for name in names:
        check(results[name], expected[name])


def test_after_a_prefix_hit(model, asked, expected):
    engine = make_engine(model)
    names = [name for name in some_of(asked) if not name.startswith("crossing")]
    for name in names:
        run(engine, {name: asked[name]})
    before = engine.stats()["prefix_cache_hit_tokens"]
    for name in names:
        check(run(engine, {name: asked[name]})[name], expected[name])
    hit = engine.stats()["prefix_cache_hit_tokens"] - before
    assert hit == sum((len(asked[name].token_ids) - 1) // 8 * 8 for name in names)


def test_after_an_encoder_hit(model, asked, expected):
    engine = make_engine(model, prefix=False)
    names = some_of(asked)
    for name in names:
        run(engine, {name: asked[name]})
    encoded = engine.stats()["encoded_segments"]
    for name in names:
        check(run(engine, {name: asked[name]})[name], expected[name])
    assert engine.stats()["encoded_segments"] == encoded


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    names = some_of(asked, PREEMPTED)
    num_tokens = sum(len(asked[name].token_ids) for name in names) + (len(names) + 2) * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix, max_num_batched_tokens=2048)
    results = run(engine, {name: asked[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name in names:
        check(results[name], expected[name])


@pytest.mark.parametrize("kind", ["plain", "adapted"], indirect=True)
@pytest.mark.parametrize("first", ["early_text", "late_image"])
def test_text_before_a_picture(model, asked, expected, kind, first):
    """Text-only requests take its K and V from each other's cache only where no adapter tells them apart."""
    second = {"early_text": "late_image", "late_image": "early_text"}[first]
    engine = make_engine(model)
    for name in (first, second):
        check(run(engine, {name: asked[name]})[name], expected[name])
    num_shared = (len(asked["early_text"].token_ids) - 1) // 8 * 8
    assert num_shared > 64
    hit = engine.stats()["prefix_cache_hit_tokens"]
    assert hit == 0 if kind == "adapted" else num_shared <= hit <= num_shared + 8


@pytest.mark.parametrize("kind", ["plain"], indirect=True)
@pytest.mark.parametrize("first", ["crossing_text", "long_text"])
def test_lengths_share_nothing_with_each_other(model, asked, expected, first):
    """What a long request computed serves one that became long, and nothing serves across."""
    second = {"crossing_text": "long_text", "long_text": "crossing_text"}[first]
    engine = make_engine(model)
    check(run(engine, {first: asked[first]})[first], expected[first])
    assert engine.stats()["prefix_cache_hit_tokens"] == 0
    check(run(engine, {second: asked[second]})[second], expected[second])
    assert engine.stats()["prefix_cache_hit_tokens"] == len(asked["crossing_text"].token_ids) // 8 * 8


def test_from_messages_to_words(paths, conversations, references):
    """Through the engine's process, with a step smaller than a picture."""
    sizes = {"kv_cache_gb": 0.02, "encoder_cache_gb": 0.01, "max_num_batched_tokens": 100}
    with LLM(paths["adapted"], device="cpu", dtype="float32", num_threads=2, num_decode_threads=2, **sizes) as llm:
        for name, checkpoint in (("image_turns", "merged"), ("text_only", "plain")):
            messages = conversations[name].messages
            out = llm.chat(messages, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
            assert out.token_ids == references[f"{checkpoint}_{name}"]["new_token_ids"][:8].tolist()


def test_weights_of_the_audio_tower_are_not_kept(model, paths):
    assert Path(paths["plain"], "config.json").exists()
    assert not any("audio" in name for name in model.module.state_dict())
