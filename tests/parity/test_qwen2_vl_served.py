"""Qwen2-VL and Qwen2.5-VL from messages to words through the engine's process: answers are Transformers', caches right."""

from __future__ import annotations

import pytest

from filmstrip import LLM, SamplingParams, encode_video_base64
from filmstrip.errors import ContextLengthError
from tests.models.qwen2_vl import make_qwen2_5_vl, make_qwen2_vl
from tests.parity.conftest import MAX_NEW_TOKENS, run_reference, user, video

PARAMS = SamplingParams(max_tokens=MAX_NEW_TOKENS, temperature=0, ignore_eos=True)
MAKERS = {"qwen2_vl": make_qwen2_vl, "qwen2_5_vl": make_qwen2_5_vl}
SMALL = {
    "kv_cache_gb": 0.02,
    "encoder_cache_gb": 0.01,
    "max_model_len": 2048,
    "num_threads": 2,
    "num_decode_threads": 2,
}


@pytest.fixture(scope="module", params=MAKERS)
def path(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, **SMALL) as llm:
        yield llm


def test_answers_are_those_of_transformers(llm, path, cases, tmp_path):
    few = {name: cases[name] for name in ("mixed", "video", "text_only")}
    expected = run_reference(tmp_path, few, path)
    outs = llm.chat([case.messages for case in few.values()], PARAMS)
    for name, out in zip(few, outs, strict=True):
        assert out.prompt_token_ids == expected[name]["input_ids"][0].tolist()
        assert out.token_ids == expected[name]["new_token_ids"].tolist()
    again = llm.chat(few["mixed"].messages, PARAMS)
    assert again.token_ids == outs[0].token_ids
    assert again.usage.cached_tokens > 0
    assert all(record.cached for record in again.media)


def test_the_same_frames_at_other_times(llm, path, media_files):
    """Pixels and tokens are the same; Qwen2.5-VL alone sees the difference, whatever was kept of the other."""
    frames = "data:video/jpeg;base64," + encode_video_base64(str(media_files["clip"]), num_frames=8)

    def ask(llm, fps):
        return llm.chat([user(video(frames, fps=fps), "When?")], PARAMS)

    fast, slow = ask(llm, 4), ask(llm, 1)
    assert fast.prompt_token_ids == slow.prompt_token_ids
    assert (slow.token_ids != fast.token_ids) == ("qwen2_5_vl" in path)
    with LLM(path, **SMALL) as fresh:
        assert ask(fresh, 1).token_ids == slow.token_ids


def test_a_video_is_made_to_fit(llm, media_files):
    messages = [user(video(media_files["large"], num_frames=24, max_pixels=24 * 300_000), "What?")]
    with pytest.raises(ContextLengthError, match=r"of the video's 24 frames would fit.*max_pixels to \d+") as refused:
        llm.chat(messages, PARAMS)
    number = int(refused.value.message.rpartition("max_pixels to ")[2].partition(";")[0])
    less = [user(video(media_files["large"], num_frames=24, max_pixels=number), "What?")]
    assert llm.chat(less, PARAMS).media[0].num_frames == 24
    fitted = llm.chat(messages, PARAMS, media_overflow="fit")
    assert fitted.usage.prompt_tokens > 0.7 * SMALL["max_model_len"]
    assert any("media_overflow" in note for note in fitted.media[0].notes)
