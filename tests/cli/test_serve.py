"""``filmstrip serve`` as a program: from its flags to an orderly end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import openai
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


class Program:
    """A running ``filmstrip serve``; its log is read line by line."""

    def __init__(self, *argv: str, **llm):
        command = [sys.executable, "-m", "tests.cli.program", "serve", "org/model", *argv]
        environment = os.environ | {"FAKE_LLM": json.dumps(llm)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.log = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read the log until a line has ``pattern``."""
        for line in self.process.stderr:
            self.log += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"ended without {pattern!r}: {self.log}")

    def end(self) -> tuple[int, str]:
        """Exit code, and all of the log."""
        self.log += self.process.stderr.read()
        return self.process.wait(30), self.log


@contextlib.contextmanager
def program(*argv: str, **llm) -> Iterator[Program]:
    running = Program(*argv, **llm)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        with running.process:
            pass


def test_serves_until_it_is_told_to_stop():
    with program("--port", "0", "--served-model-name", "tiny") as running:
        running.wait_for("loading org/model")
        running.wait_for(r"loaded in \d+\.\d s; up to 4096 tokens")
        url = running.wait_for(r"listening on (http://127\.0\.0\.1:\d+/v1)")[1]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            ask = {"model": "tiny", "messages": [{"role": "user", "content": "private words"}]}
            assert client.chat.completions.create(**ask).choices[0].message.content == "A cat."
        running.process.send_signal(signal.SIGTERM)
        code, log = running.end()
        assert running.process.stdout.read() == ""
    assert code == 0
    assert "closed, running 0, aborted 0" in log
    assert 'POST /v1/chat/completions HTTP/1.1" 200' in log
    assert "private" not in log
    assert "Traceback" not in log


def test_a_key_and_who_is_let_in():
    with program("--port", "0", "--host", "0.0.0.0", "--log-level", "warning") as running:
        running.wait_for("everybody who reaches 0.0.0.0:\\d+ may use this server")
    with program("--port", "0", "--api-key", "tops3cret", "--log-level", "debug") as running:
        url = running.wait_for(r"listening on (http://127\.0\.0\.1:\d+)/v1")[1]
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        assert httpx2.get(f"{url}/v1/models", headers={"Authorization": "Bearer tops3cret"}).status_code == 200
        running.process.send_signal(signal.SIGINT)
        code, log = running.end()
    assert code == 0
    assert "tops3cret" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_while_it_loads(number):
    with program("--port", "0", start_seconds=600) as running:
        running.wait_for("loading org/model")
        running.process.send_signal(number)
        code, log = running.end()
    assert code == 0
    assert "Traceback" not in log


def test_a_model_that_cannot_be_loaded():
    with program("--port", "0", "--log-level", "error", load_error="no checkpoint at 'org/model'") as running:
        assert running.end() == (1, "filmstrip: error: no checkpoint at 'org/model'\n")


def test_an_address_that_is_taken_is_noticed_before_the_model_loads():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with program("--port", str(port), start_seconds=600) as running:
            assert running.end() == (
                2,
                f"filmstrip: error: cannot listen on 127.0.0.1:{port}: Address already in use\n",
            )
