"""/v1/models, /version and the API's description of itself."""

import importlib.metadata
import warnings

import pytest

from tests.server.fakes import FakeLLM, asgi_client
from tests.server.test_chat import MESSAGES, URL


async def get(path: str, llm: FakeLLM | None = None, **settings):
    async with asgi_client(llm or FakeLLM(), **settings) as client:
        return await client.get(path)


async def test_models():
    body = (await get("/v1/models")).json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert isinstance(card.pop("created"), int)
    assert [permission["object"] for permission in card.pop("permission")] == ["model_permission"]
    assert card == {
        "id": "org/tiny-vl",
        "object": "model",
        "owned_by": "filmstrip",
        "root": "org/tiny-vl",
        "parent": None,
        "max_model_len": 4096,
    }
    assert (await get("/v1/models/org/tiny-vl")).json()["id"] == "org/tiny-vl"
    missing = await get("/v1/models/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_served_model_name():
    async with asgi_client(FakeLLM(), served_model_name="tiny") as client:
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        assert (await client.post(URL, json={"messages": MESSAGES, "model": "tiny"})).json()["model"] == "tiny"
        assert (await client.post(URL, json={"messages": MESSAGES})).json()["model"] == "tiny"
        assert (await client.post(URL, json={"messages": MESSAGES, "model": "org/tiny-vl"})).status_code == 404


async def test_where_a_checkpoint_lies_is_not_shown(tmp_path):
    directory = tmp_path / "tiny-checkpoint"
    directory.mkdir()
    async with asgi_client(FakeLLM(model_name=str(directory))) as client:
        models = await client.get("/v1/models")
        assert models.json()["data"][0]["id"] == "tiny-checkpoint"
        for name in ("tiny-checkpoint", str(directory)):
            answer = await client.post(URL, json={"messages": MESSAGES, "model": name})
            assert answer.json()["model"] == "tiny-checkpoint"
        wrong = await client.post(URL, json={"messages": MESSAGES, "model": "x"})
    assert wrong.status_code == 404
    assert str(tmp_path) not in models.text + answer.text + wrong.text


async def test_version():
    assert (await get("/version")).json() == {"version": importlib.metadata.version("filmstrip")}


async def test_description():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response = await get("/openapi.json")
    schema = response.json()
    components = schema["components"]["schemas"]
    references = {part.split('"')[0] for part in response.text.split('"#/components/schemas/')[1:]}
    assert references <= components.keys()
    body = components["ChatCompletionRequest"]["properties"]
    assert {"messages", "media_io_kwargs", "stop", "max_completion_tokens"} <= body.keys()
    assert {"id", "choices", "usage"} <= components["ChatCompletion"]["properties"].keys()
    assert "422" not in schema["paths"]["/v1/chat/completions"]["post"]["responses"]


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_pages_for_people(path):
    assert (await get(path)).status_code == 200
