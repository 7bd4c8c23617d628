"""An event loop in a thread of its own, for programs that wait for people in between; knows nothing of what it runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines for a thread that otherwise waits for the keyboard; the loop goes on meanwhile. A context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="filmstrip-loop", daemon=True)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of ``work``. Ctrl-C cancels it, waits for its end, and counts for nothing else; a second one counts.

        Raises what ``work`` raises: CancelledError if it did not make something of its cancellation.
        """
        ended = threading.Event()
        tasks: list[asyncio.Task[Result]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda _: ended.set())

        def cancel() -> None:
            if not tasks:  # Ctrl-C came before the loop had heard of the work
                begin()
            tasks[0].cancel()

        try:
            self._loop.call_soon_threadsafe(begin)
            ended.wait()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(cancel)
            ended.wait()
        return tasks[0].result()
