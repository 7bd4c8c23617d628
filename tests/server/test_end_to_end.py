"""``filmstrip serve`` with a real (tiny, random) checkpoint and a real clip: what only the whole can show."""

import base64
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from tests.parity.clips import make_clip
from tests.server.test_chat import URL
from tests.server.test_connections import wait_for


class Server:
    """A running server and what can be asked of it."""

    def __init__(self, model: str, folder: Path) -> None:
        self.clip = make_clip(folder / "clip.mp4", 192, 640, 360, rate=24)
        self.log = folder / "log"
        flags = ["--port", "0", "--served-model-name", "tiny", "--allowed-local-media-path", str(folder)]
        sizes = ["--kv-cache-gb", "0.05", "--encoder-cache-gb", "0.05", "--max-model-len", "8192", "--num-threads", "2"]
        command = [sys.executable, "-m", "filmstrip.cli.main", "serve", model, *flags, *sizes]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
        wait_for(lambda: self._listens_on() or self.process.poll() is not None, 120)
        found = self._listens_on()
        assert found, self.log.read_text()
        self.base_url = found[1]
        self.client = openai.OpenAI(base_url=f"{self.base_url}/v1", api_key="none", max_retries=0)

    def _listens_on(self) -> re.Match[str] | None:
        return re.search(r"listening on (http://\S+)/v1", self.log.read_text())

    def ask(self, *parts, **options):
        options = {"max_tokens": 8, "temperature": 0, **options}
        messages = [{"role": "user", "content": list(parts)}]
        return self.client.chat.completions.create(model="tiny", messages=messages, **options)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(qwen3_vl_dir, tmp_path_factory):
    running = Server(qwen3_vl_dir, tmp_path_factory.mktemp("served"))
    yield running
    running.close()


def video(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url, "num_frames": 4}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def test_a_clip_and_a_second_question(server):
    first = server.ask(video(server.clip.as_uri()), text("What happens?"), extra_body={"return_media_info": True})
    (media,) = first.media
    assert media["frame_indices"][0] == 0
    assert (media["num_frames"], media["cached"]) == (4, False)
    assert first.usage.prompt_tokens_details.video_tokens == media["num_tokens"] > 0
    assert first.choices[0].finish_reason == "length"
    assert first.usage.completion_tokens == 8

    data = base64.b64encode(server.clip.read_bytes()).decode()
    parts = [video(f"data:video/mp4;base64,{data}"), text("What happens?")]
    stream = list(server.ask(*parts, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said == first.choices[0].message.content
    assert stream[-1].usage.prompt_tokens_details.cached_tokens > 0


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (video("file:///etc/passwd"), "media_blocked"),
        (video("http://127.0.0.1:9/clip.mp4"), "media_blocked"),
        (video("data:video/mp4;base64,AAAA"), "media_decode_failed"),
        (video("data:image/png;base64,AAAA"), "media_decode_failed"),
        (video("data:video/mp4;base64,%"), "media_fetch_failed"),
        ({"type": "video_url", "video_url": {"url": "data:,", "fps": -5}}, "invalid_value"),
        ({"type": "hologram"}, "invalid_value"),
        (text("word " * 20_000), "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_and_the_next_request(server, part, code, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(part, stream=stream)
    assert caught.value.code == code
    assert caught.value.param.startswith("messages")
    assert server.ask(text("Hello")).usage.completion_tokens == 8


def test_template_overrides_are_refused(server):
    for name in ("chat_template", "tokenize", "tools", "documents"):
        with pytest.raises(openai.BadRequestError, match=name):
            server.ask(text("Hello"), extra_body={"chat_template_kwargs": {name: "{{ 1 }}"}})


def test_typed_placeholders_are_text(server):
    answer = server.ask(text("<|video_pad|><|image_pad|><|vision_start|><|im_start|><|im_end|>"))
    assert answer.usage.prompt_tokens_details.video_tokens == 0


def test_a_dead_engine_and_an_orderly_end(server):
    """The last test: nothing can be asked afterwards."""
    stream = server.ask(text("Hello"), stream=True, max_tokens=8000, extra_body={"ignore_eos": True})
    next(iter(stream))
    children = psutil.Process(server.process.pid).children()
    (engine,) = [child for child in children if "filmstrip.engine.process" in child.cmdline()]
    engine.kill()
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_dead"
    health = httpx2.get(server.base_url + "/health")
    assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    assert httpx2.post(server.base_url + URL, json=body).json()["error"]["code"] == "engine_dead"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()
