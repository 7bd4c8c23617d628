"""Shapes of /v1/chat/completions, and what of a request reaches the model."""

import json
import re
import time

import pytest

from filmstrip.errors import MediaBlockedError
from tests.server.fakes import FakeLLM, asgi_client

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What happens?"}]
USAGE = {
    "prompt_tokens": 30,
    "completion_tokens": 3,
    "total_tokens": 33,
    "prompt_tokens_details": {
        "cached_tokens": 16,
        "text_tokens": 13,
        "image_tokens": 5,
        "video_tokens": 12,
        "time_series_tokens": 0,
        "audio_tokens": 0,
    },
    "completion_tokens_details": {
        "text_tokens": 3,
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}
MEDIA = [
    {
        "type": "video",
        "num_frames": 4,
        "frame_indices": [0, 165, 331, 497],
        "timestamps": [0.0, 5.5, 11.04, 16.58],
        "height": 64,
        "width": 96,
        "num_tokens": 12,
        "cached": False,
        "notes": ["2 fps assumed"],
        "num_samples": None,
        "num_channels": None,
    }
]


def identity(body: dict) -> dict:
    """Check and take away what differs from answer to answer."""
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body["id"])
    assert abs(body["created"] - time.time()) < 60
    assert re.fullmatch(r"filmstrip-\d+\.\d+\.\d+", body["system_fingerprint"])
    return {name: value for name, value in body.items() if name not in ("id", "created", "system_fingerprint")}


def chunk(delta: dict, finish_reason=None, stop_reason=None, **extras) -> dict:
    choice = {
        "index": 0,
        "delta": delta,
        "logprobs": None,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
    return {"object": "chat.completion.chunk", "model": "org/tiny-vl", "choices": [choice], **extras}


def events(text: str) -> list[dict]:
    """Data of a stream that ends with [DONE]."""
    *lines, done, empty = text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def post(llm: FakeLLM, **body):
    async with asgi_client(llm) as client:
        return await client.post(URL, json={"messages": MESSAGES, **body})


async def test_answer():
    response = await post(FakeLLM(), model="org/tiny-vl")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert identity(response.json()) == {
        "object": "chat.completion",
        "model": "org/tiny-vl",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "A cat.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": USAGE,
    }


async def test_answer_with_media_info():
    body = (await post(FakeLLM(), return_media_info=True)).json()
    assert body["media"] == MEDIA


@pytest.mark.parametrize(("finish_reason", "stop_reason"), [("length", None), ("stop", "\n\n"), ("stop", 151645)])
async def test_why_the_answer_ended(finish_reason, stop_reason):
    llm = FakeLLM(finish_reason=finish_reason, stop_reason=stop_reason)
    choice = (await post(llm)).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == (finish_reason, stop_reason)
    last = events((await post(llm, stream=True)).text)[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == (finish_reason, stop_reason)


async def test_stream():
    response = await post(FakeLLM(), stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    bodies = events(response.text)
    assert len({(body["id"], body["created"]) for body in bodies}) == 1
    assert [identity(body) for body in bodies] == [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "A "}),
        chunk({"content": "cat"}),
        chunk({"content": "."}),
        chunk({}, "stop"),
    ]


async def test_stream_with_usage():
    bodies = events((await post(FakeLLM(), stream=True, stream_options={"include_usage": True})).text)
    assert [identity(body) for body in bodies] == [
        chunk({"role": "assistant", "content": ""}, usage=None),
        chunk({"content": "A "}, usage=None),
        chunk({"content": "cat"}, usage=None),
        chunk({"content": "."}, usage=None),
        chunk({}, "stop", usage=None),
        {"object": "chat.completion.chunk", "model": "org/tiny-vl", "choices": [], "usage": USAGE},
    ]


async def test_stream_with_usage_in_every_chunk():
    options = {"include_usage": True, "continuous_usage_stats": True}
    bodies = events((await post(FakeLLM(), stream=True, stream_options=options)).text)
    assert [body["usage"]["completion_tokens"] for body in bodies] == [0, 1, 2, 3, 3, 3]


async def test_stream_with_media_info_in_the_first_chunk_only():
    first, *rest = events((await post(FakeLLM(), stream=True, return_media_info=True)).text)
    assert first["media"] == MEDIA
    assert not any("media" in body for body in rest)


async def test_steps_without_text_send_nothing():
    bodies = events((await post(FakeLLM(script=("", "A", "", "B", "")), stream=True)).text)
    assert [body["choices"][0]["delta"] for body in bodies] == [
        {"role": "assistant", "content": ""},
        {"content": "A"},
        {"content": "B"},
        {},
    ]


async def test_everything_reaches_the_model():
    llm = FakeLLM()
    sampling = {
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 3,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    media = {
        "media_io_kwargs": {"video": {"num_frames": 10}},
        "mm_processor_kwargs": {"video": {"max_pixels": 4096}},
        "chat_template_kwargs": {"enable_thinking": False},
        "media_overflow": "fit",
    }
    messages = [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4", "fps": 2}},
                {"type": "text", "text": "<|video_pad|> what?"},
            ],
        },
    ]
    response = await post(llm, messages=messages, **sampling, **media)
    assert response.status_code == 200
    (call,) = llm.calls
    params = vars(call.pop("params"))
    assert params == {**sampling, "stop": ("a", "b"), "stop_token_ids": (1, 2)}
    assert call.pop("request_id") == response.json()["id"]
    assert call == {
        "messages": messages,
        **media,
        "add_generation_prompt": True,
        "continue_final_message": False,
    }


async def test_what_is_not_said_is_the_models_default():
    llm = FakeLLM()
    await post(llm, temperature=None, max_tokens=None, stop=None, n=None, stream=None, stream_options=None, tools=None)
    assert llm.calls[0]["params"] == llm.default_sampling_params()


async def test_max_completion_tokens_and_a_single_stop_string():
    llm = FakeLLM()
    await post(llm, max_completion_tokens=5, stop="###")
    params = llm.calls[0]["params"]
    assert (params.max_tokens, params.stop) == (5, ("###",))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (True, False)),
        ({"continue_final_message": True}, (False, True)),
        ({"add_generation_prompt": False}, (False, False)),
        ({"add_generation_prompt": False, "continue_final_message": True}, (False, True)),
    ],
)
async def test_how_the_prompt_ends(body, expected):
    llm = FakeLLM()
    await post(llm, **body)
    assert (llm.calls[0]["add_generation_prompt"], llm.calls[0]["continue_final_message"]) == expected


async def test_harmless_and_unknown_fields_and_values_that_ask_for_nothing_are_accepted():
    body = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logprobs": False,
        "logit_bias": {},
        "modalities": ["text"],
        "length_penalty": 1.0,
        "num_return_sequences": 1,
        "suppress_tokens": [],
        "bad_words_ids": [],
        "min_length": 0,
        "typical_p": 1.0,
        "guidance_scale": 1.0,
        "mirostat": 0,
        "dry_multiplier": 0.0,
        "xtc_probability": 0,
        "return_logprob": False,
        "think": None,
        "models": ["org/tiny-vl", "org/other"],
        "provider": {"order": ["a"]},
        "route": "fallback",
        "transforms": ["middle-out"],
        "plugins": [{"id": "web"}],
        "request_id": "mine",
        "some_field_of_next_year": {"x": 1},
        "guided_json": None,
    }
    llm = FakeLLM()
    response = await post(llm, **body)
    assert response.status_code == 200
    assert llm.calls[0]["request_id"] != "mine"


async def test_lines_in_the_log_say_nothing_of_what_was_said(caplog):
    caplog.set_level("DEBUG", logger="filmstrip")
    url = "https://example.com/a.mp4?X-Amz-Signature=abc"
    parts = [{"type": "video_url", "video_url": url}, {"type": "text", "text": "private"}]
    messages = [{"role": "user", "content": parts}]
    await post(FakeLLM(), messages=messages)
    await post(FakeLLM(error=MediaBlockedError("address not public")), messages=messages)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("filmstrip")]
    assert "stop, prompt 30 tokens (16 cached), answer 3 tokens, " in lines[0]
    assert "media_blocked, prompt 0 tokens (0 cached), answer 0 tokens, " in lines[1]
    assert not any(word in line for line in lines for word in ("private", "Signature", "cat"))
