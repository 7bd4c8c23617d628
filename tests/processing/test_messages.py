"""Messages: every accepted form gives the right items, every wrong one an error that names the field."""

import pytest

from filmstrip.errors import InvalidRequestError
from filmstrip.processing.messages import MediaOptions, parse_media_options, parse_messages
from filmstrip.types import FrameSampling, Modality, PixelLimits

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


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([1], "messages[0]"),
        ([{"role": "boss", "content": "x"}], "messages[0].role"),
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
