"""Attack case A54: settings of a request that ask for too much, or for what is the server's alone to choose."""

import math

import pytest

from tests.attacks.harness import Case, attacks, check_error, data_url, question
from tests.attacks.internet import HOST

URL = f"http://{HOST}/good.mp4"
VIDEO = ("video_url",)
MAX_FRAMES = 32


def video_io(name, **settings):
    return Case(f"A54-{name}", URL, VIDEO, body={"media_io_kwargs": {"video": settings}}, param="media_io_kwargs")


def in_part(name, **settings):
    return Case(f"A54-part-{name}", URL, VIDEO, part=settings, param="messages[0].content[0].video_url")


def pixels(name, kwargs, kind="video_url"):
    return Case(f"A54-pixels-{name}", URL, (kind,), body={"mm_processor_kwargs": kwargs}, param="mm_processor_kwargs")


WRONG = {
    "num-frames-minus-2": {"num_frames": -2},
    "num-frames-0": {"num_frames": 0},
    "num-frames-float": {"num_frames": 2.5},
    "num-frames-bool": {"num_frames": True},
    "num-frames-string": {"num_frames": "8"},
    "num-frames-list": {"num_frames": [8]},
    "num-frames-2-to-70": {"num_frames": 2**70},
    "fps-0": {"fps": 0},
    "fps-minus-2": {"fps": -2},
    "fps-nan": {"fps": math.nan},
    "fps-inf": {"fps": math.inf},
    "max-frames-0": {"max_frames": 0},
    "max-frames-minus-1": {"max_frames": -1},
    "min-above-max": {"min_frames": 9, "max_frames": 3},
    "start-after-end": {"start": 3, "end": 1},
    "start-nan": {"start": math.nan},
    "start-negative": {"start": -1},
    "end-inf": {"end": math.inf},
    "unknown": {"num_frame": 3},
    "path-as-backend": {"backend": "../../x"},
    "unknown-backend": {"backend": "ffmpeg -i /etc/passwd"},
    "backend-not-text": {"backend": {"a": 1}},
    "video-backend": {"video_backend": "../../x"},
    "device": {"device": "cuda:7"},
    "threads": {"num_threads": 10_000},
    "hw-decoders": {"hw_decoders": 8},
    "pool-size": {"pool_size": 8},
    "url": {"protocol_whitelist": "file,http"},
    "options": {"options": {"protocol_whitelist": "all"}},
    "dunder": {"__class__": "x"},
}

PIXELS = {
    "max-pixels-0": {"video": {"max_pixels": 0}},
    "max-pixels-negative": {"video": {"max_pixels": -1}},
    "max-pixels-float": {"video": {"max_pixels": 1e5}},
    "max-pixels-string": {"video": {"max_pixels": "9"}},
    "min-above-max": {"video": {"min_pixels": 9_000_000, "max_pixels": 100_000}},
    "size": {"video": {"size": {"shortest_edge": 10**9, "longest_edge": 10**12}}},
    "patch-size": {"video": {"patch_size": 1}},
    "merge-size": {"video": {"merge_size": 1}},
    "device": {"device": "cuda:7"},
    "tensors": {"return_tensors": "pt"},
    "remote-code": {"trust_remote_code": True},
    "resample": {"video": {"resample": 99}},
    "flat": {"max_pixels": 10**12},
    "audio": {"audio": {"max_pixels": 1}},
    "list": [],
    "text": "max_pixels=1",
}


@attacks(
    [
        *(video_io(name, **settings) for name, settings in WRONG.items()),
        *(in_part(name, **settings) for name, settings in WRONG.items()),
        *(pixels(name, kwargs) for name, kwargs in PIXELS.items()),
        Case("A54-io-list", URL, VIDEO, body={"media_io_kwargs": [1]}, param="media_io_kwargs"),
        Case("A54-io-section", URL, VIDEO, body={"media_io_kwargs": {"audio": {}}}, param="media_io_kwargs"),
        Case("A54-io-video-text", URL, VIDEO, body={"media_io_kwargs": {"video": "all"}}, param="media_io_kwargs"),
        Case(
            "A54-image-io", URL, ("image_url",), body={"media_io_kwargs": {"image": {"x": 1}}}, param="media_io_kwargs"
        ),
        Case("A54-image-part", URL, ("image_url",), part={"fps": 3}, param="messages[0].content[0].image_url"),
    ]
)
def test_wrong_settings_are_refused_before_anything_is_fetched(server, case, kind, stream):
    error = server.check_refused(case, kind, stream)
    assert server.internet.site.requests == []
    assert server.internet.names.asked == []
    assert len(error["message"]) < 500


GREEDY = {
    "num-frames-minus-1": {"num_frames": -1},
    "num-frames-a-billion": {"num_frames": 10**9},
    "fps-1000": {"num_frames": -1, "fps": 1000},
    "fps-minus-1": {"fps": -1},
    "min-frames-a-billion": {"min_frames": 10**9, "max_frames": 10**9},
    "max-frames-a-billion": {"num_frames": -1, "max_frames": 10**9},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["part", "request"])
@pytest.mark.parametrize("name", GREEDY)
def test_greedy_settings_are_clamped_to_the_servers_ceiling(server, long_clip_url, name, where, stream):
    settings = GREEDY[name]
    messages = question(long_clip_url, "video_url", **(settings if where == "part" else {}))
    body = {"media_io_kwargs": {"video": settings}} if where == "request" else {}
    answer = server.post(messages, return_media_info=True, stream=False, **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["media"][0]["num_frames"] <= MAX_FRAMES
    if stream:
        assert server.post(messages, stream=True, **body).status_code == 200


@pytest.fixture(scope="module")
def long_clip_url(tmp_path_factory):
    """A clip of more frames than the server shows of any."""
    from tests.attacks.forge import X264, clip

    return data_url(clip(tmp_path_factory.mktemp("long"), "long.mp4", *X264, num_frames=200), "video/mp4")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["part", "request"])
def test_a_trillion_pixels_are_refused_by_their_tokens_before_they_are_made(server, long_clip_url, where, stream):
    limits = {"min_pixels": 10**12, "max_pixels": 10**12}
    messages = question(long_clip_url, "video_url", **(limits if where == "part" else {}))
    body = {"mm_processor_kwargs": {"video": limits}} if where == "request" else {}
    error = check_error(server.post(messages, stream=stream, **body))
    assert error["code"] in ("context_length_exceeded", "media_too_large", "invalid_value")
    server.check_still_good()
