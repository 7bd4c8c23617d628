"""The whole server, with a tiny checkpoint and real clips: answers over HTTP, wrong input, lost clients, a dead engine."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig, ServerConfig
from filmstrip.llm import AsyncLLM
from filmstrip.server.app import create_app
from filmstrip.server.runner import Server, bind
from tests.parity.clips import make_clip, make_picture

NAME = "tiny"


class RunningServer:
    """A server on a free port, on an event loop in a thread of its own, whose model the test can ask for its counters."""

    def __init__(self, model, media_path):
        media = MediaConfig(allow_local_files=False, allowed_local_media_path=str(media_path), num_decode_threads=2)
        engine = EngineConfig(model, kv_cache_gb=0.05, encoder_cache_gb=0.01, max_model_len=4096, num_threads=2)
        self._config = ServerConfig(LLMConfig(engine, media), port=0, served_model_name=NAME)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(120)
        return self

    def __exit__(self, *exc_info):
        self._loop.call_soon_threadsafe(self._server.stop)
        self._thread.join(60)
        assert not self._thread.is_alive()

    async def _run(self):
        self.llm = await AsyncLLM.start(self._config.llm)
        listener = bind(self._config)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = Server(create_app(self.llm, self._config), self._config)
        self._loop.call_later(0.2, self._ready.set)
        try:
            await self._server.serve(sockets=[listener])
        finally:
            await self.llm.close()

    def stats(self):
        return asyncio.run_coroutine_threadsafe(self.llm.stats(), self._loop).result(30)

    def wait_until_idle(self):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            stats = self.stats()
            if stats["num_running"] == stats["num_waiting"] == 0:
                return stats
            time.sleep(0.05)
        raise AssertionError(f"requests are still there: {stats}")

    def post(self, **body):
        return httpx2.post(f"{self.url}/v1/chat/completions", json={"model": NAME, **body}, timeout=60)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_clip(folder / "clip.mp4", 60, 128, 96, rate=20)
    make_picture(folder / "photo.png", 90, 70)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (folder / "cut.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:2000])
    (tmp_path_factory.getbasetemp() / "secret.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    return folder


@pytest.fixture(scope="module")
def server(qwen3_vl_dir, media):
    with RunningServer(qwen3_vl_dir, media) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def question(url, text="What happens?", kind="video_url", **settings):
    part = {"type": kind, kind: {"url": str(url), **settings}}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


def test_a_video_question_over_http(client, media):
    def ask(text):
        return client.chat.completions.create(
            model=NAME,
            messages=question((media / "clip.mp4").as_uri(), text),
            max_tokens=8,
            temperature=0,
            extra_body={"media_io_kwargs": {"video": {"num_frames": 4}}, "return_media_info": True, "ignore_eos": True},
        )

    first, second = ask("What happens?"), ask("And what comes last?")
    (seen,) = first.model_extra["media"]
    assert seen["frame_indices"] == [0, 19, 39, 59]
    assert seen["timestamps"] == [0.0, 0.95, 1.95, 2.95]
    assert (seen["cached"], second.model_extra["media"][0]["cached"]) == (False, True)
    assert first.usage.completion_tokens == 8
    details = second.usage.prompt_tokens_details
    assert details.cached_tokens > 0
    assert details.model_extra["video_tokens"] == seen["num_tokens"]
    assert first.choices[0].finish_reason == "length"


def test_streamed_and_whole_answers_are_the_same(client, media):
    settings = {"model": NAME, "messages": question(media / "clip.mp4"), "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.completion_tokens == 24


def test_many_at_once_answer_as_one(server, client, media):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as many:
            calls = [
                many.chat.completions.create(
                    model=NAME, messages=question(media / "clip.mp4", f"Question {i % 4}?"), max_tokens=8, temperature=0
                )
                for i in range(12)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    answers = asyncio.run(ask_all())
    for i in range(4):
        alone = client.chat.completions.create(
            model=NAME, messages=question(media / "clip.mp4", f"Question {i}?"), max_tokens=8, temperature=0
        )
        assert {alone.choices[0].message.content} == set(answers[i::4])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"messages": question("{media}/missing.mp4")}, 400, "messages[0].content[0].video_url.url", "allowed-local"),
        ({"messages": question("{media}/../secret.mp4")}, 400, "messages[0].content[0].video_url.url", "allowed-local"),
        ({"messages": question("/etc/passwd")}, 400, "messages[0].content[0].video_url.url", "allowed-local"),
        ({"messages": question("{media}/empty.mp4")}, 400, "messages[0].content[0].video_url.url", ""),
        ({"messages": question("{media}/noise.mp4")}, 400, "messages[0].content[0].video_url.url", ""),
        ({"messages": question("{media}/cut.mp4")}, 400, "messages[0].content[0].video_url.url", ""),
        ({"messages": question("{media}/photo.png")}, 400, "messages[0].content[0].video_url.url", "image_url"),
        (
            {"messages": question("{media}/clip.mp4", kind="image_url")},
            400,
            "messages[0].content[0].image_url.url",
            "video_url",
        ),
        ({"messages": question("data:video/mp4;base64,???")}, 400, "messages[0].content[0].video_url.url", "base64"),
        (
            {"messages": question("http://127.0.0.1:1/x.mp4")},
            400,
            "messages[0].content[0].video_url.url",
            "allow-private-media-urls",
        ),
        (
            {"messages": question("{media}/clip.mp4", fps=0)},
            400,
            "messages[0].content[0].video_url.fps",
            "0",
        ),
        (
            {"messages": question("{media}/clip.mp4"), "media_io_kwargs": {"video": {"num_frames": "ten"}}},
            400,
            "media_io_kwargs.video.num_frames",
            "ten",
        ),
        (
            {"messages": question("{media}/clip.mp4"), "media_io_kwargs": {"video": {"fps": -3}}},
            400,
            "media_io_kwargs.video.fps",
            "-3",
        ),
        (
            {
                "messages": question("{media}/clip.mp4"),
                "media_io_kwargs": {"video": {"num_frames": 60}},
                "mm_processor_kwargs": {"video": {"min_pixels": 20_000_000, "max_pixels": 40_000_000}},
            },
            400,
            "messages",
            "max-model-len",
        ),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, 400, "messages", "max-model-len"),
        ({"messages": question("x"), "model": "gpt-9"}, 404, "model", "gpt-9"),
        (
            {"messages": [{"role": "user", "content": [{"type": "smell_url"}]}]},
            400,
            "messages[0].content[0].type",
            "smell",
        ),
    ],
)
def test_wrong_input_is_an_openai_error_and_harms_nobody(server, media, body, status, param, words, stream):
    body = json.loads(json.dumps(body).replace("{media}", str(media)))
    response = server.post(**{**body, "stream": stream, "max_tokens": 4})
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) >= {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    assert str(media) not in error["message"]
    assert server.post(messages=[{"role": "user", "content": "Still there?"}], max_tokens=2).status_code == 200


def test_two_requests_of_which_one_is_bad(server, media):
    good = threading.Thread(
        target=lambda: results.append(server.post(messages=question(media / "clip.mp4"), max_tokens=30))
    )
    results = []
    good.start()
    assert server.post(messages=question(media / "noise.mp4")).status_code == 400
    good.join()
    assert results[0].status_code == 200


STREAMING_CLIENT = """
import sys, httpx2
url, clip = sys.argv[1:]
part = {"type": "video_url", "video_url": {"url": clip}}
messages = [{"role": "user", "content": [part, {"type": "text", "text": "Go on."}]}]
body = {"model": "tiny", "messages": messages, "stream": True, "ignore_eos": True, "max_tokens": 3500, "temperature": 0}
with httpx2.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""


@pytest.mark.parametrize("num_lines", [5, 40])
def test_killing_a_client_in_the_middle_of_its_stream_leaves_no_block(server, media, num_lines):
    command = [sys.executable, "-c", STREAMING_CLIENT, server.url, str(media / "clip.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(num_lines):
            assert process.stdout.readline()
        assert server.stats()["num_allocated_blocks"] > 0
        process.kill()
    assert server.wait_until_idle()["num_allocated_blocks"] == 0


def test_a_client_that_leaves_before_the_first_token_leaves_no_block(server, media):
    url = "data:video/mp4;base64," + base64.b64encode((media / "clip.mp4").read_bytes()).decode()
    body = {"model": NAME, "messages": question(url, num_frames=50), "max_tokens": 3000, "ignore_eos": True}
    for seconds in (0.01, 0.05, 0.2):
        with contextlib.suppress(httpx2.TimeoutException):
            httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=seconds)
    assert server.wait_until_idle()["num_allocated_blocks"] == 0


def test_a_dead_engine_is_said_at_once_and_nothing_hangs(qwen3_vl_dir, media):
    with RunningServer(qwen3_vl_dir, media) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        body = {"model": NAME, "messages": question(media / "clip.mp4"), "ignore_eos": True, "max_tokens": 3500}
        results = []
        waiting = threading.Thread(target=lambda: results.append(server.post(**body)))
        waiting.start()
        with httpx2.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            for _ in range(10):
                next(lines)
            os.kill(server.llm.engine_pid, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        waiting.join(10)
        assert results[0].status_code == 500
        assert results[0].json()["error"]["code"] == "engine_dead"
        assert httpx2.get(f"{server.url}/health").status_code == 503
        assert server.post(messages=[{"role": "user", "content": "Hello?"}]).json()["error"]["code"] == "engine_dead"
