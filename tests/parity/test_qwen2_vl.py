"""Qwen2-VL and Qwen2.5-VL with pictures and videos: prompts, logits and greedy tokens equal Transformers'.

However a prompt is computed: alone, in a batch, in small chunks, after a prefix hit, after an encoder hit, after preemption;
and from messages to words through the engine's process.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from filmstrip import LLM, encode_video_base64
from filmstrip.config import EngineConfig
from filmstrip.errors import ContextLengthError
from filmstrip.models.loader import load_model
from tests.models.qwen2_vl import make_qwen2_5_vl, make_qwen2_vl
from tests.parity import test_prompt
from tests.parity.conftest import MAX_NEW_TOKENS, Case, build_prompts, run_reference, user, video
from tests.parity.test_engine import BATCH, PARAMS, check, make_engine, run

MAKERS = {"qwen2_vl": make_qwen2_vl, "qwen2_5_vl": make_qwen2_5_vl}
SERVED = {
    "kv_cache_gb": 0.02,
    "encoder_cache_gb": 0.01,
    "max_model_len": 2048,
    "num_threads": 2,
    "num_decode_threads": 2,
}


@pytest.fixture(scope="module")
def conversations(cases, media_files):
    """Those of Qwen3-VL, and a second question about a clip."""
    other = Case("other_question", [user(video(media_files["clip"]), "What is in the picture? Say it in two words.")])
    return cases | {"other_question": other}


@pytest.fixture(scope="module", params=MAKERS)
def path(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(conversations, path, tmp_path_factory):
    return run_reference(tmp_path_factory.mktemp("reference"), conversations, path)


@pytest.fixture(scope="module")
def asked(conversations, path):
    return build_prompts(conversations, path)


@pytest.fixture(scope="module")
def model(path):
    return load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2))


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, **SERVED) as llm:
        yield llm


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
    results = run(make_engine(model), {name: asked[name] for name in BATCH})
    for name in BATCH:
        check(results[name], expected[name])


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked(model, asked, expected, chunk):
    names = ["mixed", "two_videos", "odd_count", "text_only"]
    engine = make_engine(model, max_num_batched_tokens=chunk, prefix=False)
    results = run(engine, {name: asked[name] for name in names})
    for name in names:
        check(results[name], expected[name])


def test_after_a_prefix_hit(model, asked, expected):
    """The same prompts again, and another question about a clip that the cache knows."""
    engine = make_engine(model)
    block = engine.model.info.block_size
    names = ["video", "mixed", "many_turns"]
    run(engine, {name: asked[name] for name in names})
    for name in names:
        before = engine.stats()["prefix_cache_hit_tokens"]
        check(run(engine, {name: asked[name]})[name], expected[name])
        hit = engine.stats()["prefix_cache_hit_tokens"] - before
        assert hit == (len(asked[name].token_ids) - 1) // block * block
    before = engine.stats()["prefix_cache_hit_tokens"]
    check(run(engine, {"other_question": asked["other_question"]})["other_question"], expected["other_question"])
    alike = asked["other_question"].features[0].segments[-1].end
    assert engine.stats()["prefix_cache_hit_tokens"] - before >= alike // block * block


def test_after_an_encoder_hit(model, asked, expected):
    engine = make_engine(model, prefix=False)
    names = ["video", "two_videos", "mixed"]
    for name in names:
        run(engine, {name: asked[name]})
    encoded = engine.stats()["encoded_segments"]
    for name in names:
        check(run(engine, {name: asked[name]})[name], expected[name])
    assert engine.stats()["encoded_segments"] == encoded


def test_with_an_encoder_cache_smaller_than_a_frame(model, asked, expected):
    engine = make_engine(model, encoder_bytes=1, max_num_batched_tokens=50)
    check(run(engine, {"mixed": asked["mixed"]})["mixed"], expected["mixed"])


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    names = BATCH[:5]
    longest = max(len(asked[name].token_ids) for name in names) + MAX_NEW_TOKENS
    engine = make_engine(
        model, num_tokens=longest + 4 * model.info.block_size, prefix=prefix, max_num_batched_tokens=256
    )
    engine.limits = dataclasses.replace(engine.limits, max_model_len=longest)
    results = run(engine, {name: asked[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name in names:
        check(results[name], expected[name])


def test_groups_of_a_video_are_one_run(asked):
    """Each temporal group is a segment of its own, for chunks and caches, with no token between them."""
    segments = asked["video"].features[0].segments
    assert len(segments) == 3
    assert all(one.end == following.offset for one, following in itertools.pairwise(segments))


def test_a_long_video_outlasts_the_text_behind_it(asked, path):
    """In Qwen2.5-VL time may reach beyond the text that follows."""
    prompt = asked["video"]
    assert prompt.positions is not None
    end = prompt.features[0].segments[-1].end
    is_beyond = prompt.positions[0, end - 1] > prompt.positions[0, end]
    assert is_beyond == ("qwen2_5_vl" in path)


def test_positions_of_a_chunk_that_differ_are_other_blocks(model, asked, expected):
    """Pixels and tokens alike, times not: the prefix cache must not mistake one for the other."""
    prompt = asked["video"]
    assert prompt.positions is not None
    moved = prompt.positions.copy()
    moved[0, prompt.features[0].segments[-1].offset :] += 3
    engine = make_engine(model)
    run(engine, {"moved": dataclasses.replace(prompt, positions=moved)})
    check(run(engine, {"video": prompt})["video"], expected["video"])
    block = engine.model.info.block_size
    alike = int(np.flatnonzero((moved != prompt.positions).any(0))[0])
    assert engine.stats()["prefix_cache_hit_tokens"] == alike // block * block


def test_from_messages_to_words(llm, conversations, expected):
    names = ["mixed", "video", "text_only"]
    outs = llm.chat([conversations[name].messages for name in names], PARAMS)
    for name, out in zip(names, outs, strict=True):
        assert out.prompt_token_ids == expected[name]["input_ids"][0].tolist()
        assert out.token_ids == expected[name]["new_token_ids"].tolist()
    again = llm.chat(conversations["mixed"].messages, PARAMS)
    assert again.token_ids == outs[0].token_ids
    assert again.usage.cached_tokens > 0
    assert all(record.cached for record in again.media)


def test_the_same_frames_at_other_times(llm, path, model, media_files):
    """Pixels and tokens are the same; Qwen2.5-VL alone sees the difference, whatever was kept of the other."""
    frames = "data:video/jpeg;base64," + encode_video_base64(str(media_files["clip"]), num_frames=8)
    questions = {str(fps): Case(str(fps), [user(video(frames, fps=fps), "When?")]) for fps in (4, 1)}
    fast, slow = (llm.chat(question.messages, PARAMS) for question in questions.values())
    assert fast.prompt_token_ids == slow.prompt_token_ids
    assert (slow.token_ids != fast.token_ids) == ("qwen2_5_vl" in path)
    for fps, prompt in build_prompts(questions, path).items():
        tokens, _ = run(make_engine(model), {fps: prompt})[fps]
        assert tokens == (fast if fps == "4" else slow).token_ids


def test_a_video_is_made_to_fit(llm, media_files):
    messages = [user(video(media_files["large"], num_frames=24, max_pixels=24 * 300_000), "What?")]
    with pytest.raises(ContextLengthError, match=r"of the video's 24 frames would fit.*max_pixels to \d+") as refused:
        llm.chat(messages, PARAMS)
    number = int(refused.value.message.rpartition("max_pixels to ")[2].partition(";")[0])
    less = [user(video(media_files["large"], num_frames=24, max_pixels=number), "What?")]
    assert llm.chat(less, PARAMS).media[0].num_frames == 24
    fitted = llm.chat(messages, PARAMS, media_overflow="fit")
    assert fitted.usage.prompt_tokens > 0.7 * SERVED["max_model_len"]
    assert any("media_overflow" in note for note in fitted.media[0].notes)
