"""``filmstrip demo``: a server, three right answers, and a page that stays open until it is told to end."""

import re
import signal
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest

from filmstrip.cli.main import main
from filmstrip.demo import bundled

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


def test_a_model_that_does_not_load_is_an_error(tmp_path, capfd):
    assert main(["demo", "--once", "--model", str(tmp_path)]) == 1
    assert "before it was ready" in capfd.readouterr().err


@pytest.mark.parametrize("port", ["-1", "70000", "x"])
def test_a_wrong_port_is_wrong_usage(port, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--port", port])
    assert ended.value.code == 2
    assert "--port" in capsys.readouterr().err
