"""``filmstrip chat``: what is asked, what is shown and where, and what ends what."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys

import pytest

from filmstrip.cli import chat
from filmstrip.cli.display import Display, describe_media
from filmstrip.cli.main import main
from filmstrip.errors import EngineDeadError, InvalidRequestError, ModelLoadError
from filmstrip.types import MediaRecord, SamplingParams
from tests.server.fakes import VIDEO_RECORD, Abort, FakeLLM

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
VIDEO_PART = {"type": "video_url", "video_url": {"url": "https://example.com/clip.mp4"}}
VIDEO = ["--video", "https://example.com/clip.mp4"]


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


class Run:
    """Runs ``filmstrip chat`` in this process with a scripted model."""

    def __init__(self, monkeypatch, capsys):
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.configs = []

    def __call__(self, llm: FakeLLM, *argv: str, stdin: str = "") -> tuple[int, str, str]:
        run = self

        class Startable:
            @staticmethod
            async def start(config):
                run.configs.append(config)
                if isinstance(llm.error, ModelLoadError):
                    raise llm.error
                return llm

        self._monkeypatch.setattr(chat, "AsyncLLM", Startable)
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(["chat", "org/model", *argv])
        return code, *self._capsys.readouterr()


@pytest.fixture
def run(monkeypatch, capsys):
    return Run(monkeypatch, capsys)


def test_one_question(run):
    llm = FakeLLM()
    code, out, err = run(llm, *VIDEO, "--num-frames", "4", "--max-tokens", "9", "What happens?")
    assert (code, out) == (0, "A cat.\n")
    (call,) = llm.calls
    assert call["messages"] == [{"role": "user", "content": [VIDEO_PART, text_part("What happens?")]}]
    assert call["params"] == SamplingParams(temperature=0.7, max_tokens=9)
    assert call["media_io_kwargs"] == {"video": {"num_frames": 4}}
    assert run.configs[0].media.allow_local_files
    assert "loading org/model\n" in err
    assert (
        "https://example.com/clip.mp4: 4 frames at 0.00, 5.50, 11.04, 16.58 s, 96 x 64 pixels, 12 tokens; 2 fps assumed\n"
    ) in err
    assert "prompt 30 tokens (16 cached), answer 3 tokens in " in err
    assert llm.closed


def test_a_conversation_keeps_what_was_said(run):
    llm = FakeLLM()
    stdin = "What happens?\n\n  \n And then? \n/exit\nnever asked\n"
    code, out, _ = run(llm, *VIDEO, "--system", "Be short.", stdin=stdin)
    assert (code, out) == (0, "A cat.\nA cat.\n")
    system = {"role": "system", "content": "Be short."}
    first = {"role": "user", "content": [VIDEO_PART, text_part("What happens?")]}
    assert [call["messages"] for call in llm.calls] == [
        [system, first],
        [
            system,
            first,
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": [text_part("And then?")]},
        ],
    ]
    assert llm.closed


def test_end_of_input_ends_the_conversation(run):
    llm = FakeLLM(media=[])
    assert run(llm, stdin="Hello?")[:2] == (0, "A cat.\n")
    assert run(llm, stdin="")[:2] == (0, "")
    assert len(llm.calls) == 1


def test_a_question_that_cannot_be_answered(run):
    llm = FakeLLM(error=InvalidRequestError("the video is empty"))
    code, out, err = run(llm, *VIDEO, "What happens?")
    assert (code, out) == (1, "")
    assert err.endswith("filmstrip: error: the video is empty\n")
    assert "Traceback" not in err
    assert llm.closed


def test_in_a_conversation_it_can_be_asked_again_with_its_media(run):
    class Moody(FakeLLM):
        async def generate(self, *args, **kwargs):
            self.error = InvalidRequestError("not now") if not self.calls else None
            async for output in super().generate(*args, **kwargs):
                yield output

    llm = Moody()
    code, out, err = run(llm, *VIDEO, stdin="What?\nWhat?\n")
    assert (code, out) == (0, "A cat.\n")
    assert "error: not now\n" in err
    assert llm.calls[0]["messages"] == llm.calls[1]["messages"]
    assert VIDEO_PART in llm.calls[1]["messages"][0]["content"]


def test_a_dead_engine_ends_the_conversation(run):
    llm = FakeLLM(script=("A ", Abort(EngineDeadError("the engine ended"))))
    code, out, err = run(llm, *VIDEO, stdin="What?\nAnd?\n")
    assert (code, out) == (1, "A \n")
    assert err.endswith("filmstrip: error: the engine ended\n")
    assert len(llm.calls) == 1
    assert llm.closed


def test_a_model_that_cannot_be_loaded(run):
    code, out, err = run(FakeLLM(error=ModelLoadError("no such checkpoint: 'org/model'")), "Hi")
    assert (code, out) == (1, "")
    assert err.endswith("filmstrip: error: no such checkpoint: 'org/model'\n")


def test_wrong_flags_are_noticed_before_the_model_loads(run):
    code, _, err = run(FakeLLM(), "--temperature", "-1", "Hi")
    assert code == 2
    assert err == "filmstrip: error: --temperature must be in [0.0, 100.0], not -1.0\n"
    assert run(FakeLLM(), "--video", "missing.mp4", "Hi")[0] == 2
    assert run.configs == []


@pytest.mark.parametrize(("finish_reason", "shown"), [("length", True), ("stop", False)])
def test_an_answer_that_was_cut_says_so(run, finish_reason, shown):
    _, _, err = run(FakeLLM(finish_reason=finish_reason), *VIDEO, "Hi")
    assert ("cut at the limit of tokens" in err) == shown


def test_text_for_a_pipe_is_as_the_model_wrote_it(run):
    script = ("a\x1b[2J", "\n", "é👩‍🚀[bold]x[/bold]", "\n")
    assert run(FakeLLM(script=script), *VIDEO, "Hi")[1] == "".join(script)


def test_text_for_a_terminal_has_no_orders():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    answers, notes = Terminal(), io.StringIO()
    display = Display(answers, notes).answer([])
    display._write("a\x1b[2Jb\tc\r\x9b31m\u2028d\ne")
    display.end(None)
    assert answers.getvalue() == "a[2Jb\tc31m\u2028d\ne\n"


def test_media_in_a_line():
    image = MediaRecord("image", 1, [0], [0.0], 480, 640, 300, cached=True)
    assert describe_media(image) == "640 x 480 pixels, 300 tokens, from the cache"
    times = [i / 2 for i in range(100)]
    long = MediaRecord("video", 100, list(range(100)), times, 64, 96, 600, cached=False)
    assert describe_media(long) == (
        "100 frames at 0.00, 0.50, 1.00, 1.50, 2.00, ..., 49.00, 49.50 s, 96 x 64 pixels, 600 tokens"
    )
    one = MediaRecord("video", 1, [0], [0.0], 64, 96, 6, cached=False)
    assert describe_media(one).startswith("1 frame at 0.00 s, ")
    assert VIDEO_RECORD.notes[0] in describe_media(VIDEO_RECORD)


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *argv: str, **llm):
        self._master, slave = pty.openpty()
        self.seen = ""
        command = [sys.executable, "-m", "tests.cli.program", *argv]
        environment = os.environ | {"FAKE_LLM": json.dumps(llm), "TERM": "xterm", "COLUMNS": "200"}
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment, start_new_session=True
        )
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def wait_for(self, text: str) -> None:
        """Read until ``text`` has come."""
        assert self._comes(text, 60), f"waited for {text!r}: {self.seen!r}"

    def _comes(self, text: str, seconds: float) -> bool:
        """Read until ``text`` has come, or nothing more for ``seconds``."""
        while text not in self.seen:
            if not select.select([self._master], [], [], seconds)[0]:
                return False
            try:
                chunk = os.read(self._master, 65536)
            except OSError:  # Linux's way to say that the program has ended
                return False
            self.seen += chunk.decode(errors="replace")
        return True

    def type(self, text: str) -> None:
        """Press keys; forget what was seen before."""
        self.seen = ""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, as the terminal would pass it on."""
        self.seen = ""
        self._process.send_signal(signal.SIGINT)

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C, again if need be: Python does not notice it in the moment before it begins to wait for a line."""
        for _ in range(20):
            self.interrupt()
            if self._comes(text, 1):
                return
        raise AssertionError(f"interrupting did not bring {text!r}")

    def exit_code(self) -> int:
        return self._process.wait(30)


def test_ctrl_c_ends_the_answer_and_not_the_conversation():
    with Terminal("chat", "m", *VIDEO, script=["word "], repeat=100_000, step_seconds=0.01) as terminal:
        terminal.wait_for("> ")
        terminal.type("Talk!\n")
        terminal.wait_for("word word word ")
        terminal.interrupt()
        terminal.wait_for("stopped")
        terminal.wait_for("> ")
        terminal.type("Again!\n")
        terminal.wait_for("word word ")
        terminal.interrupt()
        terminal.wait_for("> ")
        terminal.interrupt_until("/exit or Ctrl-D ends the conversation")
        terminal.wait_for("> ")
        terminal.type("\x04")
        terminal.wait_for("closed, running 0, aborted 2")
        assert terminal.exit_code() == 0


def test_ctrl_c_ends_the_answer_to_an_only_question():
    with Terminal("chat", "m", "Talk!", script=["word "], repeat=100_000, step_seconds=0.01, media=[]) as terminal:
        terminal.wait_for("word word ")
        terminal.interrupt()
        terminal.wait_for("closed, running 0, aborted 1")
        assert terminal.exit_code() == 130


def test_progress_is_shown_on_a_terminal():
    with Terminal("chat", "m", *VIDEO, "What?", prompt_seconds=1.0) as terminal:
        terminal.wait_for("decoding frames 2/4")
        terminal.wait_for("4 frames at 0.00")
        terminal.wait_for("A cat.")
        assert terminal.exit_code() == 0


def test_output_to_a_pipe_is_the_answer_only():
    command = [sys.executable, "-m", "tests.cli.program", "chat", "m", *VIDEO, "What?"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "A cat.\n")
    assert "\x1b" not in done.stderr
    assert "4 frames at 0.00" in done.stderr


def test_a_reader_that_stops_reading_ends_the_program():
    command = [sys.executable, "-m", "tests.cli.program", "chat", "m", *VIDEO, "What?"]
    environment = os.environ | {"FAKE_LLM": json.dumps({"script": ["word\n"], "repeat": 100_000})}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "word\n"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(30) == 1
    assert "closed, running 0, aborted 1" in errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
