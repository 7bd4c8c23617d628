"""Qwen3-Omni's thinker with pictures and videos: prompts, logits and greedy tokens equal Transformers'.

However a prompt is computed: alone, in a batch, in small chunks, after a prefix hit, after an encoder hit, after preemption;
and from messages to words through the engine's process. From a checkpoint of thinker and talker, and of the thinker alone.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from filmstrip import LLM
from filmstrip.config import EngineConfig
from filmstrip.errors import InvalidRequestError, ModelLoadError
from filmstrip.models.loader import load_model
from tests.models.qwen3_omni import PLACES_PER_SECOND, make_qwen3_omni, make_qwen3_omni_thinker
from tests.parity import test_prompt
from tests.parity.conftest import Case, build_prompts, image, reference_case, run_reference_program, user, video
from tests.parity.test_engine import BATCH, PARAMS, check, make_engine, run

MAKERS = {"whole": make_qwen3_omni, "thinker": make_qwen3_omni_thinker}
FEW = ["mixed", "fractions", "two_videos", "odd_count", "text_only"]


@pytest.fixture(scope="module")
def conversations(cases, media_files):
    """Those of Qwen3-VL, and one whose videos' places lie between those of tokens."""
    clip, photo, small = media_files["ntsc"], media_files["photo"], media_files["small"]
    turns = [
        user(image(small), "First ", video(clip), " then ", image(photo), "?"),
        {"role": "assistant", "content": "A bar moves."},
        user("Again: ", video(clip), image(small), "What now?"),
    ]
    return cases | {"fractions": Case("fractions", turns, {"video": {"num_frames": 5}})}


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
    """Transformers' answers, from one process for both: its start takes longer than the answers of one."""
    folder = tmp_path_factory.mktemp("reference")
    specs = []
    for family, path in paths.items():
        for case in conversations.values():
            spec, arrays = reference_case(dataclasses.replace(case, name=f"{family}_{case.name}"), path)
            np.savez(folder / f"{spec['name']}.npz", **arrays)
            specs.append(spec)
    run_reference_program(folder, specs, "omni_reference.py")
    return {spec["name"]: dict(np.load(folder / f"{spec['name']}.out.npz")) for spec in specs}


@pytest.fixture(scope="module")
def expected(conversations, family, references):
    return {name: references[f"{family}_{name}"] for name in conversations}


@pytest.fixture(scope="module")
def asked(conversations, path):
    return build_prompts(conversations, path)


@pytest.fixture(scope="module")
def model(path):
    return load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2))


def test_answers_are_not_trivial(expected):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) >= len(expected) - 2
    assert all(len(set(answer)) > 4 for answer in answers)


def test_prompts(asked, expected):
    for name, prompt in asked.items():
        test_prompt.check(prompt, expected[name])


def test_places_between_tokens(asked, expected):
    """The reference's, to the last bit of float32, in the videos and behind them."""
    prompt = asked["fractions"]
    first, second = (feature for feature in prompt.features if len(feature.segments) > 1)
    assert prompt.positions.dtype == np.float32
    apart = prompt.positions[0, first.segments[1].offset] - prompt.positions[0, first.segments[0].offset]
    assert apart == pytest.approx(PLACES_PER_SECOND * 2 * 4.004 / 5, abs=1e-4)
    assert (prompt.positions[:, second.segments[-1].end :] % 1 != 0).all()
    assert prompt.position_delta % 1 != 0
    assert asked["video"].positions.dtype == np.int32


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_in_a_batch(model, asked, expected):
    names = [*BATCH, "fractions"]
    results = run(make_engine(model), {name: asked[name] for name in names})
    for name in names:
        check(results[name], expected[name])


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked(model, asked, expected, chunk):
    engine = make_engine(model, max_num_batched_tokens=chunk, prefix=False)
    results = run(engine, {name: asked[name] for name in FEW})
    for name in FEW:
        check(results[name], expected[name])


def test_after_a_prefix_hit(model, asked, expected):
    engine = make_engine(model)
    block = engine.model.info.block_size
    names = ["video", "mixed", "many_turns", "fractions"]
    run(engine, {name: asked[name] for name in names})
    before = engine.stats()["prefix_cache_hit_tokens"]
    for name in names:
        check(run(engine, {name: asked[name]})[name], expected[name])
    hit = engine.stats()["prefix_cache_hit_tokens"] - before
    assert hit == sum((len(asked[name].token_ids) - 1) // block * block for name in names)


def test_the_prefix_cache_asks_for_positions_not_for_their_type(model, asked, expected):
    """Of prompts with the same beginning one may have places between tokens later on."""
    engine, prompt = make_engine(model), asked["mixed"]
    run(engine, {"mixed": prompt})
    as_floats = dataclasses.replace(prompt, positions=prompt.positions.astype(np.float32))
    check(run(engine, {"as_floats": as_floats})["as_floats"], expected["mixed"])
    block = engine.model.info.block_size
    assert engine.stats()["prefix_cache_hit_tokens"] == (len(prompt.token_ids) - 1) // block * block


def test_after_an_encoder_hit(model, asked, expected):
    engine = make_engine(model, prefix=False)
    names = ["video", "two_videos", "mixed", "fractions"]
    for name in names:
        run(engine, {name: asked[name]})
    encoded = engine.stats()["encoded_segments"]
    for name in names:
        check(run(engine, {name: asked[name]})[name], expected[name])
    assert engine.stats()["encoded_segments"] == encoded


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    names = ["text_only", "image", "two_videos", "odd_count", "fractions"]
    num_tokens = sum(len(asked[name].token_ids) for name in names) + 3 * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix, max_num_batched_tokens=256)
    results = run(engine, {name: asked[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name in names:
        check(results[name], expected[name])


def test_from_messages_to_words(path, conversations, expected):
    names = ["mixed", "video", "text_only", "fractions"]
    with LLM(path, kv_cache_gb=0.05, encoder_cache_gb=0.01, max_model_len=8192, num_threads=2) as llm:
        for name in names:
            case = conversations[name]
            out = llm.chat(case.messages, PARAMS, media_io_kwargs=case.media_io_kwargs)
            assert out.prompt_token_ids == expected[name]["input_ids"][0].tolist()
            assert out.token_ids == expected[name]["new_token_ids"].tolist()
        with pytest.raises(InvalidRequestError, match=r"input_audio.*is not supported; the types are text, image_url"):
            llm.chat([user({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "Who?")], PARAMS)


@pytest.mark.parametrize("place", ["top", "thinker", "text"])
def test_the_weights_dtype_is_found_wherever_the_config_says_it(paths, tmp_path, place):
    source = Path(paths["whole"])
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    parts = {"top": config, "thinker": config["thinker_config"], "text": config["thinker_config"]["text_config"]}
    for part in parts.values():
        part.pop("dtype", None)
    parts[place]["dtype"] = "int8"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="names the dtype 'int8'"):
        load_model(EngineConfig(str(tmp_path), device="cpu", num_threads=2))
