"""The engine process seen from an event loop: prompts in, tokens out; knows no media, text or HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from filmstrip import channel
from filmstrip.config import EngineConfig
from filmstrip.engine import messages
from filmstrip.engine.engine import StepOutput
from filmstrip.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineOverloadedError,
    FilmstripError,
    InvalidRequestError,
    ModelLoadError,
)
from filmstrip.models.cpu_features import num_usable_cores
from filmstrip.types import ProcessedPrompt, SamplingParams

logger = logging.getLogger(__name__)

_ERRORS: dict[str, type[FilmstripError]] = {
    error.code: error
    for error in (ContextLengthError, InvalidRequestError, EngineDeadError, EngineOverloadedError, FilmstripError)
}
_EXIT_TIMEOUT_SECONDS = 10.0
"""How long :meth:`EngineClient.close` waits before it kills."""
_EXIT_CODE_TIMEOUT_SECONDS = 0.25
"""How long a broken connection waits to learn how the process ended."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(eq=False)
class _Pending:
    """A request under way: what its caller calls it, and its outputs as they come."""

    request_id: str
    outputs: asyncio.Queue[messages.TokenOutput] = field(default_factory=asyncio.Queue)


class EngineClient:
    """One engine process. Make one with :meth:`start`; belongs to the event loop it was made on."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        """Talk over ``connection`` (not blocking) to ``process``; use :meth:`start`."""
        self.info: messages.Ready
        self._process, self._connection = process, connection
        self._send_lock = asyncio.Lock()
        self._sending: set[asyncio.Task[None]] = set()
        # On the wire every request has a number of its own: what is late for one can never reach another that has its name.
        self._numbers = itertools.count()
        self._requests: dict[str, _Pending] = {}
        self._stats: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._dead: str | None = None
        self._started: asyncio.Future[messages.Ready | messages.LoadFailed] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, config: EngineConfig, *, model_factory: str | None = None) -> EngineClient:
        """Start the process and wait until the model is loaded; raises ModelLoadError.

        ``model_factory`` ("module:function") makes the model instead of the loader; tests use it.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            process = await asyncio.to_thread(_launch, config, theirs, model_factory)
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        client = cls(process, ours)
        try:
            await client._send(messages.Start(config))
            started = await client._started
            if isinstance(started, messages.LoadFailed):
                raise ModelLoadError(started.message, param=started.param)
            client.info = started
        except EngineDeadError as error:
            await client.close()
            raise ModelLoadError(f"{error.message} while loading the model", param="model") from error
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def is_alive(self) -> bool:
        """Whether requests can be answered."""
        return self._dead is None

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    async def generate(
        self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams, stop_token_ids: tuple[int, ...] = ()
    ) -> AsyncGenerator[StepOutput, None]:
        """Outputs of one request as they come; closing or cancelling the iterator aborts it in the engine.

        ``request_id`` is a name for :meth:`abort` and need not be unique. Raises EngineDeadError if the process ends, and
        what the engine refuses the request with.
        """
        self._check_alive()
        key = str(next(self._numbers))
        pending = self._requests[key] = _Pending(request_id)
        finished = False
        try:
            message, descriptors = messages.add_request(key, prompt, params, stop_token_ids)
            await self._send(message, descriptors, keep_alive=prompt)
            while not finished:
                output = await pending.outputs.get()
                finished = output.finish_reason is not None
                if output.error is not None:
                    code, text, param = output.error
                    raise _ERRORS.get(code, FilmstripError)(text, param=param)
                yield StepOutput(
                    request_id,
                    output.new_token_ids,
                    output.finish_reason,
                    output.stop_reason,
                    output.num_cached_tokens,
                )
        finally:
            del self._requests[key]
            if not finished and self._dead is None:
                # Not awaited: this also runs while the caller is being cancelled.
                self._enqueue(messages.Abort(key))

    async def abort(self, request_id: str) -> None:
        """End requests from outside: their iterators end with ``finish_reason`` "abort". Unknown ids are ignored."""
        for key, pending in list(self._requests.items()):
            if pending.request_id == request_id:
                pending.outputs.put_nowait(messages.TokenOutput(key, [], "abort", None, 0))
                await self._send(messages.Abort(key))

    async def stats(self) -> dict[str, Any]:
        """Counters of the engine; raises EngineDeadError."""
        self._check_alive()
        number = next(self._numbers)
        future = self._stats[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(messages.GetStats(number))
            return await future
        finally:
            del self._stats[number]

    async def close(self) -> None:
        """End the process; may be called twice. Requests under way raise EngineDeadError."""
        self._die("the engine was closed")
        self._reader.cancel()
        await asyncio.gather(self._reader, *self._sending, return_exceptions=True)
        self._connection.close()
        try:
            await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    async def _send(
        self, message: messages.ToEngine, descriptors: list[int] | None = None, keep_alive: object = None
    ) -> None:
        # Shielded: a caller that is cancelled in the middle of a frame must not leave half of it on the wire.
        await asyncio.shield(self._enqueue(message, descriptors, keep_alive))

    def _enqueue(
        self, message: messages.ToEngine, descriptors: list[int] | None = None, keep_alive: object = None
    ) -> asyncio.Task[None]:
        """Send in the order of calls; ``keep_alive`` owns the descriptors, which must stay open until they are sent."""
        frame = asyncio.create_task(self._send_frame(messages.frame_parts(message, descriptors or []), keep_alive))
        self._sending.add(frame)
        frame.add_done_callback(self._sent)
        return frame

    def _sent(self, frame: asyncio.Task[None]) -> None:
        self._sending.discard(frame)
        if not frame.cancelled():
            frame.exception()  # whoever waited for it has it; if nobody does, there is nobody to tell

    async def _send_frame(self, parts: list[tuple[bytes, Sequence[int]]], keep_alive: object) -> None:
        async with self._send_lock:
            self._check_alive()
            try:
                for data, descriptors in parts:
                    await self._send_part(memoryview(data), descriptors)
            except OSError as error:
                # The other end is gone; the reader sees it, too, and finds out why.
                await asyncio.wait([self._reader], timeout=2 * _EXIT_CODE_TIMEOUT_SECONDS)
                self._die("the engine process ended")
                raise EngineDeadError(self._dead or "") from error
            finally:
                del keep_alive

    async def _send_part(self, data: memoryview, descriptors: Sequence[int]) -> None:
        while data:
            try:
                if descriptors:
                    sent = socket.send_fds(self._connection, [data], list(descriptors))
                else:
                    sent = self._connection.send(data)
            except BlockingIOError:
                await self._writable()
                continue
            except OSError as error:
                if not descriptors or error.errno != errno.ETOOMANYREFS:
                    raise
                # The kernel bounds descriptors under way. Without them the engine refuses this request, and only this.
                logger.warning("too many descriptors are under way to the engine; raise the limit on open files")
                descriptors = []
                continue
            data, descriptors = data[sent:], []

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(self._connection, lambda: ready.done() or ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_writer(self._connection)

    async def _read(self) -> None:
        try:
            while True:
                num_bytes, _ = channel.HEADER.unpack(await self._receive(channel.HEADER.size))
                self._handle(messages.decode_to_client(await self._receive(num_bytes)))
        except (OSError, EOFError):
            self._die(await self._how_it_ended())
        except Exception:
            logger.exception("the engine sent what cannot be read")
            self._process.kill()
            self._die("the engine process sent what cannot be read")

    async def _receive(self, num_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        while len(buffer) < num_bytes:
            data = await loop.sock_recv(self._connection, min(num_bytes - len(buffer), 1 << 20))
            if not data:
                raise EOFError
            buffer += data
        return bytes(buffer)

    def _handle(self, message: messages.ToClient) -> None:
        if isinstance(message, messages.Outputs):
            for output in message.outputs:
                if output.request_id in self._requests:  # else it was aborted a moment ago
                    self._requests[output.request_id].outputs.put_nowait(output)
        elif isinstance(message, messages.Stats):
            future = self._stats.get(message.number)
            if future is not None and not future.done():
                future.set_result(message.values)
        elif not self._started.done():
            self._started.set_result(message)

    async def _how_it_ended(self) -> str:
        """A sentence for people; the exit status is there a moment after the end of the stream."""
        waited = 0.0
        while (code := self._process.poll()) is None and waited < _EXIT_CODE_TIMEOUT_SECONDS:
            await asyncio.sleep(0.01)
            waited += 0.01
        if code is None:
            self._process.kill()  # it can be of no use any more
            return "the connection to the engine process broke"
        if code == -signal.SIGKILL:
            return "the engine process was killed (SIGKILL; the system does that when memory runs out)"
        if code < 0:
            return f"the engine process crashed ({_signal_name(-code)})"
        return f"the engine process ended (exit code {code})"

    def _die(self, reason: str) -> None:
        """Fail everything that waits, now."""
        if self._dead is not None:
            return
        self._dead = reason
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes whoever waits to write
        for key, pending in self._requests.items():
            error = (EngineDeadError.code, reason, None)
            pending.outputs.put_nowait(messages.TokenOutput(key, [], "abort", None, 0, error))
        for future in self._stats.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
        if not self._started.done():
            self._started.set_result(messages.LoadFailed(f"{reason} while loading the model", "model"))


def _launch(config: EngineConfig, connection: socket.socket, model_factory: str | None) -> subprocess.Popen[bytes]:
    """Start the engine as a program in a session of its own, out of reach of the terminal's Ctrl-C; closes ``connection``
    here."""
    with connection:
        command = [sys.executable, "-m", "filmstrip.engine.process", str(connection.fileno())]
        if model_factory:
            command += ["--model-factory", model_factory]
        return subprocess.Popen(
            command,
            pass_fds=[connection.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment(config),
            start_new_session=True,
        )


def environment(config: EngineConfig) -> dict[str, str]:
    """What the engine process starts with.

    Thread bounds must stand there before the numerical libraries are loaded; ones that the user set hold if the config says
    nothing. The engine finds modules where this process does, and not in whatever directory it happens to be started from.
    """
    environment = dict(os.environ)
    for name in _THREAD_VARIABLES:
        if config.num_threads is not None or name not in environment:
            environment[name] = str(config.num_threads or num_usable_cores())
    paths = [path or os.getcwd() for path in sys.path if os.pathsep not in path]
    return environment | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
