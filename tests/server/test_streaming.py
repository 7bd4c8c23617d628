"""Framing of events, keep-alives, and that everything a stream holds is given back."""

import asyncio
import json
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from filmstrip.errors import InvalidRequestError
from filmstrip.server.streaming import (
    DONE,
    KEEP_ALIVE,
    EventStream,
    encode_event,
    encode_events,
    unless_disconnected,
    with_keep_alives,
)
from tests.server.fakes import FakeLLM, asgi_client
from tests.server.test_chat import MESSAGES, URL


class Text(BaseModel):
    text: str


def read_events(stream: bytes) -> list[str]:
    """Data of each event, read as the HTML standard says: fields by line, any of CR LF, LF, CR ends a line."""
    found, data = [], []
    for line in stream.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if line == "" and data:
            found.append("\n".join(data))
            data = []
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
    return found


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]))))
def test_any_text_survives_framing(texts):
    stream = b"".join(encode_event(Text(text=text)) for text in texts)
    assert [json.loads(data)["text"] for data in read_events(stream)] == texts


async def test_any_deltas_add_up_to_the_answer():
    script = (
        "\n\n",
        "data: [DONE]\n\n",
        ": keep-alive\n\n",
        "é",
        "👩",
        "\u200d🚀",
        "\r\n",
        "\u2028\u2029\x85",
        "\x00",
        '"}',
    )
    async with asgi_client(FakeLLM(script=script)) as client:
        response = await client.post(URL, json={"messages": MESSAGES, "stream": True})
    *bodies, done = read_events(response.content)
    assert done == "[DONE]"
    deltas = [json.loads(body)["choices"][0]["delta"].get("content", "") for body in bodies]
    assert [delta for delta in deltas if delta] == list(script)


class Source:
    """An async generator that knows whether it was closed."""

    def __init__(self, *steps):
        self.steps, self.closed = steps, False

    async def __call__(self):
        try:
            for step in self.steps:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.closed = True


async def test_silence_is_filled_with_comments():
    source = Source(b"a", 0.2, b"b")
    received = [event async for event in with_keep_alives(source(), 0.02)]
    assert received[0] == b"a"
    assert received[-1] == b"b"
    assert len(received) > 3
    assert set(received[1:-1]) == {KEEP_ALIVE}
    assert source.closed
    assert read_events(KEEP_ALIVE + encode_event(Text(text="x"))) == ['{"text":"x"}']


async def test_events_without_silence_have_no_comments():
    events = [b"a", b"b", b"c"]
    assert [event async for event in with_keep_alives(Source(*events)(), 60)] == events


async def test_closing_while_waiting_closes_the_source():
    source = Source(b"a", 60.0)
    events = with_keep_alives(source(), 0.01)
    assert [await anext(events), await anext(events)] == [b"a", KEEP_ALIVE]
    await events.aclose()
    assert source.closed


async def test_an_error_ends_the_stream_in_order_and_closes_the_source():
    source = Source(Text(text="x"), 0.0, Text(text="y"))

    async def broken():
        async with aclosing(source()) as steps:
            async for step in steps:
                yield step
                raise InvalidRequestError("no", param="p")

    text, error, done = [event async for event in encode_events(broken())]
    assert read_events(text) == ['{"text":"x"}']
    assert json.loads(read_events(error)[0])["error"]["param"] == "p"
    assert done == DONE
    assert source.closed


async def test_keep_alives_of_a_slow_answer():
    llm = FakeLLM(step_seconds=0.1)
    async with asgi_client(llm, keep_alive_seconds=0.02) as client:
        response = await client.post(URL, json={"messages": MESSAGES, "stream": True})
    assert response.text.startswith("data: ")
    assert response.text.count(": keep-alive\n\n") >= 3
    bodies = read_events(response.content)[:-1]
    assert "".join(json.loads(body)["choices"][0]["delta"].get("content", "") for body in bodies) == "A cat."


async def gone():
    return {"type": "http.disconnect"}


async def still_there():
    await asyncio.sleep(60)


async def test_work_is_cancelled_when_the_client_goes():
    cancelled = asyncio.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with pytest.raises(ClientDisconnect):
        await unless_disconnected(gone, work())
    assert cancelled.is_set()


async def test_work_of_a_client_that_stays():
    async def work():
        return 5

    async def broken():
        raise KeyError("x")

    assert await unless_disconnected(still_there, work()) == 5
    with pytest.raises(KeyError):
        await unless_disconnected(still_there, broken())
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("fail_at", ["start", "body", "disconnect"])
async def test_a_response_that_fails_closes_everything(fail_at):
    source, events = Source("output", "output"), Source(b"a", b"b", 60.0)
    running = source()
    await anext(running)

    async def send(message):
        if message["type"].endswith(fail_at):
            raise OSError("gone")

    response = EventStream(events(), running)
    if fail_at == "disconnect":
        await response({}, gone, send)
    else:
        with pytest.raises(OSError, match="gone"):
            await response({}, still_there, send)
    assert source.closed
    assert events.closed == (fail_at != "start")
    assert len(asyncio.all_tasks()) == 1
