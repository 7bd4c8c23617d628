"""Qwen3.5, dense and MoE, with pictures and videos: prompts, logits and greedy tokens equal Transformers'.

However a prompt is computed: alone, in a batch, in chunks shorter than the convolution, from a kept state, after preemption.
"""

import pytest

from filmstrip.config import EngineConfig
from filmstrip.engine import kv_cache
from filmstrip.engine.engine import Engine, EngineLimits
from filmstrip.models.loader import load_model
from tests.models.qwen3_5 import make_qwen3_5
from tests.parity import test_prompt
from tests.parity.conftest import Case, build_prompts, image, run_reference, user, video
from tests.parity.test_engine import PARAMS, RecordingModel, check, run

NAMES = ["text_only", "image", "video", "two_videos", "mixed", "odd_count", "many_turns"]


@pytest.fixture(autouse=True)
def close_checkpoints(monkeypatch):
    """States are kept close enough to each other for prompts as short as these."""
    monkeypatch.setattr(kv_cache, "MIN_TOKENS_PER_CHECKPOINT", 32)


class RecordingRecurrentModel(RecordingModel):
    def allocate_states(self, num_slots):
        self.model.allocate_states(num_slots)

    def copy_state(self, source, target):
        self.model.copy_state(source, target)


@pytest.fixture(scope="module")
def few(cases, media_files):
    """Some of the conversations, and a second question about a clip."""
    other = Case("other_question", [user(video(media_files["clip"]), "What is in the picture? Say it in two words.")])
    after = Case("after_picture", [user(image(media_files["photo"]), video(media_files["clip"]), "What happens?")])
    return {name: cases[name] for name in NAMES} | {"other_question": other, "after_picture": after}


@pytest.fixture(scope="module", params=["dense", "moe"])
def qwen3_5(request, tmp_path_factory):
    return make_qwen3_5(tmp_path_factory.mktemp("qwen3_5"), moe=request.param == "moe")


@pytest.fixture(scope="module")
def expected(few, qwen3_5, tmp_path_factory):
    return run_reference(tmp_path_factory.mktemp("reference"), few, qwen3_5)


@pytest.fixture(scope="module")
def asked(few, qwen3_5):
    return build_prompts(few, qwen3_5)


@pytest.fixture(scope="module")
def model(qwen3_5):
    return load_model(EngineConfig(qwen3_5, device="cpu", dtype="float32", num_threads=2, block_size=8))


def make_engine(model, *, num_tokens=20_000, max_num_batched_tokens=4096, prefix=True, checkpoints=8):
    limits = EngineLimits(
        num_blocks=-(-num_tokens // model.info.block_size),
        max_model_len=num_tokens,
        max_num_seqs=8,
        max_num_batched_tokens=max_num_batched_tokens,
        encoder_cache_bytes=1 << 26,
        enable_prefix_caching=prefix,
        num_state_checkpoints=checkpoints,
    )
    return Engine(RecordingRecurrentModel(model), limits)


def test_answers_are_not_trivial(expected):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) >= len(expected) - 1
    assert all(len(set(answer)) > 4 for answer in answers)


def test_prompts(asked, expected):
    for name, prompt in asked.items():
        test_prompt.check(prompt, expected[name])


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_in_a_batch(model, asked, expected):
    results = run(make_engine(model), asked)
    for name, result in results.items():
        check(result, expected[name])


@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_chunked(model, asked, expected, chunk):
    names = ["mixed", "two_videos", "text_only"] if chunk > 3 else ["video", "text_only"]
    results = run(make_engine(model, max_num_batched_tokens=chunk, prefix=False), {name: asked[name] for name in names})
    for name in names:
        check(results[name], expected[name])


def test_from_kept_states(model, asked, expected):
    """The same prompts again, and another question about a clip that the cache knows."""
    engine = make_engine(model)
    names = ["video", "mixed", "many_turns"]
    for name in names:
        run(engine, {name: asked[name]})
    for name in [*names, "other_question", "after_picture"]:
        before = engine.stats()["prefix_cache_hit_tokens"]
        check(run(engine, {name: asked[name]})[name], expected[name])
        hit = engine.stats()["prefix_cache_hit_tokens"] - before
        assert (hit > kv_cache.MIN_TOKENS_PER_CHECKPOINT) == (name != "after_picture"), name


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_with_hardly_any_room_for_states(model, asked, expected, checkpoints):
    engine = make_engine(model, checkpoints=checkpoints)
    for name in ["video", "mixed", "video", "other_question"]:
        check(run(engine, {name: asked[name]})[name], expected[name])
    assert (engine.stats()["prefix_cache_hit_tokens"] > 0) == (checkpoints > 0)


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    names = ["video", "image", "text_only", "odd_count"]
    num_tokens = sum(len(asked[name].token_ids) for name in names) + 4 * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix, max_num_batched_tokens=256)
    results = run(engine, {name: asked[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name in names:
        check(results[name], expected[name])


def test_slots_of_aborted_requests(model, asked, expected):
    engine = make_engine(model, max_num_batched_tokens=50, prefix=False)
    for name in ["two_videos", "mixed"]:
        engine.add_request(f"aborted {name}", asked[name], PARAMS)
    for _ in range(4):
        engine.step()
    for name in ["two_videos", "mixed"]:
        engine.abort(f"aborted {name}")
    results = run(engine, {name: asked[name] for name in ["video", "text_only"]})
    for name, result in results.items():
        check(result, expected[name])
