"""HTTP itself: bodies, methods, hosts, origins, keys and request ids, before any field is looked at."""

import asyncio
import json
import re

import httpx2
import pytest

from filmstrip.errors import EngineOverloadedError
from filmstrip.server.app import create_app
from tests.server.fakes import FakeLLM, asgi_client, server_config
from tests.server.test_chat import MESSAGES, URL
from tests.server.test_errors import error_of

JSON = {"content-type": "application/json"}
BODY = json.dumps({"messages": MESSAGES}).encode()


async def request(method="POST", path=URL, llm=None, headers=None, content=None, **settings):
    async with asgi_client(llm or FakeLLM(), **settings) as client:
        return await client.request(method, path, content=content, headers=JSON | (headers or {}))


MALFORMED = {
    "empty": b"",
    "word": b"nul",
    "cut": BODY[:-5],
    "trailing": BODY + b"x",
    "byte order mark": b"\xef\xbb\xbf" + BODY,
    "utf-16": BODY.decode().encode("utf-16"),
    "not utf-8": BODY.replace(b"happens", b"\xff\xfe"),
    "lone surrogate": BODY.replace(b"happens", rb"\ud800"),
    "half a pair": BODY.replace(b"happens", rb"\udc00\ud800"),
    "deep": b'{"messages":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep object": b'{"messages":[' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"]}",
    "long number": b'{"messages":[{}],"seed":' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_json(content):
    response = await request(content=content)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "invalid_json"
    assert error["message"].startswith("the body is not valid JSON: ")
    assert len(error["message"]) < 200


@pytest.mark.parametrize("content", [b"[]", b"1", b'"x"', b"null"])
async def test_json_that_is_no_object(content):
    response = await request(content=content)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith("the body should be an object")


async def test_the_last_of_two_equal_fields_counts():
    llm = FakeLLM()
    content = BODY[:-1] + b', "max_tokens": 5, "max_tokens": 6}'
    assert (await request(content=content, llm=llm)).status_code == 200
    assert llm.calls[0]["params"].max_tokens == 6


async def test_text_of_any_language_arrives_as_sent():
    llm = FakeLLM(script=("é\n\n", "👩‍🚀", "data: [DONE]\n\n", "\u2028\x00\x1b"))
    text = "日本語 👩‍🚀 \u2028 \x00 <|im_start|>"
    response = await request(content=json.dumps({"messages": [{"role": "user", "content": text}]}).encode(), llm=llm)
    assert llm.calls[0]["messages"][0]["content"] == text
    assert response.json()["choices"][0]["message"]["content"] == "".join(llm.script)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_content_types_a_web_page_may_send_unasked_are_refused(content_type):
    response = await request(content=BODY, headers={"content-type": content_type})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


async def test_missing_content_type():
    async with asgi_client(FakeLLM()) as client:
        response = await client.post(URL, content=BODY)
    assert response.status_code == 415


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
async def test_content_types_that_are_json(content_type):
    assert (await request(content=BODY, headers={"content-type": content_type})).status_code == 200


async def test_compressed_body():
    response = await request(content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_encoding")


async def test_body_of_exactly_the_limit():
    assert (await request(content=BODY, max_body_bytes=len(BODY))).status_code == 200
    response = await request(content=BODY, max_body_bytes=len(BODY) - 1)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
    assert response.headers["connection"] == "close"
    assert error_of(response)["message"] == (
        f"the body has {len(BODY)} bytes; at most {len(BODY) - 1} bytes are accepted (--max-body-bytes)"
    )


async def test_body_of_unsaid_length_over_the_limit():
    async def chunks():
        for _ in range(100):
            yield b"x" * 1000

    async with asgi_client(FakeLLM(), max_body_bytes=5000) as client:
        response = await client.post(URL, content=chunks(), headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


async def test_client_that_asks_first_is_refused_before_it_sends():
    """With ``Expect: 100-continue`` reading is what allows the client to send: nothing may be read."""
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    headers = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": "999",
        "expect": "100-continue",
    }
    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await create_app(FakeLLM(), server_config(max_body_bytes=10))(scope, receive, send)
    assert sent[0]["status"] == 413


async def test_body_that_stops_arriving():
    async def chunks():
        yield BODY[:5]
        await asyncio.sleep(60)

    async with asgi_client(FakeLLM(), body_idle_timeout_seconds=0.05) as client:
        response = await client.post(URL, content=chunks(), headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (408, "body_timeout")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions/", 404, "not_found"),
        ("POST", "/" + "a" * 5000, 404, "not_found"),
        ("GET", URL, 405, "method_not_allowed"),
        ("DELETE", URL, 405, "method_not_allowed"),
        ("OPTIONS", URL, 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_places_and_methods(method, path, status, code):
    response = await request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert len(error_of(response)["message"]) < 300
    if status == 405:
        assert response.headers["allow"]


async def test_head():
    assert (await request("HEAD", "/health")).status_code == 200
    assert (await request("HEAD", URL)).status_code == 405


@pytest.mark.parametrize("sent", ["req", "A-1._:z", "x" * 128])
async def test_safe_request_ids_are_echoed(sent):
    response = await request(content=BODY, headers={"X-Request-Id": sent})
    assert response.headers["x-request-id"] == sent
    assert response.json()["id"] != sent


@pytest.mark.parametrize("sent", ["", "x" * 129, "x" * 10_240, "a b", "a\tb", "<b>", "é".encode().decode("latin-1")])
async def test_other_request_ids_are_replaced(sent):
    headers = httpx2.Headers({**JSON, "X-Request-Id": sent}, encoding="latin-1")
    response = await request(content=BODY, headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


async def test_equal_request_ids_are_different_requests():
    llm = FakeLLM()
    async with asgi_client(llm) as client:
        posts = [client.post(URL, content=BODY, headers=JSON | {"X-Request-Id": "same"}) for _ in range(3)]
        responses = await asyncio.gather(*posts)
    assert {response.status_code for response in responses} == {200}
    assert len({call["request_id"] for call in llm.calls}) == 3


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:9", "[::1]:8000", "192.168.1.5"]
)
async def test_hosts_a_local_server_is_known_by(host):
    assert (await request("GET", "/version", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.test", "evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test", ""])
async def test_hosts_that_reach_a_local_server_by_a_trick(host):
    llm = FakeLLM()
    response = await request(content=BODY, headers={"host": host}, llm=llm)
    assert (response.status_code, error_of(response)["code"]) == (403, "host_not_allowed")
    assert response.headers["x-request-id"]
    assert llm.calls == []


async def test_hosts_of_a_public_server():
    headers = {"host": "films.example.com"}
    assert (await request("GET", "/version", headers=headers, host="0.0.0.0")).status_code == 200
    named = {"host": "0.0.0.0", "allowed_hosts": ("Films.example.com",)}
    assert (await request("GET", "/version", headers=headers, **named)).status_code == 200
    assert (await request("GET", "/version", headers={"host": "other.example.com"}, **named)).status_code == 403


async def test_browsers_pages_are_not_let_in():
    headers = {"origin": "https://evil.test", "access-control-request-method": "POST"}
    response = await request("OPTIONS", URL, headers=headers)
    assert response.status_code == 405
    response = await request(content=BODY, headers=headers)
    assert not any(name.startswith("access-control") for name in response.headers)


async def test_browsers_pages_of_an_allowed_origin():
    settings = {"allowed_origins": ("https://good.test",), "api_key": "key"}
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    response = await request("OPTIONS", URL, headers={"origin": "https://good.test", **ask}, **settings)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://good.test"
    response = await request("OPTIONS", URL, headers={"origin": "https://evil.test", **ask}, **settings)
    assert "access-control-allow-origin" not in response.headers


async def test_browsers_pages_may_use_openais_client():
    settings = {"allowed_origins": ("https://good.test",)}
    sent = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
    ask = {"access-control-request-method": "POST", "access-control-request-headers": sent}
    response = await request("OPTIONS", URL, headers={"origin": "https://good.test", **ask}, **settings)
    assert response.status_code == 200
    allowed = {name.strip().lower() for name in response.headers["access-control-allow-headers"].split(",")}
    assert allowed >= set(sent.split(","))
    response = await request("OPTIONS", URL, headers={"origin": "https://evil.test", **ask}, **settings)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers
    busy = FakeLLM(error=EngineOverloadedError("too busy"))
    response = await request(content=BODY, headers={"origin": "https://good.test"}, llm=busy, **settings)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (503, "https://good.test")
    shown = {name.strip().lower() for name in response.headers["access-control-expose-headers"].split(",")}
    assert shown >= {"retry-after", "retry-after-ms", "x-request-id"}


@pytest.mark.parametrize("value", [None, "", "key", "Bearer", "Bearer ke", "Bearer keyy", "Basic key", "Bearer k\xe9y"])
@pytest.mark.parametrize("path", [URL, "/v1/models", "/version", "/docs", "/openapi.json", "/nothing"])
async def test_wrong_api_key(value, path):
    headers = httpx2.Headers({} if value is None else {"authorization": value}, encoding="latin-1")
    response = await request("GET", path, headers=headers, api_key="key")
    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_right_api_key():
    for value in ("Bearer key", "bearer key"):
        headers = {"authorization": value}
        assert (await request(content=BODY, headers=headers, api_key="key")).status_code == 200
    assert (await request("GET", "/health", api_key="key")).status_code == 200
    assert (await request("GET", "/ping", api_key="key")).status_code == 200


def test_api_key_is_not_shown_with_the_settings():
    assert "tops3cret" not in repr(server_config(api_key="tops3cret"))
