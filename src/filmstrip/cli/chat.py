"""``filmstrip chat``: questions to answers in the terminal, one or many; knows neither pixels nor tokens."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from filmstrip.cli.arguments import chat_config, chat_media, chat_media_io_kwargs, chat_sampling
from filmstrip.cli.display import Display
from filmstrip.cli.loop_thread import LoopThread
from filmstrip.errors import EngineDeadError, FilmstripError
from filmstrip.llm import AsyncLLM
from filmstrip.types import RequestOutput, SamplingParams

with contextlib.suppress(ImportError):  # not everywhere; where it is, importing it gives input() a line editor
    import readline  # noqa: F401

_LEAVE = frozenset({"/exit", "/quit"})
_EXIT_INTERRUPTED = 130


def run(arguments: argparse.Namespace) -> int:
    """Answer the question given, or every one typed until the end; returns the exit code.

    Raises UsageError for wrong flags (before the model loads), and FilmstripError if the only question cannot be answered.
    """
    config, given = chat_config(arguments), chat_sampling(arguments)
    media, media_io_kwargs = chat_media(arguments), chat_media_io_kwargs(arguments)
    display = Display(sys.stdout, sys.stderr)
    with LoopThread() as loop:
        display.note(f"loading {arguments.model}")
        try:
            llm = loop.run(AsyncLLM.start(config))
        except asyncio.CancelledError:
            return _EXIT_INTERRUPTED
        try:
            params = llm.default_sampling_params(**given)
            chat = _Chat(loop, llm, display, params, media_io_kwargs, arguments.system, media)
            if arguments.question is None:
                chat.converse()
                return 0
            return 0 if chat.ask(arguments.question) else _EXIT_INTERRUPTED
        finally:
            loop.run(llm.close())


class _Chat:
    """A conversation: what was said so far, and the media to go with the next question."""

    def __init__(
        self,
        loop: LoopThread,
        llm: AsyncLLM,
        display: Display,
        params: SamplingParams,
        media_io_kwargs: Mapping[str, Any] | None,
        system: str | None,
        media: list[dict[str, Any]],
    ) -> None:
        self._loop, self._llm, self._display = loop, llm, display
        self._params, self._media_io_kwargs = params, media_io_kwargs
        self._messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self._media = media
        self._labels = [part[part["type"]]["url"][:80] for part in media]

    def converse(self) -> None:
        """Answer what is typed until /exit or the end of input; a question that cannot be answered can be asked again."""
        while (question := _read_question()) is not None:
            try:
                self.ask(question)
            except KeyboardInterrupt:  # came just as the answer ended by itself
                continue
            except EngineDeadError:
                raise
            except FilmstripError as error:
                self._display.error(error.message)

    def ask(self, question: str) -> bool:
        """Answer one question; False if Ctrl-C ended the answer. What was said is kept, unless there was nothing."""
        message = {"role": "user", "content": [*self._media, {"type": "text", "text": question}]}
        answer = self._loop.run(self._answer([*self._messages, message]))
        if answer is not None and answer.text:
            self._messages += [message, {"role": "assistant", "content": answer.text}]
            self._media = []
        return answer is not None and answer.finish_reason is not None

    async def _answer(self, messages: list[dict[str, Any]]) -> RequestOutput | None:
        """The last output there was; without a finish reason if the answer was interrupted."""
        display, output = self._display.answer(self._labels), None
        outputs = self._llm.generate(
            messages, self._params, media_io_kwargs=self._media_io_kwargs, on_progress=display.progress
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    display.output(output)
        except asyncio.CancelledError:
            return output
        finally:
            display.end(output)
        return output


def _read_question() -> str | None:
    """The next line that says something; None at the end."""
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D ends the conversation", file=sys.stderr)
            continue
        if question in _LEAVE:
            return None
        if question:
            return question
