"""Families that see pictures as tiles: prompts, pixels, logits and greedy tokens equal Transformers'.

However a prompt is computed: alone, in a batch, in chunks, after a prefix hit, after preemption.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from filmstrip import LLM, SamplingParams
from filmstrip.config import EngineConfig
from filmstrip.models.loader import load_model
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.types import Modality
from tests.models import tiles
from tests.models.llama4 import make_llama4
from tests.parity.conftest import Case, build_prompts, image, reference_case, run_reference_program, user
from tests.parity.test_engine import check, make_engine, run

VIDEO_CASES = [
    "video",
    "ntsc_video",
    "webm_video",
    "two_videos",
    "mixed",
    "tall",
    "tiny",
    "chosen_frames",
    "many_turns",
]
IMAGE_CASES = ["text_only", "image", "small_image", "large_image"]


@dataclass(frozen=True)
class Family:
    """``make`` writes a checkpoint.

    ``text_names``: how the names of the text model's weights begin on the hub, and inside of Transformers.
    """

    make: Callable[..., str]
    takes_video: bool = True
    text_names: tuple[str, str] = ("language_model.model.", "model.language_model.")


FAMILIES = {
    "internvl": Family(tiles.make_internvl),
    "llava": Family(tiles.make_llava, takes_video=False),
    "llava_siglip": Family(tiles.make_llava_siglip, takes_video=False),
    "llava_next": Family(tiles.make_llava_next, takes_video=False),
    "llava_onevision": Family(tiles.make_llava_onevision),
    "gemma3": Family(tiles.make_gemma3, takes_video=False),
    "deepseek_vl": Family(tiles.make_deepseek_vl, takes_video=False, text_names=("model.language_model.",) * 2),
    "deepseek_vl_hybrid": Family(
        tiles.make_deepseek_vl_hybrid, takes_video=False, text_names=("model.language_model.",) * 2
    ),
    "llama4": Family(make_llama4, takes_video=False, text_names=("language_model.model.",) * 2),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {name: family.make(tmp_path_factory.mktemp("model")) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def path(family, paths):
    return paths[family]


@pytest.fixture(scope="module")
def all_conversations(cases, media_files):
    """For each family conversations with what it takes."""
    again = [
        user(image(media_files["photo"]), "First?"),
        {"role": "assistant", "content": "A bar."},
        user("And <this> ", image(media_files["strip"]), " or", image(media_files["photo"]), "?"),
    ]
    with_images = {name: cases[name] for name in IMAGE_CASES} | {"image_turns": Case("image_turns", again)}
    with_videos = with_images | {name: cases[name] for name in VIDEO_CASES}
    return {name: with_videos if family.takes_video else with_images for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def conversations(all_conversations, family):
    return all_conversations[family]


def in_parts(messages):
    """Contents as lists, also where they are strings: some templates show only those, and Transformers does not mind."""
    return [
        message if isinstance(message["content"], list) else user(message["content"]) | {"role": message["role"]}
        for message in messages
    ]


@pytest.fixture(scope="module")
def references(all_conversations, paths, tmp_path_factory):
    """Transformers' answers, from one process for all families: its start takes longer than the answers of one."""
    folder = tmp_path_factory.mktemp("reference")
    specs = []
    for family, conversations in all_conversations.items():
        for case in conversations.values():
            spec, arrays = reference_case(
                replace(case, name=f"{family}_{case.name}", messages=in_parts(case.messages)), paths[family]
            )
            np.savez(folder / f"{spec['name']}.npz", **arrays)
            specs.append(spec)
    run_reference_program(folder, specs, "tile_reference.py")
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


def test_weights_named_by_older_and_newer_transformers(family, path, model, tmp_path):
    """What is on the hub has the names of before 4.52; ``make`` writes those, and Transformers has newer ones inside."""
    for file in Path(path).iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_text(file.read_text())
    old = load_file(Path(path) / "model.safetensors")
    on_hub, inside = FAMILIES[family].text_names
    assert any(name.startswith(on_hub) for name in old)
    new = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    assert any(name.startswith(inside) for name in new)
    save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load_model(EngineConfig(str(tmp_path), device="cpu", dtype="float32", num_threads=2)).module.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in new.items())


def names_of(asked):
    """Prompts of every kind that the family takes."""
    return [name for name in ("text_only", "image", "video", "mixed", "two_videos", "image_turns") if name in asked]


def tiles_of(prompt, modality=None):
    """float32 tiles (num_tiles, 3, size, size) of each item, as the model gets them."""
    found = []
    for feature in prompt.features:
        if modality in (None, feature.modality):
            rows = normalize_patches(feature.patches.torch(), feature.normalization)
            size = int((rows.shape[1] // 3) ** 0.5)
            found.append(rows.view(-1, 3, size, size).numpy())
    return found


def test_answers_are_not_trivial(expected):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) >= len(expected) - 1
    assert all(len(set(answer)) > 4 for answer in answers)


def test_prompts(asked, expected):
    for name, prompt in asked.items():
        assert prompt.token_ids == expected[name]["input_ids"][0].tolist(), name
        assert prompt.positions is None
        check_pixels(prompt, expected[name])


def check_pixels(prompt, reference):
    """Videos of some families stand among the images, in prompt order; one family has images of two sizes."""
    if "high_res_pixel_values" in reference:
        check_two_sizes(prompt, reference)
        return
    apart = "pixel_values_videos" in reference
    kinds = {"pixel_values": Modality.IMAGE, "pixel_values_videos": Modality.VIDEO} if apart else {"pixel_values": None}
    for key, modality in kinds.items():
        ours = tiles_of(prompt, modality)
        assert bool(ours) == (key in reference)
        if not ours:
            continue
        theirs = reference[key]
        if theirs.ndim == 4:
            np.testing.assert_array_equal(np.concatenate(ours), theirs)
            continue
        for item, padded in zip(ours, theirs, strict=True):  # behind an item's own tiles there is nothing
            np.testing.assert_array_equal(item, padded[: len(item)])
            assert not padded[len(item) :].any()


def check_two_sizes(prompt, reference):
    """Patches of the large image, then those of the small one, which is normalised in another way."""
    larges, smalls = reference["high_res_pixel_values"], reference["pixel_values"]
    for feature, *expected in zip(prompt.features, larges, smalls, strict=True):
        rows = feature.patches.torch()
        patch_size = int((rows.shape[1] // 3) ** 0.5)
        normalizations = (feature.normalization, feature.normalization.later_views)
        for picture, normalization in zip(expected, normalizations, strict=True):
            side = picture.shape[-1] // patch_size
            pixels = normalize_patches(rows[: side**2], normalization).view(side, side, 3, patch_size, patch_size)
            np.testing.assert_array_equal(pixels.permute(2, 0, 3, 1, 4).reshape(picture.shape).numpy(), picture)
            rows = rows[side**2 :]
        assert not len(rows)


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_in_a_batch(model, asked, expected):
    results = run(make_engine(model), asked)
    for name, result in results.items():
        check(result, expected[name])


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked(model, asked, expected, chunk):
    names = names_of(asked)
    engine = make_engine(model, max_num_batched_tokens=chunk, prefix=False)
    results = run(engine, {name: asked[name] for name in names})
    for name in names:
        check(results[name], expected[name])


def test_after_a_prefix_hit(model, asked, expected):
    engine = make_engine(model)
    names = names_of(asked)
    for name in names:
        run(engine, {name: asked[name]})
    before = engine.stats()["prefix_cache_hit_tokens"]
    for name in names:
        check(run(engine, {name: asked[name]})[name], expected[name])
    hit = engine.stats()["prefix_cache_hit_tokens"] - before
    assert hit == sum((len(asked[name].token_ids) - 1) // 8 * 8 for name in names)


def test_after_an_encoder_hit(model, asked, expected):
    engine = make_engine(model, prefix=False)
    names = names_of(asked)
    for name in names:
        run(engine, {name: asked[name]})
    encoded = engine.stats()["encoded_segments"]
    for name in names:
        check(run(engine, {name: asked[name]})[name], expected[name])
    assert engine.stats()["encoded_segments"] == encoded


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    names = names_of(asked)
    num_tokens = sum(len(asked[name].token_ids) for name in names) + 3 * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix, max_num_batched_tokens=256)
    results = run(engine, {name: asked[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name in names:
        check(results[name], expected[name])


@pytest.mark.parametrize("name", ["internvl", "gemma3", "llama4", "deepseek_vl_hybrid"])
def test_from_messages_to_words(name, paths, all_conversations, references):
    """Through the engine's process, with a step smaller than a picture."""
    cases = {
        case: all_conversations[name][case] for case in ("mixed", "image_turns") if case in all_conversations[name]
    }
    sizes = {"kv_cache_gb": 0.02, "encoder_cache_gb": 0.01, "max_num_batched_tokens": 5}
    with LLM(paths[name], device="cpu", dtype="float32", num_threads=2, num_decode_threads=2, **sizes) as llm:
        for case, conversation in cases.items():
            out = llm.chat(conversation.messages, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
            assert out.token_ids == references[f"{name}_{case}"]["new_token_ids"][:8].tolist()
