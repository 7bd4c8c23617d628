"""A model that answers from a script, with the interface of :class:`filmstrip.llm.AsyncLLM`; and servers around it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import httpx2

from filmstrip.config import EngineConfig, LLMConfig, ServerConfig
from filmstrip.errors import InvalidRequestError
from filmstrip.server.app import create_app
from filmstrip.server.runner import Server, bind
from filmstrip.types import MediaRecord, Progress, RequestOutput, SamplingParams, Usage

VIDEO_RECORD = MediaRecord(
    type="video",
    num_frames=4,
    frame_indices=[0, 165, 331, 497],
    timestamps=[0.0, 5.5, 11.04, 16.58],
    height=64,
    width=96,
    num_tokens=12,
    cached=False,
    notes=["2 fps assumed"],
)


class Abort:
    """In a script: the step on which the engine dies or a bug shows."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@dataclasses.dataclass
class FakeLLM:
    """Says ``script``, one piece per step.

    While ``hold_prompt`` is set the prompt is not ready, while ``hold_steps`` is set no step is done. ``running`` and
    ``aborted`` name the requests that are, and that were closed before their end.
    """

    script: Sequence[str | Abort] = ("A ", "cat", ".")
    finish_reason: str = "stop"
    stop_reason: str | int | None = None
    error: BaseException | None = None
    media: list[MediaRecord] = dataclasses.field(default_factory=lambda: [VIDEO_RECORD])
    model_name: str = "org/tiny-vl"
    max_model_len: int = 4096
    is_alive: bool = True
    prompt_seconds: float = 0.0
    step_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.closed = False
        self.hold_prompt = threading.Event()
        self.hold_steps = threading.Event()

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0.7, **overrides})

    async def generate(
        self,
        messages: Sequence[Any],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        media_io_kwargs: Any = None,
        mm_processor_kwargs: Any = None,
        chat_template_kwargs: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        media_overflow: Any = None,
        on_progress: Any = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        call = {name: value for name, value in locals().items() if name not in ("self", "on_progress")}
        self.calls.append(call)
        request_id = request_id or "none"
        self.running.add(request_id)
        report = on_progress or (lambda progress: None)
        finished = False
        try:
            report(Progress("fetch", 1, 1))
            report(Progress("decode", 2, 4))
            await asyncio.sleep(self.prompt_seconds)
            await self._wait(self.hold_prompt)
            if self.error is not None:
                finished = True
                raise self.error
            text, output = "", self._output(request_id, "", "", 0)
            yield output
            for i, piece in enumerate(self.script):
                await self._wait(self.hold_steps)
                await asyncio.sleep(self.step_seconds)
                if isinstance(piece, Abort):
                    finished = True
                    raise piece.error
                text += piece
                last = i == len(self.script) - 1
                finished = last
                report(Progress("generate", i + 1, params.max_tokens or 0))
                yield self._output(request_id, text, piece, i + 1, self.finish_reason if last else None)
        finally:
            self.running.discard(request_id)
            if not finished:
                self.aborted.append(request_id)

    async def _wait(self, hold: threading.Event) -> None:
        while hold.is_set():  # noqa: ASYNC110 - set by the test's thread, not by this loop
            await asyncio.sleep(0.01)

    def _output(
        self, request_id: str, text: str, delta: str, num_tokens: int, finish_reason: Any = None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=request_id,
            text=text,
            token_ids=list(range(num_tokens)),
            prompt_token_ids=list(range(30)),
            finish_reason=finish_reason,
            usage=Usage(30, num_tokens, cached_tokens=16, image_tokens=5, video_tokens=12),
            media=self.media,
            delta=delta,
            stop_reason=self.stop_reason if finish_reason else None,
        )

    async def stats(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        self.closed = True


class RefusingLLM(FakeLLM):
    """Refuses every request as a message with a bad part would be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.error = InvalidRequestError("messages[0].content[1].type is wrong", param="messages[0].content[1].type")


def server_config(**settings: Any) -> ServerConfig:
    """Settings of a server on a free port of 127.0.0.1."""
    return ServerConfig(LLMConfig(EngineConfig("org/tiny-vl")), **{"port": 0, **settings})


def asgi_client(llm: FakeLLM, **settings: Any) -> httpx2.AsyncClient:
    """A client of the application itself, without a socket."""
    app = create_app(llm, server_config(**settings))  # type: ignore[arg-type]
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


@contextlib.contextmanager
def serving(llm: FakeLLM, **settings: Any) -> Iterator[str]:
    """A real server in a thread; gives its base URL."""
    config = server_config(**settings)
    listener = bind(config)
    server = Server(create_app(llm, config), config)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            thread.join(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop()
        server.stop()
        thread.join()
