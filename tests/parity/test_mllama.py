"""Mllama, whose tokens attend to pictures beside the prompt: prompts, pixels, logits and tokens equal Transformers'.

However a prompt is computed: alone, in a batch, in chunks, after a prefix hit, after preemption, with room for few pictures.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration

from filmstrip import LLM, SamplingParams
from filmstrip.config import EngineConfig
from filmstrip.models.loader import load_model
from filmstrip.models.mllama import seen_media
from filmstrip.models.qwen_vl import normalize_patches
from tests.models.mllama import make_mllama
from tests.parity.conftest import Case, build_prompts, image, reference_case, run_reference_program, user
from tests.parity.test_engine import check, make_engine, run

SOME = ["text_only", "image", "image_turns", "neighbours"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_mllama(tmp_path_factory.mktemp("mllama"))


@pytest.fixture(scope="module")
def conversations(cases, media_files):
    photo, strip, small, poster = (image(media_files[name]) for name in ("photo", "strip", "small", "poster"))
    made = [
        Case("image_turns", [user(photo, "First?"), {"role": "assistant", "content": "A bar."}, user(strip, "And?")]),
        Case("neighbours", [user(photo, strip, small, "Which?", photo, poster, "And of those?")]),
        Case("behind", [{"role": "system", "content": "Look at it, long."}, user("What is in this? ", strip)]),
        Case("last_text", [user(small, "First?"), {"role": "assistant", "content": "Small."}, user("Really <b>?")]),
        Case("twice", [user(photo, "or", photo, "?")]),
    ]
    names = ("text_only", "image", "small_image", "large_image")
    return {name: cases[name] for name in names} | {case.name: case for case in made}


@pytest.fixture(scope="module")
def expected(conversations, path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    specs = []
    for case in conversations.values():
        spec, arrays = reference_case(case, path)
        np.savez(folder / f"{case.name}.npz", **arrays)
        specs.append(spec)
    run_reference_program(folder, specs, "tile_reference.py")
    return {name: dict(np.load(folder / f"{name}.out.npz")) for name in conversations}


@pytest.fixture(scope="module")
def asked(conversations, path):
    return build_prompts(conversations, path)


@pytest.fixture(scope="module")
def model(path):
    return load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2, block_size=8))


def test_answers_are_not_trivial(expected):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) == len(expected)
    assert all(len(set(answer)) > 4 for answer in answers)


def test_weights_named_as_on_the_hub(path, model, tmp_path):
    """What is published has the names of before 4.52, which ``make_mllama`` writes, too; others are Transformers' today."""
    for file in Path(path).iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_text(file.read_text())
    old = load_file(Path(path) / "model.safetensors")
    assert {name.split(".")[0] for name in old} == {"language_model", "multi_modal_projector", "vision_model"}
    reference = MllamaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).state_dict()
    new = {name: weight.clone() for name, weight in reference.items()}
    assert any(name.startswith("model.language_model.layers.") for name in new)
    save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load_model(EngineConfig(str(tmp_path), device="cpu", dtype="float32", num_threads=2)).module.state_dict()
    weights = model.module.state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_pages_are_for_tokens_only(model):
    assert model.info.kv_bytes_per_token == 3 * 2 * (16 + 8) * 16 * 4 // 8  # rows of 8 tokens' keys are padded to 16
    assert model.info.cross_attention_bytes_per_segment == 2 * 2 * 2 * 16 * 4 * 17 * 4


def test_prompts(asked, expected):
    for name, prompt in asked.items():
        assert prompt.token_ids == expected[name]["input_ids"][0].tolist(), name
        assert prompt.positions is None
        check_pixels(prompt, expected[name])
        check_mask(prompt, expected[name])


def check_pixels(prompt, reference):
    assert bool(prompt.features) == ("pixel_values" in reference)
    for number, feature in enumerate(prompt.features):
        ours = normalize_patches(feature.patches.torch(), feature.normalization).view(-1, 3, 56, 56).numpy()
        theirs = reference["pixel_values"][0, number]
        np.testing.assert_array_equal(ours, theirs[: len(ours)])
        assert not theirs[len(ours) :].any()
        assert reference["aspect_ratio_mask"][0, number].tolist() == [int(tile < len(ours)) for tile in range(4)]


def check_mask(prompt, reference):
    """Which tiles of which picture each token of the prompt sees."""
    if not prompt.features:
        return
    offsets = [feature.segments[0].offset for feature in prompt.features]
    ours = np.zeros((len(prompt.token_ids), len(offsets), 4), np.int64)
    for token in range(offsets[0], len(prompt.token_ids)):
        for number in seen_media(offsets, token, token + 1):
            _, rows, columns = prompt.features[number].grid_thw
            ours[token, number, : rows * columns] = 1
    np.testing.assert_array_equal(ours, reference["cross_attention_mask"][0])


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_pictures_matter(model, asked):
    """Else the tests here would prove nothing of them: another picture in its place gives other logits."""
    other = replace(asked["large_image"].features[0], segments=asked["image"].features[0].segments)
    changed = replace(asked["image"], features=(other,))
    logits = [run(make_engine(model), {"a": prompt})["a"][1][0] for prompt in (asked["image"], changed)]
    assert np.abs(logits[0] - logits[1]).max() > 0.5


def test_in_a_batch(model, asked, expected):
    results = run(make_engine(model), asked)
    for name, result in results.items():
        check(result, expected[name])


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked(model, asked, expected, chunk):
    engine = make_engine(model, max_num_batched_tokens=chunk, prefix=False)
    results = run(engine, asked)
    for name, result in results.items():
        check(result, expected[name])


def test_after_a_prefix_hit(model, asked, expected):
    engine = make_engine(model)
    for name, prompt in asked.items():
        run(engine, {name: prompt})
    before = engine.stats()["prefix_cache_hit_tokens"]
    for name, prompt in asked.items():
        check(run(engine, {name: prompt})[name], expected[name])
    hit = engine.stats()["prefix_cache_hit_tokens"] - before
    assert hit == sum((len(prompt.token_ids) - 1) // 8 * 8 for prompt in asked.values())


def test_prompts_that_begin_alike_share_what_sees_the_same(model, asked):
    """Tokens before the first picture see all pictures: with another one in its place nothing can be shared."""
    first = asked["behind"]
    other = replace(asked["image"].features[0], segments=first.features[0].segments)
    other_picture, other_question = (
        replace(first, features=(other,)),
        replace(first, token_ids=[*first.token_ids[:-10], 70, *first.token_ids[-9:]]),
    )
    assert first.features[0].segments[0].offset > 16
    prompts = {"picture": other_picture, "question": other_question}
    # First: an engine of its own takes the model's pages from any before it.
    expected = {name: run(make_engine(model, prefix=False), {name: each})[name] for name, each in prompts.items()}
    engine = make_engine(model)
    run(engine, {"first": first})
    for name, num_shared in (("picture", 0), ("question", (len(first.token_ids) - 10) // 8 * 8)):
        before = engine.stats()["prefix_cache_hit_tokens"]
        result = run(engine, {name: prompts[name]})[name]
        assert engine.stats()["prefix_cache_hit_tokens"] - before == num_shared
        tokens, logits = expected[name]
        check(result, {"new_token_ids": np.array(tokens), "logits": logits})


def test_after_an_encoder_hit(model, asked, expected):
    engine = make_engine(model, prefix=False)
    for name, prompt in asked.items():
        run(engine, {name: prompt})
    assert engine.stats()["encoded_segments"] == 4
    for name, prompt in asked.items():
        check(run(engine, {name: prompt})[name], expected[name])
    assert engine.stats()["encoded_segments"] == 4


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    num_tokens = sum(len(prompt.token_ids) for prompt in asked.values()) + 3 * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix, max_num_batched_tokens=256)
    results = run(engine, asked)
    assert engine.stats()["num_preemptions"] > 0
    for name, result in results.items():
        check(result, expected[name])


@pytest.mark.parametrize("prefix", [True, False])
def test_with_room_for_few_pictures(model, asked, expected, prefix):
    """Requests wait for each other's pictures to go."""
    engine = make_engine(model, encoder_bytes=4 * model.info.cross_attention_bytes_per_segment, prefix=prefix)
    names = [name for name in asked if len(asked[name].features) < 4]
    few = make_engine(model, encoder_bytes=2 * model.info.cross_attention_bytes_per_segment, prefix=prefix)
    for each, some in ((engine, asked), (few, {name: asked[name] for name in names})):
        results = run(each, some)
        for name, result in results.items():
            check(result, expected[name])
        assert each.stats()["encoder_cache_bytes"] <= each.runner.encoder_cache.max_bytes


def test_from_messages_to_words(path, conversations, expected):
    """Through the engine's process, with a step smaller than a prompt."""
    sizes = {"kv_cache_gb": 0.02, "encoder_cache_gb": 0.01, "max_num_batched_tokens": 5}
    with LLM(path, device="cpu", dtype="float32", num_threads=2, num_decode_threads=2, **sizes) as llm:
        for name in ("image_turns", "text_only"):
            out = llm.chat(conversations[name].messages, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
            assert out.token_ids == expected[name]["new_token_ids"][:8].tolist()


def test_in_bfloat16(path, asked, expected):
    """The same weights in half the bits: near the reference, pictures included."""
    model = load_model(EngineConfig(path, device="cpu", dtype="bfloat16", num_threads=2))
    for name in SOME:
        _, logits = run(make_engine(model), {name: asked[name]})[name]
        assert (
            torch.cosine_similarity(*(torch.from_numpy(each[0]) for each in (logits, expected[name]["logits"])), 0)
            > 0.98
        )
