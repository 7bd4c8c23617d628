"""``/v1/media/plan`` and ``/v1/media/frames``: what they say is what an answer sees; limits and rights are those of chat."""

import asyncio
import base64
import io

import httpx2
import numpy as np
import pytest
from PIL import Image

from filmstrip.errors import InvalidRequestError
from tests.media.clips import blank, h264, packets
from tests.media.numbered import NUM_BITS, numbered_frame, read_number
from tests.server.fakes import FakeLLM, asgi_client, serving
from tests.server.test_chat import MESSAGES, URL
from tests.server.test_connections import wait_for
from tests.server.test_end_to_end import Server
from tests.server.test_errors import error_of

PLAN, FRAMES = "/v1/media/plan", "/v1/media/frames"
NUM_FRAMES, RATE, WIDTH, HEIGHT = 60, 25, 320, 192


@pytest.fixture(scope="module")
def clip(folder):
    return h264(folder, "plan.mp4", num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, rate=str(RATE))


@pytest.fixture(scope="module")
def picture(folder):
    path = folder / "still.png"
    Image.fromarray(numbered_frame(421, WIDTH, HEIGHT)).save(path)
    return path


def video(path, **settings) -> dict:
    return {"type": "video_url", "video_url": {"url": path.as_uri(), **settings}}


def image(path) -> dict:
    return {"type": "image_url", "image_url": {"url": path.as_uri()}}


def body(*parts, **fields) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What happens?"}]}], **fields}


def ask(server: Server, path: str, request: dict) -> dict:
    response = httpx2.post(server.base_url + path, json=request, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def refused(server: Server, path: str, request: dict, status: int = 400) -> dict:
    response = httpx2.post(server.base_url + path, json=request, timeout=60)
    assert response.status_code == status, response.text
    return error_of(response)


def picture_of(url: str) -> np.ndarray:
    kind, _, data = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
        assert opened.format == "JPEG"
        return np.asarray(opened.convert("RGB"))


def test_a_plan_says_what_the_file_is_and_which_frames_are_seen(server, clip):
    plan = ask(server, PLAN, body(video(clip, num_frames=8)))
    (item,) = plan["media"]
    assert item["facts"] == {
        "width": WIDTH,
        "height": HEIGHT,
        "num_bytes": clip.stat().st_size,
        "codec": "h264",
        "format": None,
        "duration": NUM_FRAMES / RATE,
        "fps": RATE,
        "total_num_frames": NUM_FRAMES,
        "rotation_degrees": 0,
        "is_mirrored": False,
        "variable_frame_rate": False,
        "has_audio": False,
        "timing_assumed": False,
        "video_backend": "pyav",
        "num_samples": None,
        "num_channels": None,
        "sampling_rate": None,
    }
    indices = np.linspace(0, NUM_FRAMES - 1, 8).astype(int).tolist()
    assert item["frame_indices"] == indices
    assert item["timestamps"] == pytest.approx([index / RATE for index in indices])
    # Patches of 16 pixels, 2 x 2 of them and 2 frames to a token.
    assert item["num_tokens"] == 4 * (item["height"] // 32) * (item["width"] // 32)
    assert plan["media_tokens"] == item["num_tokens"]
    assert (plan["fits"], plan["advice"], plan["fitted"]) == (True, None, None)
    assert (plan["model"], plan["max_model_len"]) == ("tiny", 8192)


def test_an_answer_sees_what_the_plan_said(server, clip, picture):
    request = body(video(clip, fps=5, start=0.5, end=2.0), image(picture), video(clip, num_frames=3))
    plan = ask(server, PLAN, request)
    assert [item["cached"] for item in plan["media"]] == [False] * 3
    answer = ask(server, URL, {**request, "max_tokens": 1, "return_media_info": True})
    for planned, seen in zip(plan["media"], answer["media"], strict=True):
        for name in ("type", "num_frames", "frame_indices", "timestamps", "width", "height", "num_tokens"):
            assert planned[name] == seen[name]
    assert plan["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    again = ask(server, PLAN, request)
    assert [item["cached"] for item in again["media"]] == [True] * 3
    assert again["prompt_tokens"] == plan["prompt_tokens"]


def test_request_settings_reach_the_plan(server, clip, picture):
    request = body(
        video(clip),
        image(picture),
        media_io_kwargs={"video": {"num_frames": 5}},
        mm_processor_kwargs={"video": {"max_pixels": 40_000}, "image": {"max_pixels": 9_000}},
    )
    moving, still = ask(server, PLAN, request)["media"]
    assert moving["num_frames"] == 5
    assert moving["width"] * moving["height"] * 5 <= 40_000
    assert still["width"] * still["height"] <= 9_000
    assert (still["frame_indices"], still["timestamps"], still["facts"]["format"]) == ([], [], "PNG")


def test_frames_are_those_of_the_plan(server, clip, picture):
    request = body(video(clip, num_frames=7), image(picture))
    plan, shown = ask(server, PLAN, request), ask(server, FRAMES, request)
    moving, still = shown["media"]
    assert [frame["frame_index"] for frame in moving["frames"]] == plan["media"][0]["frame_indices"]
    assert [frame["timestamp"] for frame in moving["frames"]] == plan["media"][0]["timestamps"]
    for frame in moving["frames"]:
        pixels = picture_of(frame["url"])
        assert read_number(pixels) == frame["frame_index"]
        assert pixels.shape == (moving["height"], moving["width"], 3)
        assert max(pixels.shape) <= 192
    (only,) = still["frames"]
    assert (only["frame_index"], only["timestamp"]) == (None, None)
    assert read_number(picture_of(only["url"])) == 421


def test_pictures_are_never_larger_than_what_the_model_sees(server, clip):
    request = body(video(clip, num_frames=4), mm_processor_kwargs={"video": {"max_pixels": 4 * 64 * 96}})
    (item,) = ask(server, PLAN, request)["media"]
    (shown,) = ask(server, FRAMES, {**request, "max_edge": 512})["media"]
    assert (shown["width"], shown["height"]) == (item["width"], item["height"])


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (2, 2), (10, 10), (256, 40)])
def test_of_many_frames_an_even_part_is_shown(server, clip, limit, count):
    shown = ask(server, FRAMES, body(video(clip, num_frames=40), max_thumbnails=limit, max_edge=NUM_BITS * 8))
    (item,) = shown["media"]
    indices = [frame["frame_index"] for frame in item["frames"]]
    assert (len(indices), item["num_frames"]) == (count, 40)
    assert indices[0] == 0
    if count > 1:
        assert indices[-1] == NUM_FRAMES - 1
        assert np.ptp(np.diff(indices)) <= 2 * NUM_FRAMES / 40


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_edge", value) for value in (15, 513, 0, -1, 2**40)),
        *(("max_thumbnails", value) for value in (0, 257, -5)),
    ],
)
def test_bounds_of_pictures(server, clip, field, value):
    error = refused(server, FRAMES, body(video(clip), **{field: value}))
    assert (error["param"], error["code"]) == (field, "invalid_value")
    assert str(value) in error["message"]


def test_pictures_of_the_wrong_type(server, clip):
    assert refused(server, FRAMES, body(video(clip), max_edge="large"))["param"] == "max_edge"


def test_what_does_not_fit_is_no_error_and_the_advice_helps(server, clip):
    per_word = ask(server, PLAN, body({"type": "text", "text": "word " * 1000}))["prompt_tokens"] / 1000
    words = {"type": "text", "text": "word " * int(7300 / per_word)}
    request = body(video(clip, num_frames=60), words, mm_processor_kwargs={"video": {"max_pixels": 4_000_000}})
    plan = ask(server, PLAN, request)
    assert not plan["fits"]
    assert plan["prompt_tokens"] >= plan["max_model_len"]
    fewer = int(plan["advice"].partition(" of the video's 60 frames would fit")[0])
    assert 0 < fewer < 60
    assert refused(server, URL, {**request, "max_tokens": 1})["code"] == "context_length_exceeded"

    assert ask(server, PLAN, body(video(clip, num_frames=60, max_frames=fewer), words, **_pixels(request)))["fits"]
    assert not ask(server, PLAN, body(video(clip, num_frames=60, max_frames=fewer + 2), words, **_pixels(request)))[
        "fits"
    ]

    fitted = ask(server, PLAN, {**request, "media_overflow": "fit"})
    assert fitted["fits"]
    (less,), (item,) = plan["fitted"], fitted["media"]
    assert less == {name: item[name] for name in ("num_frames", "width", "height", "num_tokens")}
    assert "media_overflow" in item["notes"][0]
    shown = ask(server, FRAMES, {**request, "media_overflow": "fit"})
    assert shown["media"][0]["num_frames"] == item["num_frames"]


def _pixels(request: dict) -> dict:
    return {"mm_processor_kwargs": request["mm_processor_kwargs"]}


def test_nothing_would_help(server):
    plan = ask(server, PLAN, body({"type": "text", "text": "word " * 20_000}))
    assert (plan["fits"], plan["media"], plan["fitted"], plan["advice"]) == (False, [], None, None)
    assert plan["prompt_tokens"] > 8192


def test_a_plan_does_not_look_at_the_frames_it_names(server, clip, folder):
    """Behind the first group of pictures all is zeros: only who decodes notices, and shows what stands in instead."""
    hollow = folder / "hollow.mp4"
    hollow.write_bytes(blank(clip.read_bytes(), packets(clip)[10:]))
    request = body(video(hollow, num_frames=6))
    (item,) = ask(server, PLAN, request)["media"]
    assert item["frame_indices"] == np.linspace(0, NUM_FRAMES - 1, 6).astype(int).tolist()
    (shown,) = ask(server, FRAMES, request)["media"]
    for frame in shown["frames"]:
        assert frame["frame_index"] < 10
        assert frame["timestamp"] == pytest.approx(frame["frame_index"] / RATE)
        assert read_number(picture_of(frame["url"])) == frame["frame_index"]


@pytest.mark.parametrize("path", [PLAN, FRAMES])
@pytest.mark.parametrize(
    ("part", "code"),
    [
        ({"type": "video_url", "video_url": "file:///etc/passwd"}, "media_blocked"),
        ({"type": "video_url", "video_url": "/etc/passwd"}, "media_blocked"),
        ({"type": "video_url", "video_url": "http://127.0.0.1:9/clip.mp4"}, "media_blocked"),
        ({"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"}, "media_decode_failed"),
        ({"type": "video_url", "video_url": "data:video/mp4;base64,%"}, "media_fetch_failed"),
        ({"type": "video_url", "video_url": {"url": "data:,", "fps": -5}}, "invalid_value"),
        ({"type": "hologram"}, "invalid_value"),
    ],
)
def test_bad_media_are_refused_as_in_chat(server, path, part, code):
    error = refused(server, path, body(part))
    assert error == refused(server, URL, body(part))
    assert error["code"] == code


@pytest.mark.parametrize("path", [PLAN, FRAMES])
@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "another"}, 404, "model_not_found"),
        ({"media_io_kwarg": {}}, 400, "unknown_parameter"),
        ({"tools": [{}]}, 400, "unsupported_parameter"),
        ({"media_overflow": "crop"}, 400, "invalid_value"),
        ({"media_io_kwargs": {"video": {"frames": 3}}}, 400, "invalid_value"),
        ({"messages": []}, 400, "invalid_value"),
    ],
)
def test_bad_requests_are_refused_as_in_chat(server, clip, path, fields, status, code):
    request = {**body(video(clip)), **fields}
    error = refused(server, path, request, status)
    assert error == refused(server, URL, request, status)
    assert error["code"] == code


@pytest.mark.parametrize("path", [PLAN, FRAMES])
async def test_key_method_type_and_limits(path):
    async with asgi_client(FakeLLM(), api_key="secret", max_body_bytes=200, max_content_parts=1) as client:
        assert error_of(await client.post(path, json={"messages": MESSAGES}))["code"] == "invalid_api_key"
        client.headers["Authorization"] = "Bearer secret"
        assert (await client.get(path)).status_code == 405
        assert (await client.post(path, content=b"{}", headers={"content-type": "text/plain"})).status_code == 415
        large = await client.post(path, json={"messages": MESSAGES, "user": "x" * 200})
        assert (large.status_code, error_of(large)["code"]) == (413, "body_too_large")
        parts = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]
        assert "max-content-parts" in error_of(await client.post(path, json={"messages": parts}))["message"]


def test_too_many_items(server, clip):
    error = refused(server, PLAN, body(*[video(clip)] * 65))
    assert "at most 64" in error["message"]


class WaitingLLM(FakeLLM):
    """Its previews never come."""

    async def preview(self, messages, **options):
        return await self._never("preview")

    async def thumbnails(self, messages, **options):
        return await self._never("thumbnails")

    async def _never(self, name):
        self.running.add(name)
        try:
            await asyncio.Event().wait()
        finally:
            self.running.discard(name)
            self.aborted.append(name)


@pytest.mark.parametrize(("path", "name"), [(PLAN, "preview"), (FRAMES, "thumbnails")])
def test_a_client_that_goes_away_stops_the_work(path, name):
    llm = WaitingLLM()
    with serving(llm) as base_url:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(base_url + path, json={"messages": MESSAGES}, timeout=httpx2.Timeout(30, read=0.3))
        wait_for(lambda: llm.aborted == [name])
    assert not llm.running


async def test_errors_of_a_preview_are_answers():
    class Refusing(FakeLLM):
        async def preview(self, messages, **options):
            raise InvalidRequestError("no", param="messages")

    async with asgi_client(Refusing()) as client:
        assert error_of(await client.post(PLAN, json={"messages": MESSAGES}))["param"] == "messages"


async def test_the_description_names_both(server):
    paths = httpx2.get(server.base_url + "/openapi.json").json()["paths"]
    for path, name in ((PLAN, "ChatCompletionRequest"), (FRAMES, "MediaFramesRequest")):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{name}"}
