"""Every way a request can be wrong: status, and an OpenAI error body that says where."""

import json
import math

import pytest

from filmstrip.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidRequestError,
    MediaBlockedError,
    MediaDecodeError,
)
from tests.server.fakes import Abort, FakeLLM, asgi_client
from tests.server.test_chat import MESSAGES, URL, events

MANY_PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}]


def error_of(response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return body["error"]


WRONG_FIELDS = [
    ({"n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 10**6}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": -1}, "top_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 2**63}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [0]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"top_k": 1.0}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 10**30}, "seed"),
    ({"stop": ["a"] * 10_000}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {}}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"bad_words": ["a"]}, "bad_words"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_decoding_backend": "x"}, "guided_decoding_backend"),
    ({"audio": {"voice": "a"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"echo": True}, "echo"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"documents": [{}]}, "documents"),
    ({"cache_salt": "tenant"}, "cache_salt"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"length_penalty": 2.0}, "length_penalty"),
    ({"temprature": 0}, "temprature"),
    ({"max_new_tokens": 5}, "max_new_tokens"),
    ({"medio_io_kwargs": {}}, "medio_io_kwargs"),
    ({"fps": 1}, "fps"),
    ({"start": 0}, "start"),
    ({"video": {"fps": 1}}, "video"),
    ({"enable_thinking": False}, "enable_thinking"),
    ({"thinking": {"type": "enabled"}}, "thinking"),
    ({"n_predict": 5}, "n_predict"),
    ({"num_return_sequences": 2}, "num_return_sequences"),
    ({"suppress_tokens": [1]}, "suppress_tokens"),
    ({"bad_words_ids": [[1]]}, "bad_words_ids"),
    ({"min_length": 5}, "min_length"),
    ({"typical_p": 0.9}, "typical_p"),
    ({"guidance_scale": 1.5}, "guidance_scale"),
    ({"mirostat": 2}, "mirostat"),
    ({"dry_multiplier": 0.8}, "dry_multiplier"),
    ({"xtc_probability": 0.5}, "xtc_probability"),
    ({"return_logprob": True}, "return_logprob"),
    ({"logprob": True}, "logprob"),
    ({"format": "json"}, "format"),
    ({"think": True}, "think"),
    ({"response_formats": {}}, "response_formats"),
    ({"stream": "yes"}, "stream"),
    ({"stream": None, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": False, "stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"media_io_kwargs": []}, "media_io_kwargs"),
    ({"mm_processor_kwargs": "x"}, "mm_processor_kwargs"),
    ({"chat_template_kwargs": 1}, "chat_template_kwargs"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": {"role": "user"}}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": MANY_PARTS}, "messages"),
    ({"messages": MESSAGES * 5000}, "messages"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "param"), WRONG_FIELDS, ids=[str(body)[:40] for body, _ in WRONG_FIELDS])
async def test_wrong_field(body, param, stream):
    llm = FakeLLM()
    async with asgi_client(llm) as client:
        response = await client.post(URL, json={"messages": MESSAGES, "stream": stream} | body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 300
    assert llm.calls == []


async def test_what_messages_say():
    async def message(body):
        async with asgi_client(FakeLLM()) as client:
            return error_of(await client.post(URL, json=body))["message"]

    assert await message({}) == "messages is required"
    assert await message({"messages": []}) == "messages must not be empty"
    assert await message({"messages": MESSAGES, "temperature": "x" * 10**6}) == (
        f"temperature should be a valid number, not '{'x' * 37}...{'x' * 38}'"
    )
    assert await message({"messages": MESSAGES, "top_p": 1.1}) == "top_p must be in (0.0, 1.0], not 1.1"
    assert await message({"messages": MESSAGES, "n": 3}) == (
        "n must be 1, not 3: several answers to one request are not supported"
    )
    assert await message({"messages": MESSAGES, "temprature": 0}) == (
        "there is no field temprature; did you mean temperature?"
    )
    assert await message({"messages": MESSAGES, "response_formats": {"type": "json_object"}}) == (
        "there is no field response_formats; response_format, which it looks like, is not supported"
    )
    assert await message({"messages": MANY_PARTS}) == (
        "the request has 5000 messages and content parts; at most 4096 are allowed (--max-content-parts)"
    )


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("media_io_kwargs.video", ["fps", "num_frames", "min_frames", "max_frames", "start", "end"]),
        ("media_io_kwargs.video", ["nframes", "video", "video_kwargs"]),
        ("mm_processor_kwargs", ["min_pixels", "max_pixels", "mm_kwargs"]),
        ("chat_template_kwargs", ["enable_thinking", "thinking"]),
        ("stop", ["stop_sequences"]),
        ("max_tokens", ["max_new_tokens", "n_predict", "num_predict", "max_length"]),
        ("seed", ["sampling_seed", "random_seed"]),
    ],
)
async def test_fields_of_other_apis_that_have_another_place_here(place, names):
    async with asgi_client(FakeLLM()) as client:
        for name in names:
            error = error_of(await client.post(URL, json={"messages": MESSAGES, name: 1}))
            assert error["message"] == f"there is no field {name}; say it in {place}"
            assert (error["param"], error["code"]) == (name, "unknown_parameter")
            assert (await client.post(URL, json={"messages": MESSAGES, name: None})).status_code == 200


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_numbers_json_does_not_have(value):
    content = json.dumps({"messages": MESSAGES, "temperature": value})
    async with asgi_client(FakeLLM()) as client:
        response = await client.post(URL, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "temperature"


async def test_too_many_unknown_fields():
    body = {"messages": MESSAGES} | {f"field_{i}": 1 for i in range(1000)}
    async with asgi_client(FakeLLM()) as client:
        response = await client.post(URL, json=body)
    assert response.status_code == 400
    assert "1000 unknown fields" in error_of(response)["message"]


async def test_unknown_model():
    async with asgi_client(FakeLLM()) as client:
        response = await client.post(URL, json={"messages": MESSAGES, "model": "gpt-4"})
    assert response.status_code == 404
    assert error_of(response) == {
        "message": "there is no model 'gpt-4' here; this server has 'org/tiny-vl' (--served-model-name)",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


ERRORS_BEFORE_THE_FIRST_OUTPUT = [
    (InvalidRequestError("wrong", param="messages[0].role"), 400, "invalid_request_error", "invalid_value"),
    (MediaDecodeError("not a video", param="messages[0].content[0].video_url.url"), 400, None, "media_decode_failed"),
    (MediaBlockedError("address not public"), 400, "invalid_request_error", "media_blocked"),
    (ContextLengthError("too long: 9 of 8 tokens"), 400, "invalid_request_error", "context_length_exceeded"),
    (EngineDeadError("the engine ended"), 500, "server_error", "engine_dead"),
    (EngineOverloadedError("too busy"), 503, "server_error", "overloaded"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("raised", "status", "kind", "code"), ERRORS_BEFORE_THE_FIRST_OUTPUT)
async def test_errors_before_the_first_output_are_http_errors(raised, status, kind, code, stream):
    llm = FakeLLM(error=raised)
    async with asgi_client(llm) as client:
        response = await client.post(URL, json={"messages": MESSAGES, "stream": stream})
        assert response.status_code == status
        error = error_of(response)
        assert (error["message"], error["param"], error["code"]) == (raised.message, raised.param, code)
        assert kind in (None, error["type"])
        llm.error = None
        assert (await client.post(URL, json={"messages": MESSAGES, "stream": stream})).status_code == 200
    assert not llm.running


async def test_overload_says_when_to_come_back():
    async with asgi_client(FakeLLM(error=EngineOverloadedError("too busy"))) as client:
        response = await client.post(URL, json={"messages": MESSAGES})
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert int(response.headers["retry-after-ms"]) == int(response.headers["retry-after"]) * 1000


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_shows_nothing_of_the_server(stream):
    secret = RuntimeError("/home/alice/model <object at 0x7f00deadbeef>")
    async with asgi_client(FakeLLM(error=secret)) as client:
        response = await client.post(
            URL, json={"messages": MESSAGES, "stream": stream}, headers={"X-Request-Id": "find-me"}
        )
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "find-me"
    assert error_of(response) == {
        "message": "internal error; the server's log says more",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


@pytest.mark.parametrize(
    ("raised", "code"),
    [(EngineDeadError("the engine ended"), "engine_dead"), (RuntimeError("/secret 0x7f00"), "internal_error")],
)
async def test_errors_inside_a_stream(raised, code, caplog):
    llm = FakeLLM(script=("A ", Abort(raised)))
    async with asgi_client(llm) as client:
        response = await client.post(URL, json={"messages": MESSAGES, "stream": True})
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert [body["choices"][0]["delta"].get("content") for body in chunks] == ["", "A "]
    assert set(last) == {"error"}
    assert last["error"]["code"] == code
    assert "secret" not in response.text
    assert ("a stream failed" in caplog.text) == (code == "internal_error")


async def test_engine_dies_during_an_answer_that_is_not_streamed():
    async with asgi_client(FakeLLM(script=("A ", Abort(EngineDeadError("the engine ended"))))) as client:
        response = await client.post(URL, json={"messages": MESSAGES})
    assert (response.status_code, error_of(response)["code"]) == (500, "engine_dead")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_the_engine_gave_up_is_an_error(stream):
    async with asgi_client(FakeLLM(script=("A", ""), finish_reason="abort")) as client:
        response = await client.post(URL, json={"messages": MESSAGES, "stream": stream})
    error = events(response.text)[-1]["error"] if stream else error_of(response)
    assert error["code"] == "aborted"


async def test_dead_engine_refuses_new_requests():
    llm = FakeLLM(is_alive=False)
    async with asgi_client(llm) as client:
        response = await client.post(URL, json={"messages": MESSAGES})
        assert (response.status_code, error_of(response)["code"]) == (500, "engine_dead")
        for path in ("/health", "/ping"):
            response = await client.get(path)
            assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")
            assert error_of(response)["type"] == "server_error"
        llm.is_alive = True
        assert (await client.post(URL, json={"messages": MESSAGES})).status_code == 200
        assert (await client.get("/health")).json() == {"status": "ok"}
    assert len(llm.calls) == 1
