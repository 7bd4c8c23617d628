"""Time series over HTTP, with a real (tiny, random) Intern-S1-Pro checkpoint: sent, mixed with other media, refused."""

import base64
import io

import httpx2
import numpy as np
import pytest
import soundfile
from PIL import Image

from filmstrip import encode_time_series_base64
from tests.models.interns1_pro import make_interns1_pro
from tests.models.interns1_pro_reference import hop_of
from tests.server.test_chat import URL
from tests.server.test_end_to_end import Server
from tests.server.test_errors import error_of

WALK = np.random.default_rng(3).normal(size=(500, 2)).cumsum(axis=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    running = Server(make_interns1_pro(tmp_path_factory.mktemp("interns1_pro")), folder)
    yield running
    running.close()


def series(url, **settings):
    return {"type": "time_series_url", "time_series_url": {"url": str(url), **settings}}


def walk_url(samples=WALK):
    return f"data:application/octet-stream;base64,{encode_time_series_base64(samples)}"


def text(words="What happens?"):
    return {"type": "text", "text": words}


def num_tokens(num_samples, rate):
    hop = hop_of(rate)
    return ((-(-(num_samples - 2 * hop) // hop) + 1) // 2 + 1) // 2


def seen(answer):
    return [item for item in answer.model_extra["media"] if item["type"] == "time_series"]


def ask(server, *parts, **fields):
    return server.ask(*parts, extra_body={"return_media_info": True, **fields})


def refused(server, *parts, **fields):
    body = {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 1, **fields}
    response = httpx2.post(server.base_url + URL, json=body, timeout=60)
    assert response.status_code == 400, response.text
    return error_of(response)


def test_a_series_as_base64(server):
    answer = ask(server, series(walk_url(), sampling_rate=5), text())
    (item,) = seen(answer)
    expected = num_tokens(500, 5)
    assert (item["num_samples"], item["num_channels"], item["num_tokens"]) == (500, 2, expected)
    assert (item["num_frames"], item["width"], item["height"], item["notes"]) == (0, 0, 0, [])
    details = answer.usage.prompt_tokens_details.to_dict()
    assert details["time_series_tokens"] == expected > 50
    assert details["text_tokens"] == answer.usage.prompt_tokens - expected
    again = ask(server, series(walk_url(), sampling_rate=5), text("How many?"))
    assert seen(again)[0]["cached"]
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_what_a_series_shows_and_its_rate_change_the_answer(server):
    def tokens(samples, rate):
        part = series(walk_url(samples), sampling_rate=rate)
        return server.ask(part, text(), max_tokens=12).choices[0].message.content

    answers = {tokens(WALK, 100), tokens(WALK, 30), tokens(WALK[::-1], 100)}
    assert len(answers) == 3
    assert tokens(WALK, 100) in answers


def test_a_table_without_a_rate(server, folder):
    path = folder / "table.csv"
    path.write_text("height,width\n" + "".join(f"{a:.6f},{b:.6f}\n" for a, b in WALK))
    (item,) = seen(ask(server, series(path.as_uri()), text()))
    assert item["num_tokens"] == num_tokens(500, 125)
    assert ["sampling_rate" in note for note in item["notes"]] == [True]


def test_a_sound_has_its_own_rate(server, folder):
    soundfile.write(folder / "sound.flac", np.sin(np.arange(3000) / 5), 1000)
    url = (folder / "sound.flac").as_uri()
    (item,) = seen(ask(server, series(url), text()))
    assert (item["num_tokens"], item["notes"]) == (num_tokens(3000, 1000), [])
    (item,) = seen(ask(server, series(url, sampling_rate=20), text()))
    assert item["num_tokens"] == num_tokens(3000, 20)


def test_all_kinds_in_one_streamed_answer(server, folder):
    Image.new("RGB", (96, 64), "teal").save(folder / "teal.png")
    parts = [
        series(walk_url(), sampling_rate=100),
        {"type": "image_url", "image_url": {"url": (folder / "teal.png").as_uri()}},
        series(walk_url(WALK[:61, :1]), sampling_rate=50),
        {"type": "video_url", "video_url": {"url": server.clip.as_uri(), "num_frames": 2}},
        text("Compare."),
    ]
    whole = server.ask(*parts)
    details = whole.usage.prompt_tokens_details.to_dict()
    assert details["time_series_tokens"] == num_tokens(500, 100) + num_tokens(61, 50)
    assert min(details["image_tokens"], details["video_tokens"]) > 0
    stream = list(server.ask(*parts, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == (
        whole.choices[0].message.content
    )


def test_a_plan(server):
    body = {"messages": [{"role": "user", "content": [series(walk_url(), sampling_rate=100), text()]}]}
    plan = httpx2.post(f"{server.base_url}/v1/media/plan", json=body, timeout=60).json()
    (item,) = plan["media"]
    facts = {name: value for name, value in item["facts"].items() if value is not None}
    assert facts.pop("num_bytes") > WALK.size * 4
    assert facts == {"num_samples": 500, "num_channels": 2, "sampling_rate": 100, "format": "npy"}
    assert (item["num_tokens"], item["param"]) == (num_tokens(500, 100), "messages[0].content[0].time_series_url.url")
    shown = httpx2.post(f"{server.base_url}/v1/media/frames", json=body, timeout=60).json()
    assert [(each["type"], each["frames"]) for each in shown["media"]] == [("time_series", [])]


def test_too_short(server):
    error = refused(server, series(walk_url(WALK[:48]), sampling_rate=100), text())
    assert "48 samples" in error["message"]
    assert "at least 49" in error["message"]
    assert error["param"] == "messages[0].content[0].time_series_url.url"
    server.ask(series(walk_url(WALK[:49]), sampling_rate=100), text())


def test_too_long_for_the_context(server):
    """A prompt is counted before the samples are read, and the advice does not speak of pixels."""
    part = series(walk_url(np.sin(np.arange(100_000))), sampling_rate=1)
    for overflow in ("error", "fit"):
        error = refused(server, part, text(), media_overflow=overflow)
        assert "time series" in error["message"]
        assert "pixels" not in error["message"]
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("rate", [0, -1, "fast", 1e12])
def test_rates_that_cannot_be(server, rate):
    assert "sampling_rate" in refused(server, series(walk_url(), sampling_rate=rate), text())["param"]


def test_not_a_series(server):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    error = refused(server, series("data:application/octet-stream;base64,bm90IG51bWJlcnM="), text())
    assert "not a number" in error["message"] or "names of columns" in error["message"]
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    for data, word in ((picture.getvalue(), "image_url"), (objects.getvalue(), "object")):
        url = f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
        assert word in refused(server, series(url), text())["message"]
