"""Attack case A30: data URLs that are malformed, too large, or not what they say; frames with impossible timing."""

import base64
import io
import math

import pytest
from PIL import Image

from tests.attacks.harness import MAX_MEDIA_BYTES, Case, attacks, check_error, data_url, question
from tests.media.numbered import numbered_frame

BOTH = ("image_url", "video_url")


def picture(width=64, height=48, format="JPEG", number=3):
    """One encoded picture."""
    file = io.BytesIO()
    Image.fromarray(numbered_frame(number, width, height)).save(file, format)
    return file.getvalue()


def frames_url(*frames, media_type="video/jpeg"):
    return f"data:{media_type};base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)


JPEG, PNG = picture(), picture(format="PNG")
ENCODED = base64.b64encode(PNG).decode()

MALFORMED = [
    Case("A30-no-comma", "data:image/png;base64", codes=("media_fetch_failed",)),
    Case("A30-nothing", "data:", codes=("media_fetch_failed",)),
    Case("A30-no-base64", f"data:image/png,{ENCODED}", ("image_url",), codes=("media_fetch_failed",), words="base64"),
    Case(
        "A30-no-base64-video",
        f"data:video/mp4,{ENCODED}",
        ("video_url",),
        codes=("media_fetch_failed",),
        words="base64",
    ),
    Case("A30-empty-image", "data:image/png;base64,", ("image_url",), codes=("media_fetch_failed",), words="empty"),
    Case("A30-empty-video", "data:video/mp4;base64,", ("video_url",), codes=("media_fetch_failed",), words="empty"),
    Case("A30-only-space", "data:video/mp4;base64, \n ", ("video_url",), codes=("media_fetch_failed",)),
    Case("A30-not-base64", "data:;base64,????", BOTH, codes=("media_fetch_failed",), words="base64"),
    Case("A30-url-safe", "data:;base64,__--", BOTH, codes=("media_fetch_failed",), words="standard"),
    Case("A30-percent", "data:;base64,AAAA%3D", BOTH, codes=("media_fetch_failed",), words="percent"),
    Case("A30-cut-off", f"data:;base64,{ENCODED[:-3]}", BOTH, codes=("media_fetch_failed",)),
    Case("A30-padding-inside", "data:;base64,AA==AAAA", BOTH, codes=("media_fetch_failed",)),
    Case("A30-padding-only", "data:;base64,====", BOTH, codes=("media_fetch_failed",)),
    Case("A30-much-padding", "data:;base64,AAAA" + "=" * 100_000, BOTH, codes=("media_fetch_failed",)),
    Case("A30-not-ascii", "data:;base64,ÄÖÜß", BOTH, codes=("media_fetch_failed",)),
    Case("A30-surrogate", "data:;base64,\ud800AAA", BOTH, codes=("invalid_json",), param=""),
    Case("A30-nul", "data:;base64,AAAA\0", BOTH, codes=("media_fetch_failed",)),
    Case("A30-long-type", f"data:{'a' * 5000}/b;base64,AAAA", BOTH, codes=("media_fetch_failed",)),
    Case("A30-too-large", "data:;base64," + "A" * (MAX_MEDIA_BYTES * 4 // 3 + 400), BOTH, codes=("media_too_large",)),
    Case("A30-html", "data:text/html;base64,PGI+", BOTH),
    Case("A30-javascript", "data:application/javascript;base64,PGI+", BOTH),
    Case("A30-picture-as-video", data_url(PNG, "image/png"), ("video_url",), words="image_url"),
    Case("A30-picture-in-disguise", data_url(PNG, "video/mp4"), ("video_url",), words="image_url"),
    Case("A30-video-as-picture", data_url(PNG, "video/mp4"), ("image_url",), words="video_url"),
    Case("A30-sound", data_url(PNG, "audio/wav"), BOTH),
    Case("A30-comma-in-payload", f"data:;base64,{ENCODED},{ENCODED}", BOTH, codes=("media_fetch_failed",)),
]


@attacks(MALFORMED)
def test_malformed_data_urls(server, case, kind, stream):
    server.check_refused(case, kind, stream)


def frames(name, url, **more):
    return Case(f"A30-{name}", url, ("video_url",), **more)


FRAMES = [
    frames("a-million-frames", "data:video/jpeg;base64," + "AAAA," * 10**6, codes=("media_too_large",)),
    frames("a-million-empty-frames", "data:video/jpeg;base64," + "," * 10**6, codes=("media_too_large",)),
    frames("33-frames", frames_url(*[JPEG] * 33), codes=("media_too_large",), words="--max-video-frames"),
    frames("no-frames", "data:video/jpeg;base64,"),
    frames("an-empty-frame", frames_url(JPEG, b"", JPEG)),
    frames("a-broken-frame", frames_url(JPEG, JPEG[:60], JPEG)),
    frames("a-text-frame", frames_url(JPEG, b"hello", JPEG)),
    frames("different-sizes", frames_url(JPEG, picture(80, 48))),
    frames("a-huge-frame", frames_url(JPEG, JPEG[:-2] + bytes(MAX_MEDIA_BYTES)), codes=("media_too_large",)),
    frames(
        "a-bomb-frame", frames_url(JPEG, JPEG.replace(b"\0\x30\0\x40", b"\xff\xff\xff\xff")), codes=("media_too_large",)
    ),
]


@attacks(FRAMES)
def test_frames_that_are_too_many_or_no_frames(server, case, kind, stream):
    server.check_refused(case, kind, stream)


TIMINGS = {
    "unsorted": {"frames_indices": [3, 1], "total_num_frames": 10, "fps": 2},
    "negative": {"frames_indices": [-1, 1], "total_num_frames": 10, "fps": 2},
    "too-long": {"frames_indices": [0, 1, 2], "total_num_frames": 10, "fps": 2},
    "too-short": {"frames_indices": [0], "total_num_frames": 10, "fps": 2},
    "empty": {"frames_indices": [], "total_num_frames": 10, "fps": 2},
    "beyond-total": {"frames_indices": [0, 10], "total_num_frames": 10, "fps": 2},
    "floats": {"frames_indices": [0.5, 1], "total_num_frames": 10},
    "bools": {"frames_indices": [False, True], "total_num_frames": 10},
    "strings": {"frames_indices": ["0", "1"], "total_num_frames": 10},
    "text": {"frames_indices": "01", "total_num_frames": 10},
    "nan-index": {"frames_indices": [0, math.nan], "total_num_frames": 10},
    "huge-index": {"frames_indices": [0, 2**70], "total_num_frames": 2**71, "fps": 1},
    "total-too-small": {"total_num_frames": 1, "duration": 3},
    "total-0": {"total_num_frames": 0},
    "total-negative": {"total_num_frames": -5},
    "total-float": {"total_num_frames": 2.5},
    "fps-0": {"fps": 0},
    "fps-negative": {"fps": -2},
    "fps-nan": {"fps": math.nan},
    "fps-inf": {"fps": math.inf},
    "fps-huge": {"fps": 1e300},
    "fps-string": {"fps": "2"},
    "fps-bool": {"fps": True},
    "fps-list": {"fps": [2]},
    "duration-negative": {"duration": -1},
    "duration-0": {"duration": 0},
    "duration-nan": {"duration": math.nan},
    "duration-inf": {"duration": math.inf},
    "duration-string": {"duration": "3 s"},
    "unknown": {"frame_indexes": [0, 1]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["part", "request"])
@pytest.mark.parametrize("name", TIMINGS)
def test_impossible_timing_names_its_field(server, name, where, stream):
    timing = TIMINGS[name]
    messages = question(frames_url(JPEG, JPEG), "video_url", **(timing if where == "part" else {}))
    body = {"media_io_kwargs": {"video": timing}} if where == "request" else {}
    error = check_error(server.post(messages, stream=stream, **body))
    assert error["param"] is not None
    assert error["param"].startswith(("messages[0].content[0].video_url", "media_io_kwargs.video"))
    server.check_still_good()


def test_frames_with_a_plain_timing_are_answered(server):
    """What all refusals above are worth nothing without."""
    for timing in ({}, {"fps": 2}, {"frames_indices": [3, 7], "total_num_frames": 10, "fps": 2}):
        answer = server.post(question(frames_url(JPEG, JPEG), "video_url", **timing))
        assert answer.status_code == 200, answer.text
    assert server.post(question(data_url(PNG, "image/png"), "image_url")).status_code == 200
    assert server.post(question(frames_url(PNG, PNG, media_type="video/png"), "video_url")).status_code == 200
