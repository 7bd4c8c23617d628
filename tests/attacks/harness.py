"""A server under attack and the rules that each of its refusals must keep; knows the HTTP API and nothing below it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import pytest
from PIL import Image

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig, ServerConfig
from filmstrip.errors import FilmstripError
from filmstrip.llm import AsyncLLM
from filmstrip.media.fetch import Fetcher
from filmstrip.media.loader import MediaLoader
from filmstrip.server.app import create_app
from filmstrip.server.runner import Server, bind
from filmstrip.types import MediaItem, Modality
from tests.attacks.internet import SECRET, ConnectionWatch, Internet

NAME = "tiny"
MODALITIES = ("image_url", "video_url", "time_series_url")
ANSWER_SECONDS = 30.0
"""Longest time until any answer: beyond it a request counts as hung."""
FETCH_SECONDS = 1.0
MAX_MEDIA_BYTES = 8 * 1024**2
MAX_ITEMS = 8

_LEAKS = {
    "an address in memory": re.compile(r"0x[0-9a-fA-F]{4,}"),
    "a traceback": re.compile(r'Traceback|File "|line \d+, in|\.py\b'),
    "a Python object": re.compile(r"<[^>]*\bobject\b[^>]*>|<_?[a-z]+\.[A-Za-z]"),
    "a network address": re.compile(r"\b\d+\.\d+\.\d+\.\d+\b(?!/)|::1|\[::"),
    "a path of the system": re.compile(r"(?<![\w.])/(etc|proc|dev|tmp|root|home|usr|var|work)\b"),
    "the site's bytes": re.compile(SECRET),
}
PICTURE_EVERY = 8
WATCH = ConnectionWatch()


@dataclass(frozen=True)
class Case:
    """One attack: a part's URL (or the whole body's fields) and what it may cause.

    ``max_hits`` is how many requests the public site may see; the canary may never see one. ``codes`` are the error codes
    that are right, any if empty. ``words`` must be in the message.
    """

    name: str
    url: str = ""
    modalities: tuple[str, ...] = MODALITIES
    max_hits: int = 0
    codes: tuple[str, ...] = ()
    words: str = ""
    part: dict[str, Any] = field(default_factory=dict)
    """Settings beside the URL."""
    body: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request."""
    param: str | None = None
    """What the field at fault begins with, if it is not the part's URL."""
    marks: Any = ()
    """Marks of the test, for a defect that is known and still open."""


def expand(cases: Iterable[Case]) -> list[Any]:
    """Every case for every modality, answered whole and streamed, as parameters of a test."""
    return [
        pytest.param(case, kind, stream, id=f"{case.name}-{kind}-{'stream' if stream else 'whole'}", marks=case.marks)
        for case in cases
        for kind in case.modalities
        for stream in (False, True)
    ]


def attacks(cases: Iterable[Case]) -> Any:
    """Decorator of a test that takes ``case``, ``kind`` and ``stream``."""
    return pytest.mark.parametrize(("case", "kind", "stream"), expand(cases))


def question(url: str, kind: str, **part: Any) -> list[dict[str, Any]]:
    """A conversation about one item."""
    parts = [{"type": kind, kind: {"url": url, **part}}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": parts}]


def data_url(data: bytes, media_type: str) -> str:
    """``data`` as a data URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


class AttackedServer:
    """The whole server on a free port, whose fetcher sees a hostile internet; on an event loop in its own thread."""

    def __init__(
        self, model: str, media_path: Path | None, clip: bytes, folder: Path, *, faults: str | None = None, **media: Any
    ) -> None:
        """``faults`` is a module that makes workers misbehave; ``media`` are settings of MediaConfig."""
        self._faults = faults
        self.internet = Internet(clip, folder)
        self._clip_url = data_url(clip, "video/mp4")
        limits = {"fetch_timeout_seconds": FETCH_SECONDS, "max_media_bytes": MAX_MEDIA_BYTES}
        limits |= {"max_items_per_request": MAX_ITEMS, "max_video_frames": 32, "decode_timeout_seconds": 20.0}
        settings = {"allow_local_files": False, "num_decode_threads": 2}
        settings |= {} if media_path is None else {"allowed_local_media_path": str(media_path)}
        engine = EngineConfig(model, kv_cache_gb=0.05, encoder_cache_gb=0.01, max_model_len=4096, num_threads=2)
        llm = LLMConfig(engine, MediaConfig(**(settings | limits | media)))
        self._config = ServerConfig(llm, port=0, served_model_name=NAME)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._num_good = 0

    def __enter__(self) -> AttackedServer:
        self._thread.start()
        assert self._ready.wait(120)
        self._client = self._new_client()
        ports = {int(self.url.rpartition(":")[2]), self.internet.site.port, self.internet.canary.port}
        WATCH.expected_ports |= {*ports, self.internet.tls_port}
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()
        self._loop.call_soon_threadsafe(self._server.stop)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _new_client(self) -> httpx2.Client:
        headers = {"Authorization": "Bearer client-key", "Cookie": "session=client-cookie"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=ANSWER_SECONDS, trust_env=False)

    async def _run(self) -> None:
        async with self.internet:
            with self._hostile_fetcher(), self._faulty_workers():
                llm = await AsyncLLM.start(self._config.llm)
                self.stats = llm.stats
                self._series_loader = MediaLoader(self._config.llm.media)
            listener = bind(self._config)
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self._server = Server(create_app(llm, self._config), self._config)
            self._loop.call_later(0.2, self._ready.set)
            try:
                await self._server.serve(sockets=[listener])
            finally:
                await self._series_loader.close()
                await llm.close()

    @contextlib.contextmanager
    def _hostile_fetcher(self):
        """Whoever makes a fetcher meanwhile gets one that resolves and dials through :attr:`internet`."""
        usual = Fetcher.__init__

        def hostile(fetcher: Fetcher, config: MediaConfig, *_: Any, **__: Any) -> None:
            usual(fetcher, config, self.internet.names, network=self.internet.network)

        with mock.patch.object(Fetcher, "__init__", hostile):
            yield

    @contextlib.contextmanager
    def _faulty_workers(self):
        """Whoever makes a loader meanwhile gets one whose workers import the module with the faults."""
        usual = MediaLoader.__init__

        def faulty(loader: MediaLoader, config: MediaConfig) -> None:
            usual(loader, config, faults=self._faults)

        with mock.patch.object(MediaLoader, "__init__", faulty):
            yield

    def worker_stats(self) -> dict[str, int]:
        """Counters of the decoder processes."""
        return asyncio.run_coroutine_threadsafe(self.stats(), self._loop).result(ANSWER_SECONDS)["media_workers"]

    def post(
        self, messages: list[dict[str, Any]], *, path: str = "/v1/chat/completions", **body: Any
    ) -> httpx2.Response:
        """One request; an answer that takes too long is an exception.

        The JSON is Python's: NaN, infinity and lone surrogates are sent as they are.
        """
        text = json.dumps({"model": NAME, "max_tokens": 1, "messages": messages, **body})
        headers = {"Content-Type": "application/json"}
        answer = self._client.post(path, content=text.encode("ascii"), headers=headers)
        if (
            answer.status_code >= 500
        ):  # the server gives up such a connection: the next test must not meet it half closed
            self._client.close()
            self._client = self._new_client()
        return answer

    def check_still_good(self) -> None:
        """The next request must be answered: mostly one of text, now and then one with a picture."""
        self._num_good += 1
        if self._num_good % PICTURE_EVERY == 0:
            self.check_still_decodes()
            return
        answer = self.post([{"role": "user", "content": f"Are you there {self._num_good}?"}])
        assert answer.status_code == 200, answer.text

    def check_still_decodes(self) -> None:
        """A picture that was never seen before must be answered."""
        self._num_good += 1
        number = self._num_good
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (number % 256, number // 256 % 256, 77)).save(file, "PNG")
        answer = self.post(question(data_url(file.getvalue(), "image/png"), "image_url"))
        assert answer.status_code == 200, answer.text

    def check_refused(self, case: Case, kind: str, stream: bool, *, url: str | None = None) -> dict[str, Any]:
        """Send ``case`` and check the answer, what it caused, and that the server is as good as before.

        ``url`` is sent instead of the case's own. Returns the error.
        """
        error = self.check_answer(case, kind, stream, url=url)
        self.check_still_good()
        return error

    def check_answer(self, case: Case, kind: str, stream: bool, *, url: str | None = None) -> dict[str, Any]:
        """The first half of :meth:`check_refused`, for tests that send several attacks in a row."""
        self.internet.reset()
        url = (case.url if url is None else url).replace("CANARY", str(self.internet.canary.port))
        with WATCH.watching():
            answer = self.post(question(url, kind, **case.part), stream=stream, **case.body)
            error = check_error(answer)
            own_param = f"messages[0].content[0].{kind}.url"
            if "takes no time_series_url" in error["message"]:
                # The model has no such input, so the server looks at nothing. What a server with one does is asked below it.
                assert self.internet.network.dialled == []
                error = self._series_error(url, own_param)
        self._check_hits(case)
        assert (error["param"] or "").startswith(own_param if case.param is None else case.param), error
        assert not case.codes or error["code"] in case.codes, error
        assert case.words in error["message"], error
        return error

    def _series_error(self, url: str, param: str) -> dict[str, Any]:
        """What a loader with the server's settings, on the same internet, says to a time series."""

        async def load() -> None:
            item = MediaItem(Modality.TIME_SERIES, url=url, param=param)
            opened = await self._series_loader.open(await self._series_loader.fetch(item))
            try:
                await self._series_loader.read_samples(opened)
            finally:
                opened.close()

        with pytest.raises(FilmstripError) as caught:
            asyncio.run_coroutine_threadsafe(load(), self._loop).result(ANSWER_SECONDS)
        error = caught.value
        assert 400 <= error.http_status < 500, error
        check_shows_nothing(error.message)
        return {"message": error.message, "param": error.param, "code": error.code}

    def _check_hits(self, case: Case) -> None:
        internet = self.internet
        assert internet.canary.num_connections == 0, internet.canary.requests
        assert len(internet.site.requests) <= case.max_hits, internet.site.requests
        assert WATCH.seen == []
        for head in internet.site.requests:
            for secret in ("client-key", "client-cookie", "authorization", "cookie", "referer"):
                assert secret not in head.lower()


def check_error(answer: httpx2.Response) -> dict[str, Any]:
    """The error of ``answer``, which must be an OpenAI error body of status 4xx that shows nothing of the server."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:2000])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["code"], str)
    assert error["message"]
    check_shows_nothing(answer.text)
    return error


def check_shows_nothing(text: str) -> None:
    """Raise AssertionError if ``text`` has an address, a path, a traceback or bytes that were fetched."""
    for what, pattern in _LEAKS.items():
        found = pattern.search(text)
        assert found is None, f"{what} in the answer: {found.group()!r} in {text[:1000]}"
    assert len(text) < 2000, f"{len(text)} characters"
