"""A real server on a socket: OpenAI's client, clients that go away, large bodies, signals."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from filmstrip.config import EngineConfig, LLMConfig, ServerConfig
from filmstrip.errors import EngineDeadError, EngineOverloadedError
from filmstrip.server.runner import bind
from tests.server.fakes import Abort, FakeLLM, RefusingLLM, serving
from tests.server.test_chat import MESSAGES, URL


async def test_small_answers_are_not_held_back():
    """Nagle's algorithm must be off on what the listener accepts, or an answer in two writes waits for an ACK."""
    listener = bind(ServerConfig(LLMConfig(EngineConfig("m")), port=0))
    accepted = asyncio.get_running_loop().create_future()

    def take(reader, writer):
        accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(take, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await asyncio.wait_for(accepted, 10) == 1
        writer.close()
        await writer.wait_closed()


VIDEO_MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
            {"type": "text", "text": "What happens?"},
        ],
    }
]


def client_of(base_url: str, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, **options)


def wait_for(condition, seconds: float = 10.0) -> None:
    """Wait until ``condition()`` holds; fail after ``seconds``, far more than is needed."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def head_of_post(num_bytes: int) -> bytes:
    """The head of a request whose body has ``num_bytes``."""
    fields = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {num_bytes}"]
    return "\r\n".join([f"POST {URL} HTTP/1.1", *fields, "", ""]).encode()


def test_openai_client():
    llm = FakeLLM()
    with serving(llm) as base_url, client_of(base_url) as client:
        assert [model.id for model in client.models.list()] == ["org/tiny-vl"]
        assert client.models.retrieve("org/tiny-vl").id == "org/tiny-vl"
        answer = client.chat.completions.create(
            model="org/tiny-vl",
            messages=VIDEO_MESSAGES,
            max_completion_tokens=10,
            extra_body={"media_io_kwargs": {"video": {"fps": 1}}, "return_media_info": True, "top_k": 1},
        )
        stream = client.chat.completions.create(
            model="org/tiny-vl", messages=VIDEO_MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert answer.choices[0].message.content == "A cat."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert answer.usage.prompt_tokens_details.video_tokens == 12
    assert answer.media[0]["frame_indices"] == [0, 165, 331, 497]
    assert answer._request_id
    assert llm.calls[0]["messages"] == VIDEO_MESSAGES
    assert llm.calls[0]["params"].top_k == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "A cat."
    assert chunks[-1].usage.total_tokens == 33


async def test_async_openai_client():
    with serving(FakeLLM(script=("é", "👩‍🚀", "\n\n")), api_key="key") as base_url:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="key", max_retries=0) as client:
            answer = await client.chat.completions.create(model="org/tiny-vl", messages=VIDEO_MESSAGES)
            stream = await client.chat.completions.create(model="org/tiny-vl", messages=VIDEO_MESSAGES, stream=True)
            deltas = [chunk.choices[0].delta.content or "" async for chunk in stream]
        wrong = openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as caught:
            await wrong.models.list()
        await wrong.close()
    assert answer.choices[0].message.content == "".join(deltas) == "é👩‍🚀\n\n"
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("stream", [False, True])
def test_openai_client_understands_errors(stream):
    llm = RefusingLLM()
    with serving(llm) as base_url, client_of(base_url) as client:
        ask = {"model": "org/tiny-vl", "messages": MESSAGES, "stream": stream}
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**ask)
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**ask | {"model": "gpt-4"})
        with pytest.raises(openai.BadRequestError) as unsupported:
            client.chat.completions.create(**ask, logprobs=True)
        llm.error = EngineOverloadedError("too busy")
        with pytest.raises(openai.InternalServerError) as busy:
            client.chat.completions.create(**ask)
    assert refused.value.param == "messages[0].content[1].type"
    assert refused.value.type == "invalid_request_error"
    assert unknown.value.code == "model_not_found"
    assert unsupported.value.param == "logprobs"
    assert (busy.value.status_code, busy.value.code) == (503, "overloaded")


def test_openai_client_raises_errors_inside_a_stream():
    llm = FakeLLM(script=("A ", Abort(EngineDeadError("the engine ended"))))
    with serving(llm) as base_url, client_of(base_url) as client:
        stream = client.chat.completions.create(model="org/tiny-vl", messages=MESSAGES, stream=True)
        received = []
        with pytest.raises(openai.APIError, match="the engine ended"):
            received.extend(chunk.choices[0].delta.content for chunk in stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["prompt", "steps"])
def test_a_client_that_goes_away_ends_its_request(stage, stream):
    llm = FakeLLM()
    hold = llm.hold_prompt if stage == "prompt" else llm.hold_steps
    hold.set()
    with serving(llm, keep_alive_seconds=0.01) as base_url:
        address = urlsplit(base_url)
        connection = http.client.HTTPConnection(address.hostname, address.port)
        body = json.dumps({"messages": MESSAGES, "stream": stream})
        connection.request("POST", URL, body, {"Content-Type": "application/json"})
        wait_for(lambda: len(llm.running) == 1)
        (request_id,) = llm.running
        if stream and stage == "steps":
            assert connection.getresponse().readline().startswith(b"data: ")
        connection.close()
        wait_for(lambda: llm.aborted == [request_id])
        assert not llm.running
        hold.clear()
        assert httpx2.post(base_url + URL, json={"messages": MESSAGES}).status_code == 200


def test_a_client_that_goes_away_between_chunks():
    llm = FakeLLM(script=["word "] * 100_000)
    with serving(llm) as base_url, client_of(base_url) as client:
        stream = client.chat.completions.create(model="org/tiny-vl", messages=MESSAGES, stream=True)
        for _ in range(3):
            next(iter(stream))
        stream.close()
        wait_for(lambda: len(llm.aborted) == 1)


def test_a_client_that_goes_away_during_its_upload():
    llm = FakeLLM()
    with serving(llm) as base_url:
        address = urlsplit(base_url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head_of_post(1000) + b'{"messages"')
        assert httpx2.post(base_url + URL, json={"messages": MESSAGES}).status_code == 200
    assert len(llm.calls) == 1


def test_a_slow_request_does_not_hold_up_others():
    llm = FakeLLM()
    llm.hold_steps.set()
    with serving(llm) as base_url, socket.create_connection(urlsplit(base_url).netloc.split(":")) as connection:
        body = json.dumps({"messages": MESSAGES, "stream": True}).encode()
        connection.sendall(head_of_post(len(body)) + body)
        wait_for(lambda: len(llm.running) == 1)
        assert httpx2.get(base_url + "/health").status_code == 200
        assert len(llm.running) == 1


def test_large_body():
    llm = FakeLLM()
    text = "x" * (8 * 1024**2)
    with serving(llm) as base_url:
        response = httpx2.post(base_url + URL, json={"messages": [{"role": "user", "content": text}]})
    assert response.status_code == 200
    assert llm.calls[0]["messages"][0]["content"] == text


@pytest.mark.parametrize("chunked", [False, True])
def test_client_of_a_body_that_is_too_large_gets_to_read_the_answer(chunked):
    content = b"x" * (4 * 1024**2)
    body = (content[i : i + 65536] for i in range(0, len(content), 65536)) if chunked else content
    with serving(FakeLLM(), max_body_bytes=1024) as base_url:
        response = httpx2.post(base_url + URL, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert httpx2.get(base_url + "/health").status_code == 200


def test_too_many_headers():
    with serving(FakeLLM()) as base_url:
        headers = {f"X-Header-{i}": "x" * 20 for i in range(10_000)}
        try:
            status = httpx2.get(base_url + "/version", headers=headers).status_code
        except httpx2.TransportError:  # closed while the client was still sending
            status = 400
        assert status == 400
        assert httpx2.get(base_url + "/version").status_code == 200


SERVER_PROGRAM = """
import asyncio, sys
from filmstrip.server.runner import bind
from tests.server.fakes import FakeLLM, server_config
from filmstrip.server.app import create_app
from filmstrip.server.runner import bind, run

config = server_config(drain_timeout_seconds=float(sys.argv[1]))
listener = bind(config)
print(listener.getsockname()[1], flush=True)
llm = FakeLLM(step_seconds=float(sys.argv[2]))
app = create_app(llm, config)
app.get("/running")(lambda: len(llm.running))
asyncio.run(run(app, config, listener))
assert not llm.running
print("clean end", flush=True)
"""


def start_server(drain_timeout_seconds: float, step_seconds: float) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-c", SERVER_PROGRAM, str(drain_timeout_seconds), str(step_seconds)]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout
    base_url = f"http://127.0.0.1:{process.stdout.readline().strip()}"

    def answers() -> bool:
        try:
            return httpx2.get(base_url + "/health").status_code == 200
        except httpx2.TransportError:
            return False

    wait_for(answers)
    return process, base_url


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_requests_finish(number):
    process, base_url = start_server(30, 0.3)
    with process, client_of(base_url) as client:
        stream = client.chat.completions.create(model="org/tiny-vl", messages=MESSAGES, stream=True)
        first = next(stream)
        process.send_signal(number)
        text = first.choices[0].delta.content + "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == "A cat."
        assert process.wait(20) == 0
        assert process.stdout.read() == "clean end\n"


def is_told_of_the_end(stream) -> bool:
    with pytest.raises(openai.APIError, match="the server is shutting down") as caught:
        list(stream)
    return caught.value.code == "shutting_down"


def test_second_signal_ends_running_requests():
    process, base_url = start_server(600, 600)
    with process, client_of(base_url) as client:
        stream = client.chat.completions.create(model="org/tiny-vl", messages=MESSAGES, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert is_told_of_the_end(stream)
        assert process.wait(20) == 0


def test_requests_that_do_not_finish_in_time_are_ended():
    process, base_url = start_server(1, 600)
    with process, client_of(base_url) as client, ThreadPoolExecutor() as executor:
        stream = client.chat.completions.create(model="org/tiny-vl", messages=MESSAGES, stream=True)
        next(stream)
        whole = executor.submit(client.chat.completions.create, model="org/tiny-vl", messages=MESSAGES)
        wait_for(lambda: httpx2.get(base_url + "/running").text == "2")
        process.send_signal(signal.SIGTERM)
        assert is_told_of_the_end(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            whole.result()
        assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
        assert process.wait(20) == 0


async def test_requests_of_many_clients_at_once():
    llm = FakeLLM(step_seconds=0.01)
    with serving(llm) as base_url:
        async with httpx2.AsyncClient(base_url=base_url) as client:
            posts = [client.post(URL, json={"messages": MESSAGES, "stream": i % 2 == 0}) for i in range(40)]
            responses = await asyncio.gather(*posts)
    assert {response.status_code for response in responses} == {200}
    assert not llm.running
    assert not llm.aborted
