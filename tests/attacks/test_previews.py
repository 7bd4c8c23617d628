"""The endpoints that look at media before an answer is asked for hold to the same rules as answers."""

import pytest

from tests.attacks.harness import check_error, data_url, question
from tests.attacks.internet import HOST

SITE = f"http://{HOST}"
PATHS = ("/v1/media/plan", "/v1/media/frames")
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1/x.ts\n#EXT-X-ENDLIST\n"
ATTACKS = {
    "A01-loopback": "http://127.0.0.1:CANARY/x.mp4",
    "A02-metadata": "http://169.254.169.254/latest/meta-data/",
    "A04-decimal": "http://2130706433/",
    "A05-mapped": "http://[::ffff:127.0.0.1]/",
    "A06-to-loopback": f"{SITE}/to?url=http://127.0.0.1:CANARY/x.mp4",
    "A06-to-file": f"{SITE}/to?url=file:///etc/passwd",
    "A08-user-info": f"http://{HOST}\\@127.0.0.1:CANARY/",
    "A10-ftp": "ftp://127.0.0.1/x.mp4",
    "A13-text": f"{SITE}/text",
    "A20-file": "file:///etc/passwd",
    "A21-traversal": "file://R/../secret",
    "A30-not-base64": "data:video/mp4;base64,!!!!",
    "A40-random": data_url(bytes(range(256)) * 8, "video/mp4"),
    "A42-playlist": data_url(PLAYLIST, "video/mp4"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["video_url", "image_url"])
@pytest.mark.parametrize("name", ATTACKS)
def test_previews_are_refused_as_answers_are(server, name, kind, path):
    server.internet.reset()
    url = ATTACKS[name].replace("CANARY", str(server.internet.canary.port))
    error = check_error(server.post(question(url, kind), path=path))
    assert error["param"] == f"messages[0].content[0].{kind}.url"
    assert server.internet.canary.num_connections == 0
    server.check_still_good()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"media_io_kwargs": {"video": {"num_frames": 0}}}, "media_io_kwargs.video.num_frames"),
        ({"media_io_kwargs": {"video": {"backend": "../../x"}}}, "media_io_kwargs.video.backend"),
        ({"mm_processor_kwargs": {"device": "cuda:7"}}, "mm_processor_kwargs.device"),
        ({"media_overflow": "shrink"}, "media_overflow"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_fetched(server, path, settings, param):
    server.internet.reset()
    error = check_error(server.post(question(f"{SITE}/good.mp4", "video_url"), path=path, **settings))
    assert error["param"] == param
    assert server.internet.site.requests == []


@pytest.mark.parametrize(("name", "value"), [("max_edge", 10**6), ("max_edge", 0), ("max_thumbnails", 10**9)])
def test_thumbnails_are_bounded(server, name, value):
    server.internet.reset()
    messages = question(f"{SITE}/good.mp4", "video_url")
    assert check_error(server.post(messages, path="/v1/media/frames", **{name: value}))["param"] == name
    assert server.internet.site.requests == []


def test_greedy_previews_are_cut_to_the_servers_limits(server, clip):
    messages = question(data_url(clip, "video/mp4"), "video_url")
    greedy = {"media_io_kwargs": {"video": {"num_frames": -1, "fps": 1000}}}
    (item,) = server.post(messages, path="/v1/media/plan", **greedy).json()["media"]
    assert item["num_frames"] <= 32
    assert item["frame_indices"][0] == 0
