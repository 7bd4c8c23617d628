"""``filmstrip demo``: a server, three right answers, and a page that stays open until it is told to end."""

import re
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest

from filmstrip.cli.main import main
from filmstrip.demo import bundled
from tests.models.text import make_text

COMMAND = [sys.executable, "-m", "filmstrip.cli.main", "demo"]


def test_once_answers_and_ends():
    result = subprocess.run([*COMMAND, "--once"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    answers = re.findall(r"^answer +(.+?)  +\(", result.stdout, re.MULTILINE)
    when, *others = answers
    assert float(re.fullmatch(r"At (\d+\.\d) seconds", when)[1]) == pytest.approx(3.4, abs=0.5)
    assert others == ["Right", "The second video"]
    assert result.stdout.count("decoded now") == 2
    assert result.stdout.count("from the cache") == 2  # both clips again, to compare them
    for question in bundled.QUESTIONS:
        assert question.text in result.stdout
        assert question.truth in result.stdout


def test_the_page_stays_open():
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            link = next(match[1] for line in lines if (match := re.search(r"Ask on: (http://\S+)", line)))
            address = urllib.parse.urlsplit(link)
            with urllib.request.urlopen(f"http://{address.netloc}/", timeout=30) as page:
                assert b"Filmstrip" in page.read()
            given = dict(urllib.parse.parse_qsl(address.fragment))
            assert given["question"] == bundled.QUESTIONS[0].text
            assert given["video"].startswith("file:///")
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


def test_keys_and_proxies_of_the_environment_are_not_the_demos(monkeypatch, capfd):
    """The server is its own: it needs no key, and no proxy could reach it."""
    monkeypatch.setenv("FILMSTRIP_API_KEY", "secret")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert main(["demo", "--once"]) == 0
    assert capfd.readouterr().out.count("\nanswer ") == len(bundled.QUESTIONS)


def test_sigterm_ends_the_server_too():
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = next(line for line in iter(process.stdout.readline, "") if line.startswith("ready"))
            (port,) = re.findall(r":(\d+)$", ready.strip())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    with socket.create_server(("127.0.0.1", int(port))):  # nobody listens there any more
        pass


def test_a_model_that_takes_no_video_says_so(tmp_path, capfd):
    model = make_text(tmp_path, "LlamaForCausalLM", max_position_embeddings=8192)
    assert main(["demo", "--once", "--model", model]) == 1
    assert "the server refuses the question: the model takes no video_url" in capfd.readouterr().err


def test_a_model_that_does_not_load_is_an_error(tmp_path, capfd):
    assert main(["demo", "--once", "--model", str(tmp_path)]) == 1
    assert "before it was ready" in capfd.readouterr().err


@pytest.mark.parametrize("port", ["-1", "70000", "x"])
def test_a_wrong_port_is_wrong_usage(port, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--port", port])
    assert ended.value.code == 2
    assert "--port" in capsys.readouterr().err
