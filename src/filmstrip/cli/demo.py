"""``filmstrip demo``: the bundled model and clips to three answers, and to a page where more can be asked."""

from __future__ import annotations

import argparse
import contextlib
import signal
import textwrap
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from filmstrip.demo import bundled
from filmstrip.demo.serving import Client, running_server, video, words_of

_COLUMNS = 100


def run(arguments: argparse.Namespace) -> int:
    """Ask the bundled questions, then serve until SIGINT or SIGTERM; returns 0. Raises ServerNotStarted and Refused."""
    model, name = (arguments.model, None) if arguments.model else (str(bundled.MODEL), bundled.MODEL_NAME)
    print(f"Starting a server with {name or model} ...", flush=True)
    started = time.perf_counter()
    with (
        _leaving_by_sigterm(),
        running_server(model, bundled.CLIPS, name=name, host=arguments.host, port=arguments.port) as server,
    ):
        print(f"ready after {time.perf_counter() - started:.1f} s at {server.url}", flush=True)
        client = Client(server.url)
        for question in bundled.QUESTIONS:
            _ask(client, question)
        if arguments.once:
            return 0
        first = bundled.QUESTIONS[0]
        link = urllib.parse.urlencode({"video": _address(first.clips[0]), "question": first.text})
        print(f"\nAsk on: {server.url}/#{link}\n(your own clips, too: drop them there; Ctrl-C ends)", flush=True)
        return 1 if server.process.wait() else 0


@contextlib.contextmanager
def _leaving_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that the server ends with it."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _address(clip: str) -> str:
    return (bundled.CLIPS / clip).resolve().as_uri()


def _ask(client: Client, question: bundled.DemoQuestion) -> None:
    started = time.perf_counter()
    parts = [video(_address(clip)) for clip in question.clips]
    response = client.ask(parts, question.text, return_media_info=True)
    seconds = time.perf_counter() - started
    print()
    for clip, media in zip(question.clips, response["media"], strict=True):
        _show("clip", _seen(clip, media))
    _show("question", question.text)
    _show("answer", f"{words_of(response)}   ({seconds:.2f} s)")
    _show("truth", question.truth)


def _seen(clip: str, media: dict[str, Any]) -> str:
    times = media["timestamps"]
    source = "from the cache" if media["cached"] else "decoded now"
    return (
        f"{clip}: {media['num_frames']} frames from {times[0]:.2f} to {times[-1]:.2f} s at {media['width']} x "
        f"{media['height']}, {media['num_tokens']} tokens, {source}"
    )


def _show(name: str, text: str) -> None:
    indent = " " * 10
    print(textwrap.fill(f"{name:<10}{text}", _COLUMNS, subsequent_indent=indent), flush=True)
