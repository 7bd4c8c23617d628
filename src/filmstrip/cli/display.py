"""What ``filmstrip chat`` shows: the answer on standard output, everything else on standard error; asks nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.status import Status

from filmstrip.types import MediaRecord, Progress, RequestOutput

_STAGES = {
    "fetch": "loading media",
    "decode": "decoding frames",
    "queue": "waiting",
    "prefill": "reading the prompt",
    "generate": "answering",
}
_MAX_TIMES = 8
# What a terminal could take for an order: all control characters but tab and line feed.
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Display:
    """The terminal, or the files and pipes that stand in for it."""

    def __init__(self, answers: TextIO, notes: TextIO) -> None:
        self._answers = answers
        self._console = Console(file=notes, highlight=False, soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """A line about what is going on."""
        self._console.print(text, style="dim")

    def error(self, text: str) -> None:
        """A line about what went wrong."""
        self._console.print(f"error: {text}", style="red")

    def answer(self, labels: Sequence[str]) -> AnswerDisplay:
        """Show one answer; ``labels`` name the media of the conversation in order."""
        return AnswerDisplay(self._answers, self._console, labels)


class AnswerDisplay:
    """One answer from the question to the last token: progress, what was looked at, text, counts."""

    def __init__(self, answers: TextIO, console: Console, labels: Sequence[str]) -> None:
        self._answers, self._console, self._labels = answers, console, labels
        self._is_terminal = answers.isatty()
        self._status: Status | None = console.status("starting")
        self._status.start()
        self._started = time.monotonic()
        self._first_text_seconds: float | None = None
        self._ends_with_newline = True

    def progress(self, progress: Progress) -> None:
        """Show how far the prompt is; the answer itself is progress enough."""
        if self._status is not None:
            count = f" {progress.done}/{progress.total}" if progress.total else ""
            self._status.update(_STAGES[progress.stage] + count)

    def output(self, output: RequestOutput) -> None:
        """Show what a step brought; for the first one that is what was looked at."""
        if not output.token_ids:
            for label, record in zip(self._labels, output.media, strict=True):
                self._console.print(f"{label}: {describe_media(record)}", style="dim")
            return
        if output.delta:
            self._write(output.delta)

    def end(self, output: RequestOutput | None) -> None:
        """Finish the line and show the counts; ``output`` is the last one, None if there was none."""
        self._stop_status()
        if not self._ends_with_newline:
            self._answers.write("\n")
            self._answers.flush()
        if output is not None:
            self._console.print(self._describe_answer(output), style="dim")

    def _write(self, text: str) -> None:
        if self._first_text_seconds is None:
            self._first_text_seconds = time.monotonic() - self._started
            self._stop_status()
        if self._is_terminal:
            text = _CONTROL_CHARACTERS.sub("", text)
        self._answers.write(text)
        self._answers.flush()
        self._ends_with_newline = text.endswith("\n") if text else self._ends_with_newline

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _describe_answer(self, output: RequestOutput) -> str:
        usage, seconds = output.usage, time.monotonic() - self._started
        parts = [
            f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached)",
            f"answer {usage.completion_tokens} tokens in {seconds:.1f} s",
        ]
        first = self._first_text_seconds
        if first is not None:
            parts.append(f"first after {first:.1f} s")
            if usage.completion_tokens > 1 and seconds > first:
                parts.append(f"then {(usage.completion_tokens - 1) / (seconds - first):.1f} tokens/s")
        if output.finish_reason == "length":
            parts.append("cut at the limit of tokens")
        elif output.finish_reason is None:
            parts.append("stopped")
        return ", ".join(parts)


def describe_media(record: MediaRecord) -> str:
    """What was looked at of one item, in a line."""
    frames = ""
    if record.type == "video":
        frames = f"{record.num_frames} frame{'s' if record.num_frames != 1 else ''} at {_times(record.timestamps)} s, "
    cached = ", from the cache" if record.cached else ""
    notes = "".join(f"; {note}" for note in record.notes)
    return f"{frames}{record.width} x {record.height} pixels, {record.num_tokens} tokens{cached}{notes}"


def _times(timestamps: Sequence[float]) -> str:
    shown = [f"{seconds:.2f}" for seconds in timestamps]
    if len(shown) > _MAX_TIMES:
        shown = [*shown[: _MAX_TIMES - 3], "...", *shown[-2:]]
    return ", ".join(shown)
