"""Messages: every accepted form gives the right items, every wrong one an error that names the field."""

import pytest

from filmstrip.errors import InvalidRequestError
from filmstrip.processing.messages import MediaOptions, parse_media_options, parse_messages
from filmstrip.types import FrameSampling, FrameTiming, Modality, PixelLimits

OPTIONS = MediaOptions()


def parse(content, options=OPTIONS, max_items=8):
    return parse_messages([{"role": "user", "content": content}], options, max_items=max_items)


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"type": "video_url", "video_url": {"url": "clip.mp4"}}, Modality.VIDEO),
        ({"type": "video_url", "video_url": "clip.mp4"}, Modality.VIDEO),
        ({"video_url": "clip.mp4"}, Modality.VIDEO),
        ({"type": "video", "video": "clip.mp4"}, Modality.VIDEO),
        ({"type": "input_video", "video_url": "clip.mp4"}, Modality.VIDEO),
        ({"type": "image_url", "image_url": {"url": "clip.mp4", "detail": "high"}}, Modality.IMAGE),
        ({"type": "image", "image": "clip.mp4"}, Modality.IMAGE),
        ({"type": "input_image", "image_url": "clip.mp4"}, Modality.IMAGE),
        ({"type": "time_series_url", "time_series_url": {"url": "clip.mp4"}}, Modality.TIME_SERIES),
        ({"time_series_url": "clip.mp4"}, Modality.TIME_SERIES),
        ({"type": "time_series", "time_series": "clip.mp4"}, Modality.TIME_SERIES),
    ],
)
def test_every_form_of_a_media_part(part, modality):
    conversation = parse([part, {"type": "text", "text": "What?"}])
    (item,) = conversation.items
    assert (item.type, item.url) == (modality, "clip.mp4")
    assert conversation.messages[0]["content"] == [{"type": modality.value}, {"type": "text", "text": "What?"}]


def test_items_keep_prompt_order_over_turns():
    messages = [
        {"role": "user", "content": [{"video_url": "a"}, {"type": "text", "text": "x"}, {"image_url": "b"}]},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": [{"image_url": "c"}, {"video_url": "d"}]},
    ]
    assert [item.url for item in parse_messages(messages, OPTIONS, max_items=8).items] == ["a", "b", "c", "d"]


def test_item_settings_beat_request_settings_field_by_field():
    server = MediaOptions(FrameSampling(num_frames=32, fps=1.0), video_pixels=PixelLimits(max_pixels=5000))
    options = parse_media_options({"video": {"fps": 2}}, {"video": {"min_pixels": 1000}}, server)
    plain, own = parse(
        [{"video_url": "a"}, {"type": "video_url", "video_url": {"url": "b", "num_frames": 4, "max_pixels": 9000}}],
        options,
    ).items
    assert (plain.sampling.num_frames, plain.sampling.fps) == (32, 2)
    assert (own.sampling.num_frames, own.sampling.fps) == (4, 2)
    assert plain.pixels == PixelLimits(1000, 5000)
    assert own.pixels == PixelLimits(1000, 9000)


def test_limits_of_one_modality_never_reach_the_other():
    options = parse_media_options(None, {"video": {"max_pixels": 7000}, "image": {"min_pixels": 3000}}, OPTIONS)
    image, video = parse([{"image_url": "a"}, {"video_url": "b"}], options).items
    assert image.pixels == PixelLimits(3000, None)
    assert video.pixels == PixelLimits(None, 7000)


def test_timing_of_client_sampled_frames_comes_from_the_part_or_the_request():
    options = parse_media_options({"video": {"duration": 8.0, "total_num_frames": 240}}, None, OPTIONS)
    (item,) = parse([{"video_url": {"url": "data:video/jpeg;base64,", "frames_indices": [0, 30]}}], options).items
    assert (item.timing.frames_indices, item.timing.total_num_frames, item.timing.duration) == ((0, 30), 240, 8.0)


def test_a_time_series_brings_its_rate():
    (item,) = parse([{"type": "time_series_url", "time_series_url": {"url": "a.npy", "sampling_rate": 50}}]).items
    assert (item.sampling_rate, item.param) == (50, "messages[0].content[0].time_series_url.url")


def test_video_frames_bring_their_times():
    frames = [{"url": "a.jpg", "timestamp": 0.5}, {"url": "b.jpg", "timestamp": 2}]
    part = {"type": "video_frames", "video_frames": {"frames": frames, "max_pixels": 9000}}
    (item,) = parse([part]).items
    assert (item.type, item.url, item.frame_urls) == (Modality.VIDEO, None, ("a.jpg", "b.jpg"))
    assert (item.timing.timestamps, item.pixels.max_pixels) == ((0.5, 2), 9000)
    assert item.param == "messages[0].content[0].video_frames.frames"


def test_video_frames_without_times_take_those_beside_them():
    part = {"type": "video_frames", "video_frames": ["a.jpg", "b.jpg"], "fps": 4}
    (item,) = parse([part]).items
    assert (item.frame_urls, item.timing.timestamps, item.timing.fps) == (("a.jpg", "b.jpg"), None, 4)


def test_timestamps_of_an_item_go_before_the_requests_indices():
    options = parse_media_options({"video": {"duration": 8.0, "total_num_frames": 240}}, None, OPTIONS)
    (item,) = parse([{"video_url": {"url": "data:video/jpeg;base64,", "timestamps": [0, 1.5]}}], options).items
    assert item.timing == FrameTiming(timestamps=(0, 1.5), duration=8.0)


@pytest.mark.parametrize(
    ("own", "requests", "merged"),
    [
        # A rate meant for the files of the request is not that of frames whose length is known.
        ({"duration": 8.0}, {"fps": 4}, {"duration": 8.0}),
        (
            {"duration": 8.0, "frames_indices": [0, 3]},
            {"fps": 4},
            {"duration": 8.0, "frames_indices": (0, 3), "fps": 4},
        ),
        (
            {"duration": 8.0, "frames_indices": [0, 3], "total_num_frames": 80},
            {"fps": 4},
            {"duration": 8.0, "frames_indices": (0, 3), "total_num_frames": 80},
        ),
        ({"duration": 8.0}, {"timestamps": [1, 2]}, {"duration": 8.0, "timestamps": (1, 2)}),
        ({"fps": 4}, {"timestamps": [1, 2]}, {"fps": 4}),
        ({"fps": 4}, {"duration": 8.0}, {"fps": 4}),
        ({"fps": 4}, {"frames_indices": [0, 3]}, {"fps": 4, "frames_indices": (0, 3)}),
        ({"fps": 4, "frames_indices": [0, 3]}, {"timestamps": [1, 2]}, {"fps": 4, "frames_indices": (0, 3)}),
        ({"total_num_frames": 9}, {"timestamps": [1, 2]}, {"total_num_frames": 9}),
    ],
)
def test_what_a_part_says_of_its_frames_times_is_not_contradicted_by_the_request(own, requests, merged):
    options = parse_media_options({"video": requests}, None, OPTIONS)
    (item,) = parse([{"type": "video_frames", "video_frames": {"frames": ["a", "b"], **own}}], options).items
    assert item.timing == FrameTiming(**merged)


@pytest.mark.parametrize(
    ("own", "requests", "merged"),
    [
        ({"max_pixels": 200}, {"min_pixels": 300}, PixelLimits(200, 200)),
        ({"max_pixels": 200}, {"min_pixels": 100}, PixelLimits(100, 200)),
        ({"min_pixels": 300}, {"max_pixels": 200}, PixelLimits(300, 300)),
        ({"min_pixels": 100}, {"max_pixels": 200}, PixelLimits(100, 200)),
        ({"min_pixels": 5, "max_pixels": 9}, {"min_pixels": 1, "max_pixels": 2}, PixelLimits(5, 9)),
        ({}, {"min_pixels": 1, "max_pixels": 2}, PixelLimits(1, 2)),
    ],
)
def test_a_limit_of_the_item_beats_the_opposite_one_of_the_request(own, requests, merged):
    options = parse_media_options(None, {"image": requests}, OPTIONS)
    (item,) = parse([{"image_url": {"url": "a", **own}}], options).items
    assert item.pixels == merged


@pytest.mark.parametrize("name", ["frames_indices", "timestamps", "total_num_frames", "duration"])
def test_times_of_the_clients_frames_are_refused_for_a_file(name):
    """Of a request they are about those videos that are lists of frames."""
    value = [0, 1] if name in ("frames_indices", "timestamps") else 3
    with pytest.raises(InvalidRequestError, match="which of its frames are shown") as caught:
        parse([{"video_url": {"url": "clip.mp4", name: value}}])
    assert caught.value.param == f"messages[0].content[0].video_url.{name}"
    parse([{"video_url": "clip.mp4"}], parse_media_options({"video": {name: value}}, None, OPTIONS))
    parse([{"video_url": {"url": "clip.mp4", name: None}}])


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ('{"city": "Paris"}', {"city": "Paris"}),
        ("", {}),
        ({"city": "Paris"}, {"city": "Paris"}),
        ("[1]", "[1]"),
        ("{city}", "{city}"),
        ("[" * 100_000, "[" * 100_000),
        (None, None),
    ],
)
def test_arguments_of_tool_calls_are_objects_to_the_template(sent, shown):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": sent}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call, "odd"]},
        {"role": "tool", "content": "no", "tool_call_id": "1"},
    ]
    converted = parse_messages(messages, OPTIONS, max_items=0).messages
    assert converted[1]["tool_calls"] == [call | {"function": {"name": "weather", "arguments": shown}}, "odd"]
    assert call["function"]["arguments"] == sent  # the caller's own is left alone


def test_the_decoder_is_chosen_by_server_request_or_item():
    options = parse_media_options({"video": {"backend": "opencv"}}, None, MediaOptions(video_decoder="decord"))
    plain, own = parse([{"video_url": "a"}, {"video_url": {"url": "b", "video_backend": "pyav"}}], options).items
    assert (plain.video_decoder, own.video_decoder) == ("opencv", "pyav")
    assert parse([{"video_url": "a"}]).items[0].video_decoder is None
    assert parse_media_options({}, None, MediaOptions(video_decoder="decord")).video_decoder == "decord"


def test_limits_by_modality_name_the_modality():
    parts = [{"image_url": "a"}, {"image_url": "b"}, {"video_url": "c"}]
    conversation = [{"role": "user", "content": parts}]
    parse_messages(conversation, OPTIONS, max_items=8, limits={"image": 2, "time_series": 0})
    for limits, words in (({"image": 1}, "2 items of type image; at most 1"), ({"video": 0}, "1 items of type video")):
        with pytest.raises(InvalidRequestError, match=rf"{words}.*--limit-mm-per-prompt"):
            parse_messages(conversation, OPTIONS, max_items=8, limits=limits)


def video(**settings):
    return [{"role": "user", "content": [{"video_url": {"url": "a", **settings}}]}]


def frames(*entries, **settings):
    part = {"type": "video_frames", "video_frames": {"frames": list(entries), **settings}}
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (video(timestamps=[0, "1"]), "video_url.timestamps"),
        (video(timestamps=[1, 0]), "video_url.timestamps"),
        (video(timestamps=[0, float("nan")]), "video_url.timestamps"),
        (video(timestamps=[-1, 0]), "video_url.timestamps"),
        (video(timestamps=5), "video_url.timestamps"),
        (video(timestamps=[0], frames_indices=[0]), "video_url.timestamps"),
        (video(frames_indices=[0, 2**31]), "video_url.frames_indices"),
        (video(frames_indices=[3, 1]), "video_url.frames_indices"),
        (video(frames_indices="01"), "video_url.frames_indices"),
        (video(total_num_frames=2**31), "video_url.total_num_frames"),
        (video(total_num_frames=True), "video_url.total_num_frames"),
        (video(duration=float("inf")), "video_url.duration"),
        (video(backend="../x"), "video_url.backend"),
        (video(video_backend=3), "video_url.video_backend"),
        (video(backend="pyav", video_backend="opencv"), "video_url.backend"),
        (video(sampling_rate=3), "video_url.sampling_rate"),
        (frames(), "video_frames.frames"),
        (frames("a", 3), "video_frames.frames[1].url"),
        (frames({"url": " "}), "video_frames.frames[0].url"),
        (frames({"url": "a", "time": 1}), "video_frames.frames[0].time"),
        (frames({"url": "a", "timestamp": 1}, "b"), "video_frames.frames"),
        (frames({"url": "a", "timestamp": "1"}), "video_frames.timestamps"),
        (frames("a", rate=1), "video_frames.rate"),
    ],
)
def test_wrong_times_frames_and_decoders_name_the_field(messages, param):
    with pytest.raises(InvalidRequestError) as caught:
        parse_messages(messages, OPTIONS, max_items=8)
    assert caught.value.param == f"messages[0].content[0].{param}"


@pytest.mark.parametrize("rate", [0, -1, float("nan"), "50", True])
def test_a_wrong_sampling_rate_names_the_field(rate):
    with pytest.raises(InvalidRequestError) as caught:
        parse([{"time_series_url": {"url": "a", "sampling_rate": rate}}])
    assert caught.value.param == "messages[0].content[0].time_series_url.sampling_rate"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([1], "messages[0]"),
        ([{"role": "boss", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": {"user": 1}, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "hologram"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "messages[0].content[0].video_url"),
        ([{"role": "user", "content": [{"video_url": None}]}], "messages[0].content[0].video_url"),
        ([{"role": "user", "content": [{"video_url": {"url": 5}}]}], "messages[0].content[0].video_url.url"),
        ([{"role": "user", "content": [{"video_url": {"url": " "}}]}], "messages[0].content[0].video_url.url"),
        (
            [{"role": "user", "content": [{"video_url": {"url": "a", "fps": 0}}]}],
            "messages[0].content[0].video_url.fps",
        ),
        (
            [{"role": "user", "content": [{"video_url": {"url": "a", "speed": 1}}]}],
            "messages[0].content[0].video_url.speed",
        ),
        (
            [{"role": "user", "content": [{"image_url": {"url": "a", "fps": 1}}]}],
            "messages[0].content[0].image_url.fps",
        ),
        (
            [{"role": "user", "content": [{"video_url": {"url": "a", "frames_indices": [0, 1.5]}}]}],
            "messages[0].content[0].video_url.frames_indices",
        ),
    ],
)
def test_wrong_messages_name_the_field(messages, param):
    with pytest.raises(InvalidRequestError) as caught:
        parse_messages(messages, OPTIONS, max_items=8)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("io", "processor", "param"),
    [
        ({"audio": {}}, None, "media_io_kwargs.audio"),
        ({"video": 3}, None, "media_io_kwargs.video"),
        ({"video": {"num_frames": 0}}, None, "media_io_kwargs.video.num_frames"),
        ({"video": {"num_frames": "4"}}, None, "media_io_kwargs.video.num_frames"),
        ({"video": {"fps": -2}}, None, "media_io_kwargs.video.fps"),
        ({"video": {"fps": True}}, None, "media_io_kwargs.video.fps"),
        ({"video": {"fps": float("nan")}}, None, "media_io_kwargs.video.fps"),
        ({"video": {"duration": 0}}, None, "media_io_kwargs.video.duration"),
        ({"video": {"total_num_frames": 0}}, None, "media_io_kwargs.video.total_num_frames"),
        ({"image": {"num_frames": 1}}, None, "media_io_kwargs.image"),
        (None, {"max_pixels": 1}, "mm_processor_kwargs.max_pixels"),
        (None, {"video": {"fps": 1}}, "mm_processor_kwargs.video.fps"),
        (None, {"video": {"max_pixels": 0}}, "mm_processor_kwargs.video.max_pixels"),
        (None, {"image": {"min_pixels": 9, "max_pixels": 4}}, "mm_processor_kwargs.image.min_pixels"),
    ],
)
def test_wrong_media_options_name_the_field(io, processor, param):
    with pytest.raises(InvalidRequestError) as caught:
        parse_media_options(io, processor, OPTIONS)
    assert caught.value.param == param


def test_too_many_items_name_the_limit():
    with pytest.raises(InvalidRequestError, match=r"3 media items; at most 2"):
        parse([{"image_url": "a"}] * 3, max_items=2)
