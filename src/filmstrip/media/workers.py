"""Worker processes seen from an event loop: one for each item, killed when it is over; knows no fetching and no prompts.

See :mod:`filmstrip.media.worker` for the other side. A worker that crashes, hangs or eats memory costs its item an error
and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from filmstrip.channel import AsyncChannel, close_all, send_frame
from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError, MediaDecodeError
from filmstrip.media import worker_messages as messages
from filmstrip.media.worker import PID

logger = logging.getLogger(__name__)

_PROGRAM = "from filmstrip.media.worker import main; main()"
_START_TIMEOUT_SECONDS = 120.0
"""The first worker waits for the template's imports, which on a cold, busy disk take long."""
_EXIT_TIMEOUT_SECONDS = 5.0
# What the template needs of the environment. The rest may hold keys: nothing for a process that reads files of strangers.
_ENVIRONMENT = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH"}
    | {"PYTHONHOME", "PYTHONUTF8", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"}
)
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass
class WorkerStats:
    """Counters of worker processes: started, ended by a crash of their own, killed at the time limit; and the most memory
    that one took beyond what it began with, its results included."""

    num_started: int = 0
    num_crashed: int = 0
    num_timed_out: int = 0
    peak_memory_bytes: int = 0


class Worker:
    """One process that waits for, or works on, one item."""

    def __init__(
        self, connection: socket.socket, pid: int, process: int | None, stats: WorkerStats, max_seconds: float
    ) -> None:
        """``process`` is a descriptor of the process, where the system has such; it is taken over.

        ``max_seconds`` is for all answers together.
        """
        self.pid = pid
        self._channel = AsyncChannel(connection)
        self._process, self._stats = process, stats
        self._max_seconds = self._seconds_left = max_seconds
        self._is_killed = False

    @property
    def is_alive(self) -> bool:
        """False once it was killed here."""
        return not self._is_killed

    async def ask(self, message: messages.ToWorker, descriptors: Sequence[int]) -> messages.FromWorker:
        """Its answer. Whatever goes wrong, cancelling included, kills the worker.

        Raises the item's own error as the worker says it, or MediaDecodeError if the worker crashed or took too long.
        """
        before = time.monotonic()
        try:
            return await asyncio.wait_for(self._ask(message, descriptors), self._seconds_left)
        except asyncio.TimeoutError:  # not the built-in TimeoutError in Python 3.10
            self.kill()
            self._stats.num_timed_out += 1
            raise MediaDecodeError(
                f"opening and decoding took longer than {self._max_seconds:g} seconds (decode_timeout_seconds, "
                "--decode-timeout-seconds)",
                code="media_decode_timeout",
            ) from None
        except FilmstripError:
            raise
        except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
            self.crashed(error)
        except BaseException:
            self.kill()
            raise
        finally:
            self._seconds_left -= time.monotonic() - before

    def crashed(self, reason: Exception) -> NoReturn:
        """Kill it, count it, and raise MediaDecodeError: it ended, or says what no sound worker says."""
        self.kill()
        self._stats.num_crashed += 1
        logger.warning("a decoder process broke: %s", reason)
        raise MediaDecodeError("the decoder crashed on this file", code="media_decode_crashed") from None

    def kill(self) -> None:
        """End the process at once; may be called twice."""
        if self._is_killed:
            return
        self._is_killed = True
        self._channel.close()
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            if process is not None:
                signal.pidfd_send_signal(process, signal.SIGKILL)
            elif self.pid > 0:
                os.kill(self.pid, signal.SIGKILL)
        if process is not None:
            os.close(process)

    def __del__(self) -> None:
        self.kill()

    async def _ask(self, message: messages.ToWorker, descriptors: Sequence[int]) -> messages.FromWorker:
        await self._channel.send(messages.encode(message), descriptors)
        answer = messages.decode_from_worker(await self._channel.receive(messages.MAX_REPLY_BYTES))
        if isinstance(answer, messages.Failed):
            raise messages.error_of(answer)
        return answer


class WorkerPool:
    """Starts workers; belongs to the event loop it is first used on."""

    def __init__(self, config: MediaConfig, *, faults: str | None = None) -> None:
        """``faults`` names a module that workers import first and that may make them misbehave; tests use it."""
        self.stats = WorkerStats()
        self._max_seconds = config.decode_timeout_seconds
        self._arguments = ["--max-memory-bytes", str(int(config.max_decode_memory_gb * 2**30))]
        self._decoders = tuple(sorted({config.video_decoder, *config.allowed_video_decoders}))
        for decoder in self._decoders:
            self._arguments += ["--decoder", decoder]
        if faults:
            self._arguments += ["--faults", faults]
        self._lock = asyncio.Lock()
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Start the template and wait until it can make workers; without this the first worker waits for it.

        Raises InvalidRequestError if a decoder that was chosen or allowed cannot be used.
        """
        worker = await self.take()
        try:
            await worker.ask(messages.CheckDecoders(self._decoders), [])
        finally:
            worker.kill()

    async def take(self) -> Worker:
        """A fresh worker. Raises FilmstripError if none can be had."""
        # A caller that goes away must not leave behind an answer of the template that the next one takes for its own.
        taking = asyncio.ensure_future(self._take_in_turn())
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(_discard)
            raise

    async def _take_in_turn(self) -> Worker:
        async with self._lock:
            if self._is_closed:
                raise InterruptedError("the loader is closed")
            try:
                return await self._take()
            except (OSError, EOFError):
                self._drop_template()  # it died, or was killed: another one does
            try:
                return await self._take()
            except (OSError, EOFError) as error:
                self._drop_template()
                number = error.errno if isinstance(error, OSError) else None
                reason = os.strerror(number) if number else "it does not start"
                raise FilmstripError(f"no decoder process can be had: {reason}", code="decoder_unavailable") from error

    async def close(self) -> None:
        """End the template, and with it every worker; may be called twice."""
        async with self._lock:
            self._is_closed = True
            template = self._template
            self._drop_template()
            if template is not None:
                await asyncio.to_thread(_end, template)

    async def _take(self) -> Worker:
        if self._control is None:
            await asyncio.to_thread(self._start_template)
        assert self._control is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                send_frame(self._control, b"", [theirs.fileno()])
            # The template answers within milliseconds; only the first answer waits for its imports.
            pid, process = await asyncio.to_thread(_receive_process, self._control)
        except BaseException:
            ours.close()
            raise
        self.stats.num_started += 1
        return Worker(ours, pid, process, self.stats, self._max_seconds)

    def _start_template(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *self._arguments]
            try:
                self._template = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        ours.settimeout(_START_TIMEOUT_SECONDS)
        self._control = ours

    def _drop_template(self) -> None:
        """Let go of the template: it ends by itself at the end of its socket, and its workers with it."""
        control, self._control = self._control, None
        self._template = None
        if control is not None:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for its answer
            control.close()


def _receive_process(control: socket.socket) -> tuple[int, int | None]:
    """Process id and, where there is one, process descriptor of a new worker."""
    data, descriptors, _, _ = socket.recv_fds(control, PID.size, 1)
    while 0 < len(data) < PID.size:
        more = control.recv(PID.size - len(data))
        if not more:
            break
        data += more
    if len(data) < PID.size:
        close_all(descriptors)
        raise EOFError("the template is gone")
    (pid,) = PID.unpack(data)
    if not descriptors and hasattr(os, "pidfd_open") and pid != 0:
        raise OSError(errno.EMFILE, "no room for a descriptor of the process")
    return pid, descriptors[0] if descriptors else None


def _discard(taking: asyncio.Future[Worker]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        taking.result().kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_EXIT_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    """What the template starts with: no secrets, one thread for each numerical library, modules from where ours come."""
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
    paths = [path or os.getcwd() for path in sys.path if os.pathsep not in path]
    return {
        **kept,
        **dict.fromkeys(_ONE_THREAD, "1"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
    }
