"""Attack cases A71 and A72: what errors and logs must not tell, over everything that other cases provoke."""

import base64
import json
import logging

import pytest

from tests.attacks.forge import picture
from tests.attacks.harness import check_shows_nothing, data_url, question
from tests.attacks.internet import HOST, SECRET

SIGNATURE = "X-Amz-Signature=0badc0ffee0badc0ffee"
PROMPT = "a very private question of mine"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}/good.mp4?{SIGNATURE}",
        f"http://{HOST}/missing?{SIGNATURE}",
        f"http://{HOST}/text?{SIGNATURE}",
        f"http://{HOST}/to?url=http://10.0.0.1/{SIGNATURE}",
        f"http://10.0.0.1/x?{SIGNATURE}",
        f"http://user:{SIGNATURE}@{HOST}/",
        f"/etc/{SIGNATURE}",
    ],
)
def test_a71_logs_have_no_signature_no_prompt_and_no_base64(server, caplog, url, stream):
    encoded = base64.b64encode(picture(format="JPEG") * 3).decode()
    with caplog.at_level(logging.INFO):
        parts = [
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}},
            {"type": "text", "text": PROMPT},
        ]
        answer = server.post([{"role": "user", "content": parts}], stream=stream)
    told = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    for secret in (SIGNATURE, SIGNATURE.partition("=")[2], PROMPT, encoded[:60], encoded[-60:], SECRET):
        assert secret not in told
        if answer.status_code != 200:
            assert secret not in answer.text


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url"},
        {"type": "video_url", "video_url": None},
        {"type": "video_url", "video_url": {}},
        {"type": "video_url", "video_url": {"url": None}},
        {"type": "video_url", "video_url": {"url": ""}},
        {"type": "video_url", "video_url": {"url": " "}},
        {"type": "video_url", "video_url": {"url": 7}},
        {"type": "video_url", "video_url": {"url": ["a"]}},
        {"type": "video_url", "video_url": {"url": {"url": "a"}}},
        {"type": "video_url", "video_url": ["a"]},
        {"type": "video_url", "video_url": 3.5},
        {"type": "video_url", "video_url": True},
        {"type": "video", "video": [[[[1]]]]},
        {"type": "video", "video": ["a", "b"]},
        {"type": "image", "image": [[1, 2], [3, 4]]},
        {"type": "image_url", "image_url": {"url": "x", "data": "y", "path": "/etc/passwd"}},
        {"type": ["video_url"], "video_url": "x"},
        {"type": None},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": f"http://{HOST}/good.mp4"}},
        {"type": "file", "file": {"file_id": "1"}},
        {"type": "video_embeds", "video_embeds": "gASV"},
        {"type": "image_embeds", "image_embeds": "gASV"},
        {"type": "video_frames", "video_frames": {"frames": 3}},
        {"type": "video_frames", "video_frames": {"frames": []}},
        {"type": "video_frames", "video_frames": {"frames": [{"url": "http://127.0.0.1/", "timestamp": 0}]}},
        None,
        7,
        [],
    ],
    ids=lambda part: json.dumps(part)[:50],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a72_malformed_parts_are_told_without_the_servers_insides(server, part, stream):
    server.internet.reset()
    answer = server.post([{"role": "user", "content": [part]}], stream=stream)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith("messages[0]")
    check_shows_nothing(answer.text)
    assert server.internet.network.dialled == []
    server.check_still_good()


def test_long_input_is_not_echoed(server):
    for url in ("x" * 10_000, "data:" + "y" * 10_000, f"http://{HOST}:{'9' * 10_000}/", "z" * 10_000 + "://a"):
        answer = server.post(question(url, "video_url"))
        assert answer.status_code == 400
        check_shows_nothing(answer.text)
    answer = server.post(question(data_url(picture(), "image/" + "png" * 100), "video_url"))
    assert answer.status_code == 400
    check_shows_nothing(answer.text)
