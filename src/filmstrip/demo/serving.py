"""A checkpoint and a folder of clips in, a running ``filmstrip serve`` and its answers over HTTP out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filmstrip.config import API_KEY_VARIABLE
from filmstrip.errors import FilmstripError

MAX_ANSWER_TOKENS = 64
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The server is ours: a proxy of the environment could not reach it."""
_REQUEST_TIMEOUT_SECONDS = 600
_STOP_TIMEOUT_SECONDS = 30


class ServerNotStarted(FilmstripError):
    """The server ended, or was not ready in time."""


class Refused(FilmstripError):
    """The server answered with an error; the message is its own."""


@dataclass(frozen=True)
class RunningServer:
    """Address and process of a server."""

    url: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running_server(
    model: str,
    folder: Path,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    start_timeout_seconds: float = 300,
) -> Iterator[RunningServer]:
    """A ``filmstrip serve`` of ``model`` as ``name`` that may read ``folder``. ``port`` 0 takes a free one.

    The process ends with the context. Raises ServerNotStarted.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerNotStarted(f"cannot listen on {host}:{port}: {error.strerror}") from None
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "filmstrip.cli.main", "serve", model, "--host", host, "--port", str(port)),
        *("--allowed-local-media-path", str(folder), "--log-level", "warning"),
        # Layers as small as the demo model's are done before a second thread is awake.
        *("--num-threads", "1"),
        *(() if name is None else ("--served-model-name", name)),
        *("--max-model-len", "8192", "--kv-cache-gb", "0.25", "--encoder-cache-gb", "0.05"),
    ]
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    inherited = {variable: value for variable, value in os.environ.items() if variable != API_KEY_VARIABLE}
    process = subprocess.Popen(command, env=inherited | environment)
    url = f"http://{host}:{port}"
    try:
        _wait_until_healthy(url, process, start_timeout_seconds)
        yield RunningServer(url, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=_STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerNotStarted(f"the server ended with code {process.returncode} before it was ready")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            _DIRECTLY.open(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise ServerNotStarted(f"the server was not ready after {timeout_seconds:g} s")


class Client:
    """Asks the one model of a server."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._model = self._read(urllib.request.Request(f"{url}/v1/models"))["data"][0]["id"]

    def ask(
        self, parts: Sequence[dict[str, Any]], text: str, turns: Sequence[tuple[str, str]] = (), **options: Any
    ) -> dict[str, Any]:
        """The response to ``text`` about media ``parts``, after earlier ``turns`` of question and answer.

        The media stand in the first message. Raises Refused.
        """
        messages: list[dict[str, Any]] = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": text})
        messages[0]["content"] = [*parts, {"type": "text", "text": messages[0]["content"]}]
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": MAX_ANSWER_TOKENS,
            **options,
        }
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return self._read(request)

    def _read(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with _DIRECTLY.open(request, timeout=_REQUEST_TIMEOUT_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise Refused(f"the server refuses the question: {json.load(error)['error']['message']}") from None

    def answer(self, parts: Sequence[dict[str, Any]], text: str, turns: Sequence[tuple[str, str]] = ()) -> str:
        """The answer's words."""
        return words_of(self.ask(parts, text, turns))

    def times(self, part: dict[str, Any]) -> list[float]:
        """Times in seconds of the frames that the model sees of a video, as the server reports them."""
        response = self.ask([part], "How many shapes are there?", max_tokens=1, return_media_info=True)
        return response["media"][0]["timestamps"]


def words_of(response: dict[str, Any]) -> str:
    """The answer's words of a response."""
    return response["choices"][0]["message"]["content"] or ""


def video(url: str) -> dict[str, Any]:
    """A video's part of a message."""
    return {"type": "video_url", "video_url": {"url": url}}


def image(url: str) -> dict[str, Any]:
    """A picture's part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}
