"""The engine process seen from an event loop: prompts in, tokens out; knows no media, text or HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from typing import Any

from filmstrip.config import EngineConfig
from filmstrip.engine import messages
from filmstrip.engine.engine import StepOutput
from filmstrip.errors import ContextLengthError, EngineDeadError, FilmstripError, InvalidRequestError, ModelLoadError
from filmstrip.types import ProcessedPrompt, SamplingParams

_ERRORS: dict[str, type[FilmstripError]] = {
    error.code: error for error in (ContextLengthError, InvalidRequestError, EngineDeadError, FilmstripError)
}
_EXIT_TIMEOUT_SECONDS = 10


class EngineClient:
    """One engine process. Make one with :meth:`start`; belongs to the event loop it was made on."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.info: messages.Ready
        self._process, self._connection = process, connection
        self._send_lock = asyncio.Lock()
        self._queues: dict[str, asyncio.Queue[messages.TokenOutput]] = {}
        self._stats: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._dead: str | None = None
        self._started: asyncio.Future[messages.Ready | messages.LoadFailed] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, config: EngineConfig, *, model_factory: str | None = None) -> EngineClient:
        """Start the process and wait until the model is loaded; raises ModelLoadError.

        ``model_factory`` ("module:function") makes the model instead of the loader; tests use it.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            process = await asyncio.to_thread(_launch, config, theirs.fileno(), model_factory)
        ours.setblocking(False)
        client = cls(process, ours)
        try:
            await client._send(messages.Start(config))
            started = await client._started
            if isinstance(started, messages.LoadFailed):
                raise ModelLoadError(started.message, param=started.param)
            client.info = started
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

        Raises EngineDeadError if the process ends, and what the engine refuses the request with.
        """
        if request_id in self._queues:
            raise InvalidRequestError(f"request id {request_id!r} is in use", param="request_id")
        outputs: asyncio.Queue[messages.TokenOutput] = asyncio.Queue()
        self._queues[request_id] = outputs
        finished = False
        try:
            self._check_alive()
            message, descriptors = messages.add_request(request_id, prompt, params, stop_token_ids)
            await self._send(message, descriptors)
            while not finished:
                output = await outputs.get()
                finished = output.finish_reason is not None
                if output.error is not None:
                    code, text, param = output.error
                    raise _ERRORS.get(code, FilmstripError)(text, param=param)
                yield StepOutput(
                    output.request_id,
                    output.new_token_ids,
                    output.finish_reason,  # pyright: ignore[reportArgumentType]
                    output.stop_reason,
                    output.num_cached_tokens,
                )
        finally:
            del self._queues[request_id]
            if not finished:
                self._abort_soon(request_id)

    async def stats(self) -> dict[str, Any]:
        """Counters of the engine; raises EngineDeadError."""
        self._check_alive()
        number = next(self._numbers)
        future = self._stats[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(messages.GetStats(number))
            return await future
        finally:
            self._stats.pop(number, None)

    async def close(self) -> None:
        """End the process; may be called twice. Requests under way raise EngineDeadError."""
        self._die("the engine was closed")
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._connection.close()
        try:
            await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    def _abort_soon(self, request_id: str) -> None:
        """Tell the engine without waiting: this runs while the caller is being cancelled."""
        if self._dead is None:
            task = asyncio.get_running_loop().create_task(self._abort(request_id))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _abort(self, request_id: str) -> None:
        with contextlib.suppress(EngineDeadError):
            await self._send(messages.Abort(request_id))

    async def _send(self, message: messages.ToEngine, descriptors: list[int] | None = None) -> None:
        # Shielded: a caller that is cancelled in the middle of a frame must not leave half of it on the wire.
        await asyncio.shield(self._send_frame(messages.frame_parts(message, descriptors or [])))

    async def _send_frame(self, parts: list[tuple[bytes, list[int]]]) -> None:
        async with self._send_lock:
            self._check_alive()
            try:
                for data, descriptors in parts:
                    await self._send_part(memoryview(data), descriptors)
            except OSError as error:
                self._die("the engine process ended")
                raise EngineDeadError("the engine process ended") from error

    async def _send_part(self, data: memoryview, descriptors: list[int]) -> None:
        while data or descriptors:
            try:
                sent = (
                    socket.send_fds(self._connection, [data], descriptors)
                    if descriptors
                    else self._connection.send(data)
                )
            except BlockingIOError:
                await self._writable()
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
                num_bytes, _ = messages.HEADER.unpack(await self._receive(messages.HEADER.size))
                self._handle(messages.decode_to_client(await self._receive(num_bytes)))
        except (OSError, EOFError):
            await asyncio.sleep(0)
            self._die("the engine process ended")

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
                if output.request_id in self._queues:  # else it was aborted a moment ago
                    self._queues[output.request_id].put_nowait(output)
        elif isinstance(message, messages.Stats):
            future = self._stats.get(message.number)
            if future is not None and not future.done():
                future.set_result(message.values)
        elif not self._started.done():
            self._started.set_result(message)

    def _die(self, reason: str) -> None:
        """Fail everything that waits, now."""
        if self._dead is not None:
            return
        self._dead = reason
        for request_id, outputs in self._queues.items():
            outputs.put_nowait(
                messages.TokenOutput(request_id, [], "abort", None, 0, (EngineDeadError.code, reason, None))
            )
        for future in self._stats.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
        if not self._started.done():
            self._started.set_result(
                messages.LoadFailed(f"{reason} while loading the model (exit code {self._process.poll()})", "model")
            )


def _launch(config: EngineConfig, descriptor: int, model_factory: str | None) -> subprocess.Popen[bytes]:
    """Start the engine as a program in a session of its own, out of reach of the terminal's Ctrl-C."""
    command = [sys.executable, "-m", "filmstrip.engine.process", str(descriptor)]
    if model_factory:
        command += ["--model-factory", model_factory]
    return subprocess.Popen(
        command,
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        env=_environment(config),
        start_new_session=True,
    )


def _environment(config: EngineConfig) -> dict[str, str]:
    """Thread bounds must stand in the environment before the numerical libraries are loaded."""
    num_threads = str(config.num_threads or _num_cores())
    bounds = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), num_threads
    )
    return os.environ | bounds | {"TOKENIZERS_PARALLELISM": "false"}


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
